"""Sharing a budget between linears: which candidate each of them takes, and how much of each is removed.

L: linears, C: candidates of a linear, O: output features, I: input features.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

# OWL's: a weight is an outlier from so many times the mean score on, and sparsities differ from the mean by so much at most.
OUTLIER = 5.0
MOST_OFF = 0.08
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


def outlier_share(score_OI: Tensor) -> float:
    """The share of weights whose score, |W_ij|·‖X_j‖₂ as Wanda has it, is over five times the mean (OWL, equation 2)."""
    return (score_OI > OUTLIER * score_OI.mean()).float().mean().item()


def owl(outliers: Sequence[float], weights: Sequence[int], sparsity: float) -> list[float]:
    """Sparsities of blocks by their share of outliers: more outliers, fewer weights removed.

    "Outlier Weighed Layerwise Sparsity (OWL)", Yin et al. 2023, arXiv:2310.05175, section 3.2: shares are stretched to
    a range of twice 0.08, and shifted so that the mean over all weights is as asked. Where that left [0, 1) it is narrowed.

    Args:
        outliers: share of each block.
        weights: how many each block has.
        sparsity: of all together.
    """
    share = np.asarray(outliers, dtype=np.float64)
    spread = share.max() - share.min()
    if spread <= 0:
        return [sparsity] * len(outliers)
    off = (share - share.min()) / spread
    off -= np.average(off, weights=np.asarray(weights, dtype=np.float64))
    room = min(sparsity / max(off.max(), 1e-12), (0.999 - sparsity) / max(-off.min(), 1e-12))
    return [float(x) for x in sparsity - min(2 * MOST_OFF, max(room, 0.0)) * off]
