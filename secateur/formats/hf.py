"""How transformers loads and saves a secateur folder: `import secateur` registers this quantizer.

Packed weights stay packed, and linears compute on them, where there is a backend that can; `backend("dense")` has them expanded
while the model loads. `save_pretrained` writes them packed again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from secateur.errors import CheckpointError
from secateur.formats.layout import LAYOUT_VERSION, LAYOUTS, Layout
from secateur.formats.names import renamed, spellings, used_renamings
from secateur.formats.packed import PackedWeight
from secateur.formats.packed_modules import densify, packed_linears, replace_linears
from secateur.formats.reader import StoredTensors, find_entry, parse_quantization_config
from secateur.formats.sparse_int import CodedLayout
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
        self.stored: StoredTensors | None = None
        self._older_names: dict[str, str] | None = None
        self._all_replaced = False

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Any = None, device_map: Any = None, **kwargs: Any
    ) -> Any:
        if not checkpoint_files:
            return model
        self.stored = StoredTensors([Path(file) for file in checkpoint_files])
        weights = {}
        for name, module in model.named_modules():
            entry = self._entry(model, name) if hasattr(module, "weight") else None
            if entry is None:
                continue
            parts = self._stored_parts(model, f"{name}.weight")
            if not parts:
                # It would be filled with noise and a warning; here it is an error.
                raise CheckpointError(f"{name}.weight should be packed, says config.json, but its tensors are missing")
            weights[name] = partial(PackedWeight(entry[0], parts, entry[1]).load, f"{name}.weight", self.stored)
        if current_backend() != "dense" and weights:
            with torch.device("cpu"):  # transformers makes everything on the meta device here
                replaced = replace_linears(model, weights, current_backend(), _main_device(device_map), model.dtype)
            self.stored.release()
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
        devices = {name: torch.device(place) for name, place in (getattr(model, "hf_device_map", None) or {}).items()}
        for name, module in packed_linears(model):
            parents = [name.rsplit(".", i)[0] for i in range(name.count(".") + 1)]
            module.place(next((devices[parent] for parent in [*parents, ""] if parent in devices), model.device))
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        state = {}
        for name, tensor in model.state_dict().items():
            module, _, parameter = name.rpartition(".")
            entry = self._entry(model, module) if parameter == "weight" else None
            if entry is None:
                state[name] = tensor
                continue
            layout, transposed = entry
            if isinstance(layout, CodedLayout):
                parts = self._unchanged_parts(model, name, tensor)
            else:
                W_OI = tensor.T if transposed else tensor
                try:
                    parts = layout.pack(W_OI.contiguous())
                except ValueError as error:
                    raise CheckpointError(f"{name} no longer fits layout {layout.name!r}: {error}") from error
            saved = self._saved_as(model, name)
            state.update({f"{saved}.{part}": packed for part, packed in parts.items()})
        for module, _ in packed_linears(model):
            # What computes packed cannot have changed.
            parts = self._as_stored(model, f"{module}.weight")
            saved = self._saved_as(model, f"{module}.weight")
            state.update({f"{saved}.{part}": packed.clone() for part, packed in parts.items()})
        return state, {}

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

    def _saved_as(self, model: Any, name: str) -> str:
        """The name to save a packed weight under, which the config goes by; what transformers renames it names back itself."""
        entries, names = self.quantization_config.entries, spellings(model, name)
        return next((found for found in names if find_entry(entries, found.removesuffix(".weight")) is not None), name)

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
        return False


def _main_device(device_map: Any) -> torch.device:
    """Where most of a model will be, of what transformers takes as a `device_map`."""
    if isinstance(device_map, dict):
        device_map = next(iter(device_map.values()), None)
    if device_map is None:
        return torch.get_default_device()
    if isinstance(device_map, str) and device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(device_map)
    except RuntimeError:  # "disk"
        return torch.device("cpu")


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
    """Make a dense model that was loaded otherwise save itself packed, as `config` (a `quantization_config`) says.

    Args:
        model: the model.
        config: a `quantization_config`.
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
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(QUANT_METHOD)(SecateurConfig)
        register_quantizer(QUANT_METHOD)(SecateurQuantizer)
