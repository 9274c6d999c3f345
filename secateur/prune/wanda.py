"""Wanda: "A Simple and Effective Pruning Approach for Large Language Models", Sun et al. 2023, arXiv:2306.11695.

O: output features, I: input features.
"""

from collections.abc import Sequence

from torch import Tensor

from secateur.calibration.stats import InputStats, Level
from secateur.prune.patterns import Pattern, keep_best
from secateur.prune.registry import Pruned, pruner


def wanda_score(W_OI: Tensor, stats: InputStats) -> Tensor:
    """S_ij = |W_ij| · ‖X_j‖₂ (equation 1), up to a common factor that does not change the order."""
    return W_OI.float().abs() * stats.norm()


@pruner("wanda", Level.MOMENTS)
def wanda(W_OI: Tensor, stats: InputStats, pattern: Pattern, rows: Sequence[int] = ()) -> Pruned:
    """Keep the weights whose magnitude times input norm is largest within their output row (or group for N:M).

    Args:
        W_OI: weights, any floating dtype.
        stats: inputs at `Level.MOMENTS` or above; a dead input (always zero) is pruned first.
        pattern: how many to keep.
        rows: not looked at: no row is compared with another.
    """
    keep_OI = keep_best(wanda_score(W_OI, stats), pattern)
    return Pruned(W_OI.float() * keep_OI, keep_OI)
