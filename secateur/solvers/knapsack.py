"""The multiple-choice knapsack: one candidate for each of many, within a total size."""

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
    costs_L = [np.asarray(cost, dtype=np.float64) for cost in costs]
    sizes_L = [np.asarray(size, dtype=np.float64) for size in sizes]
    if sum(size.min() for size in sizes_L) > budget:
        raise ValueError(f"the smallest candidates take {sum(size.min() for size in sizes_L):.0f}")

    def taken(price: float) -> list[int]:
        # Of equal ones the smaller.
        return [int(np.lexsort((s, c + price * s))[0]) for c, s in zip(costs_L, sizes_L, strict=True)]

    def total(choice: list[int]) -> float:
        return float(sum(size[i] for size, i in zip(sizes_L, choice, strict=True)))

    if total(taken(0.0)) <= budget:
        return taken(0.0)
    low, high = 0.0, 1e-12
    while total(taken(high)) > budget and high < 1e30:
        low, high = high, high * 10
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if total(taken(middle)) > budget else (low, middle)
    choice = taken(high)
    if total(choice) > budget:  # costs so large that no price tells sizes apart
        choice = [int(size.argmin()) for size in sizes_L]
    return _fill(costs_L, sizes_L, choice, budget - total(choice))


def _fill(costs: list[np.ndarray], sizes: list[np.ndarray], choice: list[int], left: float) -> list[int]:
    """Swap for larger candidates as long as one that gains fits in what is left."""
    while True:
        best = (0.0, -1, -1)
        for linear, (cost, size, now) in enumerate(zip(costs, sizes, choice, strict=True)):
            more, gain = size - size[now], cost[now] - cost
            worth = np.where((more <= left) & (gain > 0), gain / np.maximum(more, 1e-9), 0)
            to = int(worth.argmax())
            best = max(best, (float(worth[to]), linear, to))
        gained, linear, to = best
        if gained <= 0:
            return choice
        left -= float(sizes[linear][to] - sizes[linear][choice[linear]])
        choice = [*choice[:linear], to, *choice[linear + 1 :]]
