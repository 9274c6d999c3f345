"""The local scores of Týr-the-Pruner: Li et al. 2025, arXiv:2503.09657, section 3.1.

O: output features, I: input features, U: units of input features.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from secateur.core.damping import damping_option, number
from secateur.core.feature_units import Units
from secateur.core.options import check_options
from secateur.core.registry import pruner
from secateur.core.stack import Stack
from secateur.core.stats import Level
from secateur.prune.unit_removal import remove_units


@pruner
@dataclass(frozen=True)
class Tyr:
    """Remove units a few at a time, as `sparsegpt` does, by a score that has a term of first order, too.

    What the paper shares out by evolution, `allocation` search shares by the divergences that it measures.
    """

    damping: float | str = damping_option()

    name: ClassVar[str] = "tyr"
    paper: ClassVar[str] = "Li et al. 2025, arXiv:2503.09657"
    level: ClassVar[Level] = Level.GRAM
    shifts: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_options(self)

    def keep_units(self, stack: Stack, units: Units) -> Tensor:
        """keep_U: see `UnitPruner`."""
        return remove_units(stack, units, number(self.damping), slope=True)
