"""From the words of a recipe to methods, a pattern and a layout: all that can be wrong with it is found here."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from dataclasses import dataclass

import torch

from secateur.calibration.stats import Level
from secateur.errors import UsageError
from secateur.formats.bitmap import Bitmap
from secateur.formats.layout import FLOAT_DTYPES, LAYOUTS, Layout
from secateur.formats.nm import NMBits
from secateur.prune import PRUNERS, REFINERS, Pruner, Refiner
from secateur.prune.patterns import NM, Pattern, parse_pattern
from secateur.recipe import Recipe


@dataclass(frozen=True)
class Plan:
    """A recipe, checked and resolved against what this version knows."""

    pruner: Pruner
    refiner: Refiner | None
    pattern: Pattern
    layout: Layout | None
    dtype: torch.dtype | None

    @property
    def level(self) -> Level:
        return max(self.pruner.level, self.refiner.level if self.refiner else Level.NONE)


def _known(what: str, name: str, among: Collection[str]) -> str:
    if name in among:
        return name
    close = difflib.get_close_matches(name, among, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"it can be {', '.join(sorted(among))}"
    raise UsageError(f"{what} {name!r} is not known: {hint}")


def plan(recipe: Recipe) -> Plan:
    """Check a recipe before any work starts.

    Raises:
        UsageError: a name is unknown (the nearest one is offered), or options contradict each other.
    """
    if not recipe.prune:
        raise UsageError(f"no method is given: --prune can be {', '.join(sorted(PRUNERS))}")
    pruner = PRUNERS[_known("pruning method", recipe.prune, PRUNERS)]
    refiner = REFINERS[_known("refiner", recipe.refine, REFINERS)] if recipe.refine is not None else None
    pattern = parse_pattern(recipe.pattern, recipe.sparsity)
    formats = ("auto", "dense", *LAYOUTS)
    name = _known("format", recipe.format, formats)
    if name == "nm" and not isinstance(pattern, NM):
        raise UsageError("--format nm needs a --pattern N:M: an unstructured mask fits bitmap or dense")
    layout: Layout | None
    if isinstance(pattern, NM) and name in ("auto", "nm"):
        layout = NMBits(pattern.n, pattern.m)
    else:
        layout = None if name == "dense" else Bitmap()
    dtypes = {str(d).removeprefix("torch."): d for d in FLOAT_DTYPES}
    dtype = None if recipe.dtype == "auto" else dtypes[_known("dtype", recipe.dtype, ["auto", *dtypes])]
    return Plan(pruner, refiner, pattern, layout, dtype)
