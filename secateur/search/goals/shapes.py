"""Sharing what goes between neurons, heads and blocks, so that the model's predictions change least, with all blocks alike.

N: windows, S: tokens of a window, O: output features, I: input features.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import combinations
from typing import Any, ClassVar

import torch
from torch import Tensor

from secateur.core.patterns import Structured
from secateur.core.stats import InputStats
from secateur.errors import UsageError
from secateur.pipeline.calibrate import Windows
from secateur.recipes.plan import plan
from secateur.recipes.pruning_plan import STRUCTURED
from secateur.recipes.recipe import Choice, Recipe
from secateur.search.budget import between
from secateur.search.goal import goal
from secateur.search.searcher import Searcher, pieces
from secateur.structured.sites import Site, Width, of_kind
from secateur.structured.structure_of import Structure, legal_heads, multiple_for
from secateur.walking.walk import Gathered

# Shares of the neurons that are tried; what lies between follows, see `between`.
_LEVELS = (0.125, 0.25, 0.375, 0.5, 0.75)
# Sets of blocks that are tried on text: the best by their divergences.
_SETS = 3
# A share that is so near to the one asked for is as good.
_NEAR = 0.005


@dataclass(frozen=True)
class Priced:
    """What removing units of a site does to the predictions.

    Attributes:
        widths: that were tried, the narrowest last.
        costs: of each, in nats a token.
        whole: of all units.
    """

    widths: list[Width]
    costs: list[float]
    whole: float

    def at(self, width: Width, full: Width) -> float:
        """Of a width, between those that were tried too."""
        if width == full:
            return 0.0
        if width in self.widths:
            return self.costs[self.widths.index(width)]
        gone = [0.0, *(1 - each.units / full.units for each in self.widths), 1.0]
        # What is next to nothing costs next to nothing.
        costs = [min(self.costs) * 1e-3, *self.costs, self.whole]
        return float(between(gone, costs, 1 - width.units / full.units))


@dataclass(frozen=True)
class _Shape:
    """A model of blocks that are alike.

    Attributes:
        dropped: numbers of blocks that go.
        heads, neurons: of the others; None: as they are.
        share: of the blocks' weights that goes.
        cost: nats a token, as far as what goes does not hang together.
    """

    dropped: tuple[int, ...]
    heads: Width | None
    neurons: Width | None
    share: float
    cost: float


@goal
@dataclass(frozen=True)
class Shapes:
    """The number of blocks, of heads and of neurons that together lose a share of the blocks' weights and cost least.

    Attributes:
        pattern: what is asked for.
    """

    pattern: Structured
    name: ClassVar[str] = STRUCTURED
    models: ClassVar[int] = 0

    @classmethod
    def of(cls, recipe: Recipe) -> Shapes:
        return cls(pattern_of(recipe))

    def check(self, searcher: Searcher) -> None:
        searcher.check_memory()

    def tried(self, searcher: Searcher) -> list[Choice]:
        return [Choice(level) for level in _LEVELS]

    def result_bytes(self, searcher: Searcher) -> int | None:
        return result_bytes(searcher, self.pattern)

    def choose(self, searcher: Searcher, windows: Windows) -> dict[str, Choice]:
        sites = sites_of(searcher)
        heads = self._head_widths(searcher)
        priced = prices(searcher, windows, {site.name: self._tried_at(site, heads) for site in sites})
        shapes = list(self._shapes(searcher, heads, priced))
        if not shapes:
            raise UsageError(f"sparsity {self.pattern.sparsity:g} is out of reach: {self._most(searcher, heads)}")
        off = min(abs(shape.share - self.pattern.sparsity) for shape in shapes)
        near = [shape for shape in shapes if abs(shape.share - self.pattern.sparsity) <= max(off, _NEAR)]
        best = min(near, key=lambda shape: shape.cost)
        dropped = best.dropped
        if dropped:
            dropped = _verified(searcher, windows, _sets(searcher, priced, len(dropped)))
        gone = [f"{searcher.prepared.block_names[i]}." for i in dropped]
        found = {}
        for site in sites:
            width = {"heads": best.heads, "neurons": best.neurons}[site.coupling.kind] or site.width
            width = Width(0, 0) if site.name.startswith(tuple(gone) or "\0") else width
            found[site.name] = Choice(units=width.units, groups=width.groups)
        return found

    def _head_widths(self, searcher: Searcher) -> list[Width]:
        """Numbers of heads that a config gives; none where heads are to stay."""
        structure = known_structure(searcher)
        if "heads" not in self.pattern.units:
            return []
        sites = of_kind(structure.probed.sites, "heads")
        found = legal_heads(searcher.prepared.source, searcher.prepared.model, structure.probed, sites)
        if not found and set(self.pattern.units) == {"heads"}:
            raise UsageError(
                f"no config of {searcher.prepared.source.name} gives fewer heads than its {sites[0].width.units}: transformers "
                "derives the size of a head from their number, or takes no other number; give `units` neurons or blocks"
            )
        return found

    def _tried_at(self, site: Site, heads: Sequence[Width]) -> list[Width]:
        if site.coupling.kind == "heads":
            return sorted(heads, reverse=True)
        if "neurons" not in self.pattern.units:
            return []
        return [Width(max(1, round((1 - level) * site.width.units))) for level in _LEVELS]

    def _shapes(self, searcher: Searcher, heads: Sequence[Width], priced: Mapping[str, Priced]) -> Iterator[_Shape]:
        """All that can be had: with every number of blocks and of heads, as many neurons as the share leaves."""
        structure = known_structure(searcher)
        blocks, total = searcher.prepared.block_names, structure.probed.weights
        order = _by_cost(searcher, priced) if "blocks" in self.pattern.units else []
        per_block = _weights_of_blocks(searcher)
        for count in range(len(order)) if order else [0]:
            dropped = tuple(sorted(order[:count]))
            gone = tuple(f"{blocks[i]}." for i in dropped) or "\0"
            left = [site for site in sites_of(searcher) if not site.name.startswith(gone)]
            of_blocks = sum(per_block[i] for i in dropped)
            if of_blocks > (self.pattern.sparsity + _NEAR) * total and count > 1:
                return
            cost = sum(priced[s.name].whole for s in sites_of(searcher) if s.name.startswith(gone))
            for width in [None, *heads]:
                fewer = [site for site in left if site.coupling.kind == "heads"]
                of_heads = sum(_lost(site, width) for site in fewer)
                cost_of_heads = sum(priced[site.name].at(width or site.width, site.width) for site in fewer)
                for neurons in self._neurons(left, self.pattern.sparsity * total - of_blocks - of_heads):
                    narrow = [site for site in left if site.coupling.kind == "neurons"]
                    lost = of_blocks + of_heads + sum(_lost(site, neurons) for site in narrow)
                    more = sum(priced[site.name].at(neurons or site.width, site.width) for site in narrow)
                    if lost:
                        yield _Shape(dropped, width, neurons, lost / total, cost + cost_of_heads + more)

    def _neurons(self, left: Sequence[Site], weights: float) -> list[Width | None]:
        """How many neurons are left where so many weights are to go with them; nothing where they do not suffice."""
        sites = [site for site in left if site.coupling.kind == "neurons"]
        if "neurons" not in self.pattern.units or not sites:
            return [None]
        site, own = sites[0], sites[0].width.units
        multiple = multiple_for(site, self.pattern)
        whole = sum(_lost(each, Width(0)) for each in sites)
        units = round((1 - weights / whole) * own / multiple) * multiple
        if units < multiple:
            return []
        return [None if units >= own else Width(units)]

    def _most(self, searcher: Searcher, heads: Sequence[Width]) -> str:
        """How much can go, in words."""
        structure = known_structure(searcher)
        lost = 0
        for site in sites_of(searcher):
            width = min(heads, default=None) if site.coupling.kind == "heads" else None
            if site.coupling.kind == "neurons" and "neurons" in self.pattern.units:
                width = Width(multiple_for(site, self.pattern))
            lost += _lost(site, width)
        most = math.floor(1000 * lost / structure.probed.weights) / 10
        return f"with `units` {','.join(self.pattern.units)} at most {most:g}% of the blocks' weights can go"


def known_structure(searcher: Searcher) -> Structure:
    """What was found in the model."""
    assert searcher.prepared.structure is not None
    return searcher.prepared.structure


def sites_of(searcher: Searcher) -> list[Site]:
    """The linears that may lose units."""
    structure = known_structure(searcher)
    return [site for site in structure.probed.sites if site.name in structure.widths]


def pattern_of(recipe: Recipe) -> Structured:
    """The structured pattern of a recipe."""
    pruning = plan(recipe).pruning
    assert pruning is not None
    assert isinstance(pruning.pattern, Structured)
    return pruning.pattern


def result_bytes(searcher: Searcher, pattern: Structured) -> int:
    """The size of the files, at most, where a share of the blocks' weights goes."""
    prepared = searcher.prepared
    gone = max(pattern.sparsity - _NEAR, 0.0) * known_structure(searcher).probed.weights
    return int(prepared.dense_bytes() - gone * prepared.written_dtype.itemsize)


def _lost(site: Site, width: Width | None) -> int:
    return 0 if width is None else site.weights(site.width) - site.weights(width)


def prices(searcher: Searcher, windows: Windows, widths: Mapping[str, list[Width]]) -> dict[str, Priced]:
    """What it does to the dense model's predictions to give one linear alone fewer units, from one backward pass.

    Args:
        widths: that are tried, of each linear; that it goes as a whole is told, too.
    """
    effects = searcher.effects(windows)
    found: dict[str, Priced] = {}

    def look(gathered: list[Gathered]) -> None:
        for (name, *_), stats in gathered:
            if name in widths:
                found[name] = _priced(searcher, effects, name, stats, widths[name])

    searcher.walk(windows.ids_NS[: max(2, len(windows.ids_NS) // 2)], look, searcher.level)
    return found


def _priced(searcher: Searcher, effects: Any, name: str, stats: InputStats, widths: list[Width]) -> Priced:
    dense_OI = searcher.prepared.problem(name, None).W_OI.float()
    changes: list[Tensor] = []
    for (solution,) in searcher.solve([name], stats, [Choice(units=w.units, groups=w.groups) for w in widths]):
        assert solution.W_OI is not None
        changes.append(solution.W_OI.float() - dense_OI)
    *costs, whole = effects.divergence(name, [*changes, -dense_OI])
    return Priced(widths, costs, whole)


def _weights_of_blocks(searcher: Searcher) -> list[int]:
    found = []
    for prefix in searcher.prepared.block_names:
        names = [name for name in searcher.prepared.names if name.startswith(f"{prefix}.")]
        found.append(sum(searcher.prepared.linear(name).get_parameter("weight").numel() for name in names))
    return found


def _cost_of_block(searcher: Searcher, priced: Mapping[str, Priced], number: int) -> float:
    prefix = f"{searcher.prepared.block_names[number]}."
    return sum(each.whole for name, each in priced.items() if name.startswith(prefix))


def _by_cost(searcher: Searcher, priced: Mapping[str, Priced]) -> list[int]:
    """Numbers of blocks by what it costs to do without them, the cheapest first."""
    numbers = range(len(searcher.prepared.block_names))
    return sorted(numbers, key=lambda number: _cost_of_block(searcher, priced, number))


def _sets(searcher: Searcher, priced: Mapping[str, Priced], count: int) -> list[tuple[int, ...]]:
    """The sets of so many blocks that cost least together."""
    among = _by_cost(searcher, priced)[: count + 2]
    sets = [tuple(sorted(each)) for each in combinations(among, count)]
    sets.sort(key=lambda each: sum(_cost_of_block(searcher, priced, number) for number in each))
    return sets[:_SETS]


def _verified(searcher: Searcher, windows: Windows, sets: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The set of blocks without which the loss on text is least."""
    if len(sets) == 1:
        return sets[0]
    searcher.job.say("measuring the loss without blocks")
    model = searcher.prepared.load_whole()
    ids_NS = pieces(windows.ids_NS[-4:], windows.bos_ids)
    blocks = [model.get_submodule(name) for name in searcher.prepared.block_names]
    return min(sets, key=lambda each: loss_without(model, [blocks[i] for i in each], ids_NS))


def loss_without(model: Any, blocks: Sequence[Any], ids_NS: Tensor) -> float:
    """The loss on windows of a model, in nats a token, where some of its blocks pass on what they are given."""

    def skip(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

    total = 0.0
    with ExitStack() as left, torch.no_grad():
        for block in blocks:
            left.callback(block.register_forward_hook(skip, with_kwargs=True).remove)
        for ids_S in ids_NS:
            logits_SV = model(input_ids=ids_S[None].to(model.device), use_cache=False).logits[0, :-1].float()
            total += torch.nn.functional.cross_entropy(logits_SV, ids_S[1:].to(logits_SV.device)).item()
    return total / len(ids_NS)
