"""A family of codes of somebody else's, in one file: signed powers of two, a scale a row; and the quantizer that makes them.

O: output features, K: stored weights of a row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from secateur.core.options import check_options, option
from secateur.core.pruned import Pruned
from secateur.core.quantized import Quantized
from secateur.core.registry import quantizer
from secateur.core.stack import Stack
from secateur.core.stats import Level
from secateur.formats.layouts.coded import QuantizedLayout, check_finite, family, is_half_vector
from secateur.formats.layouts.layout import check_parts
from secateur.formats.layouts.rows import Rows, is_stream
from secateur.kernels.packed import Grid, largest


@dataclass(frozen=True)
class Powers(Grid):
    """w = scale · ± 2^−n, where a code is 2n, or 2n + 1 with the minus sign. `code_OK` is for packing only."""

    scale_O: Tensor
    bits: int
    code_OK: Tensor | None = None
    group_size: None = None

    def values(self, code_OK: Tensor | None = None, at_OG: Tensor | None = None, bits: int = 0) -> Tensor:
        code_OK = self.code_OK if code_OK is None else code_OK
        assert code_OK is not None
        return self.scale_O.float()[:, None] * (1 - 2.0 * (code_OK & 1)) * 2.0 ** -(code_OK >> 1).float()

    def rows(self, start: int, end: int) -> Powers:
        return Powers(self.scale_O[start:end], self.bits)

    def bound(self, bits: int) -> float:
        return largest(self.scale_O)

    def layout(self, dtype: torch.dtype) -> PowersLayout:
        return PowersLayout(self.bits, dtype)


@family
@dataclass(frozen=True)
class PowersLayout(QuantizedLayout):
    """`codes uint8` (each row starts at a byte), `scale [O]`, `shape int64 [2]`."""

    bits: int
    dtype: torch.dtype

    name: ClassVar[str] = "powers"
    parts: ClassVar[tuple[str, ...]] = ("codes", "scale", "shape")
    has_outliers: ClassVar[bool] = False
    choices: ClassVar[Mapping[str, Sequence[Any]]] = {"bits": range(2, 9)}

    def pack_codes(self, codes: Powers, rows: Rows) -> dict[str, Tensor]:
        assert codes.code_OK is not None
        return {"codes": rows.pack(codes.code_OK, self.bits), "scale": codes.scale_O}

    def unpack_codes(self, grid: Powers, code_OK: Tensor, rows: Rows) -> Powers:
        return Powers(grid.scale_O, self.bits, code_OK)

    def read_grid(self, tensors: Mapping[str, Tensor], rows: Rows) -> Powers:
        check_parts(tensors, {"codes": is_stream, "scale": is_half_vector})
        if len(tensors["scale"]) != rows.shape[0]:
            raise ValueError(f"its scale has {len(tensors['scale'])} values for {rows.shape[0]} rows")
        check_finite(tensors, "scale")
        return Powers(tensors["scale"].clone(), self.bits)

    def store_grid(self, grid: Powers) -> dict[str, Tensor]:
        return {"scale": grid.scale_O}


@quantizer
@dataclass(frozen=True)
class PowersOfTwo:
    """The nearest power below the largest weight of a row."""

    bits: int = option(4, "Bits of a code.", low=2, high=8)

    name: ClassVar[str] = "powers-of-two"
    paper: ClassVar[str] = ""
    all_bits: ClassVar[tuple[int, ...]] = tuple(range(2, 9))
    level: ClassVar[Level] = Level.NONE
    needs_fisher: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_options(self)

    def quantize(self, stack: Stack, pruned: Pruned | None = None) -> list[Quantized]:
        assert pruned is None, "a toy"
        found = []
        for W_OI in stack.split(stack.W_OI):
            scale_O = W_OI.abs().amax(1).clamp(min=2**-14).half()
            steps = (scale_O.float()[:, None] / W_OI.abs().clamp(min=2**-30)).log2().round()
            code_OI = steps.clamp(0, 2 ** (self.bits - 1) - 1) * 2 + (W_OI < 0)
            codes = Powers(scale_O, self.bits, code_OI.to(torch.uint8))
            found.append(Quantized(codes, (W_OI.shape[0], W_OI.shape[1]), stack.dtype))
        return found
