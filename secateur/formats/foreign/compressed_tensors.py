"""Checkpoints of compressed-tensors: `pack-quantized`, and the sparse layouts that it wrote up to 0.14 and no longer reads,
sparse-bitmask and sparse-24-bitmask.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from secateur.errors import CheckpointError
from secateur.formats.foreign import pack_quantized
from secateur.formats.layouts.bitmap import Bitmap
from secateur.formats.layouts.layout import Layout
from secateur.formats.layouts.nm import NMBits
from secateur.formats.layouts.packed_weight import PackedWeight

QUANT_METHOD = "compressed-tensors"
# A section that says more than this describes a checkpoint that is quantized or transformed as well.
_SPARSE_ONLY = {"quant_method", "version", "sparsity_config", "transform_config"}


@dataclass(frozen=True)
class SparseBitmask(Bitmap):
    """Releases before 0.9 packed every tensor of a model, vectors such as norms and biases included."""

    name: ClassVar[str] = "sparse-bitmask"

    def unpack(self, tensors: Mapping[str, Tensor]) -> Tensor:
        shape = tensors.get("shape")
        if shape is None or shape.numel() != 1:
            return super().unpack(tensors)
        row = {**tensors, "shape": torch.cat([torch.ones_like(shape.flatten()), shape.flatten()])}
        if "bitmask" in row:
            row["bitmask"] = row["bitmask"].reshape(1, -1)
        return super().unpack(row)[0]


_LAYOUTS: dict[str, Layout] = {"sparse-bitmask": SparseBitmask(), "sparse-24-bitmask": NMBits(2, 4)}


def packed_weights(stored: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, PackedWeight]:
    """The packed weights of such a checkpoint.

    Which tensors are packed is told by their names alone: early releases wrote `targets` and `ignore` of sparse layouts without
    heeding them.

    Args:
        stored: its tensors by name, such as `….up_proj.bitmask` (from 0.9 on) or `….up_proj.weight.bitmask` (before).
        config: its `quantization_config`, or `compression_config`, as it was called up to 0.6.

    Raises:
        CheckpointError: it is both quantized and sparse, or either in another way.
    """
    sparsity = config.get("sparsity_config") or {"format": "dense"}
    name = sparsity.get("format") if isinstance(sparsity, Mapping) else None
    if config.get("format") == pack_quantized.FORMAT and name == "dense":
        return pack_quantized.packed_weights(stored, config)
    more = sorted(set(config) - _SPARSE_ONLY) + (["transform_config"] if config.get("transform_config") else [])
    if "format" in more:
        more[more.index("format")] = f"format {config['format']!r}"
    if more:
        raise CheckpointError(
            f"the checkpoint is quantized or transformed by compressed-tensors ({', '.join(more)}): "
            f"secateur reads {' and '.join(_LAYOUTS)}, or {pack_quantized.FORMAT}, and not one on top of the other"
        )
    if name == "dense":
        return {}
    if not isinstance(name, str) or name not in _LAYOUTS:
        raise CheckpointError(
            f"compressed-tensors' sparse format {name!r} is not known: secateur reads {' and '.join(_LAYOUTS)}"
        )
    parts_of: dict[str, dict[str, str]] = {}
    for key in stored:
        owner, _, part = key.rpartition(".")
        if part in _LAYOUTS[name].parts:
            parts_of.setdefault(owner, {})[part] = key
    full_names = any(owner.endswith(".weight") for owner in parts_of)
    return {
        owner if full_names else f"{owner}.weight": PackedWeight(_LAYOUTS[name], parts)
        for owner, parts in parts_of.items()
    }
