"""The family `packed-int`: integer codes, and a scale (and a zero point) for each group of a row.

O: output features, K: stored weights of a row, G: groups of the row with most, Γ: groups of all rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from secateur.core.quantized import BITS
from secateur.formats.layouts.coded import SIZES, QuantizedLayout, check_finite, family, is_half_vector
from secateur.formats.layouts.layout import check_parts
from secateur.formats.layouts.rows import Rows, is_stream, pack_stream, unpack_stream
from secateur.kernels.packed import Grid, GridOperands, largest, on_groups


@dataclass(frozen=True)
class Uniform:
    """Codes on a grid a group: w = (code − zero) · scale.

    Attributes:
        bits: of a code.
        group_size: stored weights that share a scale and zero point; the last group of a row may have fewer.
        code_OK: uint8.
        scale_OG: positive, in the dtype that it is stored in.
        zero_OG: uint8; None when all zero points are 2^(bits − 1).
    """

    bits: int
    group_size: int
    code_OK: Tensor
    scale_OG: Tensor
    zero_OG: Tensor | None

    def values(self) -> Tensor:
        """The stored weights `[O, K]`, float32."""
        zero_OG = torch.full_like(self.scale_OG, 2 ** (self.bits - 1)) if self.zero_OG is None else self.zero_OG
        return on_groups(self.code_OK, self.scale_OG.float(), zero_OG.float(), self.group_size)

    def layout(self, dtype: torch.dtype) -> PackedInt:
        return PackedInt(self.bits, self.group_size, self.zero_OG is None, dtype)


@dataclass(frozen=True)
class UniformGrid(Grid):
    """w = (code − zero) · scale, with one scale and zero point a group.

    Attributes:
        group_size: stored weights of a group; the last group of a row may have fewer.
        scale_Γ: float16 or bfloat16, groups row after row.
        zero_Γ: uint8; None when all zero points are 2^(bits − 1).
    """

    group_size: int
    scale_Γ: Tensor
    zero_Γ: Tensor | None

    def values(self, code_OK: Tensor, at_OG: Tensor | None, bits: int) -> Tensor:
        assert at_OG is not None
        at_OG = at_OG.clamp_(max=max(self.scale_Γ.numel() - 1, 0))
        scale_OG = self.scale_Γ[at_OG].float()
        zero_OG = torch.full_like(scale_OG, 2 ** (bits - 1)) if self.zero_Γ is None else self.zero_Γ[at_OG].float()
        return on_groups(code_OK, scale_OG, zero_OG, self.group_size)

    def rows(self, start: int, end: int) -> UniformGrid:
        return self

    def bound(self, bits: int) -> float:
        return largest(self.scale_Γ) * 2**bits

    def operands(self) -> GridOperands:
        return GridOperands(self.group_size, self.scale_Γ, self.zero_Γ)


@family
@dataclass(frozen=True)
class PackedInt(QuantizedLayout):
    """`codes uint8` (each row starts at a byte), `scale [Γ]`, `zero uint8` (one stream of Γ codes), `shape int64 [2]`, and
    perhaps `order [I]`.

    Groups are numbered row after row. `zero` is there unless the grid is symmetric.
    """

    bits: int
    group_size: int
    symmetric: bool
    dtype: torch.dtype

    name: ClassVar[str] = "packed-int"
    parts: ClassVar[tuple[str, ...]] = ("codes", "scale", "zero", "shape", "order")
    has_outliers: ClassVar[bool] = False
    choices: ClassVar[Mapping[str, Sequence[Any]]] = {"bits": BITS, "group_size": SIZES, "symmetric": (True, False)}

    def pack_codes(self, codes: Uniform, rows: Rows) -> dict[str, Tensor]:
        groups = rows.groups(self.group_size)
        parts = {"codes": rows.pack(codes.code_OK, self.bits), "scale": groups.flatten(codes.scale_OG)}
        if codes.zero_OG is not None:
            parts["zero"] = pack_stream(groups.flatten(codes.zero_OG), self.bits)
        return parts

    def unpack_codes(self, grid: UniformGrid, code_OK: Tensor, rows: Rows) -> Uniform:
        groups = rows.groups(self.group_size)
        zero_OG = None if grid.zero_Γ is None else groups.spread(grid.zero_Γ)
        return Uniform(self.bits, self.group_size, code_OK, groups.spread(grid.scale_Γ), zero_OG)

    def read_grid(self, tensors: Mapping[str, Tensor], rows: Rows) -> UniformGrid:
        check_parts(tensors, {"codes": is_stream, "scale": is_half_vector})
        total = rows.groups(self.group_size).total
        if tensors["scale"].numel() != total:
            raise ValueError(f"its scale has {tensors['scale'].numel()} values for {total} groups")
        check_finite(tensors, "scale")
        if total and tensors["scale"].min() <= 0:
            raise ValueError("its scale holds values that are not positive")
        if self.symmetric and "zero" in tensors:
            raise ValueError("it has a zero part, but the config says that it is symmetric")
        zero_Γ = None
        if not self.symmetric:
            check_parts(tensors, {"zero": is_stream})
            zero_Γ = unpack_stream(tensors["zero"], self.bits, total, "zero")
        return UniformGrid(self.group_size, tensors["scale"].clone(), zero_Γ)

    def store_grid(self, grid: UniformGrid) -> dict[str, Tensor]:
        parts = {"scale": grid.scale_Γ}
        if grid.zero_Γ is not None:
            parts["zero"] = pack_stream(grid.zero_Γ, self.bits)
        return parts
