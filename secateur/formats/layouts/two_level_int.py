"""The family `spqr`: codes whose scales and zero points are codes themselves, and outliers as compressed sparse rows.

O: output features, K: stored weights of a row, T: tiles of rows, G: groups of the row with most, Γ: groups of all rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from secateur.formats.layouts.coded import HALF_DTYPES, OUTLIER_PARTS, SIZES, QuantizedLayout, check_finite, family
from secateur.formats.layouts.layout import check_parts
from secateur.formats.layouts.rows import Rows, is_stream, pack_stream, unpack_stream
from secateur.kernels.packed import Grid, GridOperands, largest, on_groups


@dataclass(frozen=True)
class TwoLevel:
    """Codes on a grid a group whose scale and zero point are themselves codes: SpQR's.

    scale = low + step · scale_code, zero = low + step · zero_code, with low and step of each for every tile of consecutive rows
    and group; w = (code − zero) · scale.

    Attributes:
        bits: of a code.
        group_size: stored weights that share a scale and zero point; the last group of a row may have fewer.
        scale_bits: of the codes of scales and zero points.
        tile_rows: rows of a tile; the last tile may have fewer.
        code_OK, scale_code_OG, zero_code_OG: uint8.
        second_TG4: step and low of the scale, step and low of the zero point, in the dtype that they are stored in.
    """

    bits: int
    group_size: int
    scale_bits: int
    tile_rows: int
    code_OK: Tensor
    scale_code_OG: Tensor
    zero_code_OG: Tensor
    second_TG4: Tensor

    def scale_and_zero(self) -> tuple[Tensor, Tensor]:
        """Both `[O, G]`, float32."""
        tile_O = torch.arange(len(self.code_OK), device=self.code_OK.device) // self.tile_rows
        step_OG, low_OG, zero_step_OG, zero_low_OG = self.second_TG4.float()[tile_O].unbind(2)
        return low_OG + step_OG * self.scale_code_OG, zero_low_OG + zero_step_OG * self.zero_code_OG

    def values(self) -> Tensor:
        """The stored weights `[O, K]`, float32."""
        return on_groups(self.code_OK, *self.scale_and_zero(), self.group_size)

    def layout(self, dtype: torch.dtype) -> SpQRLayout:
        return SpQRLayout(self.bits, self.group_size, self.scale_bits, self.tile_rows, dtype)


@dataclass(frozen=True)
class TwoLevelGrid(Grid):
    """The same, as kernels take it: scale = low + step · c and zero = low + step · d.

    Attributes:
        group_size: stored weights of a group; the last group of a row may have fewer.
        tile_rows: rows of a tile; the last tile may have fewer.
        pair_Γ: uint8 `[Γ]`, c + 16·d, where neither takes more than four bits; uint8 `[Γ, 2]`, c and d, otherwise.
        second_TG4: float16 or bfloat16: step and low of the scale, step and low of the zero point.
    """

    group_size: int
    tile_rows: int
    pair_Γ: Tensor
    second_TG4: Tensor

    def values(self, code_OK: Tensor, at_OG: Tensor | None, bits: int) -> Tensor:
        assert at_OG is not None
        O, G = at_OG.shape
        at_OG = at_OG.clamp_(max=max(len(self.pair_Γ) - 1, 0))
        c_OG, d_OG = self.codes(at_OG)
        tile_O = torch.arange(O, device=code_OK.device) // self.tile_rows
        step_OG, low_OG, zero_step_OG, zero_low_OG = self.second_TG4.float()[tile_O, :G].unbind(2)
        return on_groups(code_OK, low_OG + step_OG * c_OG, zero_low_OG + zero_step_OG * d_OG, self.group_size)

    def codes(self, at: Any = slice(None)) -> tuple[Tensor, Tensor]:
        """The codes of scales and of zero points, of some groups or all."""
        pair = self.pair_Γ[at]
        return (pair & 15, pair >> 4) if self.pair_Γ.ndim == 1 else (pair[..., 0], pair[..., 1])

    def rows(self, start: int, end: int) -> TwoLevelGrid:
        tile_O = torch.arange(start, end, device=self.pair_Γ.device) // self.tile_rows
        return replace(self, tile_rows=1, second_TG4=self.second_TG4[tile_O])

    def bound(self, bits: int) -> float:
        code = 15 if self.pair_Γ.ndim == 1 else 255
        step, low, zero_step, zero_low = (largest(x_TG) for x_TG in self.second_TG4.unbind(2))
        return (low + step * code) * (2**bits + zero_low + zero_step * code)

    def operands(self) -> GridOperands:
        return GridOperands(self.group_size, None, None, self.pair_Γ, self.second_TG4, self.tile_rows)


@family
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
        *("codes", "scale_codes", "zero_codes", "second", "shape", "order"),
        *OUTLIER_PARTS,
    )
    has_outliers: ClassVar[bool] = True
    choices: ClassVar[Mapping[str, Sequence[Any]]] = {
        "bits": range(1, 9), "group_size": SIZES, "scale_bits": range(1, 9), "tile_rows": SIZES,
    }  # fmt: skip

    def pack_codes(self, codes: TwoLevel, rows: Rows) -> dict[str, Tensor]:
        groups = rows.groups(self.group_size)
        return {
            "codes": rows.pack(codes.code_OK, self.bits),
            "scale_codes": pack_stream(groups.flatten(codes.scale_code_OG), self.scale_bits),
            "zero_codes": pack_stream(groups.flatten(codes.zero_code_OG), self.scale_bits),
            "second": codes.second_TG4[:, : groups.longest].contiguous(),
        }

    def unpack_codes(self, grid: TwoLevelGrid, code_OK: Tensor, rows: Rows) -> TwoLevel:
        groups = rows.groups(self.group_size)
        scale_code_OG, zero_code_OG = (groups.spread(code_Γ) for code_Γ in grid.codes())
        form = self.bits, self.group_size, self.scale_bits, self.tile_rows
        return TwoLevel(*form, code_OK, scale_code_OG, zero_code_OG, grid.second_TG4)

    def read_grid(self, tensors: Mapping[str, Tensor], rows: Rows) -> TwoLevelGrid:
        c_Γ, d_Γ = self._scale_codes(tensors, rows)
        pair_Γ = c_Γ | d_Γ << 4 if self.scale_bits <= 4 else torch.stack((c_Γ, d_Γ), 1)
        return TwoLevelGrid(self.group_size, self.tile_rows, pair_Γ, tensors["second"].clone())

    def store_grid(self, grid: TwoLevelGrid) -> dict[str, Tensor]:
        c_Γ, d_Γ = grid.codes()
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
