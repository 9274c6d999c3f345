"""Magnitude pruning: the smallest weights of each output row go.

O: output features, I: input features.
"""

from collections.abc import Sequence

from torch import Tensor

from secateur.calibration.stats import InputStats, Level
from secateur.prune.patterns import Pattern, keep_best
from secateur.prune.registry import Pruned, pruner


@pruner("magnitude", Level.NONE)
def magnitude(W_OI: Tensor, stats: InputStats, pattern: Pattern, rows: Sequence[int] = ()) -> Pruned:
    """Keep the weights of largest |W|, compared within each output row, or within each group for N:M.

    Args:
        W_OI: weights, any floating dtype.
        stats: not looked at.
        pattern: how many to keep.
        rows: not looked at: no row is compared with another.
    """
    W_OI = W_OI.float()
    keep_OI = keep_best(W_OI.abs(), pattern)
    return Pruned(W_OI * keep_OI, keep_OI)
