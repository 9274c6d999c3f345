"""QMoE: "Practical Sub-1-Bit Compression of Trillion-Parameter Models", Frantar & Alistarh 2023, arXiv:2310.16795.

Every weight becomes zero, the least or the greatest weight of its row (section 3.2): far from any of these, most become zero,
and codes for sequences of them take less than a bit a weight. What its own models were, whose experts are far too many for
their task, other models are not: with `search_range` the two values are those of least squared error, and fewer weights zero.

O: output features, I: input features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from secateur.core.damping import damping_option, number
from secateur.core.options import check_options, option
from secateur.core.pruned import Pruned
from secateur.core.quantized import Quantized
from secateur.core.registry import quantizer
from secateur.core.stack import Stack
from secateur.core.stats import Level
from secateur.formats.layouts.ternary_dict import TernaryCodes
from secateur.quant.error_feedback import carry_error
from secateur.quant.grid import weight_range
from secateur.quant.storage import storage_dtype
from secateur.solvers.ternary_dictionary import HIGH, LOW, ZERO

# Shares of a row's least and greatest weight that are tried.
_SHARES = tuple(1 - 0.05 * step for step in range(17))


@dataclass(frozen=True)
class FittedRows:
    """The two values beside zero of every row, float32."""

    low_O: Tensor
    high_O: Tensor

    def at(self, column: int) -> FittedRows:
        """Those of a column: all have these."""
        return self

    def symbols(self, w: Tensor) -> Tensor:
        """Which of the three is nearest, for weights whose last dimension is that of rows; uint8."""
        symbol = torch.where(w > self.high_O / 2, HIGH, ZERO)
        return torch.where(w < self.low_O / 2, LOW, symbol).to(torch.uint8)

    def round(self, w: Tensor, levels: int) -> Tensor:
        """The nearest of the three; how many there are is known."""
        found = torch.where(w > self.high_O / 2, self.high_O, 0)
        return torch.where(w < self.low_O / 2, self.low_O, found)


@dataclass(frozen=True)
class TernaryGrid:
    """Grids as `quant.grid.Grid` makes them, of three values that a whole row has.

    Attributes:
        group_size: weights of a row.
        search_range: see `Ternary`.
        half: the dtype that values are stored in.
    """

    group_size: int
    search_range: bool
    half: torch.dtype
    levels: ClassVar[int] = 2

    def fit(self, w_IO: Tensor, importance_IO: Tensor | None = None) -> FittedRows:
        """The values of every row: see `Grid.fit`."""
        low_O, high_O = weight_range(w_IO, importance_IO)
        best = self._stored(low_O, high_O)
        if not self.search_range:
            return best
        importance = torch.ones(()) if importance_IO is None else importance_IO
        least_O = torch.full_like(low_O, torch.inf)
        for share in _SHARES:
            tried = self._stored(low_O * share, high_O * share)
            error_O = tried.round(w_IO, 2).sub_(w_IO).square_().mul_(importance).sum(0)
            better_O = error_O < least_O
            least_O = torch.where(better_O, error_O, least_O)
            best = FittedRows(
                torch.where(better_O, tried.low_O, best.low_O), torch.where(better_O, tried.high_O, best.high_O)
            )
        return best

    def _stored(self, low_O: Tensor, high_O: Tensor) -> FittedRows:
        return FittedRows(low_O.to(self.half).float(), high_O.to(self.half).float())

    def assemble(self, fitted: list[FittedRows], W_OK: Tensor, first: int, last: int) -> TernaryCodes:
        """The codes of weights, rows `first` to `last` of those that the values were fitted for."""
        rows = FittedRows(fitted[0].low_O[first:last], fitted[0].high_O[first:last])
        return TernaryCodes(rows.symbols(W_OK.T).T.contiguous(), rows.low_O.to(self.half), rows.high_O.to(self.half))


@quantizer
@dataclass(frozen=True)
class Ternary:
    """Round to zero, the least or the greatest weight of a row, and let the columns still to come make up for the error."""

    search_range: bool = option(False, "Values of each row by squared error, not its least and greatest weight.")
    order: str = option("natural", "Order in which columns are rounded.", choices=("natural", "activation"))
    damping: float | str = damping_option(0.1)

    name: ClassVar[str] = "ternary"
    paper: ClassVar[str] = "Frantar & Alistarh 2023, arXiv:2310.16795"
    bits: ClassVar[int] = 2
    all_bits: ClassVar[tuple[int, ...]] = ()
    level: ClassVar[Level] = Level.GRAM
    needs_fisher: ClassVar[bool] = False
    unpruned: ClassVar[str] = "its codes have zeros of their own; leave one of them out, or quantize by gptq or spqr"

    def __post_init__(self) -> None:
        check_options(self)

    def quantize(self, stack: Stack, pruned: Pruned | None = None) -> list[Quantized]:
        """Round the weights, carrying on the error.

        Raises:
            ValueError: a weight or the statistics are not finite, or the weights were pruned.
        """
        if pruned is not None:
            raise ValueError(f"ternary does not go with pruned weights: {self.unpruned}")
        if not torch.isfinite(stack.W_OI).all():
            raise ValueError("ternary cannot round the weights: some are not finite")
        grid: Any = TernaryGrid(stack.features, self.search_range, storage_dtype(stack.W_OI, stack.dtype))
        return carry_error(stack, grid, self.order, number(self.damping), None)
