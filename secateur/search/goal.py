"""The contract of goals, and which one a recipe has."""

from __future__ import annotations

from functools import cache
from typing import ClassVar, Protocol, TypeVar

import secateur.search.goals
from secateur.core.discovery import import_all, import_others
from secateur.errors import UsageError, did_you_mean
from secateur.pipeline.calibrate import Windows
from secateur.recipes.goals import PER_LAYER, is_open
from secateur.recipes.pruning_plan import STRUCTURED
from secateur.recipes.recipe import Choice, Recipe
from secateur.search.searcher import Searcher

#: Entry points of this group are modules of other packages, which register goals as ours do.
GROUP = "secateur.goals"
UNIFORM = "uniform"
#: The goal of a search for what is not read for a token.
UNREAD = "unread"


class Goal(Protocol):
    """How a total is shared between linears, or what size or quality is to be reached.

    Attributes:
        name: what `allocation` is then, or the field of the recipe that asks for it.
        models: that are made and measured on the way, at most.

    An allocation that is one way to reach what another goal is for has `takes`, the name of that goal. One that solves its
    candidates, and measures what they do, several times says in `rounds` how often.
    """

    name: ClassVar[str]
    models: ClassVar[int]

    @classmethod
    def of(cls, recipe: Recipe) -> Goal:
        """The goal behind a recipe's words. Raises UsageError where they make no sense together."""
        ...

    def check(self, searcher: Searcher) -> None:
        """Raise UsageError where the model cannot get there, before any work."""
        ...

    def tried(self, searcher: Searcher) -> list[Choice]:
        """About what is solved for every linear, for a forecast: nothing where only the dense model is looked at."""
        ...

    def result_bytes(self, searcher: Searcher) -> int | None:
        """The size of the files, at most; None where it is not known before."""
        ...

    def choose(self, searcher: Searcher, windows: Windows) -> dict[str, Choice]:
        """What becomes of each linear, by name. Raises UsageError where the goal is out of reach."""
        ...


GOALS: dict[str, type[Goal]] = {}
_G = TypeVar("_G", bound=type[Goal])


def goal(cls: _G) -> _G:
    """Register a class as a goal."""
    GOALS[cls.name] = cls
    return cls


@cache
def _import_goals() -> None:
    # Not with this file: goals import it.
    import_all(secateur.search.goals.__name__, secateur.search.goals.__path__)
    import_others(GROUP, "goals")


def goal_of(recipe: Recipe) -> Goal | None:
    """The goal of a recipe; None where it says itself what becomes of each linear.

    Raises:
        UsageError: there is none of that name, there are two, or one makes no sense with the rest.
    """
    _import_goals()
    fields = [name for name in GOALS if getattr(recipe, name, None) is not None]
    if len(fields) > 1:
        raise UsageError(f"`{fields[0]}` and `{fields[1]}` each say how small: give one of them")
    if recipe.pattern == STRUCTURED:
        return GOALS[PER_LAYER if recipe.widths == PER_LAYER else STRUCTURED].of(recipe) if is_open(recipe) else None
    if recipe.activations is not None and recipe.allocation == "search":
        return GOALS[UNREAD].of(recipe) if is_open(recipe) else None
    # An allocation may be a way of its own to get there.
    takes = getattr(GOALS.get(recipe.allocation), "takes", None)
    name = fields[0] if fields and takes != fields[0] else recipe.allocation
    allocations = [
        UNIFORM,
        *(name for name in GOALS if not hasattr(recipe, name) and name not in (STRUCTURED, PER_LAYER, UNREAD)),
    ]
    if recipe.allocation not in allocations:
        raise UsageError(
            f"allocation {recipe.allocation!r} is not known: {did_you_mean(recipe.allocation, allocations)}"
        )
    if name == UNIFORM:
        if recipe.share_choice is not None:
            raise UsageError(
                "`share_choice` is for a search, which finds other sparsities or bits for each linear: add `allocation` "
                "search, `target_size` or `max_perplexity_rise`, or leave it out"
            )
        return None
    found = GOALS[name].of(recipe)
    return found if is_open(recipe) else None
