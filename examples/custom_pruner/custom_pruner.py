"""A pruning method of one file: `pip install .` here, and `--prune blend --sparsity 0.5 --power 0.7` works.

O: output features, I: input features.
"""

from dataclasses import dataclass
from typing import ClassVar

from secateur.core.options import check_options, option
from secateur.core.patterns import Pattern, keep_best
from secateur.core.pruned import Pruned
from secateur.core.registry import pruner
from secateur.core.stack import Stack
from secateur.core.stats import Level


@pruner
@dataclass(frozen=True)
class Blend:
    """Between magnitude (power 0) and Wanda (power 1): keep the weights of largest |W| times a power of their input's norm."""

    power: float = option(0.5, "Exponent of the input norm.", low=0, high=2)

    name: ClassVar[str] = "blend"
    paper: ClassVar[str] = ""
    level: ClassVar[Level] = Level.MOMENTS

    def __post_init__(self) -> None:
        check_options(self)

    def prune(self, stack: Stack, pattern: Pattern) -> Pruned:
        """Raises ValueError where M of a pattern N:M does not divide the number of inputs."""
        keep_OI = keep_best(stack.W_OI.abs() * stack.stats.norm() ** self.power, pattern)
        return Pruned(stack.W_OI * keep_OI, keep_OI)
