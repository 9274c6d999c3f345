"""Sharing a budget between linears: which candidate each of them takes, and how much of each is removed.

L: linears, C: candidates of a linear, O: output features, I: input features.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from secateur.solvers.knapsack import choose


def share_sparsity(
    levels: Sequence[float], costs: Sequence[Sequence[float]], weights: Sequence[int], sparsity: float
) -> list[float]:
    """Sparsities of linears that sum to a given total and cost least, from the cost of each linear at some levels.

    For costs between the levels see `between`.

    Args:
        levels: rising; the least and the greatest bound what a linear can get.
        costs: of each linear at each level, not negative.
        weights: how many each linear has.
        sparsity: of all weights together, between the least and the greatest level.

    Returns:
        For each linear; weighted by `weights` their mean is `sparsity`.
    """
    grid = np.unique(np.append(np.linspace(levels[0], levels[-1], 201), sparsity))
    fine = [between(levels, cost, grid).tolist() for cost in costs]
    kept = [((1 - grid) * count).tolist() for count in weights]
    total = sum(weights)
    choice = choose(fine, kept, (1 - sparsity) * total * (1 + 1e-12))
    found = [float(grid[i]) for i in choice]
    # What a step of the grid was too large for, where there is room for it.
    over = sum(share * count for share, count in zip(found, weights, strict=True)) - sparsity * total
    for linear in sorted(range(len(found)), key=lambda i: -weights[i]):
        moved = min(max(found[linear] - over / weights[linear], levels[0]), levels[-1])
        over -= (found[linear] - moved) * weights[linear]
        found[linear] = moved
    return found


def between(levels: Sequence[float], costs: Sequence[float], at: np.ndarray | float) -> np.ndarray:
    """Costs between levels at which they are known: their logarithm is taken to be linear."""
    log = np.log(np.maximum(np.asarray(costs, dtype=np.float64), 1e-30))
    return np.exp(np.interp(at, levels, log))
