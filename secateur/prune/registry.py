"""The names under which pruning methods are found, and the contract that they keep.

O: output features, I: input features.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from secateur.calibration.stats import InputStats, Level
from secateur.prune.patterns import Pattern


@dataclass(frozen=True)
class Pruned:
    """What a pruner returns.

    Attributes:
        W_OI: the new weights, float32; zero wherever `keep_OI` is false.
        keep_OI: bool, which weights are kept.
        notes: what the user should know about how it went, such as damping that had to be raised.
    """

    W_OI: Tensor
    keep_OI: Tensor
    notes: tuple[str, ...] = ()


PruneFunction = Callable[[Tensor, InputStats, Pattern, Sequence[int]], Pruned]
RefineFunction = Callable[[Tensor, Tensor, InputStats, Pattern], Tensor]


@dataclass(frozen=True)
class Pruner:
    """`solve(W_OI, stats, pattern, rows)` returns new weights and their mask, and changes none of its arguments.

    Linears that read the same input come stacked as one `W_OI`; `rows` says how many rows each of them has (empty: it is one
    linear), for methods that compare weights beyond their own row. `level` is the least statistics it works from.
    """

    name: str
    level: Level
    solve: PruneFunction


@dataclass(frozen=True)
class Refiner:
    """`solve(W_OI, keep_OI, stats, pattern)` returns a better mask of the same pattern for the dense weights `W_OI`."""

    name: str
    level: Level
    solve: RefineFunction


PRUNERS: dict[str, Pruner] = {}
REFINERS: dict[str, Refiner] = {}


def pruner(name: str, level: Level) -> Callable[[PruneFunction], PruneFunction]:
    """Register the decorated function as the pruning method `name`."""

    def register(solve: PruneFunction) -> PruneFunction:
        PRUNERS[name] = Pruner(name, level, solve)
        return solve

    return register


def refiner(name: str, level: Level) -> Callable[[RefineFunction], RefineFunction]:
    """Register the decorated function as the mask refiner `name`."""

    def register(solve: RefineFunction) -> RefineFunction:
        REFINERS[name] = Refiner(name, level, solve)
        return solve

    return register
