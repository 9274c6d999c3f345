"""What is written of activation sparsity: with each linear, and in the config of the whole.

O: output features, I: input features.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from secateur.core.stats import InputStats
from secateur.errors import UsageError
from secateur.gates.section import LEFT, RIGHT, SCALE, SECTION, THRESHOLD, GatedInput, Section, levels_for
from secateur.pipeline.solve import Solution
from secateur.recipes.plan import Plan
from secateur.recipes.recipe import Choice

# Inputs of which more are zero are told of: such as those behind a ReLU.
_MANY_ZEROS = 0.3


def gated(
    plan: Plan,
    solutions: Sequence[Solution],
    shapes: Sequence[tuple[int, int]],
    names: Sequence[str],
    stats: InputStats,
    choice: Choice | None,
) -> list[Solution]:
    """Solutions of linears with what says which of their inputs are read.

    Args:
        names, shapes: of all linears that read the input; (O, I) of each.
        stats: of the input, with its sizes.
        choice: for these linears, with the share of each level, where these were searched for.
    """
    method, sizes = plan.sparsifier, stats.histogram
    assert method is not None
    assert sizes is not None
    levels = levels_for(plan.unread)
    shares = levels if choice is None or choice.unread is None else choice.unread
    if len(shares) != len(levels):
        raise UsageError(
            f"the recipe's choice for {names[0]} has {len(shares)} shares, and there are {len(levels)} levels"
        )
    rank_of = getattr(method, "rank", lambda *_: 0)
    ranks = [rank_of(shape, plan.unread) for shape in shapes]
    spent = sum(R * (O + I) for R, (O, I) in zip(ranks, shapes, strict=True)) / sum(O * I for O, I in shapes)
    shares = tuple(min(share + spent, 1.0) for share in shares)
    thresholds = tuple(map(sizes.threshold, shares)) if method.rule == THRESHOLD else ()
    said = {**GatedInput(tuple(names), shares, thresholds).to_dict(), "zeros": sizes.zero_share}
    found = []
    for solution in solutions:
        parts, R = dict(solution.parts), ranks[names.index(solution.name)]
        if sizes.scale_I is not None and solution.name == names[0]:
            parts[SCALE] = sizes.scale_I.float().cpu()
        if R:
            assert solution.W_OI is not None
            left_OR, right_RI = method.rest(solution.W_OI, R)  # type: ignore[attr-defined]
            pieces = {LEFT: left_OR, RIGHT: right_RI}
            parts |= {part: W.to(solution.W_OI.dtype).cpu().contiguous() for part, W in pieces.items()}
        found.append(replace(solution, parts=parts, entry={**(solution.entry or {}), SECTION: said}))
    return found


def split_entries(
    entries: Mapping[str, Mapping[str, Any]], plan: Plan, names: Iterable[str]
) -> tuple[dict[str, dict[str, Any]], Section | None]:
    """What is to be said of layouts, by linears, and of activation sparsity, in the order of `names`."""
    layouts = {name: {key: value for key, value in entry.items() if key != SECTION} for name, entry in entries.items()}
    if plan.sparsifier is None:
        return layouts, None
    said = {
        entry[SECTION]["linears"][0]: entry[SECTION] for name in names if SECTION in (entry := entries.get(name, {}))
    }
    inputs = tuple(
        GatedInput(tuple(each["linears"]), tuple(each["shares"]), tuple(each.get("thresholds", ())))
        for each in said.values()
    )
    levels = levels_for(plan.unread)
    return layouts, Section(plan.sparsifier.name, plan.sparsifier.rule, levels, plan.unread, inputs)


def note_zeros(entries: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What the user should know of inputs that are zero anyway."""
    shares = [entry[SECTION]["zeros"] for entry in entries.values() if SECTION in entry]
    many = [share for share in shares if share > _MANY_ZEROS]
    if not many:
        return []
    return [
        f"{sum(many) / len(many):.0%} of the inputs of {len(many)} linears are zero as they are: their weights are never read, "
        "and nothing is lost by it"
    ]
