"""Magnitude pruning: the smallest weights of each output row go, or the units with the smallest.

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
from secateur.core.stats import Level


@pruner
@dataclass(frozen=True)
class Magnitude:
    """Keep the weights of largest |W|, compared within each output row, or within each group for N:M."""

    name: ClassVar[str] = "magnitude"
    paper: ClassVar[str] = ""
    level: ClassVar[Level] = Level.NONE
    shifts: ClassVar[bool] = False

    def prune(self, stack: Stack, pattern: Pattern) -> Pruned:
        """Raises ValueError where M does not divide the number of inputs."""
        keep_OI = keep_best(stack.W_OI.abs(), pattern)
        return Pruned(stack.W_OI * keep_OI, keep_OI)

    def keep_units(self, stack: Stack, units: Units) -> Tensor:
        """Those of largest Σ|W| over all weights that read them."""
        return units.keep_best(units.sums(stack.W_OI.abs().sum(0)))
