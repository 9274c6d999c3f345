"""MC#'s bits for each expert: what its router makes of it, and by how much its layer is off without the bits.

T: tokens, H: hidden size, R: tokens of one expert, E: experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from secateur.core.stats import InputStats
from secateur.errors import UsageError
from secateur.experts.bit_programme import costs_of, least_cost
from secateur.mixture.expert_rows import Routed
from secateur.mixture.experts import Experts
from secateur.mixture.unfuse import experts_in
from secateur.pipeline.calibrate import Windows
from secateur.recipes.recipe import Choice, Recipe
from secateur.search.goal import goal
from secateur.search.goals.target_size import TargetSize, parse_target
from secateur.search.searcher import Searcher
from secateur.search.target import check_target
from secateur.units import words

# What experts may have, what all other linears have, and tables: the paper's, but for one bit, of which there are no codes.
_BITS, _OTHERS, _TABLES = (2, 3, 4), 4, 8
# Tokens on which experts are compared.
_TOKENS = 4096


@dataclass(frozen=True)
class _Seen:
    """What one expert is for its layer.

    Attributes:
        tokens: that it is sent.
        weight: the mean of what the router gives it for them.
        errors, sizes: for each number of bits, the error of the layer's output, and bytes on disk.
    """

    tokens: int
    weight: float
    errors: list[float]
    sizes: list[int]


@goal
@dataclass(frozen=True)
class ExpertBits:
    """Bits of experts by the programme of MC#, layer by layer within one mean; other linears have four."""

    target: TargetSize
    name: ClassVar[str] = "mc"
    models: ClassVar[int] = 0
    #: Which says how small.
    takes: ClassVar[str] = TargetSize.name

    @classmethod
    def of(cls, recipe: Recipe) -> ExpertBits:
        if recipe.target_size is None:
            raise UsageError("`allocation` mc shares out a size: give `target_size`, such as 2.5bit")
        if recipe.quantize is None or recipe.prune:
            raise UsageError("`allocation` mc finds bits for experts: give `quantize` gptq, and leave `prune` out")
        if recipe.share_choice == "layer":
            raise UsageError("`allocation` mc finds bits for each expert: leave `share_choice` layer out")
        check_target(recipe, TargetSize.name)
        return cls(parse_target(recipe.target_size))

    def check(self, searcher: Searcher) -> None:
        searcher.check_memory()
        if not searcher.prepared.of_experts:
            raise UsageError(
                f"`allocation` mc is for mixtures of experts, and of {searcher.prepared.source.name} none are compressed: "
                "leave it out"
            )

    def tried(self, searcher: Searcher) -> list[Choice]:
        return _choices(searcher)

    def result_bytes(self, searcher: Searcher) -> int | None:
        return self.target.size(searcher)

    def choose(self, searcher: Searcher, windows: Windows) -> dict[str, Choice]:
        choices = _choices(searcher)
        seen = _layers_seen(searcher, windows.ids_NS, choices)
        experts = {
            f"{name}.{linear}" for name, module in searcher.prepared.experts.items() for linear in module.linears
        }
        found = {name: Choice(None, _OTHERS) for name in searcher.weights if name not in experts}
        found |= {name: Choice(None, _TABLES) for name in searcher.tables}
        room = self.target.room(searcher) - self._others(searcher, list(found))
        least = sum(min(each.sizes) for layer in seen.values() for each in layer)
        if least > room:
            raise UsageError(
                f"`target_size` {self.target.text} leaves {words(max(room, 0))} for experts, which take {words(least)} with "
                f"{_BITS[0]} bits, where all other linears have {_OTHERS}: give more"
            )
        for name, layer in seen.items():
            share = room * sum(min(each.sizes) for each in layer) / least
            for e, bits in enumerate(_bits_of(layer, share, [choice.bits or 0 for choice in choices])):
                found |= {
                    f"{name}.{linear}": Choice(None, bits)
                    for linear in searcher.prepared.experts[name].linears
                    if linear.startswith(f"{e}.")
                }
        return {name: choice for name, choice in found.items() if name in searcher.weights or name in searcher.tables}

    def _others(self, searcher: Searcher, names: list[str]) -> int:
        """Bytes of what is no expert's."""
        tables = sum(searcher.prepared.table_bytes(name, _TABLES) for name in names if name in searcher.tables)
        linears = [name for name in names if name not in searcher.tables]
        return tables + sum(searcher.bytes_with(name, Choice(None, _OTHERS)) for name in linears)


def _choices(searcher: Searcher) -> list[Choice]:
    quantizer = searcher.job.plan.quantizer
    return [Choice(None, bits) for bits in _BITS if quantizer is not None and bits in quantizer.all_bits]


def _bits_of(layer: list[_Seen], room: float, bits: list[int]) -> list[int]:
    """The bits of a layer's experts, within so many bytes."""
    reached = [each for each in layer if each.tokens]
    # One that no token was sent to is taken to be as the others in the mean, but for how often it is chosen.
    mean = [sum(each.errors[b] for each in reached) / len(reached) for b in range(len(bits))]
    error_EB = [each.errors if each.tokens else mean for each in layer]
    frequency_E = [max(each.tokens, 0.5) for each in layer]
    weight_E = [each.weight or sum(x.weight for x in reached) / len(reached) for each in layer]
    low, high = bits.index(min(bits)), bits.index(max(bits))
    steps = max(bits) - min(bits)
    step = max((each.sizes[high] - each.sizes[low]) / steps for each in layer) if steps else 1.0
    spare = int((room - sum(each.sizes[low] for each in layer)) / step)
    budget = len(layer) * min(bits) + min(spare, len(layer) * steps)
    return least_cost(costs_of(frequency_E, weight_E, error_EB), bits, budget, sorted(bits)[-2:])


def _layers_seen(searcher: Searcher, ids_NS: Tensor, choices: list[Choice]) -> dict[str, list[_Seen]]:
    """What each expert is for its layer on the dense model's own inputs, by the names of the layers."""
    searcher.job.say("weighing experts")
    model = searcher.prepared.load_whole()
    modules = experts_in(model)
    calls: dict[str, list[tuple[Any, ...]]] = {name: [] for name in modules}

    def note(name: str) -> Callable[..., None]:
        return lambda _, args, kwargs: calls[name].append((*args, *kwargs.values()))

    handles = [m.register_forward_pre_hook(note(name), with_kwargs=True) for name, m in modules.items()]
    for ids_S in ids_NS[: max(1, _TOKENS // ids_NS.shape[1])]:
        model.base_model(input_ids=ids_S[None].to(model.device), use_cache=False)
    for handle in handles:
        handle.remove()
    found = {}
    for number, (name, module) in enumerate(modules.items()):
        searcher.job.say(f"weighing experts: layer {number + 1} of {len(modules)}")
        if module.copied_inputs or any(len(given) < 3 for given in calls[name]):
            raise UsageError(f"`allocation` mc needs the weights that a router gives, which {name} is not told")
        given = [torch.cat(parts) for parts in zip(*(each[:3] for each in calls.pop(name)), strict=True)]
        routed = Routed(given[0], given[1], given[2], module.count)
        found[name] = [_seen(searcher, name, module, e, routed, choices) for e in range(module.count)]
    unseen = [name for name, layer in found.items() if not any(each.tokens for each in layer)]
    if unseen:
        raise UsageError(f"no token is sent to any expert of {unseen[0]}: give more text")
    return found


def _seen(searcher: Searcher, name: str, module: Experts, e: int, routed: Routed, choices: list[Choice]) -> _Seen:
    """What one expert is for its layer."""
    x_RH, weight_R = routed.inputs(e), routed.weights(e)
    dense_RH = module.output(e, x_RH)
    firsts = [f"{name}.{e}.{linear}" for linear in module.firsts]
    solved = []
    for names, x_RI in ((firsts, x_RH), ([f"{name}.{e}.{module.last}"], module.inner(e, x_RH))):
        stats = InputStats.empty(x_RI.shape[1], searcher.level, x_RI.device)
        stats.add(x_RI)
        solved.append(searcher.solve(names, stats, choices))
    errors, sizes = [], []
    for first, last in zip(*solved, strict=True):
        both = [*first, *last]
        with _in_place(module, {each.name.removeprefix(f"{name}."): each.W_OI for each in both}):
            off_RH = module.output(e, x_RH) - dense_RH
        errors.append(float((off_RH * weight_R[:, None]).norm()))
        sizes.append(sum(map(searcher.bytes_on_disk, both)))
    return _Seen(len(x_RH), float(weight_R.mean()) if len(x_RH) else 0.0, errors, sizes)


@contextmanager
def _in_place(module: Experts, weights: dict[str, Tensor | None]) -> Iterator[None]:
    """Within the context, linears of a module's experts have other weights."""
    linears = {name: module.get_submodule(name) for name in weights}
    before = {name: linear._parameters["weight"] for name, linear in linears.items()}
    try:
        for name, W_OI in weights.items():
            assert W_OI is not None
            own = linears[name].get_parameter("weight")
            linears[name]._parameters["weight"] = nn.Parameter(W_OI.to(own), requires_grad=False)
        yield
    finally:
        for name, linear in linears.items():
            linear._parameters["weight"] = before[name]
