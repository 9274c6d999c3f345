"""Sharing what goes between blocks that each have widths of their own, so that the model's predictions change least.

What a width costs is not to be told from the dense model: what goes before it, and how the rest makes up for that, changes
what it is worth. So a model is made as a run makes it, and measured: how far is it from the dense model, and how much nearer
would it be if each linear had a little more? Widths move as far as such slopes reach, the next model is made, and so on.

N: windows, S: tokens of a window, O: output features, I: input features, K: features that stay.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import ClassVar

from secateur.core.patterns import Structured
from secateur.errors import UsageError
from secateur.pipeline.calibrate import Windows
from secateur.recipes.goals import PER_LAYER
from secateur.recipes.recipe import Choice, Recipe
from secateur.search.goal import goal
from secateur.search.goals.shapes import Priced, known_structure, pattern_of, prices, result_bytes, sites_of
from secateur.search.rehearsal import Rehearsal, Widths
from secateur.search.searcher import Searcher
from secateur.solvers.knapsack import choose
from secateur.structured.own_widths import Fitter
from secateur.structured.sites import Site, Width
from secateur.structured.structure_of import head_widths, multiple_for

_LOG = logging.getLogger(__name__)

# What a linear has lost grows or shrinks by no more than these from one model to the next, or by one width.
_SHRINKS, _GROWS = 0.5, 1.5
# The search ends once two sets have brought no more than this share.
_ENOUGH = 0.01
# What counts of what was measured one model ago, of what counts of the last.
_FORGOTTEN = 0.6
# Widths of a linear's neurons that are told apart, at most.
_WIDTHS = 48
# A linear is asked what it would be with this share of what it has lost, or more.
_BACK = 0.2
# A factor is not smaller than this share of the median of all; and where all are zero.
_SMALL, _TINY = 0.1, 1e-30
# Widths that a linear which loses nothing at first is tried with.
_TRIED = 3


@dataclass(frozen=True)
class _Option:
    """What a linear may become.

    Attributes:
        width: of it.
        left: how many weights then hang on it.
        gone: how many do no more.
    """

    width: Width
    left: int
    gone: int


@goal
@dataclass(frozen=True)
class PerLayer:
    """The widths of each block that together lose a share of the blocks' weights, and with which predictions change least.

    Attributes:
        pattern: what is asked for.
        rounds: how many sets of widths are made and measured, at most.
    """

    pattern: Structured
    name: ClassVar[str] = PER_LAYER
    models: ClassVar[int] = 0
    rounds: ClassVar[int] = 8

    @classmethod
    def of(cls, recipe: Recipe) -> PerLayer:
        return cls(pattern_of(recipe))

    def check(self, searcher: Searcher) -> None:
        searcher.check_memory()

    def tried(self, searcher: Searcher) -> list[Choice]:
        # As wide as it is, and wider.
        return [Choice(0.5), Choice(0.25)]

    def result_bytes(self, searcher: Searcher) -> int | None:
        return result_bytes(searcher, self.pattern)

    def choose(self, searcher: Searcher, windows: Windows) -> dict[str, Choice]:
        options = self._options(searcher)
        blocks = _Blocks.of(searcher, self.pattern, options)
        curves = _Curves(options)
        now = blocks.alike()
        uncut = {
            name: _tried(among)
            for name, among in options.items()
            if len(among) > 1 and (now is None or now[name] == among[0].width)
        }
        if uncut:
            curves.learn_alone(prices(searcher, windows, uncut))
        if now is None:
            now = blocks.best(curves)
        rehearsal = Rehearsal.of(searcher, windows)
        made: list[tuple[float, Widths]] = []
        for number in range(1, self.rounds + 1):
            searcher.job.say(f"set {number} of widths")
            wider = {name: width for name in now if (width := curves.wider(name, now[name])) is not None}
            rehearsal.make(now, wider if number < self.rounds else {})
            divergence, slopes = rehearsal.measure()
            made.append((divergence, now))
            _LOG.info("set %d of widths: %.4f nats a token from the dense model", number, divergence)
            curves.learn(now, wider, slopes)
            now = blocks.best(curves, now)
            if any(now == before for _, before in made) or _is_enough([each for each, _ in made]):
                break
        _, best = min(made, key=lambda each: each[0])
        return {name: Choice(units=width.units, groups=width.groups) for name, width in best.items()}

    def _options(self, searcher: Searcher) -> dict[str, list[_Option]]:
        """What each linear may become, the widest first: what its block can be built with."""
        prepared, structure = searcher.prepared, known_structure(searcher)
        fitter = Fitter(prepared.source, prepared.model, structure.probed)
        sites = sites_of(searcher)
        whole = sum(s.weights(s.width) - s.weights(Width(0)) for s in sites if s.coupling.kind == "neurons")
        alike = self.pattern.sparsity * structure.probed.weights / max(whole, 1)
        found = {}
        for site in sites:
            among = self._neurons(site, alike) if site.coupling.kind == "neurons" else self._heads(site)
            full = site.weights(site.width)
            fits = [site.width, *(width for width in among if fitter.of(site, width) is not None)]
            each = [_Option(width, site.weights(width), full - site.weights(width)) for width in fits]
            found[site.name] = sorted(each, key=lambda option: option.gone)
        if all(len(each) == 1 for each in found.values()):
            raise UsageError(
                f"blocks of {prepared.source.name} cannot be built with widths of their own: leave `widths` out"
            )
        return found

    def _neurons(self, site: Site, alike: float) -> list[Width]:
        """Fewer neurons: in steps, and as many as all blocks would lose if nothing else went."""
        none = [Width(0)] if self._may_be_none("neurons") else []
        if "neurons" not in self.pattern.units:
            return none
        own, multiple = site.width.units, multiple_for(site, self.pattern)
        tried = {max(1, round(own * i / _WIDTHS / multiple)) * multiple for i in range(1, _WIDTHS)}
        if alike < 1:
            tried.add(max(1, round((1 - alike) * own / multiple)) * multiple)
        return [*(Width(units) for units in tried if units < own), *none]

    def _heads(self, site: Site) -> list[Width]:
        none = [Width(0)] if self._may_be_none("heads") else []
        return [*(head_widths(site) if "heads" in self.pattern.units else []), *none]

    def _may_be_none(self, kind: str) -> bool:
        return kind in self.pattern.units or "blocks" in self.pattern.units


class _Curves:
    """What each linear costs: as much as the square of what it has lost times a factor that is measured.

    Of several measurements the geometric mean counts, the later the more: one is right within a third or so.
    """

    def __init__(self, options: Mapping[str, list[_Option]]) -> None:
        self._options = options
        self._gone = {name: {option.width: option.gone for option in among} for name, among in options.items()}
        # The logarithms of the factors that were measured, and how often all were since.
        self._measured: dict[str, list[tuple[float, int]]] = {name: [] for name in options}
        self._rounds = 0

    def cost(self, name: str, option: _Option) -> float:
        """Of an option for a linear, in nats a token."""
        if not option.gone:
            return 0.0
        found = [(factor, _FORGOTTEN ** (self._rounds - number)) for factor, number in self._measured[name]]
        mean = sum(factor * weight for factor, weight in found) / sum(weight for _, weight in found)
        return math.exp(mean) * option.gone**2

    def learn_alone(self, priced: Mapping[str, Priced]) -> None:
        """From what widths cost in the dense model."""
        found = {}
        for name, each in priced.items():
            costs = {**dict(zip(each.widths, each.costs, strict=True)), Width(0): each.whole}
            known = [(cost, self._gone[name][width]) for width, cost in costs.items() if width in self._gone[name]]
            found[name] = [cost / gone**2 for cost, gone in known]
        self._note(found)

    def learn(self, now: Widths, wider: Widths, slopes: Mapping[str, float]) -> None:
        """From the slopes towards other widths in the model that has `now`.

        A linear's weights are the best that it can have for its width. What those of more units improve is then half of what
        the slope towards them promises.
        """
        self._rounds += 1
        found = {}
        for name, slope in slopes.items():
            squares = self._gone[name][now[name]] ** 2 - self._gone[name][wider[name]] ** 2
            found[name] = [-slope / 2 / squares]
        self._note(found)

    def _note(self, found: Mapping[str, Sequence[float]]) -> None:
        """Noise makes some of them negative; these are taken for small."""
        least = _SMALL * median([abs(each) for of_linear in found.values() for each in of_linear] or [0.0]) or _TINY
        for name, of_linear in found.items():
            if of_linear:
                mean = sum(math.log(max(each, least)) for each in of_linear) / len(of_linear)
                self._measured[name].append((mean, self._rounds))

    def wider(self, name: str, now: Width) -> Width | None:
        """With at least a share of what it has lost back; None where it has lost nothing."""
        gone = self._gone[name][now]
        among = [option for option in self._options[name] if option.gone <= (1 - _BACK) * gone]
        return among[-1].width if gone else None

    def near(self, name: str, now: Width) -> list[_Option]:
        """What it may become next, where it is so wide now."""
        among, gone = self._options[name], self._gone[name][now]
        number = next(i for i, option in enumerate(among) if option.width == now)
        return [
            option
            for i, option in enumerate(among)
            if abs(i - number) <= 1 or _SHRINKS * gone <= option.gone <= _GROWS * gone
        ]


def _is_enough(divergences: Sequence[float]) -> bool:
    """Whether the last two are hardly less than the least before."""
    *before, last, latest = [math.inf, math.inf, *divergences]
    return min(last, latest) > (1 - _ENOUGH) * min(before)


def _tried(among: Sequence[_Option]) -> list[Width]:
    """Some of the widths of a linear, the narrowest among them."""
    widths = [option.width for option in among[1:] if option.width.units]
    return widths[:: -max(1, math.ceil(len(widths) / _TRIED))]


@dataclass(frozen=True)
class _Blocks:
    """What blocks may become as a whole.

    Attributes:
        sites: of each block that has any.
        options: of each linear.
        pattern: which of them go together.
        most: weights that may be left in all.
    """

    sites: list[list[Site]]
    options: Mapping[str, list[_Option]]
    pattern: Structured
    most: float

    @classmethod
    def of(cls, searcher: Searcher, pattern: Structured, options: Mapping[str, list[_Option]]) -> _Blocks:
        """Raises UsageError where so much cannot go."""
        by_block = [[s for s in sites_of(searcher) if s.prefix == name] for name in searcher.prepared.block_names]
        sites = [of_block for of_block in by_block if of_block]
        full = sum(site.weights(site.width) for of_block in sites for site in of_block)
        total = known_structure(searcher).probed.weights
        found = cls(sites, options, pattern, full - pattern.sparsity * total)
        least = sum(min(map(_left, found._together(of_block))) for of_block in sites)
        if least > found.most:
            share = math.floor(1000 * (full - least) / total) / 10
            raise UsageError(
                f"sparsity {pattern.sparsity:g} is out of reach: with `units` {','.join(pattern.units)} at most {share:g}% of "
                "the blocks' weights can go"
            )
        return found

    def best(self, curves: _Curves, now: Widths | None = None) -> Widths:
        """The set of widths that costs least, of those that are near what linears have now, where they have any."""
        near = self.options if now is None else {name: curves.near(name, width) for name, width in now.items()}
        together = [self._together(of_block, near) for of_block in self.sites]
        costs = [
            [sum(curves.cost(site.name, option) for site, option in zip(of_block, each, strict=True)) for each in among]
            for of_block, among in zip(self.sites, together, strict=True)
        ]
        chosen = choose(costs, [list(map(_left, among)) for among in together], self.most)
        return self._set([among[i] for among, i in zip(together, chosen, strict=True)])

    def alike(self) -> Widths | None:
        """The set in which all blocks lose as many neurons and nothing else; None where that does not suffice."""
        widths = [
            [
                each
                for each in self._together(of_block)
                if all(o.width == s.width or s.coupling.kind == "neurons" for o, s in zip(each, of_block, strict=True))
            ]
            for of_block in self.sites
        ]
        for i in range(min(map(len, widths))):
            each = [of_block[i] for of_block in widths]
            if sum(map(_left, each)) <= self.most * (1 + 1e-9):
                return self._set(each)
        return None

    def _together(
        self, sites: Sequence[Site], options: Mapping[str, list[_Option]] | None = None
    ) -> list[tuple[_Option, ...]]:
        among = self.options if options is None else options
        every = itertools.product(*(among[site.name] for site in sites))
        return [each for each in every if _is_possible(sites, each, self.pattern)]

    def _set(self, chosen: Sequence[tuple[_Option, ...]]) -> Widths:
        return {
            site.name: option.width
            for of_block, options in zip(self.sites, chosen, strict=True)
            for site, option in zip(of_block, options, strict=True)
        }


def _left(options: Sequence[_Option]) -> int:
    return sum(option.left for option in options)


def _is_possible(sites: Sequence[Site], options: Sequence[_Option], pattern: Structured) -> bool:
    """Whether a block may become so: whole blocks may go where `blocks` may, and attention or neurons alone where these may."""
    gone = [site.coupling.kind for site, option in zip(sites, options, strict=True) if not option.width.units]
    if len(gone) == len(sites) and len(sites) > 1:
        return "blocks" in pattern.units or all(kind in pattern.units for kind in gone)
    return all(kind in pattern.units for kind in gone)
