"""Grids whose scales and zero points are quantized themselves (SpQR, Dettmers et al. 2023, arXiv:2306.03078, section 4.2).

O: output features, T: tiles of consecutive rows, P: rows of a tile, K: weights stored of a row, G: groups of a row, S: weights
of one group.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from secateur.formats.layouts.two_level_int import TwoLevel
from secateur.quant.grid import SHARES, Fitted, best_of, encode, groups_of_rows, inverse, weight_range


@dataclass(frozen=True)
class TwoLevelGrid:
    """For each group, scale and zero point as codes on grids that a tile of rows shares. The zero point need not be whole.

    Attributes:
        bits, group_size, search_range, half: as in `Grid`.
        scale_bits: of the codes of scales and zero points.
        tile_rows: rows of a tile.
        sizes: rows of each of the stacked linears: no tile has rows of two.
    """

    bits: int
    group_size: int
    scale_bits: int
    tile_rows: int
    search_range: bool
    half: torch.dtype
    sizes: tuple[int, ...]

    @property
    def levels(self) -> int:
        return 2**self.bits - 1

    @cached_property
    def _row_TP(self) -> Tensor:
        """The rows of each tile; a tile that is short names its last row again."""
        tiles = []
        first = 0
        for size in self.sizes:
            tiles += [
                torch.arange(row, row + self.tile_rows).clamp_(max=first + size - 1)
                for row in range(first, first + size, self.tile_rows)
            ]
            first += size
        return torch.stack(tiles)

    @cached_property
    def _tile_O(self) -> Tensor:
        tile_O = torch.empty(sum(self.sizes), dtype=torch.int64)
        tile_O[self._row_TP] = torch.arange(len(self._row_TP))[:, None]
        return tile_O

    def fit(self, w_SO: Tensor, importance_SO: Tensor | None = None) -> Fitted:
        """The grid for a group of every row: see `Grid.fit`. A row in which nothing counts has no say in that of its tile."""
        low_O, high_O = weight_range(w_SO, importance_SO)
        counts_O = high_O > low_O
        middle_O, width_O = (low_O + high_O) / 2, high_O - low_O
        if self.search_range:
            wanted_O = best_of(self._shrunk(middle_O, width_O), w_SO, importance_SO, self.levels).scale_O
        else:
            wanted_O = width_O / self.levels
        scale_grid_T2 = self._grid(wanted_O, counts_O)
        scale_code_O = self._codes(wanted_O, scale_grid_T2)
        # Where the nearest scale is far too small, most of the group would be cut off: then the next one.
        small_O = (self._values(scale_code_O, scale_grid_T2) < wanted_O / 2) & (scale_code_O < 2**self.scale_bits - 1)
        scale_code_O += small_O
        scale_O = self._values(scale_code_O, scale_grid_T2)
        zero_grid_T2 = self._grid(self._zero(middle_O, scale_O), counts_O & (scale_O > 0))
        second_T4 = torch.cat([scale_grid_T2, zero_grid_T2], 1)

        def with_scale(scale_code_O: Tensor) -> Fitted:
            scale_O = self._values(scale_code_O, scale_grid_T2)
            zero_code_O = self._codes(self._zero(middle_O, scale_O), zero_grid_T2)
            return Fitted(scale_O, self._values(zero_code_O, zero_grid_T2), scale_code_O, zero_code_O, second_T4)

        if not self.search_range:
            return with_scale(scale_code_O)
        # The scales that the tile offers are few: try them all.
        tried = (with_scale(torch.full_like(scale_O, code)) for code in range(2**self.scale_bits))
        return best_of(tried, w_SO, importance_SO, self.levels)

    def _shrunk(self, middle_O: Tensor, width_O: Tensor) -> Iterator[Fitted]:
        for share in SHARES:
            scale_O = width_O * (share / self.levels)
            yield Fitted(scale_O, self._zero(middle_O, scale_O))

    def _zero(self, middle_O: Tensor, scale_O: Tensor) -> Tensor:
        """The zero point that puts the middle of the range in the middle of the grid, as far as zero is near the grid.

        A scale that is no match for its range would put it anywhere, and spoil the zero points of the whole tile.
        """
        zero_O = self.levels / 2 - middle_O * inverse(scale_O)
        return zero_O.clamp_(-self.levels, 2 * self.levels)

    def _grid(self, x_O: Tensor, counts_O: Tensor) -> Tensor:
        """Step and least value, for each tile, of a grid over those of its rows' values that count."""
        low_TP, high_TP = (torch.where(counts_O, x_O, missing)[self._row_TP] for missing in (torch.inf, -torch.inf))
        low_T, high_T = low_TP.amin(1), high_TP.amax(1)
        some_T = high_T >= low_T
        low_T, high_T = torch.where(some_T, low_T, 0), torch.where(some_T, high_T, 0)
        low_T = low_T.to(self.half).float()
        step_T = ((high_T - low_T) / (2**self.scale_bits - 1)).clamp_(min=0)
        return torch.stack([step_T.to(self.half).float(), low_T], 1)

    def _codes(self, x_O: Tensor, grid_T2: Tensor) -> Tensor:
        step_O, low_O = grid_T2[self._tile_O].unbind(1)
        code_O = torch.where(step_O > 0, (x_O - low_O) / step_O, 0)
        return code_O.round_().clamp_(0, 2**self.scale_bits - 1)

    def _values(self, code_O: Tensor, grid_T2: Tensor) -> Tensor:
        step_O, low_O = grid_T2[self._tile_O].unbind(1)
        return low_O + step_O * code_O

    def assemble(self, fitted: list[Fitted], W_OK: Tensor, first: int, last: int) -> TwoLevel:
        """The codes of weights, rows `first` to `last` of those that the groups were fitted for: whole linears."""
        scale_OG = groups_of_rows([f.scale_O for f in fitted], first, last)
        zero_OG = groups_of_rows([f.zero_O for f in fitted], first, last)
        scale_code_OG = groups_of_rows([f.scale_code_O for f in fitted if f.scale_code_O is not None], first, last)
        zero_code_OG = groups_of_rows([f.zero_code_O for f in fitted if f.zero_code_O is not None], first, last)
        tiles = slice(int(self._tile_O[first]), int(self._tile_O[last - 1]) + 1)
        return TwoLevel(
            self.bits,
            self.group_size,
            self.scale_bits,
            self.tile_rows,
            encode(W_OK, scale_OG, zero_OG, self.group_size, self.levels),
            scale_code_OG.to(torch.uint8),
            zero_code_OG.to(torch.uint8),
            torch.stack([f.second_T4[tiles] for f in fitted if f.second_T4 is not None], 1).to(self.half),
        )
