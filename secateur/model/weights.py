"""Putting stored weights into the modules of a skeleton, and taking them out again."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion
from transformers.pytorch_utils import Conv1D

from secateur.errors import CheckpointError, RepeatedError, one_line
from secateur.folder.reader import LoadedTensors, Tensors
from secateur.formats.layouts.layout import Stored, all_finite, describe_dense
from secateur.formats.layouts.packed_weight import DecodedWeights, PackedWeight
from secateur.memory.room import trim
from secateur.model.block_names import generalise, split_name
from secateur.model.located import conflicts, locate, part_of
from secateur.model.source import Source
from secateur.plugin.names import stored_as
from secateur.plugin.quantizer import backend

# What quantizers call the numbers that turn codes into weights, beside the weight or below its name.
_SCALE = re.compile(r"(?P<owner>.+?)\.(weight[._])?[^.]*(scale|absmax|scb|zero_point|qzeros)[^.]*", re.IGNORECASE)


#: What to do where values overflow the dtype that they are written in.
OTHER_DTYPE = "give another `dtype`"


class ModelWeights:
    """The weights of a source under the names that the model's modules have.

    Checkpoints may leave the name of the base model out (GPT-2's `h.0…` for `transformer.h.0…`) or carry it where the model
    does not, and transformers renames some tensors as it loads them (GPT-NeoX's `embed_out` is `lm_head`). Where names differ
    in other ways, transformers loads the model whole and its conversions apply.

    Tensors that the config ties to each other but the files hold as different ones are untied in the model: transformers
    believes the files.

    Attributes:
        untied: whether there are such tensors.
        unused: stored under names that no module has: kept as they are.
        pieces: of experts that lie in one tensor with others, where in it.

    Raises:
        CheckpointError: a tensor is missing, has another shape or kind than the model's, or holds codes and not weights.
    """

    def __init__(self, source: Source, model: nn.Module) -> None:
        self._weights = source.weights
        self._files = source.weights
        self._dtypes: dict[str, torch.dtype] = {}
        self._whole: Any = None
        self._kinds: dict[str, tuple[int, torch.dtype]] = {}
        self._twins: set[str] = set()  # untied ones that the files hold as one tensor: each is written for itself
        found = locate(source.weights, model)
        self._stored, self.pieces, missing = found.stored, found.pieces, found.missing
        if missing:
            self._load_whole(source, model, missing)
        used = set(self._stored.values())
        self.unused = [name for name in self._weights if name not in used]
        if source.quantization is not None or not self._weights.packed:
            self._check_scales()
        self._check_forms(model)
        if source.quantization is None:
            self._check_direction(model)
        self.untied = bool(conflicts(self._weights, self._stored, model))
        if self.untied:
            self._untie(model)

    def _load_whole(self, source: Source, skeleton: nn.Module, missing: list[str]) -> None:
        problem = f"{source.name} lacks {len(missing)} of the model's tensors, such as {missing[0]}"
        if source.folder is None:
            raise CheckpointError(problem)
        try:
            with backend("dense"):
                if self._weights.packed and source.quantization is None:
                    model, found = _converted(skeleton, source)
                else:
                    model, found = AutoModelForCausalLM.from_pretrained(
                        source.folder,
                        dtype=source.dtype,
                        output_loading_info=True,
                        use_safetensors=True,
                        local_files_only=not source.from_hub,
                        trust_remote_code=source.trust_remote_code,
                    )
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(f"{problem}; transformers cannot load it either: {one_line(error)}") from error
        if found["missing_keys"]:
            raise CheckpointError(f"{problem}: its files are incomplete")
        self._whole = model
        self._weights = DecodedWeights(LoadedTensors(model.state_dict()))
        located = locate(self._weights, skeleton)
        self._stored, self.pieces = located.stored, located.pieces

    def _check_scales(self) -> None:
        """Raise CheckpointError where a matrix has scales beside it that no config explains: it is not what it seems."""
        matrices = {name for name in self._stored.values() if name.endswith(".weight")}
        for name in self.unused:
            found = _SCALE.fullmatch(name)
            weight = f"{found['owner']}.weight" if found else ""
            if weight in matrices and self._weights[weight].ndim == 2:
                raise CheckpointError(
                    f"{name} stands beside {weight}, and config.json names no quantizer that would use it: make the weights "
                    "dense with what quantized them, or give config.json its quantization_config back"
                )

    def _check_forms(self, model: nn.Module) -> None:
        """Check what the headers of files tell: the shape and kind of every tensor that is not packed."""
        packed = self._weights.packed
        for name, expected in model.state_dict().items():
            if name in self and self._stored[name] not in packed:
                _check_form(name, self._tensor(name), expected)

    def _check_direction(self, model: nn.Module) -> None:
        """Raise CheckpointError where others packed the weight of a module that keeps it as `[in, out]`: which way is open."""
        for name, stored in self._stored.items():
            if stored in self._weights.packed and isinstance(model.get_submodule(name.rpartition(".")[0]), Conv1D):
                raise CheckpointError(
                    f"{name} is packed, and belongs to a module that keeps weights as [in, out], as GPT-2's do: secateur reads "
                    "packed weights of such modules in its own folders only"
                )

    def _untie(self, model: Any) -> None:
        """Make every tied tensor of a model one of its own, with the values that it had in common or those of the files."""
        for name, other in model.all_tied_weights_keys.items():
            if name not in self._stored:
                self._stored[name] = self._stored[other]
                self._twins.add(name)
            owner, leaf = name.rpartition(".")[::2]
            place(model.get_submodule(owner), leaf, model.get_parameter_or_buffer(name).detach())
        model.all_tied_weights_keys = {}

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def __getitem__(self, name: str) -> Tensor:
        """The tensor of a parameter or buffer of the model, named as `model.state_dict()` names it."""
        tensor = self._tensor(name)
        self._dtypes[name] = tensor.dtype
        return tensor

    def _tensor(self, name: str) -> Tensor:
        return part_of(self._weights, self._stored[name], self.pieces.get(name))

    def checked(self, name: str, expected: Tensor, check_finite: bool = True) -> Tensor:
        """The same, for a parameter or buffer of the model.

        Raises:
            CheckpointError: it has another shape or kind or, if that is to be checked, a value is not finite.
        """
        tensor = self[name]
        _check_form(name, tensor, expected)
        if check_finite and tensor.is_floating_point() and not all_finite(tensor):
            raise CheckpointError(f"{name} holds NaN or infinity: the checkpoint is damaged")
        return tensor

    def release(self) -> None:
        """Let files leave the memory that have been read."""
        self._weights.stored.release()

    def packed(self, name: str) -> PackedWeight | None:
        """How a parameter is stored, if it is stored packed, and not with others."""
        return None if name in self.pieces else self._weights.packed.get(self._stored[name])

    def describe(self, name: str) -> Stored:
        """What is stored of a weight, all of which is read."""
        whole = self._weights.packed.get(self._stored[name])
        if whole is None:
            return describe_dense(self[name])
        if name not in self.pieces:
            return whole.describe(name, self.stored_tensors)
        found = describe_dense(self[name])
        size = sum(self.stored_tensors[part].nbytes for part in whole.parts.values())
        count = math.prod(self._weights.form(self._stored[name])[0])
        return replace(found, layout=whole.layout.name, bytes=size * math.prod(found.shape) // count)

    @property
    def stored_tensors(self) -> Tensors:
        """All tensors as the files have them, of packed weights their parts."""
        return self._weights.stored

    def parts(self, name: str) -> dict[str, Tensor]:
        """The tensors that a packed parameter is stored as, by the names of its layout's parts."""
        packed = self.packed(name)
        assert packed is not None
        return packed.tensors(self.stored_tensors)

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor that has been read, without reading it again."""
        return self._dtypes[name]

    def name_to_write(self, name: str) -> str:
        """The name under which such a tensor should be stored again: every tool knows it by the one that it had."""
        return name if name in self._twins or name in self.pieces else self._stored.get(name, name)

    @property
    def converted(self) -> bool:
        """Whether transformers made other tensors of those in the files as it loaded them."""
        return self._whole is not None

    def unconverted(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the files had in place of tensors of the model's, where transformers converted them.

        All that became of one tensor have to be among them, as they are where those of whole blocks are.
        """
        found = revert_weight_conversion(self._whole, dict(tensors))
        return {stored_as(self._whole, name, self._files, {}) or name: tensor for name, tensor in found.items()}

    def module_to_write(self, module: str) -> str:
        """The name of a module by that of its weight in the files."""
        return self.name_to_write(f"{module}.weight").removesuffix(".weight")

    def generalised(
        self, entries: Mapping[str, dict[str, Any]], lists: Iterable[str], absent: Iterable[str]
    ) -> dict[str, dict[str, Any]]:
        """What `generalise` makes of the entries of modules, by the names that their weights have in the files."""
        found = {self.module_to_write(name): entry for name, entry in entries.items()}
        written = []
        for name in entries:
            block, rest = split_name(name, lists)
            if rest:
                number = block.rpartition(".")[2]
                written.append(self.module_to_write(name).partition(f".{number}.")[0])
        return generalise(found, dict.fromkeys(written), {self.module_to_write(name) for name in absent})

    def stored_name(self, name: str) -> str:
        """The name in the files of what holds a tensor of the model."""
        return self._stored[name]

    def stored(self, name: str) -> Tensor:
        """A tensor by the name it is stored under."""
        return self._weights[name]

    def bytes_as(self, name: str, dtype: torch.dtype | None) -> int:
        """The bytes of what is stored under a name once it is dense, its floating values as `dtype` (None: as they are)."""
        if name not in self._kinds:  # most packed ones have to be decoded to tell
            several = name in self._twins or name in self.pieces
            shape, found = self._weights.form(self._stored[name] if several else name)
            if name in self.pieces:
                shape = self.pieces[name].shape(shape)
            self._kinds[name] = math.prod(shape), found
        count, own = self._kinds[name]
        return count * (dtype if dtype is not None and own.is_floating_point else own).itemsize


def _converted(model: Any, source: Source) -> Any:
    """What transformers makes of decoded weights, a model like the one that is given, and what it tells of them.

    It never sees the codes of others: it would keep FP8 ones where there is a GPU, and decode those otherwise whose weights
    blocks do not divide.
    """
    return type(model).from_pretrained(
        None,
        config=deepcopy(model.config),
        state_dict=dict(source.weights),
        dtype=source.dtype,
        output_loading_info=True,
    )


def _check_form(name: str, tensor: Tensor, expected: Tensor) -> None:
    if tensor.shape != expected.shape:
        raise CheckpointError(
            f"{name} is {list(tensor.shape)} in the checkpoint, but {list(expected.shape)} in the model"
        )
    if tensor.is_floating_point() != expected.is_floating_point():
        raise CheckpointError(f"{name} is {tensor.dtype} in the checkpoint, but {expected.dtype} in the model")


def tie(model: Any) -> None:
    """Tie the tensors of a model whose weights were put in place, but for those that `ModelWeights` has untied."""
    model.tie_weights(recompute_mapping=False)


def materialise(
    module: nn.Module,
    prefix: str,
    names: Iterable[str],
    weights: ModelWeights,
    device: torch.device,
    *,
    check_finite: bool = True,
    ahead: Ahead | None = None,
) -> None:
    """Give `module` (called `prefix` in the model) its weights, in the dtypes that it has them in, all on `device`.

    `names` are those below `prefix` that are wanted; those that are stored nowhere (tied, say) are left as they are. What is
    being read `ahead` is taken from there.

    Raises:
        CheckpointError: a shape disagrees with the model's, or, if that is to be checked, a value is not finite.
    """
    for name in names:
        full = f"{prefix}.{name}" if prefix else name
        if full not in weights:
            continue
        owner_name, _, leaf = name.rpartition(".")
        owner = module.get_submodule(owner_name)
        expected = getattr(owner, leaf)
        tensor = ahead.take(full) if ahead is not None else None
        if tensor is None:
            tensor = weights.checked(full, expected, check_finite).to(expected.dtype)
        place(owner, leaf, tensor.to(device, non_blocking=True))


class Ahead:
    """Reads the weights of a block in a thread of its own, to be taken later."""

    def __init__(self, weights: ModelWeights, device: torch.device) -> None:
        self.weights = weights
        self.pin = device.type == "cuda"  # from pinned memory they are copied while others compute
        self._pool = ThreadPoolExecutor(1)
        self._futures: dict[str, Future[Tensor]] = {}

    def start(self, prefix: str, module: nn.Module, names: Iterable[str]) -> None:
        """Begin to read weights of a module that is called `prefix` in the model."""
        for name in names:
            full = f"{prefix}.{name}"
            if full in self.weights:
                expected = module.get_submodule(name.rpartition(".")[0])
                self._futures[full] = self._pool.submit(self._read, full, getattr(expected, name.rpartition(".")[2]))

    def _read(self, name: str, expected: Tensor) -> Tensor:
        tensor = self.weights.checked(name, expected).to(expected.dtype, copy=True)
        return tensor.pin_memory() if self.pin else tensor

    def take(self, name: str) -> Tensor | None:
        """The tensor, once; None if it was not begun to be read. Raises what reading it raised."""
        future = self._futures.pop(name, None)
        return None if future is None else future.result()


def place(owner: nn.Module, leaf: str, tensor: Tensor) -> None:
    """Make `tensor` the parameter or buffer `leaf` of `owner`."""
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[leaf] = tensor


def check_values(weights: ModelWeights, model: nn.Module, written: Mapping[str, torch.dtype]) -> None:
    """Read every weight of a model once, and tell what a run would meet in it later.

    Args:
        weights: of the model.
        model: the skeleton.
        written: names of those that are written as they are, and the dtype that they are written in.

    Raises:
        CheckpointError: a weight is damaged.
        RepeatedError: values overflow that dtype.
    """
    for name, expected in model.state_dict().items():
        if name not in weights:
            continue
        tensor = weights.checked(name, expected)
        dtype = written.get(name, tensor.dtype)
        if tensor.is_floating_point() and torch.finfo(dtype).max < torch.finfo(tensor.dtype).max:
            extremes = torch.stack(torch.aminmax(tensor)) if tensor.numel() else tensor
            converted(name, extremes, dtype, OTHER_DTYPE)


def release(module: nn.Module) -> None:
    """Drop the memory of a module's parameters: they go back to the meta device."""
    for owner in module.modules():
        for leaf, parameter in owner._parameters.items():
            if parameter is not None:
                owner._parameters[leaf] = nn.Parameter(parameter.to("meta"), requires_grad=False)
    trim()


def converted(name: str, tensor: Tensor, dtype: torch.dtype | None, remedy: str) -> Tensor:
    """A copy of a tensor to be written as it is, its floating values as `dtype` (None: as they are).

    A mapped tensor would keep its file in memory until the shard is written.

    Raises:
        RepeatedError: values overflow; the message ends in `remedy`.
    """
    copied = tensor.to(dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype, copy=True)
    if copied.dtype != tensor.dtype and not all_finite(copied):
        raise RepeatedError(f"{name}: its values overflow {copied.dtype}: {remedy}")
    return copied
