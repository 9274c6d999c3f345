"""How much of low rank a recipe puts beside each linear, and by which method.

O: output features, I: input features, R: rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from secateur.core.patterns import Pattern, Structured
from secateur.core.registry import LOW_RANKERS, LowRanker
from secateur.core.stack import Stack
from secateur.core.stats import Level
from secateur.errors import UsageError, did_you_mean
from secateur.recipes.recipe import Recipe


@dataclass(frozen=True)
class LowRankPart:
    """What is beside each linear.

    Attributes:
        method: that splits it off.
        share: of the linear's own weights, which its factors have at most; None: `rank` is given.
        rank: of every linear, but for those that have no such rank.
    """

    method: LowRanker
    share: float | None
    rank: int | None

    @property
    def level(self) -> Level:
        """The least statistics that it is fitted by."""
        return max(self.method.level, Level.GRAM)

    def rank_of(self, O: int, I: int) -> int:
        """R of a linear; 0: it has none."""
        rank = int((self.share or 0) * O * I / (O + I) + 1e-9) if self.rank is None else self.rank
        return min(rank, O, I)

    def split(self, stack: Stack, ranks: Sequence[int], pattern: Pattern | None) -> Tensor:
        """What the method splits off; nothing of what is not pruned, where it is one that needs that."""
        if self.method.needs_pattern and pattern is None:
            return torch.zeros_like(stack.W_OI)
        return self.method.split(stack, ranks, pattern)


def low_rank_part(recipe: Recipe, pattern: Pattern | Structured | None, compresses: bool) -> LowRankPart | None:
    """What a recipe says of it; None: nothing.

    Args:
        pattern: that the recipe's pruner leaves; None: it prunes nothing.
        compresses: whether there is anything that it could be beside.

    Raises:
        UsageError: it makes no sense, or does not go together with the rest.
    """
    share, rank = recipe.low_rank, recipe.rank
    if share is None and rank is None:
        if recipe.low_rank_method is not None:
            raise UsageError(
                "`low_rank_method` says how, but not how much: add `low_rank`, a share such as 5%, or `rank`"
            )
        return None
    given = "rank" if share is None else "low_rank"
    if share is not None and rank is not None:
        raise UsageError("`low_rank` and `rank` each say how much is of low rank: give one of them")
    if share is not None and not 0 < share < 1:
        raise UsageError(f"`low_rank` {share:g} is outside (0, 1): give a share of each linear's weights, like 5%")
    if rank is not None and rank < 1:
        raise UsageError(f"`rank` {rank} is not possible: give 1 or more, or leave it out")
    if not compresses:
        raise UsageError(f"`{given}` is beside what is pruned or quantized: `prune` or `quantize` is missing")
    if isinstance(pattern, Structured):
        raise UsageError(f"`{given}` does not go together with `pattern` structured: leave it out")
    name = recipe.low_rank_method or ("eora" if pattern is None else "admm")
    if name not in LOW_RANKERS:
        raise UsageError(f"`low_rank_method` {name!r} is not known: {did_you_mean(name, LOW_RANKERS)}")
    made: Any = LOW_RANKERS[name]()
    if made.needs_pattern and pattern is None:
        raise UsageError(f"`low_rank_method` {name} splits weights to be pruned: add `prune`, or leave it out for eora")
    return LowRankPart(made, share, rank)
