"""From the words of a recipe to methods, a pattern and layouts: all that can be wrong with it is found here."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from secateur.core.options import given_options
from secateur.core.patterns import NM, Pattern, Unstructured, parse_pattern
from secateur.core.registry import PRUNERS, QUANTIZERS, Pruner, Quantizer, Refiner
from secateur.core.stats import Level
from secateur.errors import UsageError, did_you_mean
from secateur.formats.layouts.bitmap import Bitmap
from secateur.formats.layouts.layout import DTYPES, Layout
from secateur.formats.layouts.nm import NMBits
from secateur.quant.block_grid import check_pruned
from secateur.recipes.built_in import TO_BEGIN_WITH
from secateur.recipes.goals import placeholder
from secateur.recipes.methods import make
from secateur.recipes.recipe import Choice, Recipe

_SPARSE_FORMATS = ("bitmap", "nm")


@dataclass(frozen=True)
class Pruning:
    """What removes weights, and which sets of them may be left."""

    pruner: Pruner
    refiner: Refiner | None
    pattern: Pattern
    reconstruct: bool = False

    @property
    def level(self) -> Level:
        if self.reconstruct:
            return Level.GRAM
        return max(self.pruner.level, self.refiner.level if self.refiner else Level.NONE)


@dataclass(frozen=True)
class Plan:
    """A recipe, checked and resolved against what this version knows.

    Attributes:
        pruning, quantizer: at least one of them.
        layout: of pruned weights that are not quantized; None writes them dense.
        dense: write quantized weights dense.
        dtype: of the weights written; None keeps the source's.
    """

    pruning: Pruning | None
    quantizer: Quantizer | None
    layout: Layout | None
    dense: bool
    dtype: torch.dtype | None

    @property
    def level(self) -> Level:
        return max(part.level for part in (self.pruning, self.quantizer) if part is not None)

    def of(self, choice: Choice | None) -> Plan:
        """The plan for a linear for which something was chosen, other than to leave it alone; None: for one like all."""
        if choice is None:
            return self
        pruning = quantizer = None
        if choice.sparsity is not None:
            assert self.pruning is not None
            pruning = dataclasses.replace(self.pruning, pattern=Unstructured(choice.sparsity))
        if choice.bits is not None:
            quantizer = dataclasses.replace(self.quantizer, bits=choice.bits)  # type: ignore[type-var]
        return dataclasses.replace(self, pruning=pruning, quantizer=quantizer)

    def options(self) -> dict[str, Any]:
        """All options of the methods, by what a recipe calls those of each."""
        methods = {
            "pruning": self.pruning.pruner if self.pruning is not None else None,
            "refining": self.pruning.refiner if self.pruning is not None else None,
            "quantization": self.quantizer,
        }
        return {key: given_options(method) for key, method in methods.items() if method is not None}

    @property
    def needs_text(self) -> bool:
        """Whether the methods look at what the model makes of any."""
        return self.level > Level.NONE or self.needs_fisher

    @property
    def needs_fisher(self) -> bool:
        return self.quantizer is not None and self.quantizer.needs_fisher


def _known(what: str, name: str, among: Collection[str]) -> str:
    if name in among:
        return name
    raise UsageError(f"{what} {name!r} is not known: {did_you_mean(name, among)}")


def plan(recipe: Recipe) -> Plan:
    """Check a recipe before any work starts.

    Raises:
        UsageError: a name is unknown (the nearest one is offered), or options contradict each other.
    """
    _check_choices(recipe)
    recipe = placeholder(recipe)
    if not recipe.prune and recipe.quantize is None:
        raise UsageError(
            f"no method is given: `prune` can be {', '.join(sorted(PRUNERS))}, `quantize` {', '.join(sorted(QUANTIZERS))}; "
            f"to begin with: `recipe={TO_BEGIN_WITH!r}`"
        )
    pruning = _pruning(recipe)
    quantizer = _quantizer(recipe)
    if pruning is not None and quantizer is not None:
        check_pruned(quantizer)
    pattern = pruning.pattern if pruning else None
    _known("format", recipe.format, ("auto", "dense", *_SPARSE_FORMATS))
    if quantizer is not None and recipe.format in _SPARSE_FORMATS:
        raise UsageError(f"`format` {recipe.format} does not hold quantized weights: give auto or dense")
    layouts: dict[str, Layout | None] = {"dense": None, "bitmap": Bitmap(), "auto": Bitmap()}
    if isinstance(pattern, NM):
        layouts |= dict.fromkeys(("auto", "nm"), NMBits(pattern.n, pattern.m))
    if recipe.format not in layouts:
        raise UsageError("`format` nm needs a `pattern` N:M: an unstructured mask fits bitmap or dense")
    dtype = None if recipe.dtype == "auto" else DTYPES[_known("dtype", recipe.dtype, ["auto", *DTYPES])]
    return Plan(pruning, quantizer, layouts[recipe.format], recipe.format == "dense", dtype)


def _check_choices(recipe: Recipe) -> None:
    """Raise UsageError where something is chosen for a linear that no method does."""
    for name, choice in recipe.linears.items():
        if choice.sparsity is not None:
            Unstructured(choice.sparsity)
            if not recipe.prune:
                raise UsageError(f"a sparsity is chosen for {name}, but no method is given: `prune` is missing")
        if choice.bits is not None and recipe.quantize is None:
            raise UsageError(f"bits are chosen for {name}, but no method is given: `quantize` is missing")


def _pruning(recipe: Recipe) -> Pruning | None:
    if not recipe.prune:
        for option, value in (
            ("sparsity", recipe.sparsity),
            ("pattern", recipe.pattern),
            ("refine", recipe.refine),
            ("reconstruct", recipe.reconstruct or None),
            *recipe.pruning.items(),
        ):
            if value is not None:
                raise UsageError(f"`{option}` says how to prune, but no method is given: `prune` is missing")
        return None
    pruner = make("prune", recipe.prune, recipe.pruning)
    if recipe.refine is None:
        _need_method(recipe.refining, "refine")
    refiner = make("refine", recipe.refine, recipe.refining) if recipe.refine is not None else None
    return Pruning(pruner, refiner, parse_pattern(recipe.pattern, recipe.sparsity), recipe.reconstruct)


def _quantizer(recipe: Recipe) -> Quantizer | None:
    if recipe.quantize is None:
        _need_method(recipe.quantization, "quantize")
        return None
    found: Quantizer = make("quantize", recipe.quantize, recipe.quantization)
    return found


def _need_method(given: Mapping[str, Any], role: str) -> None:
    if given:
        raise UsageError(f"`{next(iter(given))}` says how to {role}, but no method is given: `{role}` is missing")
