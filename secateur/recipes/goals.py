"""What a recipe leaves open: how much is removed of each linear, for a search to find."""

from __future__ import annotations

from dataclasses import replace

from secateur.core.patterns import UNITS
from secateur.recipes.recipe import Recipe

# What a target is reached with, where nothing else is said.
_PRUNER, _QUANTIZER, _ALSO = "sparsegpt", "gptq", "trellis"
_PLACEHOLDER = 0.5
#: Whether all blocks of a structured result are alike, or each has widths of its own.
UNIFORM_WIDTHS, PER_LAYER = WIDTHS = ("uniform", "per-layer")


def is_open(recipe: Recipe) -> bool:
    """Whether it is still to be found out what becomes of each linear."""
    return not recipe.linears and (has_target(recipe) or recipe.allocation != "uniform" or has_units_to_share(recipe))


def has_units_to_share(recipe: Recipe) -> bool:
    """Whether units of other kinds than neurons may go, and it is not said how many of each."""
    return recipe.pattern == "structured" and units_of(recipe) != ("neurons",)


def units_of(recipe: Recipe) -> tuple[str, ...]:
    """Which kinds of units may go by a structured recipe: all, unless it says, where widths of each block are searched for."""
    if recipe.units is not None:
        return tuple(word.strip() for word in recipe.units.split(","))
    searched = recipe.widths == PER_LAYER and recipe.allocation == "search" and not recipe.linears
    return UNITS if searched else ("neurons",)


def has_target(recipe: Recipe) -> bool:
    """Whether size or perplexity say how much is removed."""
    return recipe.target_size is not None or recipe.max_perplexity_rise is not None


def with_methods(recipe: Recipe) -> Recipe:
    """A recipe with a target gets the methods that it is reached with, where it names none."""
    return replace(recipe, prune=_PRUNER, quantize=_QUANTIZER) if _names_none(recipe) else recipe


def also_tried(recipe: Recipe) -> str | None:
    """The quantizer that a search tries beside the recipe's, where it may take whichever it likes."""
    return _ALSO if _names_none(recipe) else None


def _names_none(recipe: Recipe) -> bool:
    return has_target(recipe) and not recipe.prune and recipe.quantize is None


def placeholder(recipe: Recipe) -> Recipe:
    """A recipe that can be planned, with a sparsity in the place of those that each linear has or gets."""
    recipe = with_methods(recipe)
    if (
        recipe.prune
        and recipe.sparsity is None
        and recipe.pattern in (None, "structured")
        and (has_target(recipe) or recipe.linears)
    ):
        return replace(recipe, sparsity=_PLACEHOLDER)
    return recipe
