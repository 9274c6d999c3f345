"""Finding couplings in a block by looking at what its linears' inputs depend on.

A block is run on a few tokens with random weights, and gradients tell which rows of which linears have a part in which input
features. Nothing is taken from names: fused and interleaved projections, those that keep their weights the other way round,
and parallel branches are all found alike.

O: output features, I: input features, R: rows of a linear, U: units, B: bits of a feature's number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from secateur.mixture.experts import Experts, Visit, visited
from secateur.model.structure import LINEARS, TRACED_TOKENS, run_without_weights
from secateur.structured.coupling import Coupling, Feeds, as_feeds, groups_of

# How often tokens are drawn: a neuron behind a ReLU may be off for all of one draw.
_DRAWS = 6


@dataclass(frozen=True)
class Call:
    """How a block is called, but for its hidden states, which are `[1, tokens, width]`."""

    width: int
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def run(self, block: nn.Module, weights: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
        """What a block returns with these weights."""
        out = functional_call(block, dict(weights), (hidden, *self.args), dict(self.kwargs), tie_weights=False)
        return out[0] if isinstance(out, tuple | list) else out


def without_experts(block: nn.Module) -> AbstractContextManager[Any]:
    """Within the context a block runs without its experts, which have no weights here and are no part of what is looked for."""
    return visited(block, lambda _: Visit(lambda *_: False))


def calls_of(model: nn.Module, blocks: Sequence[nn.Module]) -> list[Call] | None:
    """How a model calls its blocks; None where that cannot be told without weights."""
    calls: dict[int, Call] = {}

    def note(i: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            rest = {key: _as_float(value) for key, value in kwargs.items()}
            hidden = args[0] if args else rest.pop("hidden_states")
            calls[i] = Call(hidden.shape[-1], tuple(map(_as_float, args[1:])), rest)

        return hook

    with ExitStack() as left:
        for i, block in enumerate(blocks):
            left.callback(block.register_forward_pre_hook(note(i), with_kwargs=True).remove)
        try:
            run_without_weights(model)
        except Exception:  # whatever a model's code does where weights are zeros
            return None
    return [calls[i] for i in range(len(blocks))] if len(calls) == len(blocks) else None


def _as_float(value: Any) -> Any:
    """The same, with all floating tensors in it as float32, on the CPU."""
    if isinstance(value, Tensor):
        return value.float().cpu() if value.is_floating_point() else value.cpu()
    if type(value) in (tuple, list):
        return type(value)(map(_as_float, value))
    return value


@dataclass(frozen=True)
class _Seen:
    """A forward pass.

    Attributes:
        inputs, outputs: of each linear, by name, in the order in which they ran.
        out: of the block.
    """

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    out: Tensor


@torch.enable_grad()
def find_couplings(block: nn.Module, call: Call, heads: int) -> tuple[list[Coupling], dict[str, Tensor]]:
    """The couplings of a block, and the random weights that they were found with.

    Args:
        block: with its parameters anywhere, on the meta device too.
        call: as it is called by its model.
        heads: of attention.
    """
    draw = torch.Generator().manual_seed(0)
    weights = random_weights(block, draw)
    seen = [_pass(block, call, weights, draw) for _ in range(_DRAWS)]
    found = []
    for consumer in seen[0].inputs:
        coupling = _coupling(consumer, seen, heads)
        if coupling is not None and _feeds_nothing_else(block, call, weights, coupling, draw):
            found.append(coupling)
    return found, weights


def random_weights(block: nn.Module, draw: torch.Generator) -> dict[str, Tensor]:
    """Weights for a block on the CPU, of a size at which nothing saturates."""
    found = {}
    of_experts = tuple(f"{name}." for name, module in block.named_modules() if isinstance(module, Experts))
    for name, parameter in block.named_parameters():
        if name.startswith(of_experts or "\0"):
            continue  # they are not run
        scale = max(1, parameter.shape[-1]) ** -0.5 if parameter.ndim > 1 else 0.1
        mean = 0.5 if parameter.ndim == 1 and not name.endswith("bias") else 0.0  # norms scale, biases do not
        found[name] = torch.randn(parameter.shape, generator=draw) * scale + mean
    return found


def random_hidden(call: Call, draw: torch.Generator) -> Tensor:
    """Hidden states for a block."""
    return torch.randn(1, TRACED_TOKENS, call.width, generator=draw)


def linears_of(block: nn.Module) -> dict[str, nn.Module]:
    """The linears of a block, by their names within it."""
    return {name: module for name, module in block.named_modules() if isinstance(module, LINEARS)}


def _pass(
    block: nn.Module,
    call: Call,
    weights: Mapping[str, Tensor],
    draw: torch.Generator,
    cut: str | None = None,
) -> _Seen:
    """Run a block; what it reads from the linear `cut` carries no gradient."""
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[..., Tensor | None]:
        def hook(_: nn.Module, args: tuple[Any, ...], out: Any) -> Tensor | None:
            if not isinstance(out, Tensor):  # a router's, say
                return None
            inputs[name], outputs[name] = args[0], out
            return out.detach() if name == cut else None

        return hook

    with ExitStack() as left:
        for name, linear in linears_of(block).items():
            left.callback(linear.register_forward_hook(watch(name)).remove)
        left.enter_context(without_experts(block))
        hidden = random_hidden(call, draw).requires_grad_(True)
        return _Seen(inputs, outputs, call.run(block, weights, hidden))


def _reached(seen: _Seen, of: Tensor, names: Sequence[str], draw: torch.Generator) -> dict[str, Tensor]:
    """Which rows of each linear a tensor depends on, `[R]`."""
    weighted = (of * torch.rand(of.shape, generator=draw).add_(0.5)).sum()
    outputs = [seen.outputs[name] for name in names]
    if not weighted.requires_grad:
        return {name: torch.zeros(out.shape[-1], dtype=torch.bool) for name, out in zip(names, outputs, strict=True)}
    gradients = torch.autograd.grad(weighted, outputs, retain_graph=True, allow_unused=True)
    return {
        name: torch.zeros(out.shape[-1], dtype=torch.bool)
        if gradient is None
        else (gradient.reshape(-1, gradient.shape[-1]) != 0).any(0)
        for name, out, gradient in zip(names, outputs, gradients, strict=True)
    }


def _coupling(consumer: str, seen: Sequence[_Seen], heads: int) -> Coupling | None:
    before = list(seen[0].inputs)[: list(seen[0].inputs).index(consumer)]
    before = [name for name in before if seen[0].outputs[name].requires_grad]
    x = seen[0].inputs[consumer]
    I = x.shape[-1]
    if not before or not x.requires_grad or I < 2:
        return None
    draw = torch.Generator().manual_seed(1)
    # A look at one feature: what reads all rows, or none, tells nothing apart.
    first = _reached(seen[0], x[..., :1], before, draw)
    some = [name for name in before if 0 < int(first[name].sum()) < len(first[name])]
    if not some:
        return None
    neurons = _neurons(seen, consumer, before, I)
    if neurons is not None and not _mixes_tokens(seen[0], consumer, list(neurons)):
        return Coupling(consumer, "neurons", I, I, 1, neurons)
    if heads < 2 or I % heads or not _share_rows(seen, consumer, before, I // heads):
        return None
    producers = _heads(seen, consumer, before, heads)
    groups = groups_of(producers.values(), heads) if producers else None
    if not producers or groups is None or not _every_unit(producers.values(), heads):
        return None
    return Coupling(consumer, "heads", I, heads, groups, producers)


def _over_draws(seen: Sequence[_Seen], consumer: str, features_I: Tensor, before: Sequence[str]) -> dict[str, Tensor]:
    """Which rows any of some features depend on, in any draw."""
    draw = torch.Generator().manual_seed(2)
    found: dict[str, Tensor] = {}
    for each in seen:
        reached = _reached(each, each.inputs[consumer][..., features_I], before, draw)
        found = {name: found[name] | rows if name in found else rows for name, rows in reached.items()}
    return found


def _neurons(seen: Sequence[_Seen], consumer: str, before: Sequence[str], I: int) -> dict[str, Feeds] | None:
    """The producers of a linear each of whose input features comes from rows of its own; None where that is not so.

    The number of the feature that a row has a part in is read bit by bit, from the features that have the bit and from those
    that have not: a row of one feature is reached from just one of both, each time.
    """
    numbers_I = torch.arange(I)
    bits = max(1, (I - 1).bit_length())
    number = {name: torch.zeros(seen[0].outputs[name].shape[-1], dtype=torch.long) for name in before}
    one = {name: torch.ones_like(number[name], dtype=torch.bool) for name in before}
    every = {name: one[name].clone() for name in before}
    none = {name: one[name].clone() for name in before}
    for b in range(bits):
        has_I = (numbers_I >> b & 1).bool()
        with_bit = _over_draws(seen, consumer, has_I, before)
        without = _over_draws(seen, consumer, ~has_I, before)
        for name in before:
            number[name] += with_bit[name].long() << b
            one[name] &= with_bit[name] ^ without[name]
            every[name] &= with_bit[name] & without[name]
            none[name] &= ~(with_bit[name] | without[name])
        if any(not (one[name] | every[name] | none[name]).all() for name in before):
            return None
    producers = {}
    for name in before:
        if one[name].any():
            producers[name] = Feeds(number[name], number[name] + one[name])
    return producers if producers and _every_unit(producers.values(), I) else None


def _mixes_tokens(seen: _Seen, consumer: str, producers: Sequence[str]) -> bool:
    """Whether what a linear reads of a token hangs on other tokens: that is attention, or the state of a recurrent block."""
    x = seen.inputs[consumer]
    last = x.reshape(-1, x.shape[-1])[-1]
    gradients = torch.autograd.grad(last.sum(), [seen.outputs[name] for name in producers], retain_graph=True)
    return any((gradient.reshape(-1, gradient.shape[-1])[:-1] != 0).any() for gradient in gradients)


def _heads(seen: Sequence[_Seen], consumer: str, before: Sequence[str], heads: int) -> dict[str, Feeds] | None:
    """The producers of a linear whose input features are those of so many heads; None where they are not told apart."""
    I = seen[0].inputs[consumer].shape[-1]
    head_I = torch.arange(I) // (I // heads)
    reached = [_over_draws(seen, consumer, head_I == head, before) for head in range(heads)]
    producers = {}
    for name in before:
        feeds_RU = torch.stack([of_head[name] for of_head in reached], dim=1)
        if feeds_RU.all(1).all() or not feeds_RU.any():
            continue  # what is before the attention, or keys and values that all heads share
        feeds_RU[feeds_RU.all(1)] = False
        feeds = as_feeds(feeds_RU)
        if feeds is None:
            return None
        producers[name] = feeds
    return producers


def _share_rows(seen: Sequence[_Seen], consumer: str, before: Sequence[str], size: int) -> bool:
    """Whether the first and the last feature of a head hang on the same rows: those of queries, which weigh all of them."""
    numbers_I = torch.arange(seen[0].inputs[consumer].shape[-1])
    first = _over_draws(seen, consumer, numbers_I == 0, before)
    last = _over_draws(seen, consumer, numbers_I == size - 1, before)
    other = _over_draws(seen, consumer, numbers_I >= size, before)
    return any((first[name] & last[name] & ~other[name]).any() for name in before)


def _every_unit(producers: Any, units: int) -> bool:
    """Whether every unit has rows of its own, as many as any other."""
    counts_U = torch.zeros(units, dtype=torch.long)
    for feeds in producers:
        for first, stop in torch.stack([feeds.first_R, feeds.stop_R], 1)[feeds.some_R].unique(dim=0).tolist():
            if stop == first + 1:
                counts_U[first] += 1
    return bool((counts_U == counts_U[0]).all()) and int(counts_U[0]) > 0


def _feeds_nothing_else(
    block: nn.Module, call: Call, weights: Mapping[str, Tensor], coupling: Coupling, draw: torch.Generator
) -> bool:
    """Whether the rows of a coupling do nothing but what its consumer reads."""
    seen = _pass(block, call, weights, draw, cut=coupling.consumer)
    reached = _reached(seen, seen.out, list(coupling.producers), draw)
    return not any((reached[name] & feeds.some_R).any() for name, feeds in coupling.producers.items())
