"""One smoothing vector for all experts of a layer ("EAQuant", Fu et al. 2025, arXiv:2506.13329, expert-aware smoothing
aggregation).

What experts read is divided by a vector s̄, and their weights are multiplied by it, so that activations that stand out are met
by weights that can be rounded: s̄_j = max_e (max |x_ej|^a / max |W_ej|^(1−a)). The norm before takes the division, the router
and whatever else reads the same takes the product: outputs stay as they are, and nothing is computed that was not before. The
paper's balance of calibration tokens is what `expert_tokens` does; tuning of routers, which is training, is left out.

Where activations stay in 16 bits it is weights alone that are changed, and it does little: docs/mixtures.md has figures.

T: tokens, H: hidden size, E: experts, O: output features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import UsageError
from secateur.mixture.expert_rows import Routed
from secateur.mixture.experts import DOWN, GATE_UP, UP
from secateur.mixture.skipping import modules_of

#: a: how much of the difference between inputs goes to weights.
ALPHA = 0.5
# By how much outputs may change, in the dtype of the weights, relative to the largest.
_ROUNDING = 64


@dataclass
class _Layer:
    """Experts and what reads the same as they do.

    Attributes:
        experts: transformers' module of them.
        norm: whose output they read; None until one is seen.
        readers: other modules whose weights are multiplied with it.
        largest_EH: max |x| of each expert's own tokens.
    """

    experts: nn.Module
    norm: nn.Module | None = None
    readers: dict[str, nn.Module] = field(default_factory=dict)
    largest_EH: Tensor | None = None


@torch.no_grad()
def smooth_experts(model: Any, windows: Sequence[Tensor], alpha: float = ALPHA) -> list[Tensor]:
    """Smooth the experts of a mixture, in place. Gives the vector s̄ of each layer.

    Args:
        model: of transformers, in memory, its experts fused.
        windows: token ids of each window of calibration text.
        alpha: a, from 0 to 1.

    Raises:
        UsageError: it is no mixture, or not built so that this can be done: then nothing is changed.
    """
    if not 0 <= alpha <= 1:
        raise UsageError(f"`alpha` is {alpha:g}: give a number from 0 to 1")
    layers = [_Layer(module) for module in modules_of(model)]
    if not layers:
        raise UsageError("there are no experts to smooth: this model is no mixture that transformers keeps fused")
    before = _watched(model, layers, windows)
    vectors = [_vector(layer, alpha) for layer in layers]
    for layer, s_H in zip(layers, vectors, strict=True):
        _fold(layer, s_H)
    after = _logits(model, windows[0])
    most = _ROUNDING * torch.finfo(model.dtype).eps * float(before.abs().max())
    if not float((after - before).abs().max()) <= most:
        for layer, s_H in zip(layers, vectors, strict=True):
            _fold(layer, 1 / s_H)
        raise UsageError(
            "the experts of this model cannot be smoothed: its norms are not of a kind that takes a factor"
        )
    return vectors


def _logits(model: Any, ids_S: Tensor) -> Tensor:
    found: Tensor = model(input_ids=ids_S[None].to(model.device), use_cache=False).logits.float()
    return found


class _Watch:
    """Fills in what layers read while a model runs."""

    def __init__(self, model: nn.Module, layers: list[_Layer]) -> None:
        self.names = {module: name for name, module in model.named_modules()}
        # By where the output of a norm lies, the norm.
        self.normed: dict[int, nn.Module] = {}
        self.handles: list[Any] = []
        for module in model.modules():
            weight = module._parameters.get("weight")
            if weight is not None and weight.ndim == 1:
                self.handles.append(module.register_forward_hook(self._norm))
        for layer in layers:
            self.handles.append(
                layer.experts.register_forward_pre_hook(partial(self._experts, layer), with_kwargs=True)
            )
            parent, H = self.names[layer.experts].rpartition(".")[0], _first(layer.experts)[1]
            for module in model.get_submodule(parent).modules():
                weight = module._parameters.get("weight")
                if weight is not None and weight.ndim == 2 and weight.shape[1] == H:
                    self.handles.append(module.register_forward_pre_hook(partial(self._reader, layer)))

    def leave(self) -> None:
        for handle in self.handles:
            handle.remove()

    def _norm(self, module: nn.Module, _: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            self.normed[output.data_ptr()] = module

    def _reader(self, layer: _Layer, module: nn.Module, args: Any) -> None:
        if args and isinstance(args[0], Tensor) and args[0].data_ptr() in self.normed:
            layer.readers[self.names[module]] = module

    def _experts(self, layer: _Layer, module: nn.Module, args: Any, kwargs: Any) -> None:
        given = [*args, *kwargs.values()]
        if len(given) < 3 or given[0].data_ptr() not in self.normed:
            raise UsageError(f"{self.names[module]} does not read what a norm gives, which could take a factor")
        layer.norm = self.normed[given[0].data_ptr()]
        x_TH = given[0].reshape(-1, given[0].shape[-1]).float().abs()
        experts = len(module.get_parameter(DOWN))
        routed = Routed(x_TH, given[1], given[2], experts)
        largest_EH = x_TH.new_zeros(experts, x_TH.shape[1])
        for e in routed.hit:
            largest_EH[e] = routed.inputs(e).amax(0)
        before_EH = layer.largest_EH
        layer.largest_EH = largest_EH if before_EH is None else torch.maximum(before_EH, largest_EH)


def _watched(model: Any, layers: list[_Layer], windows: Sequence[Tensor]) -> Tensor:
    """Fill in what layers read while windows run; the logits of the first one."""
    watch = _Watch(model, layers)
    try:
        logits = [_logits(model, ids_S) for ids_S in windows]
    finally:
        watch.leave()
    for layer in layers:
        if layer.norm is None or sum(other.norm is layer.norm for other in layers) > 1:
            raise UsageError(
                f"{watch.names[layer.experts]} has no norm of its own before it, which could take a factor"
            )
    return logits[0]


def _first(experts: nn.Module) -> tuple[str, int, bool]:
    """The parameter of the first projections, how many inputs they have, and whether it lies transposed."""
    leaf = GATE_UP if hasattr(experts, GATE_UP) else UP
    transposed = bool(getattr(experts, "is_transposed", False))
    return leaf, experts.get_parameter(leaf).shape[1 if transposed else 2], transposed


def _vector(layer: _Layer, alpha: float) -> Tensor:
    """s̄ of a layer, around 1."""
    leaf, _, transposed = _first(layer.experts)
    W = layer.experts.get_parameter(leaf)
    weight_EH = W.float().abs().amax(2 if transposed else 1)
    assert layer.largest_EH is not None
    x_EH = layer.largest_EH.to(weight_EH.device)
    s_H = torch.where((x_EH > 0) & (weight_EH > 0), x_EH**alpha / weight_EH ** (1 - alpha), 0).amax(0)
    s_H = torch.where(s_H > 0, s_H, 1)
    found_H: Tensor = s_H / s_H.log().mean().exp()
    return found_H


def _fold(layer: _Layer, s_H: Tensor) -> None:
    """Divide what the norm gives, and multiply what reads it."""
    assert layer.norm is not None
    norm = layer.norm.get_parameter("weight")
    norm.copy_(norm / s_H)
    bias = layer.norm._parameters.get("bias")
    if bias is not None:
        bias.copy_(bias / s_H)
    for reader in layer.readers.values():
        W_OH = reader.get_parameter("weight")
        W_OH.copy_(W_OH * s_H)
    leaf, _, transposed = _first(layer.experts)
    W = layer.experts.get_parameter(leaf)
    W.copy_(W * (s_H[:, None] if transposed else s_H))
