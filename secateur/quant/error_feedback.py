"""Rounding the columns of a weight one after the other, those still to come making up for the error: GPTQ's and SpQR's loop.

O: output features, I: input features (columns, in the order in which they are stored), S: those of one group, K: weights stored
of a row, G: groups of a row.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from secateur.core.pruned import Pruned
from secateur.core.quantized import Outliers, Quantized
from secateur.core.stack import Stack
from secateur.quant.bank_grid import BankGrid
from secateur.quant.block_grid import BlockGrid
from secateur.quant.grid import Fitted, Grid, inverse
from secateur.quant.groups import fit_groups, stored_rows
from secateur.quant.two_level import TwoLevelGrid
from secateur.solvers.column_sweep import sweep


def carry_error(
    stack: Stack,
    grid: Grid | TwoLevelGrid | BlockGrid | BankGrid,
    order: str,
    damping: float,
    pruned: Pruned | None,
    threshold: float | None = None,
    stored_I: Tensor | None = None,
) -> list[Quantized]:
    """Round stacked linears on a grid, column by column, the columns still to come making up for the error.

    Args:
        stack, pruned: see `Quantizer.quantize`.
        grid: that each group is rounded on.
        order: `natural`: the columns as they are, a group's grid fitted when it is reached. `activation`: by falling energy
            of their inputs; groups are of neighbouring columns all the same, and fitted before ("static groups"). `permuted`:
            by falling energy, and groups are of columns next to each other in that order, which has to be stored. Groups of
            kept weights end in another column in every row: with a mask all grids are fitted before.
        damping: λ of `inverse_cholesky`.
        threshold: of SpQR's outliers, relative to each linear; None for no outliers.
        stored_I: with order `activation`, the input of each column as it is stored, where that is an order of its own.

    Raises:
        ValueError: the statistics are not finite.
    """
    W_OI, falling_I = stack.W_OI, stack.falling_I
    keep_OI, guide_OI = (None, W_OI) if pruned is None else (pruned.keep_OI, pruned.W_OI)
    order_I = falling_I if order == "permuted" else stored_I
    if order_I is not None:
        W_OI, guide_OI = W_OI[:, order_I], guide_OI[:, order_I]
        keep_OI = None if keep_OI is None else keep_OI[:, order_I]
    swept_I = torch.arange(stack.features, device=W_OI.device)
    if order == "activation":
        swept_I = falling_I if stored_I is None else stored_I.argsort()[falling_I]
    U_II, used = stack.inverse(damping, falling=order != "natural")
    pivot_I = torch.empty_like(U_II[0]).index_copy_(0, swept_I, U_II.diagonal())

    limit_O = None if threshold is None else _outlier_limits(stack, W_OI, pivot_I, threshold)
    rounding = _Rounding(grid, swept_I.tolist(), pivot_I, keep_OI, limit_O)
    fixed = order == "activation" or keep_OI is not None
    if fixed:
        rounding.fit_all(guide_OI)
    W_IO = W_OI.T[swept_I].contiguous()
    # With all grids fitted, nothing is to be looked at before its turn.
    sweep(W_IO, U_II, rounding, len(W_IO) if fixed else grid.group_size)
    settled_OI = torch.empty_like(W_IO).index_copy_(0, swept_I, W_IO).T.contiguous()

    notes = stack.notes(damping, used)
    found = []
    for first, last, W_OK, keep in stored_rows(settled_OI, keep_OI, stack.rows):
        codes = grid.assemble(rounding.fitted, W_OK, first, last)
        weight = Quantized(codes, (last - first, W_OI.shape[1]), torch.float32, keep, order_I, notes=notes)
        if rounding.outlier_IO is not None:
            outliers = _outliers(weight, rounding.outlier_IO.T[first:last], settled_OI[first:last], grid.half)
            weight = replace(weight, outliers=outliers)
        found.append(replace(weight, dtype=stack.dtype))
    return found


def _outlier_limits(stack: Stack, W_OI: Tensor, pivot_I: Tensor, threshold: float) -> Tensor:
    """Of each row the error from which a weight is an outlier: a multiple of the mean over its linear."""
    limits = [threshold * (W.square().mean(0) / pivot_I.square()).mean() for W in stack.split(W_OI)]
    return torch.cat([limit.expand(size) for limit, size in zip(limits, stack.rows, strict=True)])


def _outliers(weight: Quantized, outlier_OI: Tensor, settled_OI: Tensor, dtype: torch.dtype) -> Outliers:
    """What has to be added to some weights for them to be as they were settled; the columns of both are as they are stored."""
    if weight.order_I is not None:
        outlier_OI = torch.empty_like(outlier_OI).index_copy_(1, weight.order_I, outlier_OI)
        settled_OI = torch.empty_like(settled_OI).index_copy_(1, weight.order_I, settled_OI)
    return Outliers.of(settled_OI - weight.dequantize(), outlier_OI, dtype)


class _Rounding:
    """Rounds the columns of a sweep: `sweep.Settler`."""

    def __init__(
        self,
        grid: Grid | TwoLevelGrid | BlockGrid | BankGrid,
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
        self.fitted: list[Any] = []  # as the grid fits them
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

    def _fit(self, w_SO: Tensor, importance_SO: Tensor | None) -> Any:
        assert importance_SO is not None
        if self.limit_O is not None:
            likely_SO = useful_outliers(w_SO, importance_SO, self.limit_O, self.grid.levels)
            importance_SO = torch.where(likely_SO, 0, importance_SO)
        return self.grid.fit(w_SO, importance_SO)

    def settle(self, i: int, w_O: Tensor) -> Tensor:
        column = self.swept[i]
        if self.keep_OI is None:
            group, within = divmod(column, self.grid.group_size)
            fitted = self.fitted[group].at(within)
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
