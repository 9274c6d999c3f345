"""Grids of two precisions: in each bank of weights the most important ones on a fine grid, all others on a coarse one.

O: output features, K: weights of a row, S: those of one bank (the first dimension, see `grid`), G: banks of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.formats.layouts.two_precisions import Banks, high_count
from secateur.quant.grid import Fitted, Grid, encode, groups_of_rows


@dataclass(frozen=True)
class FittedBank:
    """The grids of one bank in every row.

    Attributes:
        low, high: of both precisions.
        high_SO: bool, which weights are on the fine one.
        high_levels: of which.
    """

    low: Fitted
    high: Fitted
    high_SO: Tensor
    high_levels: int

    def at(self, column: int) -> FittedColumn:
        """The grids of a column of the bank."""
        return FittedColumn(self, self.high_SO[column])


@dataclass(frozen=True)
class FittedColumn:
    """The grids of one weight in every row."""

    bank: FittedBank
    high_O: Tensor

    def round(self, w_O: Tensor, levels: int) -> Tensor:
        """See `Fitted.round`; `levels` are those of the coarse grid."""
        bank = self.bank
        return torch.where(self.high_O, bank.high.round(w_O, bank.high_levels), bank.low.round(w_O, levels))


@dataclass(frozen=True)
class BankGrid:
    """One scale a bank for weights in low bits, and one a row for those in high bits, both with zero points in the middle.

    Attributes:
        low: of the weights in low bits; its group is a bank.
        high_bits: of the others.
        high: how many of a whole bank are.
        high_fitted: their grid, in every row.
    """

    low: Grid
    high_bits: int
    high: int
    high_fitted: Fitted

    @classmethod
    def of(cls, low: Grid, high_bits: int, high: int, W_OI: Tensor) -> BankGrid:
        """With a fine grid that reaches as far as the weights of a row do."""
        whole = Grid(high_bits, W_OI.shape[1], True, False, low.half)
        return cls(low, high_bits, high, whole.fit(W_OI.T))

    @property
    def group_size(self) -> int:
        return self.low.group_size

    @property
    def levels(self) -> int:
        return self.low.levels

    @property
    def half(self) -> torch.dtype:
        return self.low.half

    def fit(self, w_SO: Tensor, importance_SO: Tensor | None = None) -> FittedBank:
        """The grids of a bank, see `Grid.fit`: what counts most, w² · importance, is on the fine one."""
        importance_SO = torch.ones_like(w_SO) if importance_SO is None else importance_SO.expand_as(w_SO)
        count = high_count(len(w_SO), self.group_size, self.high)
        first_NO = (w_SO.square() * importance_SO).topk(count, 0).indices
        high_SO = torch.zeros_like(w_SO, dtype=torch.bool).scatter_(0, first_NO, True)
        low = self.low.fit(w_SO, importance_SO.masked_fill(high_SO, 0))
        return FittedBank(low, self.high_fitted, high_SO, 2**self.high_bits - 1)

    def assemble(self, fitted: list[FittedBank], W_OK: Tensor, first: int, last: int) -> Banks:
        """The codes of weights, see `Grid.assemble`."""
        high_OK = torch.cat([bank.high_SO for bank in fitted]).T[first:last]
        scale_OG = groups_of_rows([bank.low.scale_O for bank in fitted], first, last)
        zero_OG = groups_of_rows([bank.low.zero_O for bank in fitted], first, last)
        high_scale_O, high_zero_O = self.high_fitted.scale_O[first:last], self.high_fitted.zero_O[first:last]
        fine = high_scale_O[:, None], high_zero_O[:, None], W_OK.shape[1], 2**self.high_bits - 1
        low_code_OK = encode(W_OK, scale_OG, zero_OG, self.group_size, self.levels)
        return Banks(
            self.high_bits,
            self.low.bits,
            self.group_size,
            self.high,
            high_OK.contiguous(),
            torch.where(high_OK, encode(W_OK, *fine), low_code_OK),
            high_scale_O.to(self.half),
            scale_OG.to(self.half),
        )
