"""What a recipe says of experts that are to be dropped."""

from __future__ import annotations

from typing import Any

from secateur.errors import UsageError
from secateur.recipes.methods import make
from secateur.recipes.recipe import Recipe

#: By what experts are kept where nothing is said: the best of `benchmarks/experts.py` on two models.
DEFAULT_SCORE = "gate"
_SELF = "self"


def expert_score_of(recipe: Recipe) -> Any:
    """The method that says which experts stay; None where none are dropped.

    Raises:
        UsageError: there is no such method, or the recipe says how to drop experts and not how many.
    """
    if recipe.drop_experts is None:
        said = {"expert_score": recipe.expert_score, "experts": recipe.experts or None, **recipe.scoring}
        for name, value in said.items():
            if value is not None:
                raise UsageError(
                    f"`{name}` says how to drop experts, but not how many: give `drop_experts`, such as 25%"
                )
        return None
    if not 0 < recipe.drop_experts < 1:
        raise UsageError(
            f"`drop_experts` {recipe.drop_experts:g} is not possible: give a share of the experts between 0 and 1, such as 25%"
        )
    method = make("expert_score", recipe.expert_score or DEFAULT_SCORE, recipe.scoring)
    method.check()
    if method.of_task and recipe.calibration.source == _SELF and not recipe.experts:
        raise UsageError(
            f"`expert_score` {method.name} groups experts by the text of a task, and none is given: name one by `calibration`"
        )
    return method
