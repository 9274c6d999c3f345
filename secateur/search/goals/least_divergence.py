"""Sharing a total, of sparsity or of bytes, so that the model's predictions change least."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from secateur.errors import UsageError
from secateur.pipeline.calibrate import Windows
from secateur.quant.block_grid import OPEN, UNIFORM
from secateur.recipes.recipe import Choice, Recipe
from secateur.search.budget import share_sparsity
from secateur.search.candidates import bits_alone, bytes_of, cheapest, divergence_of
from secateur.search.goal import goal
from secateur.search.searcher import Searcher
from secateur.search.total import total_sparsity

# Sparsities that are tried, as shares of the way from the total down to nothing, and up to everything.
_BELOW, _ABOVE = (1 / 3, 2 / 3, 1.0), (0.25, 0.5, 0.75)


@goal
@dataclass(frozen=True)
class LeastDivergence:
    """The same total, shared by what each linear does to the predictions.

    Attributes:
        sparsity: of all linears together; None where nothing is pruned: then bytes are shared, those of the bits asked for.
    """

    sparsity: float | None
    name: ClassVar[str] = "search"
    models: ClassVar[int] = 0

    @classmethod
    def of(cls, recipe: Recipe) -> LeastDivergence:
        grid = recipe.quantization.get("grid", UNIFORM)
        if grid != UNIFORM:
            raise UsageError(
                f"`allocation` search shares bits, which `grid` {grid} decides: leave `allocation` out, or give `grid` {OPEN} "
                "and `target_size`, for which types are found"
            )
        return cls(total_sparsity(recipe) if recipe.prune else None)

    def check(self, searcher: Searcher) -> None:
        searcher.check_memory()

    def tried(self, searcher: Searcher) -> list[Choice]:
        if self.sparsity is None:
            return bits_alone(searcher.job.plan.quantizer)
        levels = [self.sparsity * x for x in _BELOW] + [self.sparsity + (1 - self.sparsity) * x for x in _ABOVE]
        return [Choice(level, searcher.bits) for level in levels]

    def result_bytes(self, searcher: Searcher) -> int | None:
        return None

    def choose(self, searcher: Searcher, windows: Windows) -> dict[str, Choice]:
        tried = self.tried(searcher)
        library = searcher.shared.library(searcher.library(windows, tried))
        weights = searcher.shared.weights(searcher.weights)
        if self.sparsity is None:
            budget = sum(c.bytes for each in library.values() for c in each if c.choice.bits == searcher.bits)
            return searcher.shared.spread(cheapest(library, divergence_of, bytes_of, budget))
        levels = [choice.sparsity or 0.0 for choice in tried]
        costs = [[candidate.divergence for candidate in library[name]] for name in weights]
        shares = share_sparsity(levels, costs, list(weights.values()), self.sparsity)
        choices = {name: Choice(share, searcher.bits) for name, share in zip(weights, shares, strict=True)}
        return searcher.shared.spread(choices)
