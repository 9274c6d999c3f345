"""The layout `packed-int`: integer codes, and a scale (and a zero point) for each group of a row.

Γ: groups of all rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from secateur.core.quantized import BITS, Codes, Uniform
from secateur.formats.layouts.coded import (
    QuantizedLayout,
    Rows,
    check_finite,
    is_half_vector,
    is_stream,
    pack_stream,
    read_choice,
    read_size,
    unpack_stream,
)
from secateur.formats.layouts.layout import DTYPES, check_parts, layout
from secateur.kernels.packed import UniformGrid


@layout
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

    def pack_codes(self, codes: Codes, rows: Rows) -> dict[str, Tensor]:
        if not isinstance(codes, Uniform) or (codes.bits, codes.group_size) != (self.bits, self.group_size):
            raise ValueError(f"its codes are not of {self.bits} bits in groups of {self.group_size}")
        groups = rows.groups(self.group_size)
        parts = {"codes": rows.pack(codes.code_OK, self.bits), "scale": groups.flatten(codes.scale_OG)}
        if codes.zero_OG is not None:
            parts["zero"] = pack_stream(groups.flatten(codes.zero_OG), self.bits)
        return parts

    def unpack_codes(self, tensors: Mapping[str, Tensor], rows: Rows) -> Uniform:
        grid = self.read_grid(tensors, rows)
        groups = rows.groups(self.group_size)
        zero_OG = None if grid.zero_Γ is None else groups.spread(grid.zero_Γ)
        code_OK = rows.unpack(tensors["codes"], self.bits, "codes")
        return Uniform(self.bits, self.group_size, code_OK, groups.spread(grid.scale_Γ), zero_OG)

    def read_grid(self, tensors: Mapping[str, Tensor], rows: Rows) -> UniformGrid:
        check_parts(tensors, {"codes": is_stream, "scale": is_half_vector})
        total = rows.groups(self.group_size).total
        if tensors["scale"].numel() != total:
            raise ValueError(f"its scale has {tensors['scale'].numel()} values for {total} groups")
        check_finite(tensors, "scale")
        if (tensors["scale"] <= 0).any():
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

    def to_config(self) -> dict[str, Any]:
        return {
            "layout": self.name,
            "bits": self.bits,
            "group_size": self.group_size,
            "symmetric": self.symmetric,
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> PackedInt:
        return cls(
            read_choice(config, "bits", BITS),
            read_size(config, "group_size"),
            read_choice(config, "symmetric", (True, False)),
            DTYPES[read_choice(config, "dtype", DTYPES)],
        )
