"""From the words of a recipe to methods, a pattern and layouts: all that can be wrong with it is found here."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch

from secateur.core.damping import is_open, with_damping
from secateur.core.options import given_options
from secateur.core.patterns import NM, Structured, Unstructured
from secateur.core.quantized import BITS
from secateur.core.registry import (
    FACTORIZERS,
    PRUNERS,
    QUANTIZERS,
    Factorizer,
    Quantizer,
    Sparsifier,
)
from secateur.core.stats import Level
from secateur.errors import UsageError, did_you_mean
from secateur.formats.layouts.bitmap import Bitmap
from secateur.formats.layouts.layout import DTYPES, Layout
from secateur.formats.layouts.nm import NMBits
from secateur.mixture.skipping import check_share
from secateur.quant.block_grid import OPEN, STAND_IN, TYPE_GRIDS, UNDECIDED
from secateur.recipes.activation_plan import check_by_inputs, sparsifier_of, unread_of
from secateur.recipes.built_in import TO_BEGIN_WITH
from secateur.recipes.dropping import expert_score_of
from secateur.recipes.factorizing import factorizer_of
from secateur.recipes.goals import has_target, placeholder
from secateur.recipes.low_rank_part import LowRankPart, low_rank_part
from secateur.recipes.methods import find, make
from secateur.recipes.pruning_plan import STRUCTURED, Pruning, need_method, pruning_of
from secateur.recipes.recipe import TABLES, UNTOUCHED, Choice, Recipe

_SPARSE_FORMATS = ("bitmap", "nm")
# Options of a quantizer that are chosen for a linear.
_NAMED = ("bits", "grid")


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
        sparsifier: what says which inputs are read for a token, if any does, so that weights are stored by input.
        unread: the share of weights that it leaves unread.
        expert_score: says which experts stay, where some are dropped.
        expert_skip: the share of weak experts, which the calibration text tells, that the result leaves out; None: it knows of
            none.
        low_rank: what is of low rank beside each linear.
    """

    pruning: Pruning | None
    quantizer: Quantizer | None
    layout: Layout | None
    dense: bool
    dtype: torch.dtype | None
    tables: tuple[tuple[str, int | str], ...] = ()
    match_dense: bool = False
    sparsifier: Sparsifier | None = None
    unread: float = 0.0
    expert_score: Any = None
    expert_skip: float | None = None
    low_rank: LowRankPart | None = None
    factorizer: Factorizer | None = None

    @property
    def of_linears(self) -> bool:
        """Whether anything becomes of linears."""
        return self.changes_weights or self.sparsifier is not None

    @property
    def changes_weights(self) -> bool:
        """Whether weights of linears become others."""
        return any(part is not None for part in (self.pruning, self.quantizer, self.factorizer))

    @property
    def level(self) -> Level:
        least = Level.NONE if self.sparsifier is None else Level.MOMENTS
        parts = (self.pruning, self.quantizer, self.low_rank, self.factorizer)
        return max([least, *(part.level for part in parts if part is not None)])

    def of(self, choice: Choice | None) -> Plan:
        """The plan for a linear for which something was chosen, other than to leave it alone; None: for one like all."""
        if choice is None or (self.pruning is not None and isinstance(self.pruning.pattern, Structured)):
            return self
        if choice == Choice(unread=choice.unread):
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
        """All options of the methods, by what a recipe calls those of each, and what else it leaves to their defaults."""
        methods = {
            "pruning": self.pruning.pruner if self.pruning is not None else None,
            "refining": self.pruning.refiner if self.pruning is not None else None,
            "quantization": self.quantizer,
            "gating": self.sparsifier,
            "scoring": self.expert_score,
            "factorization": self.factorizer,
        }
        found: dict[str, Any] = {key: given_options(method) for key, method in methods.items() if method is not None}
        return found if self.sparsifier is None else {**found, "activation_sparsity": self.unread}

    @property
    def dictionary_blocks(self) -> int:
        """How many blocks in a row share the dictionaries of their linears."""
        return getattr(self.factorizer, "dictionary_blocks", 1)

    @property
    def needs_halves(self) -> bool:
        """Whether something is chosen by windows that were held out."""
        return self.match_dense or self.chooses_damping or (self.pruning is not None and self.pruning.refits)

    @property
    def looks_first(self) -> bool:
        """Whether what all linears of a block read is looked at before any of them changes.

        Where nothing makes up for what goes, norms of inputs are all that counts, and what earlier linears have lost to N:M
        counts in them as if it were signal.
        """
        pruning = self.pruning
        if pruning is None or pruning.refiner is not None or self.match_dense or self.sparsifier is not None:
            return False
        return self.level == Level.MOMENTS and isinstance(pruning.pattern, NM)

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
        """Whether anything looks at what the model makes of any."""
        return self.level > Level.NONE or self.needs_fisher or self.expert_skip is not None

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
    sparsifier, experts = sparsifier_of(recipe), expert_score_of(recipe)
    methods = (recipe.prune or None, recipe.quantize, factorizer, tables or None, sparsifier, experts)
    if all(method is None for method in methods):
        raise UsageError(
            f"no method is given: `prune` can be {', '.join(sorted(PRUNERS))}, `quantize` {', '.join(sorted(QUANTIZERS))}, "
            f"`factorize` {', '.join(sorted(FACTORIZERS))}; "
            f"to begin with: `recipe={TO_BEGIN_WITH!r}`"
        )
    pruning = pruning_of(recipe)
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
    beside = low_rank_part(recipe, pattern, pruning is not None or quantizer is not None)
    dense = recipe.format == "dense"
    if recipe.expert_skip is not None:
        check_share(recipe.expert_skip)
        if dense or isinstance(pattern, Structured):
            raise UsageError(
                "`expert_skip` stands in the config of packed weights, and these are written dense: leave it out"
            )
    found = Plan(
        *(pruning, quantizer, layouts[recipe.format], dense, dtype, tables, recipe.match_dense),
        *(sparsifier, unread_of(recipe), experts, recipe.expert_skip, beside, factorizer),
    )
    if sparsifier is not None:
        check_by_inputs(pruning, quantizer, beside)
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


def _quantizer(recipe: Recipe) -> Quantizer | None:
    if recipe.quantize is None:
        need_method(recipe.quantization, "quantize")
        return None
    found: Quantizer = make("quantize", recipe.quantize, recipe.quantization)
    return found
