"""What a recipe says of pruning, as methods and a pattern, and what does not go together with that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from secateur.core.damping import is_open
from secateur.core.patterns import Pattern, Structured, parse_pattern
from secateur.core.registry import PRUNERS, Pruner, Refiner, UnitPruner
from secateur.core.stats import Level
from secateur.errors import UsageError
from secateur.recipes.goals import PER_LAYER, WIDTHS, units_of
from secateur.recipes.methods import make
from secateur.recipes.recipe import Recipe
from secateur.solvers.inverse_cholesky import DAMPING

#: The pattern of whole units.
STRUCTURED = "structured"


@dataclass(frozen=True)
class Pruning:
    """What removes weights, and which sets of them may be left.

    Attributes:
        damping: of `reconstruct`, which is chosen for each linear before it is solved.
    """

    pruner: Pruner | UnitPruner
    refiner: Refiner | None
    pattern: Pattern | Structured
    reconstruct: bool = False
    damping: float = DAMPING

    @property
    def level(self) -> Level:
        if self.refits:
            return Level.GRAM
        if self.reconstruct:
            return Level.GRAM
        return max(self.pruner.level, self.refiner.level if self.refiner else Level.NONE)

    @property
    def refits(self) -> bool:
        """Whether the units that stay are refitted."""
        return isinstance(self.pattern, Structured) and self.pattern.refit


def pruning_of(recipe: Recipe) -> Pruning | None:
    """What a recipe prunes by. Raises UsageError where something is missing or does not go together."""
    if not recipe.prune:
        for option, value in (
            ("sparsity", recipe.sparsity),
            ("pattern", recipe.pattern),
            *_structured_only(recipe).items(),
            ("refine", recipe.refine),
            ("reconstruct", recipe.reconstruct or None),
            *recipe.pruning.items(),
        ):
            if value is not None:
                raise UsageError(f"`{option}` says how to prune, but no method is given: `prune` is missing")
        return None
    pruner = make("prune", recipe.prune, recipe.pruning)
    if recipe.refine is None:
        need_method(recipe.refining, "refine")
    refiner = make("refine", recipe.refine, recipe.refining) if recipe.refine is not None else None
    if recipe.pattern == STRUCTURED:
        return _structured(recipe, pruner)
    for option in _structured_only(recipe):
        raise UsageError(f"`{option}` is for `pattern` structured: add that, or leave it out")
    if not hasattr(pruner, "prune"):
        raise UsageError(f"{recipe.prune} removes whole units: add `pattern` structured")
    return Pruning(pruner, refiner, parse_pattern(recipe.pattern, recipe.sparsity), recipe.reconstruct)


def _structured_only(recipe: Recipe) -> dict[str, Any]:
    """What a recipe says that only a structured pattern heeds, by name."""
    said = {"units": recipe.units, "multiple": recipe.multiple, "widths": recipe.widths}
    return {
        name: value for name, value in {**said, "refit": None if recipe.refit else False}.items() if value is not None
    }


def _structured(recipe: Recipe, pruner: Any) -> Pruning:
    """Raises UsageError where something does not go together with it."""
    if not hasattr(pruner, "keep_units"):
        known = ", ".join(sorted(name for name, each in PRUNERS.items() if hasattr(each, "keep_units")))
        raise UsageError(
            f"{recipe.prune} compares single weights, and `pattern` structured whole units: `prune` can be {known}"
        )
    others = {
        "refine": recipe.refine,
        "reconstruct": recipe.reconstruct or None,
        "match_dense": recipe.match_dense or None,
        "damping": "auto" if is_open(pruner) else None,
        "quantize": recipe.quantize,
        "targets": recipe.targets or None,
        "ignore": recipe.ignore or None,
        "target_size": recipe.target_size,
        "max_perplexity_rise": recipe.max_perplexity_rise,
        "share_choice": recipe.share_choice,
    }
    for name, value in others.items():
        if value is not None:
            instead = "compress the result again for that" if name in ("quantize", "target_size") else "leave it out"
            raise UsageError(f"`{name}` does not go together with `pattern` structured: {instead}")
    if recipe.format not in ("auto", "dense"):
        raise UsageError(
            f"`format` {recipe.format} is for single weights, and a structured result is dense: leave it out"
        )
    if recipe.sparsity is None:
        raise UsageError(
            "how much to prune is not said: give `sparsity`, the share of the blocks' weights to remove, like 25%"
        )
    if recipe.widths not in (None, *WIDTHS):
        raise UsageError(f"`widths` {recipe.widths!r} is not known: it can be {', '.join(WIDTHS)}")
    pattern = Structured(recipe.sparsity, units_of(recipe), recipe.multiple, recipe.refit, recipe.widths == PER_LAYER)
    _check_allocation(recipe)
    return Pruning(pruner, None, pattern)


def _check_allocation(recipe: Recipe) -> None:
    """Raise UsageError where a structured recipe does not say how what goes is shared."""
    if recipe.allocation not in ("uniform", "search"):
        raise UsageError(
            f"`allocation` {recipe.allocation} is for single weights: `allocation` search shares whole units by what each costs"
        )
    if recipe.linears:
        return
    if recipe.widths == PER_LAYER and recipe.allocation != "search":
        raise UsageError(
            f"`widths` {PER_LAYER} leaves open how wide each block is to be: add `allocation` search, or a recipe whose "
            "`linears` say so"
        )
    if recipe.allocation == "search" and recipe.widths != PER_LAYER and units_of(recipe) == ("neurons",):
        raise UsageError(
            f"`allocation` search has nothing to share where all blocks lose as many neurons: add `widths` {PER_LAYER}, or "
            "give several `units`"
        )


def need_method(given: Mapping[str, Any], role: str) -> None:
    """Raise UsageError where options are given of a method that is not."""
    if given:
        raise UsageError(f"`{next(iter(given))}` says how to {role}, but no method is given: `{role}` is missing")
