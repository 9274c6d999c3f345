"""Sharing what goes between blocks that each have widths of their own, so that the model's predictions change least.

What a width of a linear costs is known from one backward pass, as far as nothing else changes. A quarter of a model is more
than that: what goes at one place makes the rest matter more, or less. So costs are weighed by a few numbers, and each set of
widths that these lead to is put into the model: the loss on text says which numbers are right.

N: windows, S: tokens of a window, O: output features, I: input features, K: features that stay.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from secateur.core.patterns import Structured
from secateur.core.stats import InputStats
from secateur.errors import UsageError
from secateur.model.structure import is_transposed
from secateur.pipeline.calibrate import Windows
from secateur.pipeline.solve import stacked
from secateur.prune.refit import choose_damping, refit_with
from secateur.recipes.goals import PER_LAYER
from secateur.recipes.recipe import Choice, Recipe
from secateur.search.goal import goal
from secateur.search.goals.shapes import known_structure, loss_without, pattern_of, result_bytes, sites_of
from secateur.search.searcher import Searcher, pieces
from secateur.solvers.knapsack import choose
from secateur.structured.own_widths import Fitter
from secateur.structured.sites import Site, Width
from secateur.structured.structure_of import head_widths, multiple_for
from secateur.walking.walk import Gathered

_LOG = logging.getLogger(__name__)

# How many widths of a linear's neurons are tried, at least and at most; between them as many as make steps of such a share of
# all that the blocks have.
_LEAST, _MOST, _STEP = 8, 24, 0.005
# What costs are weighed by, one after the other, each the best that was measured so far times or plus one of these.
_POWERS = (0.5, 0.75, 1.0, 1.5)
_HEADS = (0.25, 0.5, 2.0, 4.0)
_DEPTHS = (-1.5, -0.75, 0.75, 1.5)
# Tokens that the loss of a set is measured on: all see the same.
_TRIED = 1024


@dataclass(frozen=True)
class _Option:
    """What a linear may become.

    Attributes:
        width: of it.
        left: how many weights then hang on it.
        cost: nats a token, if nothing else changes.
    """

    width: Width
    left: int
    cost: float


@dataclass(frozen=True)
class _Weighing:
    """How costs are weighed.

    Attributes:
        power: that they are raised to: below 1, what costs much already may go as a whole.
        heads: by which those of attention are multiplied.
        depth: how much more what goes late counts than what goes early: the last block e to this power times as much as that in
            the middle.
    """

    power: float = 1.0
    heads: float = 1.0
    depth: float = 0.0

    def of(self, option: _Option, site: Site, mean: float, place: float) -> float:
        """Of an option for a linear in a block at a place between −1 and 1."""
        cost: float = (max(option.cost, 0.0) / mean) ** self.power
        return cost * math.exp(self.depth * place) * (self.heads if site.coupling.kind == "heads" else 1.0)


#: A width for each linear, by name.
_Set = dict[str, Width]


@goal
@dataclass(frozen=True)
class PerLayer:
    """The widths of each block that together lose a share of the blocks' weights, and with which the loss is least.

    Attributes:
        pattern: what is asked for.
    """

    pattern: Structured
    name: ClassVar[str] = PER_LAYER
    models: ClassVar[int] = 0

    @classmethod
    def of(cls, recipe: Recipe) -> PerLayer:
        return cls(pattern_of(recipe))

    def check(self, searcher: Searcher) -> None:
        searcher.check_memory()

    def tried(self, searcher: Searcher) -> list[Choice]:
        return [Choice((i + 1) / _LEAST) for i in range(_LEAST - 1)]

    def result_bytes(self, searcher: Searcher) -> int | None:
        return result_bytes(searcher, self.pattern)

    def choose(self, searcher: Searcher, windows: Windows) -> dict[str, Choice]:
        options = self._options(searcher, windows)
        blocks = _Blocks.of(searcher, self.pattern, options)
        trial = _Trial.of(searcher, windows)
        best = _Weighing()
        found = blocks.best(best)
        least = trial.loss(found)
        for tried in (_powers, _heads, _depths, _powers):
            for weighing in tried(best):
                widths = blocks.best(weighing)
                loss = trial.loss(widths)
                if loss < least:
                    best, found, least = weighing, widths, loss
        alike = blocks.alike()
        if alike is not None and trial.loss(alike) < least:
            found = alike
        return {name: Choice(units=width.units, groups=width.groups) for name, width in found.items()}

    def _widths(self, searcher: Searcher) -> dict[str, list[Width]]:
        """What each linear may become, the widest first: what its block can be built with."""
        prepared, structure = searcher.prepared, known_structure(searcher)
        fitter = Fitter(prepared.source, prepared.model, structure.probed)
        found = {}
        sites = sites_of(searcher)
        whole = sum(s.weights(s.width) - s.weights(Width(0)) for s in sites if s.coupling.kind == "neurons")
        alike = self.pattern.sparsity * structure.probed.weights / max(whole, 1)
        for site in sites:
            if site.coupling.kind == "neurons":
                among = self._neurons(site, structure.probed.weights, alike)
            else:
                among = self._heads(site)
            found[site.name] = [site.width, *(width for width in among if fitter.of(site, width) is not None)]
        return found

    def _neurons(self, site: Site, total: int, alike: float) -> list[Width]:
        """Fewer neurons: in steps, and as many as all blocks would lose if nothing else went."""
        none = [Width(0)] if self._may_be_none("neurons") else []
        if "neurons" not in self.pattern.units:
            return none
        own, multiple = site.width.units, multiple_for(site, self.pattern)
        whole = site.weights(site.width) - site.weights(Width(0))
        steps = min(max(_LEAST, math.ceil(whole / total / _STEP)), _MOST)
        tried = {max(1, round(own * i / steps / multiple)) * multiple for i in range(1, steps)}
        if alike < 1:
            tried.add(max(1, round((1 - alike) * own / multiple)) * multiple)
        return [*(Width(units) for units in sorted(tried, reverse=True) if units < own), *none]

    def _heads(self, site: Site) -> list[Width]:
        none = [Width(0)] if self._may_be_none("heads") else []
        return [*(sorted(head_widths(site), reverse=True) if "heads" in self.pattern.units else []), *none]

    def _may_be_none(self, kind: str) -> bool:
        return kind in self.pattern.units or "blocks" in self.pattern.units

    def _options(self, searcher: Searcher, windows: Windows) -> dict[str, list[_Option]]:
        """What each linear may become, and what that costs on dense inputs; the weights then are kept in files."""
        widths, sites = self._widths(searcher), {site.name: site for site in sites_of(searcher)}
        if all(len(each) == 1 for each in widths.values()):
            raise UsageError(
                f"blocks of {searcher.prepared.source.name} cannot be built with widths of their own: leave `widths` out"
            )
        effects = searcher.effects(windows)
        found: dict[str, list[_Option]] = {}

        def look(gathered: list[Gathered]) -> None:
            for (name, *_), stats in gathered:
                site, narrower = sites[name], widths[name][1:]
                changes = _changes(searcher, site, stats, narrower)
                costs = effects.divergence(name, changes) if narrower else []
                found[name] = [_Option(site.width, site.weights(site.width), 0.0)]
                found[name] += [_Option(w, site.weights(w), c) for w, c in zip(narrower, costs, strict=True)]

        searcher.walk(windows.ids_NS[: max(2, len(windows.ids_NS) // 2)], look, searcher.level)
        return found


def _powers(best: _Weighing) -> list[_Weighing]:
    return [replace(best, power=best.power * each) for each in _POWERS if each != 1.0]


def _heads(best: _Weighing) -> list[_Weighing]:
    return [replace(best, heads=best.heads * each) for each in _HEADS]


def _depths(best: _Weighing) -> list[_Weighing]:
    return [replace(best, depth=best.depth + each) for each in _DEPTHS]


def _changes(searcher: Searcher, site: Site, stats: InputStats, widths: Sequence[Width]) -> Iterator[Tensor]:
    """What each width changes of a linear's weight, solved when it is asked for and kept in a file.

    By how much a refit is damped is chosen once, at the width in the middle: for all of them it would take many times as long.
    """
    job = searcher.job
    assert job.plan.pruning is not None
    pruner: Any = job.plan.pruning.pruner
    stack = stacked(job.plan, [searcher.prepared.problem(site.name, None)], stats.or_isotropic())
    damping: float | None = math.inf
    if job.plan.pruning.refits:
        middle = site.units(widths[len(widths) // 2])
        damping = choose_damping(stack, middle.spread(pruner.keep_units(stack, middle)), pruner.shifts)
    for width in widths:
        if not width.units:
            yield -stack.W_OI
            continue
        units = site.units(width)
        keep_I = units.spread(pruner.keep_units(stack, units))
        W_OI = refit_with(stack, keep_I, math.inf if damping is None else damping, pruner.shifts)
        stay_K = keep_I.nonzero()[:, 0]
        kept = {"stay_K": stay_K.cpu(), "W_OK": W_OI[:, stay_K].bfloat16().cpu().contiguous()}
        save_file(kept, _file(searcher.folder, site.name, width))
        yield W_OI - stack.W_OI


def _file(folder: Path, name: str, width: Width) -> Path:
    return folder / f"{name}-{width.units}-{width.groups}.safetensors"


@dataclass(frozen=True)
class _Blocks:
    """What each block may become as a whole.

    Attributes:
        sites: of each block that has any.
        options: of each of these blocks, one option for each of its sites.
        places: of these blocks between −1, the first, and 1, the last.
        most: weights that may be left in all.
        mean: of all costs.
    """

    sites: list[list[Site]]
    options: list[list[tuple[_Option, ...]]]
    places: list[float]
    most: float
    mean: float

    @classmethod
    def of(cls, searcher: Searcher, pattern: Structured, options: Mapping[str, list[_Option]]) -> _Blocks:
        """Raises UsageError where so much cannot go."""
        names = searcher.prepared.block_names
        by_block = [[site for site in sites_of(searcher) if site.prefix == name] for name in names]
        here = [number for number, sites in enumerate(by_block) if sites]
        every = [[options[site.name] for site in by_block[number]] for number in here]
        together = [
            [each for each in itertools.product(*of_sites) if _is_possible(by_block[number], each, pattern)]
            for number, of_sites in zip(here, every, strict=True)
        ]
        full = sum(site.weights(site.width) for sites in by_block for site in sites)
        total = known_structure(searcher).probed.weights
        least = sum(min(sum(option.left for option in each) for each in of_block) for of_block in together)
        most = full - pattern.sparsity * total
        if least > most:
            share = math.floor(1000 * (full - least) / total) / 10
            raise UsageError(
                f"sparsity {pattern.sparsity:g} is out of reach: with `units` {','.join(pattern.units)} at most {share:g}% of "
                "the blocks' weights can go"
            )
        costs = [option.cost for of_sites in every for of_site in of_sites for option in of_site if option.cost > 0]
        places = [2 * number / max(len(names) - 1, 1) - 1 for number in here]
        mean = sum(costs) / len(costs) if costs else 1.0
        return cls([by_block[number] for number in here], together, places, most, mean)

    def best(self, weighing: _Weighing) -> _Set:
        """The set of widths that costs least, weighed."""
        costs = [
            [
                sum(weighing.of(option, site, self.mean, place) for option, site in zip(each, sites, strict=True))
                for each in of_block
            ]
            for sites, of_block, place in zip(self.sites, self.options, self.places, strict=True)
        ]
        sizes = [[sum(option.left for option in each) for each in of_block] for of_block in self.options]
        chosen = choose(costs, sizes, self.most)
        return self._set([of_block[i] for of_block, i in zip(self.options, chosen, strict=True)])

    def alike(self) -> _Set | None:
        """The set in which all blocks lose as many neurons and nothing else; None where that does not suffice."""
        widths = [
            [
                each
                for each in of_block
                if all(o.width == s.width or s.coupling.kind == "neurons" for o, s in zip(each, sites, strict=True))
            ]
            for sites, of_block in zip(self.sites, self.options, strict=True)
        ]
        count = min(map(len, widths))
        for i in range(count):
            each = [of_block[i] for of_block in widths]
            if sum(option.left for options in each for option in options) <= self.most * (1 + 1e-9):
                return self._set(each)
        return None

    def _set(self, chosen: Sequence[tuple[_Option, ...]]) -> _Set:
        return {
            site.name: option.width
            for sites, options in zip(self.sites, chosen, strict=True)
            for site, option in zip(sites, options, strict=True)
        }


def _is_possible(sites: Sequence[Site], options: Sequence[_Option], pattern: Structured) -> bool:
    """Whether a block may become so: whole blocks may go where `blocks` may, and attention or neurons alone where these may."""
    gone = [site.coupling.kind for site, option in zip(sites, options, strict=True) if not option.width.units]
    if len(gone) == len(sites) and len(sites) > 1:
        return "blocks" in pattern.units or all(kind in pattern.units for kind in gone)
    return all(kind in pattern.units for kind in gone)


@dataclass
class _Trial:
    """The model, with the widths that were last tried, to measure the loss of.

    Attributes:
        searcher: whose files have the weights.
        model: all of it; what goes is zero.
        ids_NS: the text.
    """

    searcher: Searcher
    model: Any
    ids_NS: Tensor
    _now: _Set = field(default_factory=dict)
    _known: dict[tuple[tuple[str, Width], ...], float] = field(default_factory=dict)

    @classmethod
    def of(cls, searcher: Searcher, windows: Windows) -> _Trial:
        """On windows that neither weights were solved nor costs measured on, where there are enough."""
        model = searcher.prepared.load_whole()
        ids_NS = pieces(windows.ids_NS[len(windows.ids_NS) // 2 :], windows.bos_ids)
        return cls(
            searcher, model, ids_NS[: max(1, _TRIED // ids_NS.shape[1])], {s.name: s.width for s in sites_of(searcher)}
        )

    def loss(self, widths: _Set) -> float:
        """With such widths, in nats a token."""
        key = tuple(sorted(widths.items()))
        if key not in self._known:
            self.searcher.job.say(f"measuring set {len(self._known) + 1} of widths")
            for name, width in widths.items():
                if width != self._now[name]:
                    self._put(name, width)
                    self._now[name] = width
            self._known[key] = loss_without(self.model, [], self.ids_NS)
            _LOG.info("set %d of widths: loss %.4f nats a token", len(self._known), self._known[key])
        return self._known[key]

    def _put(self, name: str, width: Width) -> None:
        linear = self.model.get_submodule(name)
        weight = linear.weight.data
        file = _file(self.searcher.folder, name, width)
        if file.exists():
            kept = load_file(file)
            W_OI = torch.zeros(weight.T.shape if is_transposed(linear) else weight.shape)
            W_OI[:, kept["stay_K"]] = kept["W_OK"].float()
        elif width.units:
            W_OI = self.searcher.prepared.problem(name, None).W_OI
        else:
            weight.zero_()
            return
        weight.copy_(W_OI.T if is_transposed(linear) else W_OI)
