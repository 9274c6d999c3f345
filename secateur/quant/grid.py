"""Uniform grids: 2^bits levels, with a scale and a zero point for each group of consecutive weights of a row.

O: output features, I: input features, K: weights stored of a row, G: groups of a row, S: weights of one group (the first
dimension: transposed, so that what is computed for all rows at once is contiguous).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from secateur.core.stack import Stack
from secateur.formats.layouts.packed_int import Uniform
from secateur.quant.storage import storage_dtype

# The ranges that a search tries, as shares of the whole one.
SHARES = tuple(1 - 0.05 * step for step in range(14))
ROW = "row"


@dataclass(frozen=True)
class Fitted:
    """The grid of one group in every row, float32 (`second_T4`: as it is stored).

    Attributes:
        scale_O, zero_O: w ≈ (code − zero) · scale. Where the scale is 0 the group stands for zeros.
        scale_code_O, zero_code_O, second_T4: what they are made of in two levels, see `codes.TwoLevel`.
        inverse_O: see `inverse`.
    """

    scale_O: Tensor
    zero_O: Tensor
    scale_code_O: Tensor | None = None
    zero_code_O: Tensor | None = None
    second_T4: Tensor | None = None
    inverse_O: Tensor = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "inverse_O", inverse(self.scale_O))

    def at(self, column: int) -> Fitted:
        """The grid of a column of the group: all have this one."""
        return self

    def round(self, w: Tensor, levels: int) -> Tensor:
        """What the nearest of the levels 0 to `levels` stand for."""
        code = nearest(w, self.inverse_O, self.zero_O, levels)
        return code.sub_(self.zero_O).mul_(self.scale_O)


def inverse(scale: Tensor) -> Tensor:
    """1 / scale; 0 where the scale is 0, or so small that this would overflow."""
    return torch.where(scale >= torch.finfo(scale.dtype).tiny, 1 / scale, 0)


def nearest(w: Tensor, inverse_scale: Tensor, zero: Tensor, levels: int) -> Tensor:
    """round(w / scale + zero) from 0 to `levels`, as float32; the zero point alone where the inverse of the scale is 0."""
    return (w * inverse_scale).add_(zero).round_().clamp_(0, levels)


def weight_range(w_SO: Tensor, importance_SO: Tensor | None) -> tuple[Tensor, Tensor]:
    """The least and the greatest of the weights that have any importance and of zero, in every row."""
    if importance_SO is not None:
        w_SO = torch.where(importance_SO > 0, w_SO, 0)
    return w_SO.amin(0).clamp_(max=0), w_SO.amax(0).clamp_(min=0)


def squared_error(fitted: Fitted, w_SO: Tensor, importance_SO: Tensor | None, levels: int) -> Tensor:
    """Σ importance · (ŵ − w)² of each row."""
    error_SO = fitted.round(w_SO, levels).sub_(w_SO).square_()
    return (error_SO if importance_SO is None else error_SO.mul_(importance_SO)).sum(0)


def best_of(tried: Iterator[Fitted], w_SO: Tensor, importance_SO: Tensor | None, levels: int) -> Fitted:
    """The row-wise best of several fits by squared error."""
    best = next(tried)
    least_O = squared_error(best, w_SO, importance_SO, levels)
    for fitted in tried:
        error_O = squared_error(fitted, w_SO, importance_SO, levels)
        better_O = error_O < least_O
        least_O = torch.where(better_O, error_O, least_O)
        best = Fitted(
            torch.where(better_O, fitted.scale_O, best.scale_O),
            torch.where(better_O, fitted.zero_O, best.zero_O),
            _either(better_O, fitted.scale_code_O, best.scale_code_O),
            _either(better_O, fitted.zero_code_O, best.zero_code_O),
            best.second_T4,
        )
    return best


def _either(first_O: Tensor, one_O: Tensor | None, other_O: Tensor | None) -> Tensor | None:
    return None if one_O is None or other_O is None else torch.where(first_O, one_O, other_O)


class HasGrid(Protocol):
    """A method with the options of `grid_options`."""

    @property
    def bits(self) -> int: ...

    @property
    def group_size(self) -> int | str: ...

    @property
    def symmetric(self) -> bool: ...

    @property
    def search_range(self) -> bool: ...


@dataclass(frozen=True)
class Grid:
    """One scale and zero point a group, stored as they are.

    Attributes:
        bits: 2 to 8.
        group_size: stored weights that share a scale.
        symmetric: the zero point lies in the middle and is not stored. Else the grid runs from the least to the greatest
            weight, and its zero point is an integer.
        search_range: choose the range of least squared error instead of the whole one.
        half: the dtype that scales are stored in.
    """

    bits: int
    group_size: int
    symmetric: bool
    search_range: bool
    half: torch.dtype

    @classmethod
    def of(cls, method: HasGrid, stack: Stack) -> Grid:
        """The grid that a method's options ask for; a group size of `row` is a whole row."""
        size = stack.features if method.group_size == ROW else int(method.group_size)
        half = storage_dtype(stack.W_OI, stack.dtype)
        return cls(method.bits, size, method.symmetric, method.search_range, half)

    @property
    def levels(self) -> int:
        return 2**self.bits - 1

    def fit(self, w_SO: Tensor, importance_SO: Tensor | None = None) -> Fitted:
        """The grid for a group of every row.

        Args:
            w_SO: float32.
            importance_SO: what the squared error of each weight counts (or `[S, 1]`); 0: the grid is not for this weight.
        """
        low_O, high_O = weight_range(w_SO, importance_SO)
        if not self.search_range:
            return self._fit(low_O, high_O)
        tried = (self._fit(low_O * share, high_O * share) for share in SHARES)
        return best_of(tried, w_SO, importance_SO, self.levels)

    def _fit(self, low_O: Tensor, high_O: Tensor) -> Fitted:
        if self.symmetric:
            largest_O = torch.maximum(-low_O, high_O)
            low_O, high_O = -largest_O, largest_O
        scale_O = ((high_O - low_O) / self.levels).to(self.half).float()
        # A group of zeros, or of weights so small that no scale of this dtype is as small.
        scale_O = torch.where(inverse(scale_O) > 0, scale_O, 1)
        if self.symmetric:
            return Fitted(scale_O, torch.full_like(scale_O, (self.levels + 1) // 2))
        return Fitted(scale_O, (-low_O / scale_O).round_().clamp_(0, self.levels))

    def assemble(self, fitted: list[Fitted], W_OK: Tensor, first: int, last: int) -> Uniform:
        """The codes of weights, rows `first` to `last` of those that the groups were fitted for."""
        scale_OG = groups_of_rows([f.scale_O for f in fitted], first, last)
        zero_OG = groups_of_rows([f.zero_O for f in fitted], first, last)
        code_OK = encode(W_OK, scale_OG, zero_OG, self.group_size, self.levels)
        zero = None if self.symmetric else zero_OG.to(torch.uint8)
        return Uniform(self.bits, self.group_size, code_OK, scale_OG.to(self.half), zero)


def encode(W_OK: Tensor, scale_OG: Tensor, zero_OG: Tensor, group_size: int, levels: int) -> Tensor:
    """The codes of stored weights, uint8."""
    K = W_OK.shape[1]
    size = min(group_size, K)
    inverse_OK, zero_OK = (x_OG.repeat_interleave(size, 1)[:, :K] for x_OG in (inverse(scale_OG), zero_OG))
    return nearest(W_OK, inverse_OK, zero_OK, levels).to(torch.uint8)


def groups_of_rows(x_GO: list[Tensor], first: int, last: int) -> Tensor:
    """What was fitted group by group, for some rows: `[O, G]`."""
    return torch.stack([x_O[first:last] for x_O in x_GO], 1)
