"""How transformers loads and saves a secateur folder: `import secateur` registers this quantizer.

Packed weights stay packed, and linears compute on them, where there is a backend that can; `backend("dense")` has them expanded
while the model loads. `save_pretrained` writes them packed again.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter, revert_weight_conversion
from transformers.integrations.accelerate import load_offloaded_parameter
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer

from secateur.errors import CheckpointError
from secateur.folder.extents import MappedFiles
from secateur.folder.reader import StoredTensors
from secateur.formats.layouts.layout import Layout
from secateur.formats.layouts.packed_weight import BESIDE, DecodedWeights, PackedWeight
from secateur.formats.stored_weights import (
    QUANT_METHOD,
    find_entry,
    packed_weights,
    parse_quantization_config,
    quantization_config,
)
from secateur.kernels.backends import AUTO, check_backend
from secateur.mixture.experts import Experts, Piece, module_of
from secateur.mixture.skipping import KEY as SKIP
from secateur.mixture.skipping import skip_experts
from secateur.mixture.unfuse import experts_in
from secateur.plugin.block_widths import fit_blocks
from secateur.plugin.decode_steps import decode_in_steps
from secateur.plugin.expanding import expanding, expands
from secateur.plugin.expert_modules import (
    check_names_sort,
    fill_weights,
    fuse_again,
    hide_weights,
    names_apart,
    packed_experts,
    read_dense,
    taken_apart,
)
from secateur.plugin.gated import parts_of_gates, put_in_place
from secateur.plugin.names import renamed, spellings, stored_as, used_renamings
from secateur.plugin.offloaded import Offloaded, Read, may_offload
from secateur.plugin.packed_modules import (
    densify,
    hide_sizes,
    ignore_in_files,
    main_device,
    memory_footprint,
    packed_linears,
    place_linears,
    replace_linears,
    show_sizes,
)
from secateur.plugin.packed_tables import refuse_to_resize, replace_tables, tie_again, unpack_tables
from secateur.plugin.quantization_config import SecateurConfig

_backend: ContextVar[str] = ContextVar("secateur_backend", default=AUTO)


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


class SecateurQuantizer(HfQuantizer):
    """Loads models whose weights lie in secateur's layouts, and saves them in these layouts again."""

    requires_calibration = True
    quantization_config: SecateurConfig

    def __init__(self, quantization_config: SecateurConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.errors: list[CheckpointError] = []
        #: How weights are packed in the files, by the names that they have there.
        self.packed: Mapping[str, PackedWeight] = {}
        #: The tensors in the files; after loading, only where a dense weight does not tell how it was quantized.
        self.stored: Any = {}
        #: Of which some weights are packed, by name; taken apart, but where `_whole` says so.
        self._experts: dict[str, Experts] = {}
        self._whole = False
        self._older_names: dict[str, str] | None = None
        self._older_stored: dict[str, str] | None = None
        self._all_replaced = False
        self._all_packed = False
        #: Where parts of the model are left where they do not compute.
        self._offloaded: Offloaded | None = None
        # What packed weights may lie in.
        self._mapped = MappedFiles()
        # While transformers asks how large they are.
        self._sized: list[torch.nn.Module] = []

    def _process_model_before_weight_loading(
        self,
        model: Any,
        checkpoint_files: Any = None,
        device_map: Any = None,
        weights: DecodedWeights | None = None,
        offload: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Put modules that compute on packed weights in place, for the backend that there is.

        Args:
            checkpoint_files: that transformers reads the other weights from.
            weights: of the files, where they are open already.
            offload: whether parts may be left where they do not compute; None: what the device map says.
        """
        if weights is None:
            fit_blocks(model, self.quantization_config.widths, meta=True)
            if not checkpoint_files:
                return model
            stored = StoredTensors([Path(file) for file in checkpoint_files])
            weights = DecodedWeights(stored, packed_weights(stored, self.quantization_config.entries))
        self.packed, self.stored = weights.packed, weights.stored
        self._experts = packed_experts(model, {*self.packed, *self.older_names(model)})
        self._whole = current_backend() == "dense"
        readers: dict[str, Read] = {}
        for name, module in model.named_modules():
            packed = self._packed(model, f"{name}.weight") if hasattr(module, "weight") else None
            if packed is not None:
                readers[name] = partial(packed.read, f"{name}.weight", self.stored)
            elif hasattr(module, "weight") and self._entry(model, name) is not None:
                # It would be filled with noise and a warning; here it is an error.
                raise CheckpointError(f"{name}.weight should be packed, says config.json, but its tensors are missing")
        if current_backend() != "dense" and readers:
            if (may_offload(device_map) if offload is None else offload) and isinstance(self.stored, StoredTensors):
                self._offloaded = Offloaded(self.stored)
                readers = {
                    name: self._offloaded.reader(name, self._linear(model, name), read)
                    for name, read in readers.items()
                }
            # transformers makes everything on the meta device here; a context that is not wanted would slow every operation.
            with torch.device("cpu") if torch.get_default_device().type == "meta" else nullcontext():
                where = current_backend(), main_device(device_map), model.dtype
                replaced = replace_linears(model, readers, *where, weights.stored.at_hand)
                replaced += replace_tables(model, readers, *where)
            if self._offloaded is not None:
                self._offloaded.let_go(model)
            # What packed weights do not hold of the files is not to stay mapped.
            weights.stored.release()
            if replaced and isinstance(self.stored, StoredTensors):
                self._mapped = MappedFiles(self.stored.files)
            if isinstance(device_map, str):
                self._sized = show_sizes(model)
            self._all_replaced = len(replaced) == len(readers)
            if replaced:
                parts = {part for packed in self.packed.values() for part in packed.parts}
                ignore_in_files(model, rf"\.weight(\.({'|'.join(sorted({*parts, *BESIDE}))}))?$")
        self.put_gates(model, self.stored)
        if self._experts and checkpoint_files:
            check_names_sort(self._experts)
            # transformers would merge what the files have of experts, but there is no place for that.
            hide_weights(self._experts)
            leaves = {re.escape(name.rpartition(".")[2]) for name in self._experts}
            ignore_in_files(model, rf"(^|\.)({'|'.join(sorted(leaves))})\.")
        return model

    def put_gates(self, model: Any, stored: Mapping[str, Tensor]) -> None:
        """Have a model whose linears are in place read its inputs as the config says; `stored` are the tensors of the files."""
        if self.quantization_config.activations is not None:
            put_in_place(model, self.quantization_config.activations, stored, partial(self._stored_names, model))

    def _read_of_expert(self, model: Any, name: str, piece: Piece) -> Tensor:
        """The dense weight of an expert's linear from the files. Raises CheckpointError when it is damaged or missing."""
        packed = self._packed(model, name)
        if packed is not None:
            return packed.decode(name, self.stored)
        if self._older_stored is None:
            self._older_stored = renamed(self.stored, model)
        return read_dense(model, self.stored, self._older_stored, name, piece)

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
        return [expanding(self.decode, self.errors)]

    def decode(self, model: Any, name: str, tensors: dict[str, Tensor]) -> Tensor:
        """The weight called `name` in the model, in the dtype and shape of the model's own parameter.

        `tensors` are its parts where there are no files: transformers hands them over in the dtype of the model, in which
        scales of 16 bits are other numbers.
        """
        packed = self._packed(model, name)
        if self._whole and module_of(name) in self._experts and packed is not None:
            return packed.decode(name, self.stored).to(model.dtype)
        parameter = model.get_parameter(name)
        if packed is not None:
            W = packed.decode(name, self.stored)
        else:
            entry = self._entry(model, name.removesuffix(".weight"))
            if entry is None:
                raise CheckpointError(f"{name} is stored packed, but the config does not name its layout")
            W = PackedWeight(entry[0], {part: part for part in tensors}, entry[1]).decode(name, tensors)
        if W.shape != parameter.shape:
            raise CheckpointError(f"{name} is {list(W.shape)} in the file, but {list(parameter.shape)} in the model")
        return W.to(parameter.dtype)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self.errors:
            raise self.errors[0]
        # What expands on loading is not to be run backwards on saving: `get_state_dict_and_metadata` packs.
        if getattr(model, "_weight_conversions", None):
            kept = [c for c in model._weight_conversions if not expands(c)]
            # Nor what renamed nothing, which early releases of transformers 5 keep too.
            model._weight_conversions = used_renamings(kept, self.stored)
        hide_sizes(self._sized)
        self._sized = []
        if self._whole:
            apart = experts_in(model)  # none where they have been put together already
            here = {name: module for name, module in self._experts.items() if name in apart}
            fuse_again(model, here, partial(self._read_of_expert, model))
        else:
            fill_weights(self._experts, partial(self._read_of_expert, model), model)
        if self._offloaded is not None:
            self._offloaded.stream(model, partial(self._linear, model))
            self._offloaded = None
        place_linears(model)
        decode_in_steps(model)
        refuse_to_resize(model)
        self._keep_grids(model)
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                module.get_memory_footprint = partial(memory_footprint, module)
        skip_experts(model, {SKIP: self.quantization_config.expert_skip})
        return model

    def _keep_grids(self, model: Any) -> None:
        """Hold on to what is stored of quantized weights that are dense now, and let go of everything else."""
        entries = {
            name: self._entry(model, name.removesuffix(".weight"))
            for name in names_apart(model, self._experts if self._whole else {})
            if name.endswith(".weight")
        }
        dense = {name: entry[0] for name, entry in entries.items() if entry is not None}
        self._all_packed = not dense
        rounded = (self._packed(model, name) for name, layout in dense.items() if layout.rounded)
        keys = [key for packed in rounded if packed is not None for key in packed.parts.values()]
        self.stored = self.stored.held(keys) if keys else {}

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        self._mapped.check()
        state, packed = {}, {}
        tied = model.all_tied_weights_keys
        for name, tensor in (taken_apart(model, self._experts) if self._whole else model.state_dict()).items():
            module, _, parameter = name.rpartition(".")
            if name in tied and self._entry(model, tied[name].rpartition(".")[0]) is not None:
                continue  # the same table, which is written packed
            entry = self._entry(model, module) if parameter == "weight" else None
            if entry is None:
                state[name] = tensor
                continue
            if tensor.is_meta:
                tensor = load_offloaded_parameter(model, name)
            packed[name] = self._pack(model, name, tensor, *entry)
        packed.update({f"{name}.weight": linear.parts() for name, linear in packed_linears(model)})
        own = {name: self._own_parts(model, name, packed) for name in packed}
        state.update({f"{name}.{part}": tensor for name, parts in own.items() for part, tensor in parts.items()})
        state.update(parts_of_gates(model))
        self._name_in_config(model, packed)
        return state, {}

    def _own_parts(self, model: Any, name: str, packed: Mapping[str, dict[str, Tensor]]) -> dict[str, Tensor]:
        """The parts of a weight that do not lie with another among those to be saved."""
        entry = self._entry(model, name.removesuffix(".weight"))
        if entry is None or entry[0].lender_of(name) not in packed:
            return packed[name]
        return entry[0].own(packed[name])

    def _pack(self, model: Any, name: str, tensor: Tensor, layout: Layout, transposed: bool) -> dict[str, Tensor]:
        """The parts of a dense weight."""
        if layout.rounded:
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

    def _packed(self, model: Any, name: str) -> PackedWeight | None:
        """How a weight of the model is packed in its files; None where it is not, or there are none."""
        stored = stored_as(model, name, self.packed, self.older_names(model))
        return None if stored is None else self.packed[stored]

    def _linear(self, model: Any, module: str) -> PackedWeight | None:
        """The same of a linear, by its name."""
        return self._packed(model, f"{module}.weight")

    def older_names(self, model: Any) -> dict[str, str]:
        """The names of packed weights in the files, by those that transformers gives them where they differ."""
        if self._older_names is None:
            self._older_names = renamed(self.packed, model)
        return self._older_names

    def _stored_names(self, model: Any, name: str) -> list[str]:
        """The names that a weight of a model may have in its files: `AutoModel` leaves the first part of the name out."""
        names, older = spellings(model, name), self.older_names(model)
        return [*names, *(older[spelling] for spelling in names if spelling in older)]

    def _unchanged_parts(self, model: Any, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """The parts of a quantized weight as its files have them, if it still is what they hold.

        Its grid is not to be found in the dense weight alone.
        """
        packed = self._packed(model, name)
        if packed is not None and torch.equal(self.decode(model, name, {}).to(tensor), tensor):
            return {part: stored.clone() for part, stored in packed.tensors(self.stored).items()}
        raise CheckpointError(
            f"{name} is not the weight that was loaded, and changed weights have no place on its grid: "
            "make the folder dense by `secateur export FOLDER OUT --to dense`, and change that"
        )

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        unpack_tables(model)
        densify(model)
        tie_again(model)
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


def register() -> None:
    """Make transformers know the quantizer; a second call does nothing."""
    AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = SecateurConfig
    AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = SecateurQuantizer


register()
