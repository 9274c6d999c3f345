"""Checkpoints of compressed-tensors: what it writes today, and what it wrote up to 0.14 and no longer reads: bit masks
(sparse-bitmask and sparse-24-bitmask), over whatever codes, and marlin-24.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from secateur.errors import CheckpointError
from secateur.foreign import byte_codes, marlin24, pack_quantized
from secateur.foreign.format import Foreign, foreign
from secateur.foreign.masked import PARTS, UnderMask
from secateur.formats.layouts.bitmap import Bitmap
from secateur.formats.layouts.layout import Decoder, Layout
from secateur.formats.layouts.nm import NMBits
from secateur.formats.layouts.packed_weight import PackedWeight

# What a section says of codes, if there are any. Everything else is either of no use to weights, or refused.
_ANY = {
    "quant_method", "version", "sparsity_config", "transform_config", "config_groups", "format", "ignore", "kv_cache_scheme",
    "quantization_status", "global_compression_ratio",
}  # fmt: skip


class SparseBitmask(Decoder):
    """Our bitmap. Releases before 0.9 packed every tensor of a model, vectors such as norms and biases included."""

    name: ClassVar[str] = "sparse-bitmask"
    rounded: ClassVar[bool] = False
    parts: ClassVar[tuple[str, ...]] = Bitmap.parts

    def unpack(self, tensors: Mapping[str, Tensor]) -> Tensor:
        shape = tensors.get("shape")
        if shape is None or shape.numel() != 1:
            return Bitmap().unpack(tensors)
        row = {**tensors, "shape": torch.cat([torch.ones_like(shape.flatten()), shape.flatten()])}
        if "bitmask" in row:
            row["bitmask"] = row["bitmask"].reshape(1, -1)
        return Bitmap().unpack(row)[0]

    def ours(self, tensors: Mapping[str, Tensor]) -> tuple[Layout, dict[str, Tensor]] | None:
        shape = tensors.get("shape")
        return None if shape is not None and shape.numel() == 1 else Bitmap().ours(tensors)


_DENSE = "dense"
_LAYOUTS: dict[str, Decoder] = {"sparse-bitmask": SparseBitmask(), "sparse-24-bitmask": NMBits(2, 4)}
_READ = (
    f"secateur reads {' and '.join(_LAYOUTS)}, {pack_quantized.FORMAT}, {' and '.join(byte_codes.FORMATS)} below them or "
    f"alone, and {marlin24.FORMAT}"
)


@foreign
class CompressedTensors(Foreign):
    """Which tensors are packed is told by their names alone: early releases wrote `targets` and `ignore` of sparse layouts
    without heeding them. Names are such as `….up_proj.bitmask` (from 0.9 on) or `….up_proj.weight.bitmask` (before).
    """

    quant_method: ClassVar[str] = "compressed-tensors"
    reads: ClassVar[str] = "compressed-tensors' integers, FP8 and bit masks"
    card: ClassVar[str] = """
FOLDER is this folder, or its name on the hub. The weights are in the format `pack-quantized` of compressed-tensors: it is
opened by transformers where the package `compressed-tensors` is installed, and by vLLM.
"""

    @classmethod
    def section(cls, config: Mapping[str, Any]) -> Mapping[str, Any] | None:
        if config.get("quantization_config") is None and isinstance(config.get("compression_config"), dict):
            found: dict[str, Any] = config["compression_config"]  # as it was called up to 0.6
            return found
        return super().section(config)

    @classmethod
    def packed_weights(cls, stored: Mapping[str, Tensor], section: Mapping[str, Any]) -> dict[str, PackedWeight]:
        """Masks may lie over codes, so that what is below them is asked for first."""
        sparsity = section.get("sparsity_config") or {"format": _DENSE}
        mask = sparsity.get("format") if isinstance(sparsity, Mapping) else None
        if not isinstance(mask, str) or mask not in (_DENSE, *_LAYOUTS):
            raise CheckpointError(f"compressed-tensors' sparse format {mask!r} is not known: {_READ}")
        masks = {} if mask == _DENSE else _masks(stored)
        names = [name for name in stored if name.rpartition(".")[2] not in PARTS] if masks else list(stored)
        packed = _codes([*names, *masks], section, bool(masks))
        below = {part for weight in packed.values() for part in weight.parts.values()}
        found = {name: _under_masks(weight, masks) for name, weight in packed.items()}
        found |= {name: PackedWeight(_LAYOUTS[mask], parts) for name, parts in masks.items() if name not in below}
        return found


def _masks(stored: Iterable[str]) -> dict[str, dict[str, str]]:
    """What is masked: the names that tensors would have without, and of each its parts."""
    parts_of: dict[str, dict[str, str]] = {}
    for key in stored:
        owner, _, part = key.rpartition(".")
        if part in PARTS:
            parts_of.setdefault(owner, {})[part] = key
    full_names = any(owner.endswith(".weight") for owner in parts_of)
    return {owner if full_names else f"{owner}.weight": parts for owner, parts in parts_of.items()}


def _under_masks(weight: PackedWeight, masks: Mapping[str, Mapping[str, str]]) -> PackedWeight:
    """A weight of which some tensors are masked."""
    if not masks.keys() & weight.parts.values():
        return weight
    parts = {}
    for part, name in weight.parts.items():
        inner = masks.get(name)
        parts.update({part: name} if inner is None else {f"{part}.{each}": key for each, key in inner.items()})
    return PackedWeight(UnderMask(weight.layout), parts)


def _codes(names: Iterable[str], section: Mapping[str, Any], masked: bool) -> dict[str, PackedWeight]:
    """The weights that are codes, by what a section says of tensors of such names, below masks or not.

    Raises CheckpointError when it says what is not read here.
    """
    form, groups = section.get("format"), section.get("config_groups")
    if form == pack_quantized.FORMAT and (groups or not masked):
        below = {key: value for key, value in section.items() if key != "sparsity_config"}
        return pack_quantized.packed_weights(dict.fromkeys(names, torch.empty(0)), below)
    said = {key for key, value in section.items() if value}
    more = [f"{key} {section[key]!r}" for key in sorted(said - _ANY)]
    more += ["transform_config"] if section.get("transform_config") else []
    if groups and not isinstance(groups, Mapping):
        more.append("config_groups that are none")
    if form not in (None, _DENSE) and not groups:
        more.append(f"format {form!r} without config_groups")
    if groups and form not in (marlin24.FORMAT, *byte_codes.FORMATS):
        more.append(f"config_groups with format {form!r}")
    if more:
        raise CheckpointError(
            f"the checkpoint is quantized or transformed by compressed-tensors ({', '.join(more)}): {_READ}"
        )
    if not groups:
        return {}
    return marlin24.packed_weights(names) if form == marlin24.FORMAT else byte_codes.packed_weights(names, groups)
