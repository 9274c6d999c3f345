"""SparseGPT: "Massive Language Models Can Be Accurately Pruned in One-Shot", Frantar & Alistarh 2023, arXiv:2301.00774.

O: output features, R: those of one of several stacked linears, I: input features, S: input features of one mask block or N:M
group, N: weights of a block.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from secateur.core.damping import damping_option, number
from secateur.core.options import check_options, option
from secateur.core.patterns import NM, Pattern, drop_lowest, keep_in_groups
from secateur.core.pruned import Pruned
from secateur.core.registry import pruner
from secateur.core.stack import Stack
from secateur.core.stats import Level
from secateur.solvers.column_sweep import sweep


@pruner
@dataclass(frozen=True)
class SparseGPT:
    """Prune column by column, and let the columns still to come make up for what was removed (algorithm 1).

    The mask is chosen adaptively: for each block of columns the weights of lowest W² / U² (equation 5) over all rows of a
    linear, or, for N:M, those of each group of M when the sweep reaches it.
    """

    damping: float | str = damping_option()
    block: int = option(128, "Columns whose mask is chosen at once (the paper's Bₛ); N:M patterns take theirs.", low=1)

    name: ClassVar[str] = "sparsegpt"
    paper: ClassVar[str] = "Frantar & Alistarh 2023, arXiv:2301.00774"
    level: ClassVar[Level] = Level.GRAM

    def __post_init__(self) -> None:
        check_options(self)

    def prune(self, stack: Stack, pattern: Pattern) -> Pruned:
        """Weights of a dead input (always zero) are set to zero: nothing depends on them.

        Raises:
            ValueError: M does not divide the number of inputs, or the statistics are not finite.
        """
        if isinstance(pattern, NM):
            pattern.check_divides(stack.features)
        damping = number(self.damping)
        U_II, used = stack.inverse(damping)
        W_IO = stack.W_OI.T.masked_fill(stack.dead_I[:, None], 0).contiguous()
        removal = _Removal(pattern, stack.rows, U_II.diagonal(), torch.ones_like(W_IO, dtype=torch.bool))
        sweep(W_IO, U_II, removal, pattern.m if isinstance(pattern, NM) else self.block)

        notes = (*stack.dead_notes(), *stack.notes(damping, used))
        return Pruned(W_IO.T.contiguous(), removal.keep_IO.T.contiguous(), notes)


class _Removal:
    """Chooses what is removed, and removes it: `sweep.Settler`."""

    def __init__(self, pattern: Pattern, rows: Sequence[int], pivot_I: Tensor, keep_IO: Tensor) -> None:
        self.pattern = pattern
        self.rows = list(rows)
        self.pivot_I = pivot_I
        self.keep_IO = keep_IO

    def enter(self, first: int, W_SO: Tensor) -> None:
        keep_SO = self.keep_IO[first : first + len(W_SO)]
        score_SO = (W_SO / self.pivot_I[first : first + len(W_SO), None]).square_()
        if isinstance(self.pattern, NM):
            keep_SO.copy_(keep_in_groups(score_SO, self.pattern.n))
            return
        for keep_SR, score_SR in zip(keep_SO.split(self.rows, 1), score_SO.split(self.rows, 1), strict=True):
            drop_1N = drop_lowest(score_SR.reshape(1, -1), self.pattern.pruned(score_SR.numel()))
            keep_SR.copy_(~drop_1N.view_as(score_SR))

    def settle(self, i: int, w_O: Tensor) -> Tensor:
        return w_O * self.keep_IO[i]
