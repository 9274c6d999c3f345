"""MXFP4 experts, as gpt-oss is published: read only.

`NAME_blocks uint8 [E, O, G, 16]` holds codes of 4 bits (e2m1), the first of two in the lower half of a byte, and `NAME_scales
uint8 [E, O, G]` the power of two, plus 127, of each 32 weights. `NAME` is `[E, I, O]`: the matrix of an expert is transposed.

E: experts, O: output features, I: input features, G: groups of 32 weights, R: some rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from secateur.errors import CheckpointError
from secateur.foreign.format import Foreign, foreign
from secateur.foreign.stacked import Stacked, dtype_of, with_dtype
from secateur.formats.layouts.layout import check_parts
from secateur.formats.layouts.packed_weight import PackedWeight

QUANT_METHOD = "mxfp4"
_BLOCKS, _SCALES = "_blocks", "_scales"
_GROUP_BYTES = 16
_BIAS = 127
_NAN = 255  # the scale that is no number
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# Integers as wide as two weights: a pair of them is moved as one.
_PAIRS = {2: torch.int32, 4: torch.int64, 8: torch.complex128}
_CHUNK = 2**19  # bytes that are decoded at a time


class MXFP4(Stacked):
    """Decodes the experts of one checkpoint."""

    name: ClassVar[str] = QUANT_METHOD
    parts: ClassVar[tuple[str, ...]] = ("blocks", "scales")

    def shape(self, tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
        """`[E, I, O]`."""
        check_parts(
            tensors,
            {
                "blocks": lambda t: (
                    t.dtype == torch.uint8 and t.ndim == 4 and t.shape[3] == _GROUP_BYTES and t.numel() > 0
                ),
                "scales": lambda t: t.dtype == torch.uint8,
            },
        )
        blocks, scales = tensors["blocks"], tensors["scales"]
        if scales.shape != blocks.shape[:-1]:
            raise ValueError(
                f"its scales have shape {list(scales.shape)}, and blocks of {list(blocks.shape)} have one for each "
                f"{_GROUP_BYTES} bytes"
            )
        E, O, G = scales.shape
        return E, 2 * _GROUP_BYTES * G, O

    def matrix(self, tensors: Mapping[str, Tensor], expert: int) -> Tensor:
        byte_OG16, scale_OG = tensors["blocks"][expert], tensors["scales"][expert]
        if (scale_OG == _NAN).any():
            raise ValueError("its scales have one that is NaN")
        O, G, _ = byte_OG16.shape
        table = _table(self.made)
        pair_OB = torch.empty(O, G * _GROUP_BYTES, dtype=table.dtype)
        rows = max(1, _CHUNK // pair_OB.shape[1])
        for begin in range(0, O, rows):
            index_RG16 = scale_OG[begin : begin + rows, :, None].int() * 256 + byte_OG16[begin : begin + rows]
            torch.index_select(table, 0, index_RG16.flatten(), out=pair_OB[begin : begin + rows].view(-1))
        return pair_OB.view(self.made).T


@cache
def _table(dtype: torch.dtype) -> Tensor:
    """The two weights that a byte stands for with a scale, at place 256 · scale + byte."""
    level = torch.tensor([*_MAGNITUDES, *(-m for m in _MAGNITUDES)], dtype=dtype)
    byte = torch.arange(256)
    table_SB2 = torch.stack([level[byte & 15], level[byte >> 4]], 1).repeat(256, 1, 1)
    exponent_S = torch.arange(256, dtype=torch.int32) - _BIAS
    torch.ldexp(table_SB2, exponent_S[:, None, None], out=table_SB2)
    return table_SB2.flatten().view(_PAIRS[dtype.itemsize])


@foreign
class MXFP4Experts(Foreign):
    """Which weights are packed is told by their names."""

    quant_method: ClassVar[str] = QUANT_METHOD
    reads: ClassVar[str] = "the experts of gpt-oss (mxfp4)"

    @classmethod
    def section(cls, config: Mapping[str, Any]) -> Mapping[str, Any] | None:
        return with_dtype(super().section(config), config)

    @classmethod
    def packed_weights(cls, stored: Mapping[str, Tensor], section: Mapping[str, Any]) -> dict[str, PackedWeight]:
        layout = MXFP4(dtype_of(section))
        names = {key.removesuffix(end) for end in (_BLOCKS, _SCALES) for key in stored if key.endswith(end)}
        packed = {}
        for name in sorted(names):
            parts = {"blocks": f"{name}{_BLOCKS}", "scales": f"{name}{_SCALES}"}
            for key in parts.values():
                if key not in stored:
                    raise CheckpointError(f"{name} cannot be decoded from layout {QUANT_METHOD!r}: {key} is missing")
            packed[name] = PackedWeight(layout, parts)
        return packed
