"""Checkpoints of compressed-tensors: `pack-quantized`, and the sparse layouts that it wrote up to 0.14 and no longer reads,
sparse-bitmask and sparse-24-bitmask.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from secateur.errors import CheckpointError
from secateur.foreign import pack_quantized
from secateur.foreign.format import Foreign, foreign
from secateur.formats.layouts.bitmap import Bitmap
from secateur.formats.layouts.layout import Decoder, Layout
from secateur.formats.layouts.nm import NMBits
from secateur.formats.layouts.packed_weight import PackedWeight

# A section that says more than this describes a checkpoint that is quantized or transformed as well.
_SPARSE_ONLY = {"quant_method", "version", "sparsity_config", "transform_config"}


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

    def ours(self, tensors: Mapping[str, Tensor]) -> tuple[Layout, dict[str, Tensor]]:
        return Bitmap().ours(tensors)


_LAYOUTS: dict[str, Decoder] = {"sparse-bitmask": SparseBitmask(), "sparse-24-bitmask": NMBits(2, 4)}


@foreign
class CompressedTensors(Foreign):
    """Which tensors are packed is told by their names alone: early releases wrote `targets` and `ignore` of sparse layouts
    without heeding them. Names are such as `….up_proj.bitmask` (from 0.9 on) or `….up_proj.weight.bitmask` (before).
    """

    quant_method: ClassVar[str] = "compressed-tensors"
    reads: ClassVar[str] = "compressed-tensors' pack-quantized, sparse-bitmask and sparse-24-bitmask"
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
        sparsity = section.get("sparsity_config") or {"format": "dense"}
        name = sparsity.get("format") if isinstance(sparsity, Mapping) else None
        if section.get("format") == pack_quantized.FORMAT and name == "dense":
            return pack_quantized.packed_weights(stored, section)
        more = sorted(set(section) - _SPARSE_ONLY) + (["transform_config"] if section.get("transform_config") else [])
        if "format" in more:
            more[more.index("format")] = f"format {section['format']!r}"
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
