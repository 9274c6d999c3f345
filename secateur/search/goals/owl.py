"""OWL: "Outlier Weighed Layerwise Sparsity (OWL)", Yin et al. 2023, arXiv:2310.05175."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from secateur.errors import UsageError
from secateur.model.block_names import split_name
from secateur.pipeline.calibrate import Windows
from secateur.recipes.recipe import Choice, Recipe
from secateur.search.goal import goal
from secateur.search.searcher import Searcher
from secateur.search.total import total_sparsity

# Sparsities differ from the mean by so much at most: the authors' λ.
MOST_OFF = 0.08


@goal
@dataclass(frozen=True)
class OWL:
    """Blocks with more outliers among their weights lose fewer of them.

    Attributes:
        sparsity: of all linears together.
    """

    sparsity: float
    name: ClassVar[str] = "owl"
    models: ClassVar[int] = 0

    @classmethod
    def of(cls, recipe: Recipe) -> OWL:
        if not recipe.prune:
            raise UsageError("`allocation` owl shares a sparsity, but no method is given: `prune` is missing")
        return cls(total_sparsity(recipe))

    def check(self, searcher: Searcher) -> None:
        """There is nothing to check: the dense model is walked through block by block, as a run does."""

    def tried(self, searcher: Searcher) -> list[Choice]:
        return []

    def result_bytes(self, searcher: Searcher) -> int | None:
        return None

    def choose(self, searcher: Searcher, windows: Windows) -> dict[str, Choice]:
        outliers, weights = searcher.outliers(windows), searcher.weights
        blocks: dict[str, list[str]] = {}
        for name in weights:
            blocks.setdefault(split_name(name, searcher.prepared.lists)[0], []).append(name)
        counts = [sum(weights[name] for name in names) for names in blocks.values()]
        # The mean of a block's linears, as the authors' code takes all weights of a block together.
        shares = [
            sum(outliers[name] * weights[name] for name in names) / count
            for names, count in zip(blocks.values(), counts, strict=True)
        ]
        sparsities = by_outliers(shares, counts, self.sparsity)
        return {
            name: Choice(sparsity, searcher.bits)
            for names, sparsity in zip(blocks.values(), sparsities, strict=True)
            for name in names
        }


def by_outliers(outliers: Sequence[float], weights: Sequence[int], sparsity: float) -> list[float]:
    """Sparsities of blocks by their share of outliers: more outliers, fewer weights removed.

    Section 3.2: shares are stretched to a range of twice 0.08, and shifted so that the mean over all weights is as asked. Where
    that left [0, 1) it is narrowed.

    Args:
        outliers: share of each block.
        weights: how many each block has.
        sparsity: of all together.
    """
    share = np.asarray(outliers, dtype=np.float64)
    spread = share.max() - share.min()
    if spread <= 0:
        return [sparsity] * len(outliers)
    off = (share - share.min()) / spread
    off -= np.average(off, weights=np.asarray(weights, dtype=np.float64))
    room = min(sparsity / max(off.max(), 1e-12), (0.999 - sparsity) / max(-off.min(), 1e-12))
    return [float(x) for x in sparsity - min(2 * MOST_OFF, max(room, 0.0)) * off]
