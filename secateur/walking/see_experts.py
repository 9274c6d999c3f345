"""What a text shows of the experts of a model: the dense model's blocks are walked through once, and sums taken on the way.

T: tokens, E: experts, K: experts of a token, R: tokens of one expert, H: hidden size, N: windows, S: tokens of a window.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.experts.layer_seen import LayerSeen, Sample
from secateur.memory.footprint import Settings
from secateur.mixture.expert_rows import Copied, Routed, note_scores, scores_of
from secateur.mixture.experts import Experts
from secateur.mixture.unfuse import routers_in
from secateur.model.weights import place, release
from secateur.pipeline.choose_settings import choose_settings
from secateur.pipeline.job import Job
from secateur.pipeline.measure import measure
from secateur.pipeline.prepared import Prepared
from secateur.walking.capture import BodyCalls
from secateur.walking.clock import Clock
from secateur.walking.forward import forward, precision
from secateur.walking.walker import Journey, Walker

#: Told the name of the experts' module of a layer and what was seen of it, while the router of its block is in memory.
Look = Callable[[str, LayerSeen], None]


def see_experts(
    job: Job,
    prepared: Prepared,
    ids_NS: Tensor,
    folder: Path,
    look: Look,
    *,
    groups: int = 1,
    sampled: int = 0,
    last: int | None = None,
) -> Clock:
    """Take windows through the dense model, and have every layer of experts looked at.

    Args:
        folder: for hidden states, where the memory does not hold them.
        look: at each layer.
        groups: of the router's experts, see `LayerSeen`.
        sampled: of how many tokens it is to be found out what all experts make of them.
        last: the number of the last block that is of interest; None: of all.

    Returns:
        What each phase has taken.
    """
    clock = Clock(prepared.device)
    walker = Walker(job, prepared, clock)
    catcher = walker.enter(ids_NS)

    def settle() -> Settings:
        return choose_settings(
            lambda exact: measure(walker, catcher, ids_NS, exact), job.limit, job.device, job.batch_tokens
        )

    journey = walker.catch(catcher, ids_NS, settle(), lambda number: folder / f"hidden-{number:05d}-0")
    # Nobody asks what an expert makes of other tokens than its own.
    journey = replace(journey, turns=replace(journey.turns, tokens=0, inputs="routed"))
    window, each = ids_NS.shape[1], math.ceil(sampled / len(ids_NS))
    if isinstance(catcher, BodyCalls):
        with _watching(catcher.body, prepared.blocks, window, each, groups) as seen:
            for i, calls in enumerate(journey.calls):
                with forward(clock, precision(prepared)), torch.no_grad():
                    calls[0].run(catcher.body, journey.hiddens.take(i))
            _look(catcher.body, seen, look)
        for block in prepared.blocks:
            release(block)
        walker.leave()
        return clock
    walker.leave()
    stop = len(prepared.blocks) if last is None else last + 1
    for number in range(stop):
        job.say(f"looking at experts: block {number + 1} of {len(prepared.blocks)}")
        _pass(walker, journey, number, look, (window, each, groups))
    return clock


def _pass(walker: Walker, journey: Journey, number: int, look: Look, how: tuple[int, int, int]) -> None:
    prepared = walker.prepared
    block, inputs = prepared.blocks[number], journey.hiddens
    walker.read(number)
    with _watching(block, [block], *how) as seen:
        journey.pass_unsolved(number)
        _look(block, seen, look)
    release(block)
    if inputs.file is not None:
        inputs.file.unlink(missing_ok=True)


def _look(block: nn.Module, seen: dict[str, _Layer], look: Look) -> None:
    for name, layer in seen.items():
        look(name, layer.total(block))


class _Layer:
    """What is seen of one module of experts."""

    def __init__(self, experts: Experts, parent: nn.Module, window: int, each: int, groups: int) -> None:
        self.experts, self._parent = experts, parent
        self._window, self._each = window, each
        self.seen = LayerSeen.empty(experts.count, groups)
        self._outputs: list[Tensor] = []
        self._inputs: list[Tensor] = []

    def begin(self, experts: Experts, routed: Routed | Copied) -> _Batch:
        """See `Experts.watched`."""
        sample = None
        if self._each and isinstance(routed, Routed):
            places_T = torch.arange(routed.count).view(-1, min(self._window, routed.count))
            step = max(1, places_T.shape[1] // self._each)
            sample = places_T[:, step - 1 :: step][:, : self._each].reshape(-1)
        return _Batch(self, routed, sample)

    def add(self, own: LayerSeen, x_TH: Tensor | None, outputs: dict[int, Tensor]) -> None:
        """Count a batch."""
        self.seen += own
        if x_TH is not None:
            for e in set(range(self.experts.count)) - set(outputs):  # only those that were hit have run
                outputs[e] = self.experts.output(e, x_TH).float().cpu()
            self._inputs.append(x_TH)
            self._outputs.append(torch.stack([outputs[e] for e in range(self.experts.count)]))

    def total(self, block: nn.Module) -> LayerSeen:
        """All that was seen; what the router does with a sample is known from here on without the block."""
        if self._outputs:
            routed = _routes(self._parent, self.experts, routers_in(block), torch.cat(self._inputs))
            if routed is not None:
                self.seen.sample = Sample(torch.cat(self._outputs, dim=1), routed)
        return self.seen


class _Batch:
    """What experts give for one batch: counted once it has passed all of them, for it may begin again."""

    def __init__(self, layer: _Layer, routed: Routed | Copied, sample_T: Tensor | None) -> None:
        self._layer, self._routed = layer, routed
        self._own = LayerSeen.empty(layer.experts.count)
        self._scores_TE = scores_of(layer.experts.count, routed)
        self._x_TH = None if sample_T is None else routed.tokens(sample_T.to(_device(routed)), 0)
        self._outputs: dict[int, Tensor] = {}
        self._ran = False

    def gave(self, e: int, weight_R: Tensor | None, output_RH: Tensor) -> None:
        self._ran, scaled = True, weight_R is None
        if weight_R is None:
            token_R = self._routed.rows(e)[0]
            known = self._scores_TE is not None
            weight_R = self._scores_TE[token_R, e] if known else output_RH.new_ones(len(output_RH))  # type: ignore[index]
        self._own.add_outputs(e, weight_R, output_RH, scaled)
        if self._x_TH is not None:
            self._outputs[e] = self._layer.experts.output(e, self._x_TH).float().cpu()

    def done(self) -> None:
        if not self._ran:  # a few tokens by which the stages of a block are found
            return
        self._own.add_tokens(self._routed.count, self._scores_TE)
        self._layer.add(self._own, self._x_TH, self._outputs)


def _device(routed: Routed | Copied) -> torch.device:
    return routed.hidden_TH.device if isinstance(routed, Routed) else routed.copies_ETH.device


@contextmanager
def _watching(
    block: nn.Module, blocks: Sequence[nn.Module], window: int, each: int, groups: int
) -> Iterator[dict[str, _Layer]]:
    """Within the context, what experts of a block give is counted, by the name of their module, and how `blocks` in it change
    what they read.
    """
    layers: dict[str, _Layer] = {}
    with ExitStack() as left:
        for parent in block.modules():
            for experts in [m for m in parent.children() if isinstance(m, Experts)]:
                layer = layers[experts.name] = _Layer(experts, parent, window, each, groups)
                experts.watched = layer.begin
                left.callback(setattr, experts, "watched", None)
                for sibling in parent.children():
                    if sibling is not experts:
                        left.callback(sibling.register_forward_hook(note_scores(experts.count)).remove)
        for one in blocks:
            inside = [layers[m.name] for m in one.modules() if isinstance(m, Experts)]
            if inside:
                hook = one.register_forward_hook(_note_change(inside, window), with_kwargs=True)
                left.callback(hook.remove)
        yield layers


def _note_change(layers: Sequence[_Layer], window: int) -> Callable[..., None]:
    """A hook of a block that counts how it changes whole windows: others are a few tokens by which its stages are found."""

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        before = args[0] if args else kwargs["hidden_states"]
        after = output[0] if isinstance(output, tuple | list) else output
        if before.shape == after.shape and before.shape[-2] == window:
            for layer in layers:
                layer.seen.add_change(before, after)

    return note


# --- what a router does without some of the experts


class _Stub(nn.Module):
    """In the place of experts: keeps what it is called with, and returns nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.given: tuple[Tensor, Tensor] | None = None

    def forward(self, hidden_TH: Tensor, index_TK: Any = None, weight_TK: Any = None) -> Tensor:
        self.given = None if index_TK is None else (index_TK, weight_TK)
        return torch.zeros_like(hidden_TH)


class _Nothing(nn.Module):
    """In the place of what stands beside experts and chooses none of them."""

    def forward(self, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        return torch.zeros_like(hidden)


def _routes(
    parent: nn.Module, experts: Experts, routers: set[str], x_TH: Tensor
) -> Callable[[Sequence[int]], Tensor] | None:
    """What the parent of experts makes of tokens where only some of them are left, see `Sample`; None: that cannot be told.

    The parent is copied with its router's weights and without any others, and its rows for other experts are cut off.
    """
    names = {name.rpartition(".")[2] for name in routers}
    memo: dict[int, Any] = {id(experts): (stub := _Stub())}
    for name, child in parent.named_children():
        if child is not experts and name not in names and any(True for _ in child.parameters()):
            memo[id(child)] = _Nothing()
    whole = copy.deepcopy(parent, memo)

    def routed(kept: Sequence[int]) -> Tensor:
        left = _without(whole, stub, experts.count, list(kept))
        with torch.no_grad():
            left(x_TH[None])
        found = next(m for m in left.modules() if isinstance(m, _Stub)).given
        assert found is not None
        index_TK, weight_TK = found
        weight_TE = torch.zeros(len(x_TH), len(kept), device=x_TH.device)
        within_TK = index_TK < len(kept)
        return weight_TE.scatter_add_(1, index_TK.clamp(max=len(kept) - 1), weight_TK.float() * within_TK).cpu()

    try:
        routed(range(experts.count))
    except Exception:  # whatever a model's code does with what is left of it
        return None
    return routed


def _without(whole: nn.Module, stub: nn.Module, count: int, kept: list[int]) -> nn.Module:
    """A copy of the parent of experts in which the router knows those that are kept and no others."""
    left = copy.deepcopy(whole, {id(stub): _Stub()})
    for module in left.modules():
        for leaf, value in list(vars(module).items()):
            if type(value) is int and value == count and "expert" in leaf:
                setattr(module, leaf, len(kept))
        if isinstance(module, nn.Linear) and module.out_features == count:
            module.out_features = len(kept)
        for leaf, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None and count in tensor.shape:
                rows = torch.tensor(kept, device=tensor.device)
                place(module, leaf, tensor.detach().index_select(tensor.shape.index(count), rows))
    return left
