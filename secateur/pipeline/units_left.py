"""What a recipe with a structured pattern chooses for linears, and the source without the blocks that go."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from secateur.core.patterns import Pattern, Structured
from secateur.errors import UsageError
from secateur.model.source import Source
from secateur.model.structure import Blocks
from secateur.recipes.recipe import Recipe
from secateur.structured.shorten import without_blocks
from secateur.structured.sites import Width


def chosen_widths(recipe: Recipe) -> dict[str, Width | float]:
    """What a recipe chooses for linears that lose whole units: how wide each is to be, or which share of its units goes."""
    found: dict[str, Width | float] = {}
    for name, choice in recipe.linears.items():
        if choice.units is not None:
            found[name] = Width(choice.units, choice.groups or 1)
        elif choice.sparsity is not None:
            found[name] = choice.sparsity
    return found


def is_per_layer(pattern: Pattern | Structured | None) -> bool:
    """Whether each block may have widths of its own."""
    return isinstance(pattern, Structured) and pattern.per_layer


def shortened(
    source: Source, model: nn.Module, blocks: Blocks, drop: Sequence[int], pattern: Pattern | Structured | None
) -> Source | None:
    """The source without blocks of which nothing is to be left; None where they stay, though they do nothing."""
    if not drop:
        return None
    try:
        return without_blocks(source, model, blocks, drop)
    except UsageError:
        if is_per_layer(pattern) and len(drop) < len(blocks.modules):
            return None
        raise
