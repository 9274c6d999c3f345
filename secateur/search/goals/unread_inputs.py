"""Sharing between linears what is not read for a token, so that the model's predictions change least.

One backward pass tells what leaving inputs out costs, as it tells of changed weights: in place of thousands of forward passes.

T: tokens, O: output features, I: input features.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from secateur.calibration.effects import Effects
from secateur.core.histogram import FIRST, scores
from secateur.errors import UsageError
from secateur.gates.section import LARGEST, THRESHOLD, levels_for
from secateur.pipeline.calibrate import Windows
from secateur.recipes.activation_plan import unread_of
from secateur.recipes.methods import make
from secateur.recipes.recipe import Choice, Recipe
from secateur.search.budget import share_sparsity
from secateur.search.goal import UNREAD, goal
from secateur.search.searcher import Searcher

# Shares of an input that are tried.
_TRIED = (0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95)


@goal
@dataclass(frozen=True)
class UnreadInputs:
    """For every level the shares of inputs that together leave so much unread.

    Attributes:
        levels: that are calibrated.
    """

    levels: tuple[float, ...]
    name: ClassVar[str] = UNREAD
    models: ClassVar[int] = 0

    @classmethod
    def of(cls, recipe: Recipe) -> UnreadInputs:
        method = make("activations", recipe.activations or "", recipe.gating)
        if method.rule not in (THRESHOLD, LARGEST):
            raise UsageError(
                f"`allocation` search looks at inputs token by token, and {method.name} chooses them by a prompt: leave it out"
            )
        return cls(levels_for(unread_of(recipe)))

    def check(self, searcher: Searcher) -> None:
        searcher.check_memory()

    def tried(self, searcher: Searcher) -> list[Choice]:
        return []

    def result_bytes(self, searcher: Searcher) -> int | None:
        return None

    def choose(self, searcher: Searcher, windows: Windows) -> dict[str, Choice]:
        effects = searcher.effects(windows)
        names = [name for name in searcher.prepared.names if name in searcher.prepared.gated]
        groups = effects.by_input(names)
        costs, sizes = [], []
        for number, group in enumerate(groups):
            searcher.job.say(f"searching: input {number + 1} of {len(groups)}")
            costs.append(_rising(self._costs(searcher, effects, group)))
            sizes.append(sum(O * I for O, I in map(searcher.prepared.shape, group)))
        shares = [self._shares(level, costs, sizes) for level in self.levels]
        return {
            name: Choice(unread=tuple(each[number] for each in shares))
            for number, group in enumerate(groups)
            for name in group
        }

    def _costs(self, searcher: Searcher, effects: Effects, group: list[str]) -> list[float]:
        """In nats a token, of each share that is tried."""
        method: Any = searcher.job.plan.sparsifier
        dense = {name: searcher.prepared.problem(name, None).W_OI.float() for name in group}
        scale_I = method.scale(list(dense.values())) if hasattr(method, "scale") else None
        weights = {name: W_OI - _stand_in(method, W_OI, searcher.job.plan.unread) for name, W_OI in dense.items()}
        return effects.without(weights, lambda x_TI: _smallest(x_TI, scale_I, method.rule == LARGEST), FIRST)

    def _shares(self, level: float, costs: list[list[float]], sizes: list[int]) -> list[float]:
        if not _TRIED[0] <= level <= _TRIED[-1]:
            return [level] * len(costs)
        return share_sparsity(_TRIED, costs, sizes, level)


def _rising(costs: list[float]) -> list[float]:
    """Costs of which none is below one before it, as the estimates of small ones may be."""
    return list(itertools.accumulate(costs, max))


def _stand_in(method: Any, W_OI: Tensor, unread: float) -> Tensor | float:
    """What a method has stand for a weight where inputs are not read."""
    rank = method.rank(tuple(W_OI.shape), unread) if hasattr(method, "rank") else 0
    if not rank:
        return 0.0
    left_OR, right_RI = method.rest(W_OI, rank)
    product_OI: Tensor = left_OR @ right_RI
    return product_OI


def _smallest(x_TI: Tensor, scale_I: Tensor | None, by_token: bool) -> Iterator[Tensor]:
    """For each share that is tried, where the smallest inputs are: of all, or of each token."""
    size_TI = scores(x_TI, scale_I)
    order_TI = size_TI.argsort(-1).argsort(-1) if by_token else size_TI
    rising = None if by_token else size_TI.reshape(-1).sort().values
    for share in _TRIED:
        if rising is None:
            yield order_TI < round(share * x_TI.shape[-1])
        else:
            yield size_TI <= rising[min(int(share * rising.numel()), rising.numel() - 1)]
