"""From the words of a recipe to methods, a pattern and layouts: all that can be wrong with it is found here."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass

import torch

from secateur.calibration.stats import Level
from secateur.errors import UsageError, did_you_mean
from secateur.formats.bitmap import Bitmap
from secateur.formats.layout import DTYPES, Layout
from secateur.formats.nm import NMBits
from secateur.pipeline.goals import check_goals, placeholder
from secateur.prune import PRUNERS, REFINERS, Pruner, Refiner
from secateur.prune.patterns import NM, Pattern, Unstructured, parse_pattern
from secateur.quant import QUANTIZERS, Quantizer
from secateur.recipe import Choice, Recipe

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
    check_goals(recipe)
    recipe = placeholder(recipe)
    if not recipe.prune and recipe.quantize is None:
        raise UsageError(
            f"no method is given: --prune can be {', '.join(sorted(PRUNERS))}, --quantize {', '.join(sorted(QUANTIZERS))}"
        )
    pruning = _pruning(recipe)
    quantizer = _quantizer(recipe)
    pattern = pruning.pattern if pruning else None
    _known("format", recipe.format, ("auto", "dense", *_SPARSE_FORMATS))
    if quantizer is not None and recipe.format in _SPARSE_FORMATS:
        raise UsageError(f"--format {recipe.format} does not hold quantized weights: give auto or dense")
    if recipe.format == "nm" and not isinstance(pattern, NM):
        raise UsageError("--format nm needs a --pattern N:M: an unstructured mask fits bitmap or dense")
    layout: Layout | None = None
    if isinstance(pattern, NM) and recipe.format in ("auto", "nm"):
        layout = NMBits(pattern.n, pattern.m)
    elif recipe.format != "dense":
        layout = Bitmap()
    dtype = None if recipe.dtype == "auto" else DTYPES[_known("dtype", recipe.dtype, ["auto", *DTYPES])]
    return Plan(pruning, quantizer, layout, recipe.format == "dense", dtype)


def _pruning(recipe: Recipe) -> Pruning | None:
    if not recipe.prune:
        for option, value in (
            ("sparsity", recipe.sparsity),
            ("pattern", recipe.pattern),
            ("refine", recipe.refine),
            ("reconstruct", recipe.reconstruct or None),
        ):
            if value is not None:
                raise UsageError(f"--{option} says how to prune, but no method is given: --prune is missing")
        return None
    pruner = PRUNERS[_known("pruning method", recipe.prune, PRUNERS)]
    refiner = REFINERS[_known("refiner", recipe.refine, REFINERS)] if recipe.refine is not None else None
    return Pruning(pruner, refiner, parse_pattern(recipe.pattern, recipe.sparsity), recipe.reconstruct)


def _quantizer(recipe: Recipe) -> Quantizer | None:
    given = recipe.quantization.given()
    if recipe.quantize is None:
        if given:
            raise UsageError(
                f"{_flag(next(iter(given)))} says how to quantize, but no method is given: --quantize is missing"
            )
        return None
    method = QUANTIZERS[_known("quantization method", recipe.quantize, QUANTIZERS)]
    options = [field.name for field in dataclasses.fields(method)]  # type: ignore[arg-type]
    for name in given:
        if name not in options:
            raise UsageError(
                f"{_flag(name)} is not an option of {recipe.quantize}, which has {', '.join(map(_flag, options))}"
            )
    return method(**given)


def _flag(option: str) -> str:
    return f"--{option.replace('_', '-')}"
