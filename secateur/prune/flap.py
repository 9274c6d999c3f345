"""FLAP: "Fluctuation-based Adaptive Structured Pruning for Large Language Models", An et al. 2023, arXiv:2312.11983.

O: output features, I: input features, U: units of input features.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from secateur.core.feature_units import Units
from secateur.core.registry import pruner
from secateur.core.stack import Stack
from secateur.core.stats import Level


@pruner
@dataclass(frozen=True)
class FLAP:
    """Keep the units whose inputs fluctuate most: Var(x_j)·‖W_:j‖² (equation 4), summed over the features of a unit.

    An input that hardly changes is a constant, which a bias can be in the place of (equation 5).
    """

    name: ClassVar[str] = "flap"
    paper: ClassVar[str] = "An et al. 2023, arXiv:2312.11983"
    level: ClassVar[Level] = Level.MOMENTS
    shifts: ClassVar[bool] = True

    def keep_units(self, stack: Stack, units: Units) -> Tensor:
        """keep_U: see `UnitPruner`."""
        return units.keep_best(units.sums(stack.W_OI.square().sum(0) * stack.stats.variance()))
