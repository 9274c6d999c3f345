"""Damping, which several methods have for an option: a number, or chosen by windows that are held out.

O: output features, R: those of one of several stacked linears, I: input features.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from secateur.core.options import option, options_of
from secateur.core.stack import Stack
from secateur.core.stats import InputStats
from secateur.solvers.inverse_cholesky import DAMPING, MAX_DAMPING

#: The word for one that is chosen; and what is tried, as shares of the Gram matrix's mean diagonal.
AUTO = "auto"
TRIED = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
# Rows of a linear that it is tried on at most: what the best damping is hangs on the inputs, which all rows share.
_ROWS = 256

_M = TypeVar("_M")


def damping_option(default: float = DAMPING) -> Any:
    """λ, which a method adds to the diagonal of the Gram matrix."""
    return option(
        default, "Share of the Gram matrix's mean diagonal added to it.", above=0, below=MAX_DAMPING, words=(AUTO,)
    )


def number(damping: float | str) -> float:
    """The damping of a method that is about to solve.

    Raises:
        ValueError: it was to be chosen, which whoever calls the method does before.
    """
    if isinstance(damping, str):
        raise ValueError(f"the damping {damping!r} has to be chosen before anything is solved: see `choose_damping`")
    return damping


def is_open(method: Any) -> bool:
    """Whether the damping of a method is to be chosen."""
    return method is not None and "damping" in options_of(method) and method.damping == AUTO


def with_damping(method: _M, damping: float) -> _M:
    """A method with a damping, where it was to be chosen."""
    return dataclasses.replace(method, damping=damping) if is_open(method) else method  # type: ignore[type-var]


def choose_damping(stack: Stack, solve: Callable[[Stack, float], Tensor]) -> list[float]:
    """For each linear of a stack the damping whose weights, found on even windows, have the least error on odd ones.

    Args:
        solve: gives new weights for the weights of a stack, by its statistics and with a damping.
    """
    halves = stack.stats.both_halves
    if halves is None:
        return [DAMPING] * len(stack.rows)
    even, odd = halves
    few = _few_rows(stack)
    best = [(torch.inf, DAMPING)] * len(stack.rows)
    for damping in TRIED:
        found_OI = solve(dataclasses.replace(few, stats=_unsolved(even)), damping)
        errors = few.split(odd.energy(found_OI.float() - few.W_OI))
        best = [
            min(known, (error_R.double().sum().item(), damping)) for known, error_R in zip(best, errors, strict=True)
        ]
    return [damping for _, damping in best]


def _few_rows(stack: Stack) -> Stack:
    """A stack of some rows of each linear, evenly spread over it."""
    kept, first = [], 0
    for size in stack.rows:
        kept.append(first + torch.arange(min(size, _ROWS)) * size // min(size, _ROWS))
        first += size
    chosen_O = torch.cat(kept).to(stack.W_OI.device)
    fisher_OI = None if stack.fisher_OI is None else stack.fisher_OI[chosen_O]
    return dataclasses.replace(stack, W_OI=stack.W_OI[chosen_O], rows=tuple(map(len, kept)), fisher_OI=fisher_OI)


def _unsolved(stats: InputStats) -> InputStats:
    """The same sums, without what solves have found out of them: each damping has a factorisation of its own."""
    return dataclasses.replace(stats, _found={})
