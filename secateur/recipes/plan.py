"""From the words of a recipe to methods, a pattern and layouts: all that can be wrong with it is found here."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from secateur.core.damping import is_open, with_damping
from secateur.core.options import given_options
from secateur.core.patterns import NM, Pattern, Structured, Unstructured, parse_pattern
from secateur.core.quantized import BITS
from secateur.core.registry import (
    FACTORIZERS,
    PRUNERS,
    QUANTIZERS,
    Factorizer,
    Pruner,
    Quantizer,
    Refiner,
    UnitPruner,
)
from secateur.core.stats import Level
from secateur.errors import UsageError, did_you_mean
from secateur.formats.layouts.bitmap import Bitmap
from secateur.formats.layouts.layout import DTYPES, Layout
from secateur.formats.layouts.nm import NMBits
from secateur.quant.block_grid import OPEN, STAND_IN, TYPE_GRIDS, UNDECIDED
from secateur.recipes.built_in import TO_BEGIN_WITH
from secateur.recipes.factorizing import factorizer_of
from secateur.recipes.goals import PER_LAYER, WIDTHS, has_target, placeholder, units_of
from secateur.recipes.methods import find, make
from secateur.recipes.recipe import TABLES, UNTOUCHED, Choice, Recipe
from secateur.solvers.inverse_cholesky import DAMPING

#: The pattern of whole units.
STRUCTURED = "structured"
_SPARSE_FORMATS = ("bitmap", "nm")
# Options of a quantizer that are chosen for a linear.
_NAMED = ("bits", "grid")


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


@dataclass(frozen=True)
class Plan:
    """A recipe, checked and resolved against what this version knows.

    Attributes:
        pruning, quantizer: at least one of them, or
        factorizer: alone.
        layout: of pruned weights that are not quantized; None writes them dense.
        dense: write quantized weights dense.
        dtype: of the weights written; None keeps the source's.
        tables: bits of the table of embeddings and of the head, or their grid, by what recipes call them, as far as they are
            quantized.
        match_dense: solve for the dense model's outputs.
    """

    pruning: Pruning | None
    quantizer: Quantizer | None
    layout: Layout | None
    dense: bool
    dtype: torch.dtype | None
    tables: tuple[tuple[str, int | str], ...] = ()
    match_dense: bool = False
    factorizer: Factorizer | None = None

    @property
    def of_linears(self) -> bool:
        """Whether anything becomes of linears."""
        return self.pruning is not None or self.quantizer is not None or self.factorizer is not None

    @property
    def level(self) -> Level:
        parts = (self.pruning, self.quantizer, self.factorizer)
        return max((part.level for part in parts if part is not None), default=Level.NONE)

    def of(self, choice: Choice | None) -> Plan:
        """The plan for a linear for which something was chosen, other than to leave it alone; None: for one like all."""
        if choice is None or (self.pruning is not None and isinstance(self.pruning.pattern, Structured)):
            return self
        pruning = quantizer = None
        if choice.sparsity is not None:
            assert self.pruning is not None
            pruning = dataclasses.replace(self.pruning, pattern=Unstructured(choice.sparsity))
        named = {name: getattr(choice, name) for name in _NAMED if getattr(choice, name) is not None}
        if named:
            other: Any = self.quantizer if choice.quantize is None else make("quantize", choice.quantize, {})
            quantizer = dataclasses.replace(other, **named)
        return dataclasses.replace(self, pruning=pruning, quantizer=quantizer)

    def options(self) -> dict[str, Any]:
        """All options of the methods, by what a recipe calls those of each."""
        methods = {
            "pruning": self.pruning.pruner if self.pruning is not None else None,
            "refining": self.pruning.refiner if self.pruning is not None else None,
            "quantization": self.quantizer,
            "factorization": self.factorizer,
        }
        return {key: given_options(method) for key, method in methods.items() if method is not None}

    @property
    def needs_halves(self) -> bool:
        """Whether something is chosen by windows that were held out."""
        return self.match_dense or self.chooses_damping or (self.pruning is not None and self.pruning.refits)

    @property
    def chooses_damping(self) -> bool:
        """Whether a method leaves its damping to be chosen, as `reconstruct` always does."""
        pruning = self.pruning
        if is_open(self.quantizer) or is_open(self.factorizer):
            return True
        return pruning is not None and (pruning.reconstruct or is_open(pruning.pruner))

    def with_damping(self, damping: float) -> Plan:
        """The plan with a damping for the methods that leave it open."""
        pruning = self.pruning
        if pruning is not None:
            pruning = dataclasses.replace(pruning, pruner=with_damping(pruning.pruner, damping), damping=damping)
        coders = {name: with_damping(getattr(self, name), damping) for name in ("quantizer", "factorizer")}
        return dataclasses.replace(self, pruning=pruning, **coders)

    @property
    def matrices(self) -> int:
        """How many matrices `[I, I]` the statistics of inputs hold: where windows are halved, of each half and of both."""
        kinds = (self.level >= Level.GRAM) + self.match_dense
        return 3 * kinds if self.needs_halves else kinds

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
    factorizer = factorizer_of(recipe)
    recipe = placeholder(recipe)
    tables = _tables(recipe)
    if not recipe.prune and recipe.quantize is None and factorizer is None and not tables:
        raise UsageError(
            f"no method is given: `prune` can be {', '.join(sorted(PRUNERS))}, `quantize` {', '.join(sorted(QUANTIZERS))}, "
            f"`factorize` {', '.join(sorted(FACTORIZERS))}; "
            f"to begin with: `recipe={TO_BEGIN_WITH!r}`"
        )
    pruning = _pruning(recipe)
    quantizer = _quantizer(recipe)
    if tables and recipe.linears and all(choice == Choice() for choice in recipe.linears.values()):
        pruning = quantizer = factorizer = None  # as a search may have found
    unpruned = getattr(quantizer, "unpruned", None)
    if pruning is not None and unpruned:
        raise UsageError(f"`quantize` {recipe.quantize} does not go with `prune`: {unpruned}")
    if quantizer is not None and not quantizer.all_bits and (has_target(recipe) or recipe.allocation == "search"):
        raise UsageError(f"`quantize` {recipe.quantize} has no `bits` for a search to choose: give another method")
    if getattr(quantizer, "grid", None) == OPEN:
        if not has_target(recipe) and not recipe.linears:
            raise UsageError(UNDECIDED)
        quantizer = dataclasses.replace(quantizer, grid=STAND_IN)  # type: ignore[type-var]
    pattern = pruning.pattern if pruning else None
    _known("format", recipe.format, ("auto", "dense", *_SPARSE_FORMATS))
    if (quantizer is not None or pruning is None) and recipe.format in _SPARSE_FORMATS:
        raise UsageError(f"`format` {recipe.format} does not hold quantized weights: give auto or dense")
    layouts: dict[str, Layout | None] = {"dense": None, "bitmap": Bitmap(), "auto": Bitmap()}
    if isinstance(pattern, Structured):
        layouts["auto"] = None
    if isinstance(pattern, NM):
        layouts |= dict.fromkeys(("auto", "nm"), NMBits(pattern.n, pattern.m))
    if recipe.format not in layouts:
        raise UsageError("`format` nm needs a `pattern` N:M: an unstructured mask fits bitmap or dense")
    dtype = None if recipe.dtype == "auto" else DTYPES[_known("dtype", recipe.dtype, ["auto", *DTYPES])]
    found = Plan(
        pruning,
        quantizer,
        layouts[recipe.format],
        recipe.format == "dense",
        dtype,
        tables,
        recipe.match_dense,
        factorizer,
    )
    if recipe.match_dense and found.level < Level.GRAM:
        able = sorted(
            name
            for table in (PRUNERS, QUANTIZERS, FACTORIZERS)
            for name, method in table.items()
            if getattr(method, "level", None) == Level.GRAM
        )
        named = " with ".join(filter(None, (recipe.prune, recipe.refine, recipe.quantize)))
        raise UsageError(
            f"`match_dense` needs the inputs' Gram matrix, which {named} does not look at: {', '.join(able)} do, and any "
            "pruner with `reconstruct`"
        )
    return found


def _tables(recipe: Recipe) -> tuple[tuple[str, int | str], ...]:
    """The bits of tables that are to be quantized. Raises UsageError where there are no such codes."""
    given = {name: getattr(recipe, name) for name in TABLES}
    for name, bits in given.items():
        if bits not in (None, *BITS, UNTOUCHED, *TYPE_GRIDS):
            raise UsageError(
                f"`{name}` {bits} is not possible: give {BITS[0]} to {BITS[-1]} bits, or {UNTOUCHED} to leave it as it is, or "
                "a grid of GGUF's, such as q6_k"
            )
    return tuple((name, bits) for name, bits in given.items() if bits not in (None, UNTOUCHED))


def _check_choices(recipe: Recipe) -> None:
    """Raise UsageError where something is chosen for a linear that no method does."""
    for name, choice in recipe.linears.items():
        if choice.sparsity is not None:
            Unstructured(choice.sparsity)
            if not recipe.prune:
                raise UsageError(f"a sparsity is chosen for {name}, but no method is given: `prune` is missing")
        if choice.units is not None and recipe.pattern != STRUCTURED:
            raise UsageError(f"a width is chosen for {name}, which is for `pattern` structured")
        if (choice.bits is not None or choice.grid is not None) and recipe.quantize is None:
            raise UsageError(f"bits are chosen for {name}, but no method is given: `quantize` is missing")
        if choice.quantize is not None:
            _check_method(name, choice)
        elif choice.bits is not None and not find("quantize", recipe.quantize or "").all_bits:
            raise UsageError(
                f"bits are chosen for {name}, and `quantize` {recipe.quantize} has no `bits`: leave them out"
            )
    for grid in dict.fromkeys(choice.grid for choice in recipe.linears.values() if choice.grid is not None):
        make("quantize", recipe.quantize or "", {**recipe.quantization, "grid": grid})
        if grid == OPEN:
            raise UsageError(UNDECIDED)


def _check_method(name: str, choice: Choice) -> None:
    """Raise UsageError where the method that is chosen for a linear cannot do what is chosen."""
    assert choice.quantize is not None
    method = find("quantize", choice.quantize)
    if choice.bits not in method.all_bits:
        known = ", ".join(map(str, method.all_bits))
        raise UsageError(f"{choice.quantize} with `bits` {choice.bits} is chosen for {name}: it can be {known}")
    if choice.grid is not None:
        raise UsageError(
            f"{choice.quantize} and `grid` {choice.grid} are chosen for {name}: a grid is of the recipe's own method"
        )
    unpruned = getattr(method, "unpruned", None)
    if unpruned and choice.sparsity is not None:
        raise UsageError(f"{choice.quantize} and a sparsity are chosen for {name}: {unpruned}")


def _pruning(recipe: Recipe) -> Pruning | None:
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
        _need_method(recipe.refining, "refine")
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


def _quantizer(recipe: Recipe) -> Quantizer | None:
    if recipe.quantize is None:
        _need_method(recipe.quantization, "quantize")
        return None
    found: Quantizer = make("quantize", recipe.quantize, recipe.quantization)
    return found


def _need_method(given: Mapping[str, Any], role: str) -> None:
    if given:
        raise UsageError(f"`{next(iter(given))}` says how to {role}, but no method is given: `{role}` is missing")
