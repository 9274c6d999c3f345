"""The sparsity that a recipe names, where it is shared between linears."""

from __future__ import annotations

from secateur.core.patterns import parse_pattern
from secateur.errors import UsageError
from secateur.recipes.recipe import Recipe


def total_sparsity(recipe: Recipe) -> float:
    """The sparsity of all linears together. Raises UsageError where a pattern removes the same share of every linear."""
    if recipe.pattern not in (None, "unstructured"):
        raise UsageError(
            f"`allocation` {recipe.allocation} needs an unstructured mask: `pattern` {recipe.pattern} removes the same share "
            "of every linear"
        )
    return parse_pattern(recipe.pattern, recipe.sparsity).sparsity
