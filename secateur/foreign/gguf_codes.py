"""Codes of ours as those of a type of GGUF's that stands for the same.

O: output features, I: input features, G: groups of a row, B: blocks of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.core.quantized import Quantized
from secateur.formats.layouts.block_codes import Blocks
from secateur.formats.layouts.block_types import BLOCK_TYPES, BlockType
from secateur.formats.layouts.packed_int import Uniform

# The grids around zero that hold differences of codes and zero points, the smallest first.
_CENTERED = ("Q4_0", "Q5_0", "Q8_0")


def blocks_of(weight: Quantized, wanted: str | None) -> Blocks | None:
    """Blocks that stand for the same as a weight; None where there are none.

    Args:
        weight: quantized, of this type or another.
        wanted: the name of a type; None: the smallest that holds it to the bit. Where it is one with an offset in 16
            bits, zero points are rounded to that: by a thousandth of a step or so.
    """
    codes = weight.codes
    plain = weight.keep_OI is None and weight.order_I is None and weight.outliers is None
    if isinstance(codes, Blocks):
        return codes if plain and wanted in (None, codes.type) else None
    if not plain or not isinstance(codes, Uniform) or weight.shape[1] % 32:
        return None
    size = min(codes.group_size, weight.shape[1])
    if size % 32:
        return None
    scale_OG = codes.scale_OG.half()
    if not torch.equal(scale_OG.float(), codes.scale_OG.float()):
        return None
    scale_OB = scale_OG.repeat_interleave(size // 32, 1)[:, : weight.shape[1] // 32]
    form = BLOCK_TYPES[wanted] if wanted is not None else None
    if form is not None and form.has_offset and not form.scale_bits:
        return _with_offset(codes, form, scale_OB, size)
    return _centered(codes, wanted, scale_OB, size)


def _zeros(codes: Uniform, size: int) -> Tensor:
    """The zero point of every weight, or of every group where they are all one number."""
    if codes.zero_OG is None:
        return torch.tensor(2 ** (codes.bits - 1), dtype=torch.int16)
    return codes.zero_OG.to(torch.int16).repeat_interleave(size, 1)[:, : codes.code_OK.shape[1]]


def _centered(codes: Uniform, wanted: str | None, scale_OB: Tensor, size: int) -> Blocks | None:
    level_OI = codes.code_OK.to(torch.int16) - _zeros(codes, size)
    # By what codes of so many bits may be, so that linears that are alike are of one type; of eight bits by what they are.
    below = 2 ** (codes.bits - 1) if codes.zero_OG is None else 2**codes.bits - 1
    least, most = -below, 2**codes.bits - 1 - (below if codes.zero_OG is None else 0)
    if most > 127:
        least, most = int(level_OI.min()), int(level_OI.max())
    for name in _CENTERED:
        half = 2 ** (BLOCK_TYPES[name].bits - 1)
        if wanted in (None, name) and -half <= least and most < half:
            return Blocks(name, (level_OI + half).to(torch.uint8), scale_OB)
    return None


def _with_offset(codes: Uniform, form: BlockType, scale_OB: Tensor, size: int) -> Blocks | None:
    if codes.bits > form.bits:
        return None
    zero = float(2 ** (codes.bits - 1)) if codes.zero_OG is None else codes.zero_OG.float()
    zero_OB = (
        torch.as_tensor(zero).expand(codes.scale_OG.shape).repeat_interleave(size // 32, 1)[:, : scale_OB.shape[1]]
    )
    offset_OB = (scale_OB.float() * zero_OB).half()
    return Blocks(form.name, codes.code_OK, scale_OB, offset_OB) if torch.isfinite(offset_OB).all() else None
