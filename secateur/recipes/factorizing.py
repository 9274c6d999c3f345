"""Recipes that make weights products of smaller matrices, and what does not go together with that."""

from __future__ import annotations

from secateur.core.registry import Factorizer
from secateur.errors import UsageError
from secateur.recipes.methods import make
from secateur.recipes.recipe import Recipe

_AGAIN, _DROP = "compress the result again for that", "leave it out"


def factorizer_of(recipe: Recipe) -> Factorizer | None:
    """The method that a recipe factorizes by, if any.

    Raises:
        UsageError: something does not go together with it.
    """
    if recipe.factorize is None:
        if recipe.factorization:
            option = next(iter(recipe.factorization))
            raise UsageError(f"`{option}` says how to factorize, but no method is given: `factorize` is missing")
        return None
    others = {
        "prune": (recipe.prune or None, _AGAIN),
        "quantize": (recipe.quantize, _AGAIN),
        "target_size": (recipe.target_size, "`size` says how large linears are to be"),
        "max_perplexity_rise": (recipe.max_perplexity_rise, "`size` says how large linears are to be"),
        "allocation": (None if recipe.allocation == "uniform" else recipe.allocation, _DROP),
        "share_choice": (recipe.share_choice, _DROP),
        "activations": (recipe.activations, _DROP),
        "low_rank": (recipe.low_rank, _DROP),
        "rank": (recipe.rank, _DROP),
    }
    for name, (value, instead) in others.items():
        if value is not None:
            raise UsageError(f"`{name}` {value} does not go together with `factorize` {recipe.factorize}: {instead}")
    if recipe.format not in ("auto", "dense"):
        raise UsageError(f"`format` {recipe.format} does not hold factors: give auto or dense")
    found: Factorizer = make("factorize", recipe.factorize, recipe.factorization)
    return found
