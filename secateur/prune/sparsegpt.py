"""SparseGPT: "Massive Language Models Can Be Accurately Pruned in One-Shot", Frantar & Alistarh 2023, arXiv:2301.00774.

O: output features, R: those of one of several stacked linears, I: input features, S: input features of one mask block or N:M
group, N: weights of a block.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from secateur.calibration.stats import InputStats, Level
from secateur.prune.patterns import NM, Pattern, drop_lowest, keep_in_groups
from secateur.prune.registry import Pruned, pruner
from secateur.sweep import DAMPING, calibration_notes, dead_notes, inverse_cholesky, sweep

MASK_BLOCK = 128


@pruner("sparsegpt", Level.GRAM)
def sparsegpt(W_OI: Tensor, stats: InputStats, pattern: Pattern, rows: Sequence[int] = ()) -> Pruned:
    """Prune column by column, and let the columns still to come make up for what was removed (algorithm 1).

    The mask is chosen adaptively: for each block of 128 columns the weights of lowest W² / U² (equation 5) over all rows
    of a linear, or, for N:M, those of each group of M when the sweep reaches it.

    Args:
        W_OI: weights, any floating dtype.
        stats: inputs at `Level.GRAM`. Weights of a dead input (always zero) are set to zero: nothing depends on them.
        pattern: how many to keep.
        rows: how many rows each of the stacked linears has; empty if it is one.

    Raises:
        ValueError: M does not divide the number of inputs, or the statistics are not finite.
    """
    I = W_OI.shape[1]
    if isinstance(pattern, NM):
        pattern.check_divides(I)
    U_II, damping = stats.once(("inverse", DAMPING), lambda: inverse_cholesky(stats.upper()))
    dead_I = stats.square_I <= 0
    W_IO = W_OI.float().T.masked_fill(dead_I[:, None], 0).contiguous()
    removal = _Removal(pattern, list(rows) or [len(W_OI)], U_II.diagonal(), torch.ones_like(W_IO, dtype=torch.bool))
    sweep(W_IO, U_II, removal, pattern.m if isinstance(pattern, NM) else MASK_BLOCK)

    notes = (*dead_notes(stats), *calibration_notes(stats, DAMPING, damping))
    return Pruned(W_IO.T.contiguous(), removal.keep_IO.T.contiguous(), notes)


class _Removal:
    """Chooses what is removed, and removes it: `sweep.Settler`."""

    def __init__(self, pattern: Pattern, sizes: list[int], pivot_I: Tensor, keep_IO: Tensor) -> None:
        self.pattern = pattern
        self.sizes = sizes
        self.pivot_I = pivot_I
        self.keep_IO = keep_IO

    def enter(self, first: int, W_SO: Tensor) -> None:
        keep_SO = self.keep_IO[first : first + len(W_SO)]
        score_SO = (W_SO / self.pivot_I[first : first + len(W_SO), None]).square_()
        if isinstance(self.pattern, NM):
            keep_SO.copy_(keep_in_groups(score_SO, self.pattern.n))
            return
        for keep_SR, score_SR in zip(keep_SO.split(self.sizes, 1), score_SO.split(self.sizes, 1), strict=True):
            drop_1N = drop_lowest(score_SR.reshape(1, -1), self.pattern.pruned(score_SR.numel()))
            keep_SR.copy_(~drop_1N.view_as(score_SR))

    def settle(self, i: int, w_O: Tensor) -> Tensor:
        return w_O * self.keep_IO[i]
