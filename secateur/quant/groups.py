"""The groups of a weight's stored columns, and the rows of stacked linears.

O: output features, I: input features, K: weights stored of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from torch import Tensor

from secateur.core.quantized import take_kept

_Fitted = TypeVar("_Fitted")


def fit_groups(
    fit: Callable[[Tensor, Tensor | None], _Fitted],
    group_size: int,
    W_OI: Tensor,
    keep_OI: Tensor | None,
    importance_I: Tensor | None = None,
) -> list[_Fitted]:
    """The grid of every group of the weights that are stored, before any is rounded.

    Args:
        fit: given a group of every row and what each weight counts, see `Grid.fit`.
        group_size: stored weights of a group.
        W_OI: weights, columns in the order in which they are stored.
        keep_OI: bool, which are stored; None for all.
        importance_I: what the squared error of an input's weights counts; None: all the same.
    """
    if keep_OI is None:
        W_KO, importance_KO = W_OI.T, None if importance_I is None else importance_I[:, None]
    else:
        W_KO = take_kept(W_OI, keep_OI).T
        importance_OI = (W_OI.new_ones(()) if importance_I is None else importance_I).expand(W_OI.shape)
        importance_KO = take_kept(importance_OI, keep_OI).T
    return [
        fit(
            W_KO[start : start + group_size].contiguous(),
            None if importance_KO is None else importance_KO[start : start + group_size],
        )
        for start in range(0, len(W_KO), group_size)
    ]


def stored_rows(
    W_OI: Tensor, keep_OI: Tensor | None, sizes: Sequence[int]
) -> Iterator[tuple[int, int, Tensor, Tensor | None]]:
    """For each of the stacked linears: its first and last row, its stored weights `[O, K]`, and its mask."""
    W_OK = W_OI if keep_OI is None else take_kept(W_OI, keep_OI)
    first = 0
    for size in sizes:
        last = first + size
        yield first, last, W_OK[first:last], None if keep_OI is None else keep_OI[first:last]
        first = last
