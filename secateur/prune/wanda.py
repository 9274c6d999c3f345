"""Wanda: "A Simple and Effective Pruning Approach for Large Language Models", Sun et al. 2023, arXiv:2306.11695.

O: output features, I: input features, U: units of input features.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from secateur.core.feature_units import Units
from secateur.core.patterns import Pattern, keep_best
from secateur.core.pruned import Pruned
from secateur.core.registry import pruner
from secateur.core.stack import Stack
from secateur.core.stats import InputStats, Level


def wanda_score(W_OI: Tensor, stats: InputStats) -> Tensor:
    """S_ij = |W_ij| · ‖X_j‖₂ (equation 1), up to a common factor that does not change the order."""
    return W_OI.float().abs() * stats.norm()


@pruner
@dataclass(frozen=True)
class Wanda:
    """Keep the weights whose magnitude times input norm is largest within their output row, or their group for N:M.

    A dead input (always zero) is pruned first.
    """

    name: ClassVar[str] = "wanda"
    paper: ClassVar[str] = "Sun et al. 2023, arXiv:2306.11695"
    level: ClassVar[Level] = Level.MOMENTS
    shifts: ClassVar[bool] = False

    def prune(self, stack: Stack, pattern: Pattern) -> Pruned:
        """Raises ValueError where M does not divide the number of inputs."""
        keep_OI = keep_best(wanda_score(stack.W_OI, stack.stats), pattern)
        return Pruned(stack.W_OI * keep_OI, keep_OI)

    def keep_units(self, stack: Stack, units: Units) -> Tensor:
        """Those of largest Σ|W|·‖X‖ over all weights that read them ("Wanda-sp" of An et al. 2023, arXiv:2312.11983)."""
        return units.keep_best(units.sums(stack.W_OI.abs().sum(0) * stack.stats.norm()))
