"""The layout `spqr`: codes whose scales and zero points are codes themselves, and outliers as compressed sparse rows.

T: tiles of rows, G: groups of the row with most, Γ: groups of all rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from secateur.core.quantized import Codes, TwoLevel
from secateur.formats.layouts.coded import (
    HALF_DTYPES,
    OUTLIER_PARTS,
    QuantizedLayout,
    Rows,
    check_finite,
    is_stream,
    pack_stream,
    read_choice,
    read_size,
    unpack_stream,
)
from secateur.formats.layouts.layout import DTYPES, check_parts, layout
from secateur.kernels.packed import TwoLevelGrid


@layout
@dataclass(frozen=True)
class SpQRLayout(QuantizedLayout):
    """`codes uint8` (each row starts at a byte), `scale_codes uint8`, `zero_codes uint8` (streams of Γ codes each), `second
    [T, G, 4]`, `shape int64 [2]`, and the outliers `outlier_count [O]`, `outlier_column [N]`, `outlier_value [N]`.
    """

    bits: int
    group_size: int
    scale_bits: int
    tile_rows: int
    dtype: torch.dtype

    name: ClassVar[str] = "spqr"
    parts: ClassVar[tuple[str, ...]] = (
        "codes",
        "scale_codes",
        "zero_codes",
        "second",
        "shape",
        "order",
        *OUTLIER_PARTS,
    )
    has_outliers: ClassVar[bool] = True

    def pack_codes(self, codes: Codes, rows: Rows) -> dict[str, Tensor]:
        form = (self.bits, self.group_size, self.scale_bits, self.tile_rows)
        if not isinstance(codes, TwoLevel) or (codes.bits, codes.group_size, codes.scale_bits, codes.tile_rows) != form:
            raise ValueError(f"its codes are not of the form {form}")
        groups = rows.groups(self.group_size)
        return {
            "codes": rows.pack(codes.code_OK, self.bits),
            "scale_codes": pack_stream(groups.flatten(codes.scale_code_OG), self.scale_bits),
            "zero_codes": pack_stream(groups.flatten(codes.zero_code_OG), self.scale_bits),
            "second": codes.second_TG4[:, : groups.longest].contiguous(),
        }

    def unpack_codes(self, tensors: Mapping[str, Tensor], rows: Rows) -> TwoLevel:
        groups = rows.groups(self.group_size)
        scale_code_OG, zero_code_OG = (groups.spread(code_Γ) for code_Γ in self._scale_codes(tensors, rows))
        return TwoLevel(
            self.bits,
            self.group_size,
            self.scale_bits,
            self.tile_rows,
            rows.unpack(tensors["codes"], self.bits, "codes"),
            scale_code_OG,
            zero_code_OG,
            tensors["second"],
        )

    def read_grid(self, tensors: Mapping[str, Tensor], rows: Rows) -> TwoLevelGrid:
        c_Γ, d_Γ = self._scale_codes(tensors, rows)
        pair_Γ = c_Γ | d_Γ << 4 if self.scale_bits <= 4 else torch.stack((c_Γ, d_Γ), 1)
        return TwoLevelGrid(self.group_size, self.tile_rows, pair_Γ, tensors["second"].clone())

    def store_grid(self, grid: TwoLevelGrid) -> dict[str, Tensor]:
        pair_Γ = grid.pair_Γ
        c_Γ, d_Γ = (pair_Γ & 15, pair_Γ >> 4) if pair_Γ.ndim == 1 else pair_Γ.unbind(1)
        return {
            "scale_codes": pack_stream(c_Γ, self.scale_bits),
            "zero_codes": pack_stream(d_Γ, self.scale_bits),
            "second": grid.second_TG4,
        }

    def _scale_codes(self, tensors: Mapping[str, Tensor], rows: Rows) -> tuple[Tensor, Tensor]:
        """The codes of the scales and of the zero points of all groups, `[Γ]` each, after all that they need was checked."""
        groups = rows.groups(self.group_size)
        shape = (-(-rows.shape[0] // self.tile_rows), groups.longest, 4)
        check_parts(
            tensors,
            {
                "codes": is_stream,
                "scale_codes": is_stream,
                "zero_codes": is_stream,
                "second": lambda t: t.shape == shape and t.dtype in HALF_DTYPES,
            },
        )
        check_finite(tensors, "second")
        total = groups.total
        return (
            unpack_stream(tensors["scale_codes"], self.scale_bits, total, "scale_codes"),
            unpack_stream(tensors["zero_codes"], self.scale_bits, total, "zero_codes"),
        )

    def to_config(self) -> dict[str, Any]:
        return {
            "layout": self.name,
            "bits": self.bits,
            "group_size": self.group_size,
            "scale_bits": self.scale_bits,
            "tile_rows": self.tile_rows,
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> SpQRLayout:
        return cls(
            read_choice(config, "bits", range(1, 9)),
            read_size(config, "group_size"),
            read_choice(config, "scale_bits", range(1, 9)),
            read_size(config, "tile_rows"),
            DTYPES[read_choice(config, "dtype", DTYPES)],
        )
