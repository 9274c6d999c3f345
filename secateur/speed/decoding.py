"""A mixture of experts as it writes: how many of its experts a step activates, what it reads, and how long that takes.

A step of decoding reads only those experts that one of its tokens is sent to: the more texts are written at a time, the more of
them. MoE-CAP (Jiang et al. 2024, arXiv 2412.07067) therefore defines the sparse memory bandwidth utilization by the bytes that
are activated,

    S-MBU = B_achieved / B_peak,  B_achieved = (S_activated + S_KV) / TPOT,
    S_activated = n_layer · S_attn + Σ_l Σ_i 1[l, i] · S_expert,

where 1[l, i] is 1 for each expert i of layer l that any token of the step is sent to, S_KV is the size of the cache and TPOT
the time of a step; and the sparse FLOP/s utilization, S-MFU, alike, by the operations of the experts that each token is sent
to and of attention over what the cache holds. Here S_attn is all that is in no expert, with routers, shared experts and the
head; every expert counts with its own bytes as they lie in memory; and the peaks are what a copy and a product of matrices
reach on the machine.

B: texts written at a time, S: tokens of each so far, V: vocabulary.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.evaluation.routing import Call, counts_of, watched
from secateur.kernels.embedding import PackedEmbedding
from secateur.kernels.module import PackedLinear
from secateur.kernels.packed import nbytes
from secateur.mixture.experts import Experts
from secateur.model.load import load_source
from secateur.model.source import Source
from secateur.model.structure import build_skeleton
from secateur.speed.timing import large_product, time_in_turn

# Tokens that every text begins with, drawn at random; steps before anything is measured, and steps that are.
_PROMPT, WARM_UP, STEPS = 8, 2, 16


@dataclass(frozen=True)
class Decoding:
    """A step of a mixture that writes so many texts at a time.

    Attributes:
        tokens: texts, each of which gets one token in a step.
        seconds: of a step: the median.
        experts: distinct experts of a layer that a step activates: the mean over layers and steps.
        of: experts that a layer has, in the mean.
        bytes: that a step reads, the cache included: the mean.
        flops: floating-point operations of a step, of zeros, too: the mean.
    """

    tokens: int
    seconds: float
    experts: float
    of: float
    bytes: float
    flops: float


@dataclass(frozen=True)
class _Held:
    """What parameters and packed weights take: bytes, and how many numbers the matrices among them have."""

    bytes: float = 0
    weights: float = 0

    def __add__(self, other: _Held) -> _Held:
        return _Held(self.bytes + other.bytes, self.weights + other.weights)

    def __truediv__(self, parts: int) -> _Held:
        return _Held(self.bytes / parts, self.weights / parts)


@dataclass(frozen=True)
class Costs:
    """What the parts of a model take.

    Attributes:
        rest: of all that every step reads.
        experts: each of a module's experts, by the module's name.
        row: bytes of a token's embedding.
    """

    rest: _Held
    experts: dict[str, list[_Held]]
    row: int

    @classmethod
    def of(cls, model: Any) -> Costs:
        """Of a model that is in place."""
        counts = counts_of(model)
        embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
        inside = {id(part) for name in counts for part in model.get_submodule(name).modules()}
        outside = [module for module in model.modules() if id(module) not in inside]
        if getattr(head, "weight", None) is not embeddings.weight:
            outside = [module for module in outside if module is not embeddings]
        experts = {name: _of_experts(model.get_submodule(name), count) for name, count in counts.items()}
        packed = isinstance(embeddings, PackedEmbedding)
        row = embeddings.linear.nbytes // embeddings.num_embeddings if packed else embeddings.weight[0].nbytes
        return cls(_held(outside), experts, row)


def _of_experts(module: nn.Module, count: int) -> list[_Held]:
    if not isinstance(module, Experts):
        return [_held(module.modules()) / count] * count
    fused = _held([module]) / count  # biases
    return [_held(module.get_submodule(str(e)).modules()) + fused for e in range(count)]


def _held(modules: Iterable[nn.Module]) -> _Held:
    """What modules hold themselves; what several of them share counts once."""
    found, seen = _Held(), set()
    for module in modules:
        if isinstance(module, PackedLinear):
            assert module.prepared is not None
            found += _Held(nbytes(module.prepared.weight), module.out_features * module.in_features)
        for parameter in module._parameters.values():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                found += _Held(parameter.nbytes, parameter.numel() if parameter.ndim > 1 else 0)
    return found


def decode_source(
    source: Source, backend: str, device: torch.device, dtype: torch.dtype, tokens: Sequence[int]
) -> tuple[list[Decoding], float | None]:
    """A model as it writes so many texts at a time, and the operations a second that a product of large matrices reaches.

    Nothing where the model has no experts.
    """
    if not counts_of(build_skeleton(source, dtype) if source.loaded is None else source.loaded):
        return [], None
    model = load_source(source, dtype, device, backend=backend) if source.loaded is None else source.loaded
    found = [decode(model, texts) for texts in tokens]
    del model
    product, flops = large_product(device, dtype)
    [taken] = time_in_turn([[product]], device, 0)
    return found, flops / min(taken)


@torch.inference_mode()
def decode(model: Any, texts: int) -> Decoding:
    """Have a mixture write some texts at a time from random tokens on, each token drawn from what it predicts.

    Args:
        model: a causal language model of transformers with experts, packed or not.
        texts: how many.
    """
    costs = Costs.of(model.eval())
    draw = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().num_embeddings
    ids_BS = torch.randint(vocabulary, (texts, _PROMPT), generator=draw)
    cache = None
    seconds, active, read, computed = [], [], [], []
    for step in range(-1, WARM_UP + STEPS):  # the first reads the prompt
        began = _now(model.device)
        with watched(model, routers=False) as calls:
            out = model(input_ids=ids_BS.to(model.device), past_key_values=cache, use_cache=True)
        took = _now(model.device) - began
        cache = out.past_key_values
        likely_BV = out.logits[:, -1].float().softmax(1).cpu()
        ids_BS = torch.multinomial(likely_BV, 1, generator=draw)
        if step >= WARM_UP:
            seconds.append(took)
            active += [len(_hit(call)) for call in calls]
            kept = list(_tensors(cache))
            read.append(_bytes(costs, calls, texts) + sum(tensor.nbytes for tensor in kept))
            computed.append(_flops(costs, calls, texts) + sum(_attention(tensor, model.config) for tensor in kept))
    return Decoding(
        tokens=texts,
        seconds=statistics.median(seconds),
        experts=statistics.mean(active),
        of=statistics.mean(len(each) for each in costs.experts.values()),
        bytes=statistics.mean(read),
        flops=statistics.mean(computed),
    )


def _now(device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def _hit(call: Call) -> dict[int, int]:
    """How many tokens of a call each expert is sent that is sent any."""
    experts, counts = call.chosen().unique(return_counts=True)
    return {e: n for e, n in zip(experts.tolist(), counts.tolist(), strict=True) if e >= 0}


def _bytes(costs: Costs, calls: list[Call], texts: int) -> float:
    """That a step reads of the model."""
    return costs.rest.bytes + texts * costs.row + sum(costs.experts[c.name][e].bytes for c in calls for e in _hit(c))


def _flops(costs: Costs, calls: list[Call], texts: int) -> float:
    """Of a step, without those over the cache."""
    routed = sum(costs.experts[c.name][e].weights * tokens for c in calls for e, tokens in _hit(c).items())
    return 2 * (texts * costs.rest.weights + routed)


def _attention(kept: Tensor, config: Any) -> int:
    """Operations over what a layer keeps: each number is multiplied and added once for every head that reads it."""
    heads = getattr(config.get_text_config(), "num_attention_heads", None) or 1
    shared = max(1, heads // kept.shape[1]) if kept.ndim == 4 else 1
    return 2 * kept.numel() * shared


def _tensors(value: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
    """All tensors that a cache keeps, whatever class it is."""
    seen = set() if seen is None else seen
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from _tensors(each, seen)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each, seen)
    elif type(value).__module__.startswith("transformers.") and hasattr(value, "__dict__"):
        yield from _tensors(vars(value), seen)
