"""How transformers loads and saves a secateur folder: `import secateur` registers this quantizer.

Packed weights stay packed, and linears compute on them, where there is a backend that can; `backend("dense")` has them expanded
while the model loads. `save_pretrained` writes them packed again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter, revert_weight_conversion
from transformers.integrations.accelerate import load_offloaded_parameter
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from secateur.errors import CheckpointError
from secateur.formats.folder.reader import HeldTensors, StoredTensors, find_entry, parse_quantization_config
from secateur.formats.layouts.layout import LAYOUT_VERSION, LAYOUTS, Layout
from secateur.formats.layouts.packed_weight import PackedWeight
from secateur.formats.layouts.sparse_int import CodedLayout
from secateur.formats.transformers.names import renamed, spellings, used_renamings
from secateur.formats.transformers.packed_modules import (
    PackedLinear,
    densify,
    hide_sizes,
    main_device,
    packed_linears,
    place_linears,
    replace_linears,
    show_sizes,
)
from secateur.kernels.backends import AUTO, check_backend

QUANT_METHOD = "secateur"
_backend: ContextVar[str] = ContextVar("secateur_backend", default=AUTO)
_PARTS = sorted({part for layout in LAYOUTS.values() for part in layout.parts})


@contextmanager
def backend(name: str) -> Iterator[None]:
    """While it is open, `from_pretrained` and `secateur.load` load secateur's folders for this backend instead of `auto`.

    Raises:
        UsageError: there is no such backend.
    """
    check_backend(name)
    token = _backend.set(name)
    try:
        yield
    finally:
        _backend.reset(token)


def current_backend() -> str:
    """The backend that `backend` says, or `auto`."""
    return _backend.get()


class SecateurConfig(QuantizationConfigMixin):
    """The `quantization_config` of a secateur folder: a layout version, and the layout of each pattern of module names."""

    def __init__(self, layout_version: Any = None, modules: Any = None, **_: Any) -> None:
        self.quant_method = QUANT_METHOD
        self.layout_version = layout_version
        self.modules = modules
        self.entries = parse_quantization_config({"layout_version": layout_version, "modules": modules})

    def to_dict(self) -> dict[str, Any]:
        return quantization_config(self.modules)

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


def quantization_config(modules: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What `config.json` says about a folder whose modules lie in these layouts."""
    return {"quant_method": QUANT_METHOD, "layout_version": LAYOUT_VERSION, "modules": modules}


class _Expand(ConversionOps):
    """Turns the parts of one weight into the dense weight."""

    def __init__(self, quantizer: SecateurQuantizer) -> None:
        self.quantizer = quantizer

    def __deepcopy__(self, memo: Any) -> _Expand:
        return self  # transformers copies the operation for every weight; the quantizer must stay the same

    def convert(
        self, input_dict: dict[str, Any], *args: Any, full_layer_name: str, model: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        tensors = {
            pattern.rpartition(".")[2]: found[0] if isinstance(found, list) else found
            for pattern, found in input_dict.items()
        }
        try:
            W = self.quantizer.decode(model, full_layer_name, tensors)
        except CheckpointError as error:
            # transformers would catch it and raise one in its place that does not name the weight.
            self.quantizer.errors.append(error)
            return {}
        return {full_layer_name: W}


class SecateurQuantizer(HfQuantizer):
    """Loads models whose weights lie in secateur's layouts, and saves them in these layouts again."""

    requires_calibration = True
    quantization_config: SecateurConfig

    def __init__(self, quantization_config: SecateurConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.errors: list[CheckpointError] = []
        #: The tensors in the files; after loading, only where a dense weight does not tell how it was quantized.
        self.stored: Mapping[str, Tensor] | None = None
        self._older_names: dict[str, str] | None = None
        self._all_replaced = False
        self._all_packed = False
        # While transformers asks how large they are.
        self._sized: list[PackedLinear] = []

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Any = None, device_map: Any = None, **kwargs: Any
    ) -> Any:
        if not checkpoint_files:
            return model
        stored = self.stored = StoredTensors([Path(file) for file in checkpoint_files])
        weights = {}
        for name, module in model.named_modules():
            entry = self._entry(model, name) if hasattr(module, "weight") else None
            if entry is None:
                continue
            parts = self._stored_parts(model, f"{name}.weight")
            if not parts:
                # It would be filled with noise and a warning; here it is an error.
                raise CheckpointError(f"{name}.weight should be packed, says config.json, but its tensors are missing")
            weights[name] = partial(PackedWeight(entry[0], parts, entry[1]).read, f"{name}.weight", stored)
        if current_backend() != "dense" and weights:
            with torch.device("cpu"):  # transformers makes everything on the meta device here
                replaced = replace_linears(model, weights, current_backend(), main_device(device_map), model.dtype)
            stored.release()
            if isinstance(device_map, str):
                self._sized = show_sizes(model)
            self._all_replaced = len(replaced) == len(weights)
            if replaced:
                ignored = rf"\.weight(\.({'|'.join(_PARTS)}))?$"
                known = model._keys_to_ignore_on_load_unexpected
                # A list or nothing in early releases of transformers 5, a set later.
                more = {*known, ignored} if isinstance(known, set) else [*(known or ()), ignored]
                model._keys_to_ignore_on_load_unexpected = more
        return model

    def _entry(self, model: Any, module: str) -> tuple[Layout, bool] | None:
        """What the config, which goes by the names in the files, says about a module."""
        entries = self.quantization_config.entries
        names = (name.removesuffix(".weight") for name in self._stored_names(model, f"{module}.weight"))
        return next((entry for name in names if (entry := find_entry(entries, name)) is not None), None)

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        # transformers calls it once more when it has made a device map, for which alone it had to know sizes.
        hide_sizes(self._sized)
        self._sized = []

    def get_weight_conversions(self) -> list[WeightConverter]:
        if self._all_replaced:
            return []
        # By keyword: the order of its fields is not the same in all releases.
        return [_ExpandConverter([f"weight.{part}" for part in _PARTS], ["weight"], operations=[_Expand(self)])]

    def decode(self, model: Any, name: str, tensors: dict[str, Tensor]) -> Tensor:
        """The weight called `name` in the model, in the dtype and shape of the model's own parameter."""
        parameter = model.get_parameter(name)
        entry = self._entry(model, name.removesuffix(".weight"))
        if entry is None:
            raise CheckpointError(f"{name} is stored packed, but the config does not name its layout")
        if isinstance(entry[0], CodedLayout):
            tensors = self._as_stored(model, name) or tensors
        if "compressed" in tensors and tensors["compressed"].is_floating_point():
            tensors["compressed"] = tensors["compressed"].to(parameter.dtype)
        W = PackedWeight(entry[0], {part: part for part in tensors}, entry[1]).decode(name, tensors)
        if W.shape != parameter.shape:
            raise CheckpointError(f"{name} is {list(W.shape)} in the file, but {list(parameter.shape)} in the model")
        return W.to(parameter.dtype)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self.errors:
            raise self.errors[0]
        # What expands on loading is not to be run backwards on saving: `get_state_dict_and_metadata` packs.
        if getattr(model, "_weight_conversions", None):
            kept = [c for c in model._weight_conversions if not _is_ours(c)]
            # Nor what renamed nothing, which early releases of transformers 5 keep too.
            model._weight_conversions = used_renamings(kept, self.stored or ())
        hide_sizes(self._sized)
        self._sized = []
        place_linears(model)
        self._keep_grids(model)
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                module.get_memory_footprint = partial(memory_footprint, module)
        return model

    def _keep_grids(self, model: Any) -> None:
        """Hold on to what is stored of quantized weights that are dense now, and let go of everything else."""
        entries = {
            name: self._entry(model, name.removesuffix(".weight"))
            for name in model.state_dict()
            if name.endswith(".weight")
        }
        dense = {name: entry[0] for name, entry in entries.items() if entry is not None}
        self._all_packed = not dense
        coded = [name for name, layout in dense.items() if isinstance(layout, CodedLayout)]
        keys = [key for name in coded for key in self._stored_parts(model, name).values()]
        self.stored = HeldTensors(self.stored, keys) if keys and isinstance(self.stored, StoredTensors) else None

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        state, packed = {}, {}
        for name, tensor in model.state_dict().items():
            module, _, parameter = name.rpartition(".")
            entry = self._entry(model, module) if parameter == "weight" else None
            if entry is None:
                state[name] = tensor
                continue
            if tensor.is_meta:
                tensor = load_offloaded_parameter(model, name)
            packed[name] = self._pack(model, name, tensor, *entry)
        packed.update({f"{name}.weight": linear.parts() for name, linear in packed_linears(model)})
        state.update({f"{name}.{part}": tensor for name, parts in packed.items() for part, tensor in parts.items()})
        self._name_in_config(model, packed)
        return state, {}

    def _pack(self, model: Any, name: str, tensor: Tensor, layout: Layout, transposed: bool) -> dict[str, Tensor]:
        """The parts of a dense weight."""
        if isinstance(layout, CodedLayout):
            return self._unchanged_parts(model, name, tensor)
        W_OI = tensor.T if transposed else tensor
        try:
            return layout.pack(W_OI.contiguous())
        except ValueError as error:
            raise CheckpointError(f"{name} no longer fits layout {layout.name!r}: {error}") from error

    def _name_in_config(self, model: Any, packed: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Let the config tell the layout of each weight by its name in the model, and by what transformers saves it as.

        That is one that older releases gave its module, for some models, unless the user asks for those of today.
        """
        names = list(packed)
        saved = revert_weight_conversion(model, {name: torch.tensor(i) for i, name in enumerate(names)})
        spelled = [(name, name) for name in names] + [(names[int(i)], spelling) for spelling, i in saved.items()]
        config = self.quantization_config
        modules = dict(config.modules)
        for name, spelling in spelled:
            module, entry = spelling.removesuffix(".weight"), self._entry(model, name.removesuffix(".weight"))
            if entry is not None and find_entry(config.entries, module) is None:
                modules[module] = {**entry[0].to_config(), **({"transposed": True} if entry[1] else {})}
        if modules != config.modules:
            config.modules, config.entries = modules, parse_quantization_config(quantization_config(modules))

    def _stored_parts(self, model: Any, name: str) -> dict[str, str]:
        """The tensors in the files that a weight is stored as: part of its layout → name; none if there are no files."""
        stored = self.stored if self.stored is not None else {}
        for spelling in self._stored_names(model, name):
            parts = {part: f"{spelling}.{part}" for part in _PARTS if f"{spelling}.{part}" in stored}
            if parts:
                return parts
        return {}

    def older_names(self, model: Any) -> dict[str, str]:
        """The names of packed weights in the files, by those that transformers gives them where they differ."""
        if self._older_names is None:
            parts = (key.rpartition(".") for key in self.stored or ())
            self._older_names = renamed({weight for weight, _, part in parts if part in _PARTS}, model)
        return self._older_names

    def _stored_names(self, model: Any, name: str) -> list[str]:
        """The names that a weight of a model may have in its files: `AutoModel` leaves the first part of the name out."""
        names, older = spellings(model, name), self.older_names(model)
        return [*names, *(older[spelling] for spelling in names if spelling in older)]

    def _as_stored(self, model: Any, name: str) -> dict[str, Tensor]:
        """The parts of a weight as its files have them; none if there are no files.

        transformers hands them over in the dtype of the model, in which scales of 16 bits are other numbers.
        """
        return {part: self.stored[key] for part, key in self._stored_parts(model, name).items()} if self.stored else {}

    def _unchanged_parts(self, model: Any, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """The parts of a quantized weight as its files have them, if it still is what they hold.

        Its grid is not to be found in the dense weight alone.
        """
        parts = self._as_stored(model, name)
        if parts and torch.equal(self.decode(model, name, parts).to(tensor), tensor):
            return {part: packed.clone() for part, packed in parts.items()}
        raise CheckpointError(
            f"{name} is not the weight that was loaded, and changed weights have no place on its grid: "
            "make the folder dense by `secateur export FOLDER OUT --to dense`, and change that"
        )

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        densify(model)
        return model if dtype is None else model.to(dtype)

    def is_serializable(self, **_: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether adapters can be trained on it."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Whether a trainer takes it without adapters, be it to evaluate: what is not packed trains, and can be saved.

        A compressed weight that is dense would train, too, and then no longer fit its layout.
        """
        return self._all_packed


def memory_footprint(model: Any, return_buffers: bool = True) -> int:
    """`model.get_memory_footprint`, with packed weights, which are no parameters."""
    dense: int = type(model).get_memory_footprint(model, return_buffers)
    return dense + sum(linear.nbytes for _, linear in packed_linears(model))


def _is_ours(conversion: Any) -> bool:
    return any(isinstance(op, _Expand) for op in getattr(conversion, "operations", []))


class _ExpandConverter(WeightConverter):
    """transformers makes a deep copy of a converter for every tensor; only what it collects has to be its own."""

    def __deepcopy__(self, memo: Any) -> _ExpandConverter:
        twin = copy(self)
        twin.collected_tensors = defaultdict(list)
        twin.layer_targets = defaultdict(set)
        return twin


def attach_quantizer(model: Any, config: dict[str, Any], files: Sequence[Path]) -> None:
    """Make packed linears of a model that was loaded otherwise ready, and the model save itself packed.

    Args:
        model: the model.
        config: a `quantization_config`, which says how.
        files: that its weights were read from.
    """
    model.hf_quantizer = SecateurQuantizer(SecateurConfig(**config))
    model.hf_quantizer.stored = StoredTensors(list(files))
    model.hf_quantizer.preprocess_model(model)
    model.hf_quantizer.postprocess_model(model)
    if not model.hf_quantizer.older_names(model):
        model._weight_conversions = []  # else transformers saves it under the names of older releases


def register() -> None:
    """Make transformers know the quantizer; a second call does nothing."""
    AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = SecateurConfig
    AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = SecateurQuantizer


register()
