"""The multiple-choice knapsack: one candidate for each of many, within a total size.

L: linears, C: candidates of a linear.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_STEPS = 100


def choose(costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[float]], budget: float) -> list[int]:
    """One candidate for each linear, of the least total cost that a multiplier finds within a total size.

    A multiple-choice knapsack. For a price λ of size each linear takes the candidate of least cost + λ·size; the price is found
    by bisection ("Generalized Lagrange Multiplier Method", Everett 1963), and what is left of the budget is spent by the swaps
    that gain most for their size. The sum is the least for the size that it has before these swaps, on the convex hull of all.

    Args:
        costs, sizes: of each linear's candidates; any number of them, at least one.
        budget: the most that the sizes may sum to.

    Returns:
        For each linear the number of its candidate.

    Raises:
        ValueError: the smallest candidates exceed the budget.
    """
    cost_LC, size_LC = _matrix(costs, np.inf), _matrix(sizes, max(map(max, sizes)))
    least = float(size_LC.min(1).cumsum()[-1])
    if least > budget:
        raise ValueError(f"the smallest candidates take {least:.0f}")
    row_L = np.arange(len(cost_LC))

    def taken(price: float) -> np.ndarray:
        worth_LC = cost_LC + price * size_LC
        # Of equal ones the smaller.
        equal_LC = worth_LC == worth_LC.min(1, keepdims=True)
        found_L: np.ndarray = np.where(equal_LC, size_LC, np.inf).argmin(1)
        return found_L

    def total(choice_L: np.ndarray) -> float:
        # One after the other, so that what fits does not depend on how numpy adds up.
        return float(size_LC[row_L, choice_L].cumsum()[-1])

    cheapest_L = taken(0.0)
    if total(cheapest_L) <= budget:
        return [int(i) for i in cheapest_L]
    low, high = 0.0, 1e-12
    while total(taken(high)) > budget and high < 1e30:
        low, high = high, high * 10
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if total(taken(middle)) > budget else (low, middle)
    choice_L = taken(high)
    if total(choice_L) > budget:  # costs so large that no price tells sizes apart
        choice_L = size_LC.argmin(1)
    return [int(i) for i in _fill(cost_LC, size_LC, choice_L, budget - total(choice_L))]


def _matrix(rows: Sequence[Sequence[float]], lacking: float) -> np.ndarray:
    """Of rows that may be of several lengths, with something in the place of what they lack."""
    widths = np.array([len(row) for row in rows])
    found_LC = np.full((len(rows), widths.max()), lacking, dtype=np.float64)
    found_LC[np.arange(widths.max()) < widths[:, None]] = [value for row in rows for value in row]
    return found_LC


def _fill(cost_LC: np.ndarray, size_LC: np.ndarray, choice_L: np.ndarray, left: float) -> np.ndarray:
    """Swap for larger candidates as long as one that gains fits in what is left."""
    row_L, choice_L = np.arange(len(cost_LC)), choice_L.copy()
    more_LC = size_LC - size_LC[row_L, choice_L][:, None]
    gain_LC = cost_LC[row_L, choice_L][:, None] - cost_LC
    while True:
        good_LC = (more_LC <= left) & (gain_LC > 0)
        worth_LC = np.divide(gain_LC, np.maximum(more_LC, 1e-9), out=np.zeros_like(gain_LC), where=good_LC)
        to_L = worth_LC.argmax(1)
        gained_L = worth_LC[row_L, to_L]
        # Of equal ones the last.
        linear = len(gained_L) - 1 - int(gained_L[::-1].argmax())
        if gained_L[linear] <= 0:
            return choice_L
        to = int(to_L[linear])
        left -= float(more_LC[linear, to])
        choice_L[linear] = to
        more_LC[linear] = size_LC[linear] - size_LC[linear, to]
        gain_LC[linear] = cost_LC[linear, to] - cost_LC[linear]
