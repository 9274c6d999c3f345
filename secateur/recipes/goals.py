"""What a search between linears is to reach: the words of a recipe, checked."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from secateur.core.patterns import Unstructured
from secateur.errors import UsageError, did_you_mean
from secateur.recipes.recipe import Recipe
from secateur.shares import parse_share
from secateur.units import parse_size

ALLOCATIONS = ("uniform", "owl", "search")
# What a target is reached with, where nothing else is said.
_PRUNER, _QUANTIZER = "sparsegpt", "gptq"
_PLACEHOLDER = 0.5


@dataclass(frozen=True)
class Size:
    """A size of weight files: a share of the dense model's, or bytes."""

    share: float | None
    bytes: int | None

    def of(self, dense_bytes: int) -> int:
        """In bytes, for a dense model of so many."""
        return int(self.share * dense_bytes) if self.share is not None else int(self.bytes or 0)


def parse_target(text: str) -> Size:
    """The size behind `0.35x`, `35%`, or bytes in words such as `100MB`.

    Raises:
        UsageError: it is neither, or not positive.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*[x×]\s*", text)
    if match or text.rstrip().endswith("%"):
        share = float(match[1]) if match else parse_share(text, "--target-size")
        if not 0 < share < 1:
            raise UsageError(
                f"--target-size {text} is not between 0 and 1 times the dense model: give one like 0.35x or 35%"
            )
        return Size(share, None)
    try:
        size = parse_size(text, "--target-size")
    except UsageError as error:
        raise UsageError(
            f"--target-size {text!r} is not a size: write it like 0.35x or 35% (of the dense model), or 100MB"
        ) from error
    if size <= 0:
        raise UsageError(f"--target-size {text} is no size to reach: give one like 0.35x, 35% or 100MB")
    return Size(None, size)


def parse_rise(text: str) -> float:
    """The share behind `3%` or `0.03`. Raises UsageError when it is none, or not positive."""
    rise = parse_share(text, "--max-perplexity-rise")
    if rise <= 0:
        raise UsageError(f"--max-perplexity-rise {text!r} is not a rise: write it like 3% or 0.03")
    return rise


def is_open(recipe: Recipe) -> bool:
    """Whether it is still to be found out what becomes of each linear."""
    return not recipe.linears and (has_target(recipe) or recipe.allocation != "uniform")


def has_target(recipe: Recipe) -> bool:
    """Whether size or perplexity say how much is removed."""
    return recipe.target_size is not None or recipe.max_perplexity_rise is not None


def check_goals(recipe: Recipe) -> None:
    """Raise UsageError where what is to be reached makes no sense with the rest of the recipe."""
    if recipe.allocation not in ALLOCATIONS:
        raise UsageError(
            f"allocation {recipe.allocation!r} is not known: {did_you_mean(recipe.allocation, ALLOCATIONS)}"
        )
    for name, choice in recipe.linears.items():
        if choice.sparsity is not None:
            Unstructured(choice.sparsity)
            if not recipe.prune:
                raise UsageError(f"a sparsity is chosen for {name}, but no method is given: --prune is missing")
        if choice.bits is not None and recipe.quantize is None:
            raise UsageError(f"bits are chosen for {name}, but no method is given: --quantize is missing")
    if has_target(recipe):
        _check_target(recipe)
    elif recipe.allocation != "uniform":
        if not recipe.prune and recipe.quantize is None:
            return  # for others to say
        if recipe.allocation == "owl" and not recipe.prune:
            raise UsageError("--allocation owl shares a sparsity, but no method is given: --prune is missing")
        if recipe.pattern not in (None, "unstructured"):
            raise UsageError(
                f"--allocation {recipe.allocation} needs an unstructured mask: --pattern {recipe.pattern} removes the same "
                "share of every linear"
            )


def _check_target(recipe: Recipe) -> None:
    if recipe.target_size is not None and recipe.max_perplexity_rise is not None:
        raise UsageError("--target-size and --max-perplexity-rise each say how small: give one of them")
    flag = "--target-size" if recipe.target_size is not None else "--max-perplexity-rise"
    if recipe.target_size is not None:
        parse_target(recipe.target_size)
    if recipe.max_perplexity_rise is not None:
        parse_rise(recipe.max_perplexity_rise)
    if recipe.allocation == "owl":
        raise UsageError(f"{flag} is reached by a search: leave --allocation owl out")
    if recipe.linears:
        return
    for option, value in (
        ("--sparsity", recipe.sparsity),
        ("--pattern", recipe.pattern),
        ("--bits", recipe.quantization.get("bits")),
    ):
        if value is not None:
            raise UsageError(f"{flag} finds sparsity and bits of every linear: leave {option} out")


def with_methods(recipe: Recipe) -> Recipe:
    """A recipe with a target gets the methods that it is reached with, where it names none."""
    if not has_target(recipe) or recipe.prune or recipe.quantize is not None:
        return recipe
    return replace(recipe, prune=_PRUNER, quantize=_QUANTIZER)


def placeholder(recipe: Recipe) -> Recipe:
    """A recipe that can be planned, with a sparsity in the place of those that each linear has or gets."""
    recipe = with_methods(recipe)
    if recipe.prune and recipe.sparsity is None and recipe.pattern is None and (has_target(recipe) or recipe.linears):
        return replace(recipe, sparsity=_PLACEHOLDER)
    return recipe
