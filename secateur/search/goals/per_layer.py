"""Sharing what goes between blocks that each have widths of their own, so that the model's predictions change least.

What a width of a linear costs is known from one backward pass, as far as nothing else changes. A quarter of a model is more
than that: what goes at one place makes the rest matter more, or less. So a set of widths is made, as a run makes it but on a
few windows, and it is measured again in that model what each other width of each linear would cost or save.

N: windows, S: tokens of a window, O: output features, I: input features, K: features that stay.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from secateur.core.patterns import Structured
from secateur.core.stack import Stack
from secateur.errors import UsageError
from secateur.model.structure import is_transposed
from secateur.model.weights import place
from secateur.pipeline.calibrate import Windows
from secateur.pipeline.solve import stacked
from secateur.prune.refit import choose_damping, refit_with
from secateur.recipes.goals import PER_LAYER
from secateur.recipes.recipe import Choice, Recipe
from secateur.search.goal import goal
from secateur.search.goals.shapes import known_structure, loss_without, pattern_of, result_bytes, sites_of
from secateur.search.searcher import TOKENS, Searcher, pieces
from secateur.solvers.knapsack import choose
from secateur.structured.own_widths import Fitter
from secateur.structured.sites import Site, Width
from secateur.structured.structure_of import head_widths, multiple_for
from secateur.walking.walk import Gathered

_LOG = logging.getLogger(__name__)

# How many widths of a linear's neurons are tried, at least and at most; between them as many as make steps of such a share of
# all that the blocks have.
_LEAST, _MOST, _STEP = 8, 24, 0.005
# How often costs are measured again, in the model that the last set of widths gives. The mean of all counts: what is right for
# one change is too much for all of them together, and each time it is other text that tells.
_AGAIN = 2
# Tokens that weights are solved on, for each input of the widest linear, and that the loss of a set is measured on.
_SOLVED, _MEASURED = 3, 2048
# What is left is as much as may be if no larger share of it is lacking.
_NEAR = 0.01

#: A width for each linear, by name; and what each width costs, in nats a token, up to a constant for each linear.
_Set = dict[str, Width]
_Costs = dict[str, dict[Width, float]]


@dataclass(frozen=True)
class _Option:
    """What a linear may become.

    Attributes:
        width: of it.
        left: how many weights then hang on it.
    """

    width: Width
    left: int


@goal
@dataclass(frozen=True)
class PerLayer:
    """The widths of each block that together lose a share of the blocks' weights, and with which the loss is least.

    Attributes:
        pattern: what is asked for.
        rounds: of solving all linears for all widths, and of measuring what that costs.
    """

    pattern: Structured
    name: ClassVar[str] = PER_LAYER
    models: ClassVar[int] = 0
    rounds: ClassVar[int] = 1 + _AGAIN

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
        widths = self._widths(searcher)
        blocks = _Blocks.of(searcher, self.pattern, widths)
        trial = _Trial.of(searcher, windows, widths)
        dense = {site.name: site.width for site in sites_of(searcher)}
        trial.make(dense, others=True)
        costs = [trial.costs(dense, 0)]
        tried: list[tuple[float, _Set]] = []
        for again in range(1, 2 + _AGAIN):
            now = blocks.best(_mean(costs))
            if any(now == each for _, each in tried):
                break
            trial.make(now, others=again <= _AGAIN)
            tried.append((trial.loss(), now))
            if again <= _AGAIN:
                costs.append(trial.costs(now, again))
        alike = blocks.alike()
        if alike is not None:
            trial.make(alike)
            tried.append((trial.loss(), alike))
        _, best = min(tried, key=lambda each: each[0])
        return {name: Choice(units=width.units, groups=width.groups) for name, width in best.items()}

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
        if all(len(each) == 1 for each in found.values()):
            raise UsageError(
                f"blocks of {prepared.source.name} cannot be built with widths of their own: leave `widths` out"
            )
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


@dataclass(frozen=True)
class _Blocks:
    """What each block may become as a whole.

    Attributes:
        sites: of each block that has any.
        options: of each of these blocks, one option for each of its sites.
        most: weights that may be left in all.
    """

    sites: list[list[Site]]
    options: list[list[tuple[_Option, ...]]]
    most: float

    @classmethod
    def of(cls, searcher: Searcher, pattern: Structured, widths: Mapping[str, list[Width]]) -> _Blocks:
        """Raises UsageError where so much cannot go."""
        names = searcher.prepared.block_names
        by_block = [[site for site in sites_of(searcher) if site.prefix == name] for name in names]
        by_block = [sites for sites in by_block if sites]
        together = []
        for sites in by_block:
            of_sites = [[_Option(width, site.weights(width)) for width in widths[site.name]] for site in sites]
            together.append([each for each in itertools.product(*of_sites) if _is_possible(sites, each, pattern)])
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
        return cls(by_block, together, most)

    def best(self, costs: _Costs) -> _Set:
        """The set of widths that costs least, with as many weights as may be left, though fewer may seem to cost less."""
        of_blocks = [
            [sum(costs[site.name][option.width] for option, site in zip(each, sites, strict=True)) for each in of_block]
            for sites, of_block in zip(self.sites, self.options, strict=True)
        ]
        sizes = [[sum(option.left for option in each) for each in of_block] for of_block in self.options]
        worth = max(map(_most_earned, of_blocks, sizes))
        of_blocks = [[c - worth * n for c, n in zip(*each, strict=True)] for each in zip(of_blocks, sizes, strict=True)]
        chosen = choose(of_blocks, sizes, self.most)
        return self._set([of_block[i] for of_block, i in zip(self.options, chosen, strict=True)])

    def alike(self) -> _Set | None:
        """The set in which all blocks lose as many neurons and nothing else; None where the share is not to be had so."""
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
            left = sum(option.left for options in each for option in options)
            if self.most * (1 - _NEAR) <= left <= self.most * (1 + 1e-9):
                return self._set(each)
        return None

    def _set(self, chosen: Sequence[tuple[_Option, ...]]) -> _Set:
        return {
            site.name: option.width
            for sites, options in zip(self.sites, chosen, strict=True)
            for site, option in zip(sites, options, strict=True)
        }


def _mean(costs: Sequence[_Costs]) -> _Costs:
    return {
        name: {width: sum(each[name][width] for each in costs) / len(costs) for width in among}
        for name, among in costs[0].items()
    }


def _most_earned(costs: Sequence[float], sizes: Sequence[int]) -> float:
    """The most that a block seems to earn by each weight that goes: so much has a weight to be worth for all to be wanted."""
    cost, size = costs[sizes.index(max(sizes))], max(sizes)
    return max((cost - c) / (size - n) if n < size else 0.0 for c, n in zip(costs, sizes, strict=True))


def _is_possible(sites: Sequence[Site], options: Sequence[_Option], pattern: Structured) -> bool:
    """Whether a block may become so: whole blocks may go where `blocks` may, and attention or neurons alone where these may."""
    gone = [site.coupling.kind for site, option in zip(sites, options, strict=True) if not option.width.units]
    if len(gone) == len(sites) and len(sites) > 1:
        return "blocks" in pattern.units or all(kind in pattern.units for kind in gone)
    return all(kind in pattern.units for kind in gone)


@dataclass
class _Trial:
    """The model as a run would make it with the widths that were last tried, but on fewer windows.

    Attributes:
        searcher: whose files have the weights of every width.
        windows: of the search.
        widths: that each linear may get.
        model: all of it; what goes is zero.
        ids_NS, held_NS: text that weights are solved on, and text that the loss is measured on: neither sees the other's.
    """

    searcher: Searcher
    windows: Windows
    widths: Mapping[str, list[Width]]
    model: Any
    ids_NS: Tensor
    held_NS: Tensor
    _dampings: dict[str, float] = field(default_factory=dict)
    _made: int = 0

    @classmethod
    def of(cls, searcher: Searcher, windows: Windows, widths: Mapping[str, list[Width]]) -> _Trial:
        prepared = searcher.prepared
        half, S = max(2, len(windows.ids_NS) // 2), windows.ids_NS.shape[1]
        tokens = _SOLVED * max(prepared.shape(name)[1] for name in widths)
        held_NS = pieces(windows.ids_NS[len(windows.ids_NS) // 2 :], windows.bos_ids)
        return cls(
            searcher,
            windows,
            widths,
            prepared.load_whole(),
            windows.ids_NS[: min(half, max(2, math.ceil(tokens / S)))],
            held_NS[: max(1, _MEASURED // held_NS.shape[1])],
        )

    def make(self, now: _Set, others: bool = False) -> None:
        """Solve linears for such widths, each on what those before it have become.

        Args:
            others: solve them for all other widths, too, and keep what comes of it.
        """
        searcher, job = self.searcher, self.searcher.job
        sites = {site.name: site for site in sites_of(searcher)}

        def look(gathered: list[Gathered]) -> None:
            for (name, *_), stats in gathered:
                stack = stacked(job.plan, [searcher.prepared.problem(name, None)], stats.or_isotropic())
                for width in self.widths[name] if others else [now[name]]:
                    W_OI = self._solved(stack, sites[name], width)
                    if others:
                        stay_K = W_OI.any(0).nonzero()[:, 0]
                        kept = {"stay_K": stay_K.cpu(), "W_OK": W_OI[:, stay_K].bfloat16().cpu().contiguous()}
                        save_file(kept, _file(searcher.folder, name, width))
                    if width == now[name]:
                        new_OI = W_OI
                for linear in (searcher.prepared.linear(name), self.model.get_submodule(name)):
                    before, W = linear.get_parameter("weight"), new_OI.T if is_transposed(linear) else new_OI
                    place(linear, "weight", W.to(before.device, before.dtype).contiguous())

        self._made += 1
        job.say(f"making set {self._made} of widths")
        searcher.walk(self.ids_NS, look, searcher.level)

    def _solved(self, stack: Stack, site: Site, width: Width) -> Tensor:
        """The weight for a width.

        By how much a refit is damped is chosen once, in the dense model at the width in the middle: for all it would take
        many times as long.
        """
        pruning = self.searcher.job.plan.pruning
        assert pruning is not None
        pruner: Any = pruning.pruner
        if width == site.width or not width.units:
            return stack.W_OI if width.units else torch.zeros_like(stack.W_OI)
        if site.name not in self._dampings:
            among = [each for each in self.widths[site.name][1:] if each.units]
            middle, damping = site.units(among[len(among) // 2]), None
            if pruning.refits:
                damping = choose_damping(stack, middle.spread(pruner.keep_units(stack, middle)), pruner.shifts)
            self._dampings[site.name] = math.inf if damping is None else damping
        units = site.units(width)
        return refit_with(
            stack, units.spread(pruner.keep_units(stack, units)), self._dampings[site.name], pruner.shifts
        )

    def loss(self) -> float:
        """In nats a token."""
        loss = loss_without(self.model, [], self.held_NS)
        _LOG.info("set %d of widths: loss %.4f nats a token", self._made, loss)
        return loss

    def costs(self, now: _Set, again: int) -> _Costs:
        """What it would cost to give one linear another width than it has now; `again`: how often that was asked before.

        On other text each time, as long as there is any. The dense model is where its training left it: its loss has no slope.
        """
        S, bos = self.windows.ids_NS.shape[1], self.windows.bos_ids
        text_NS = self.windows.ids_NS[len(self.windows.ids_NS) // 2 :].flip(0)
        text_NS = text_NS[: max(1, len(text_NS) - math.ceil(_MEASURED / S))]
        text_NS = text_NS.roll(-again * math.ceil(TOKENS / S), 0)
        effects = self.searcher.effects_in(self.model, pieces(text_NS, bos), of_loss=again > 0)
        found: _Costs = {}
        for name, among in self.widths.items():
            now_OI = self._kept(name, now[name])
            rises = effects.rises(name, (self._kept(name, width) - now_OI for width in among))
            found[name] = dict(zip(among, rises, strict=True))
        return found

    def _kept(self, name: str, width: Width) -> Tensor:
        """What came of it for a width when the model was made."""
        kept = load_file(_file(self.searcher.folder, name, width))
        O, I = self.searcher.prepared.shape(name)
        W_OI = torch.zeros(O, I)
        W_OI[:, kept["stay_K"]] = kept["W_OK"].float()
        return W_OI


def _file(folder: Path, name: str, width: Width) -> Path:
    return folder / f"{name}-{width.units}-{width.groups}.safetensors"
