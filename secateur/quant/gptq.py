"""GPTQ: "Accurate Post-Training Quantization for Generative Pre-trained Transformers", Frantar et al. 2022, arXiv:2210.17323.

O: output features, I: input features (columns, in the order in which they are stored), S: those of one group, K: weights stored
of a row, G: groups of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from secateur.calibration.stats import InputStats, Level
from secateur.codes import BITS, Outliers, Quantized
from secateur.errors import UsageError
from secateur.prune.registry import Pruned
from secateur.quant.grid import ROW, Fitted, Grid, check_bits, check_group_size, inverse
from secateur.quant.groups import fit_groups, stored_rows
from secateur.quant.registry import quantizer, storage_dtype
from secateur.quant.two_level import TwoLevelGrid
from secateur.sweep import DAMPING, calibration_notes, inverse_cholesky, sweep

ORDERS = ("natural", "activation", "permuted")


@quantizer
@dataclass(frozen=True)
class GPTQ:
    """Round column by column, and let the columns still to come make up for the error (algorithm 1).

    Attributes:
        bits, group_size, symmetric, search_range: see `Grid`; a `group_size` of `row` is a whole row.
        order: of the columns, see `carry_error`.
        damping: λ of `inverse_cholesky`.
    """

    bits: int = 4
    group_size: int | str = 64
    symmetric: bool = False
    search_range: bool = True
    order: str = "activation"
    damping: float = DAMPING

    name: ClassVar[str] = "gptq"
    all_bits: ClassVar[tuple[int, ...]] = BITS
    level: ClassVar[Level] = Level.GRAM
    needs_fisher: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_bits(self.bits)
        check_group_size(self.group_size)
        check_order(self.order)
        check_damping(self.damping)

    def solve(
        self,
        W_OI: Tensor,
        stats: InputStats,
        sizes: Sequence[int],
        dtype: torch.dtype,
        pruned: Pruned | None = None,
        fisher_OI: Tensor | None = None,
    ) -> list[Quantized]:
        """Round the weights, carrying on the error; with a mask also that of what it removes.

        With `pruned` a column is pruned and rounded at once, and the sum of both errors is carried on (Frantar & Alistarh
        2023, arXiv:2301.00774, section 3.5). The grids are those of the weights that the pruner left.
        """
        grid = Grid(
            self.bits,
            W_OI.shape[1] if self.group_size == ROW else int(self.group_size),
            self.symmetric,
            self.search_range,
            storage_dtype(W_OI, dtype),
        )
        return carry_error(W_OI, stats, sizes, dtype, grid, self.order, self.damping, pruned)


def check_order(order: str) -> None:
    """Raise UsageError unless columns can be taken in this order."""
    if order not in ORDERS:
        raise UsageError(f"--order {order} is not known: it can be {', '.join(ORDERS)}")


def check_damping(damping: float) -> None:
    """Raise UsageError unless the damping is a positive number."""
    if not 0 < damping < 1e4:
        raise UsageError(
            f"--damping {damping:g} is not possible: give a positive share of the mean diagonal, like 0.01"
        )


def carry_error(
    W_OI: Tensor,
    stats: InputStats,
    sizes: Sequence[int],
    dtype: torch.dtype,
    grid: Grid | TwoLevelGrid,
    order: str,
    damping: float,
    pruned: Pruned | None,
    threshold: float | None = None,
) -> list[Quantized]:
    """Round stacked linears on a grid, column by column, the columns still to come making up for the error.

    Args:
        W_OI, stats, sizes, dtype, pruned: see `Quantizer.solve`.
        grid: that each group is rounded on.
        order: `natural`: the columns as they are, a group's grid fitted when it is reached. `activation`: by falling energy
            of their inputs; groups are of neighbouring columns all the same, and fitted before ("static groups"). `permuted`:
            by falling energy, and groups are of columns next to each other in that order, which has to be stored. Groups of
            kept weights end in another column in every row: with a mask all grids are fitted before.
        damping: λ of `inverse_cholesky`.
        threshold: of SpQR's outliers, relative to each linear; None for no outliers.

    Raises:
        ValueError: the statistics are not finite.
    """
    falling_I = stats.upper().diagonal().argsort(descending=True, stable=True)
    keep_OI, guide_OI = (None, W_OI) if pruned is None else (pruned.keep_OI, pruned.W_OI)
    order_I = None
    if order == "permuted":
        order_I = falling_I
        W_OI, guide_OI = W_OI[:, order_I], guide_OI[:, order_I]
        keep_OI = None if keep_OI is None else keep_OI[:, order_I]
    swept_I = falling_I if order == "activation" else torch.arange(stats.features, device=W_OI.device)
    natural = order == "natural"
    key = ("inverse", damping) if natural else ("inverse", damping, "falling")
    U_II, used = stats.once(key, lambda: inverse_cholesky(_ordered(stats, None if natural else falling_I), damping))
    pivot_I = torch.empty_like(U_II[0]).index_copy_(0, swept_I, U_II.diagonal())

    limit_O = None
    if threshold is not None:
        limits = [threshold * (W.square().mean(0) / pivot_I.square()).mean() for W in W_OI.split(list(sizes))]
        limit_O = torch.cat([limit.expand(size) for limit, size in zip(limits, sizes, strict=True)])
    rounding = _Rounding(grid, swept_I.tolist(), pivot_I, keep_OI, limit_O)
    fixed = order == "activation" or keep_OI is not None
    if fixed:
        rounding.fit_all(guide_OI)
    W_IO = W_OI.T[swept_I].contiguous()
    # With all grids fitted, nothing is to be looked at before its turn.
    sweep(W_IO, U_II, rounding, len(W_IO) if fixed else grid.group_size)
    settled_OI = torch.empty_like(W_IO).index_copy_(0, swept_I, W_IO).T.contiguous()

    notes = calibration_notes(stats, damping, used)
    found = []
    for first, last, W_OK, keep in stored_rows(settled_OI, keep_OI, sizes):
        codes = grid.assemble(rounding.fitted, W_OK, first, last)
        weight = Quantized(codes, (last - first, W_OI.shape[1]), torch.float32, keep, order_I, notes=notes)
        if rounding.outlier_IO is not None:
            outlier_OI, difference_OI = rounding.outlier_IO.T[first:last], settled_OI[first:last]
            if order_I is not None:
                outlier_OI = torch.empty_like(outlier_OI).index_copy_(1, order_I, outlier_OI)
                difference_OI = torch.empty_like(difference_OI).index_copy_(1, order_I, difference_OI)
            difference_OI = difference_OI - weight.dequantize()
            weight = replace(weight, outliers=Outliers.of(difference_OI, outlier_OI, grid.half))
        found.append(replace(weight, dtype=dtype))
    return found


def _ordered(stats: InputStats, order_I: Tensor | None) -> Tensor:
    """The Gram matrix with its inputs in an order, as `inverse_cholesky` reads it."""
    return stats.upper() if order_I is None else stats.gram()[order_I][:, order_I]


class _Rounding:
    """Rounds the columns of a sweep: `sweep.Settler`."""

    def __init__(
        self,
        grid: Grid | TwoLevelGrid,
        swept: list[int],
        pivot_I: Tensor,
        keep_OI: Tensor | None,
        limit_O: Tensor | None,
    ) -> None:
        self.grid = grid
        self.swept = swept
        self.pivot_I = pivot_I
        self.limit_O = limit_O
        self.keep_OI = keep_OI
        self.fitted: list[Fitted] = []
        self.outlier_IO: Tensor | None = None
        if limit_O is not None:
            self.outlier_IO = torch.zeros(len(swept), len(limit_O), dtype=torch.bool, device=limit_O.device)
        if keep_OI is not None:
            self.keep_IO = keep_OI.T.contiguous()
            self.group_IO = (self.keep_IO.cumsum(0, dtype=torch.int32) - 1).clamp_(min=0) // grid.group_size

    def fit_all(self, W_OI: Tensor) -> None:
        """Fit the grids of all groups to weights as they are before the sweep."""
        self.fitted = fit_groups(self._fit, self.grid.group_size, W_OI, self.keep_OI, self.pivot_I.pow(-2))
        if self.keep_OI is not None:
            self.scale_GO, self.zero_GO = (
                torch.stack(x) for x in zip(*((f.scale_O, f.zero_O) for f in self.fitted), strict=True)
            )

    def enter(self, first: int, W_SO: Tensor) -> None:
        if first == len(self.fitted) * self.grid.group_size:
            self.fitted.append(self._fit(W_SO, self.pivot_I[first : first + len(W_SO), None].pow(-2)))

    def _fit(self, w_SO: Tensor, importance_SO: Tensor | None) -> Fitted:
        assert importance_SO is not None
        if self.limit_O is not None:
            likely_SO = useful_outliers(w_SO, importance_SO, self.limit_O, self.grid.levels)
            importance_SO = torch.where(likely_SO, 0, importance_SO)
        return self.grid.fit(w_SO, importance_SO)

    def settle(self, i: int, w_O: Tensor) -> Tensor:
        column = self.swept[i]
        if self.keep_OI is None:
            fitted = self.fitted[column // self.grid.group_size]
        else:
            group_1O = self.group_IO[column].long()[None]
            fitted = Fitted(self.scale_GO.gather(0, group_1O)[0], self.zero_GO.gather(0, group_1O)[0])
        settled_O = fitted.round(w_O, self.grid.levels)
        if self.limit_O is not None and self.outlier_IO is not None:
            difference_O = w_O - settled_O
            outlier_O = (difference_O / self.pivot_I[column]).square_() > self.limit_O
            if self.keep_OI is not None:
                outlier_O &= self.keep_IO[column]
            self.outlier_IO[column] = outlier_O
            settled_O += torch.where(outlier_O, difference_O.to(self.grid.half).float(), 0)
        return settled_O if self.keep_OI is None else settled_O.mul_(self.keep_IO[column])


def useful_outliers(w_SO: Tensor, importance_SO: Tensor, limit_O: Tensor, levels: int) -> Tensor:
    """Mask of the weights without which the rest of their group is rounded with so much less error (SpQR, algorithm 1).

    What leaving a weight out saves is its own error, and, when it is the least or the greatest, what the others gain from the
    narrower range.
    """
    counted_SO = (importance_SO > 0).expand_as(w_SO)
    w_SO = torch.where(counted_SO, w_SO, 0)
    if len(w_SO) < 3:
        return torch.zeros_like(counted_SO)
    high_2O, first_2O = w_SO.topk(2, 0)
    low_2O, last_2O = w_SO.topk(2, 0, largest=False)
    low_2O, high_2O = low_2O.clamp(max=0), high_2O.clamp(min=0)

    def errors(low_O: Tensor, high_O: Tensor) -> Tensor:
        scale_O = (high_O - low_O) / levels
        zero_O = -low_O * inverse(scale_O)
        return Fitted(scale_O, zero_O).round(w_SO, levels).sub_(w_SO).square_().mul_(importance_SO)

    saved_SO = errors(low_2O[0], high_2O[0])
    total_O = saved_SO.sum(0)
    for index_O, low_O, high_O in ((last_2O[0], low_2O[1], high_2O[0]), (first_2O[0], low_2O[0], high_2O[1])):
        rest_O = errors(low_O, high_O).scatter_(0, index_O[None], 0).sum(0)
        saved_SO.scatter_(0, index_O[None], (total_O - rest_O)[None])
    return (saved_SO > limit_O) & counted_SO
