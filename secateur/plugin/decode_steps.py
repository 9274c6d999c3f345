"""Decoder layers that take a step of decoding in few calls: what comes before attention, attention, what comes after it.

A layer of a small model is some sixty operations on a token, and calling them takes longer than what they compute.

B: texts, H: features of a token, D: features of a head.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.modules import module as torch_module
from transformers import DynamicCache

from secateur.kernels.backends import Prepared
from secateur.kernels.cpu.few_tokens import MOST_TOKENS, Weights, after_attention, attention_inputs
from secateur.kernels.module import PackedLinear

# Layers that do just that, by module and class.
_LAYERS = (("transformers.models.llama.modeling_llama", "LlamaDecoderLayer"),)
_INPUTS = (("self_attn", "q_proj"), ("self_attn", "k_proj"), ("self_attn", "v_proj"))
_REST = (("self_attn", "o_proj"), ("mlp", "gate_proj"), ("mlp", "up_proj"), ("mlp", "down_proj"))
_OTHERS = (("", "self_attn"), ("", "mlp"), ("", "input_layernorm"), ("", "post_attention_layernorm"), ("mlp", "act_fn"))

# In place of a step, where a layer has none.
_NONE = object()


@dataclass(frozen=True)
class _Step:
    """What a layer was when this was made of it.

    Attributes:
        parts: its modules, each with the modules that its parent has, and by what name.
        prepared: of its linears, in turn.
        inputs, rest: their weights.
    """

    parts: list[tuple[dict[str, Any], str, nn.Module]]
    prepared: list[tuple[PackedLinear, Prepared]]
    inputs: Weights
    rest: Weights

    @classmethod
    def of(cls, layer: nn.Module) -> _Step | None:
        """None where a layer has other parts."""
        parts = []
        for parent, name in (*_INPUTS, *_REST, *_OTHERS):
            modules: dict[str, Any] = (layer.get_submodule(parent) if parent else layer)._modules
            if modules.get(name) is None:
                return None
            parts.append((modules, name, modules[name]))
        linears = [module for _, _, module in parts[: len(_INPUTS) + len(_REST)]]
        if any(not isinstance(linear, PackedLinear) or linear.transposed or linear.away for linear in linears):
            return None
        if any(linear.bias is not None or linear._fetch or linear.prepared is None for linear in linears):
            return None
        inputs = Weights.of([linear.prepared for linear in linears[: len(_INPUTS)]])
        rest = Weights.of([linear.prepared for linear in linears[len(_INPUTS) :]])
        if inputs is None or rest is None:
            return None
        return cls(parts, [(linear, linear.prepared) for linear in linears], inputs, rest)

    @property
    def modules(self) -> list[nn.Module]:
        """The modules in turn, which are equal only where they are the same."""
        return [module for _, _, module in self.parts]

    def holds(self) -> bool:
        """Whether the layer is still the same, and nobody looks at what goes between its parts."""
        for modules, name, module in self.parts:
            if modules.get(name) is not module or module._forward_hooks or module._forward_pre_hooks:
                return False
            if "forward" in module.__dict__:
                return False
        return all(linear.prepared is prepared for linear, prepared in self.prepared)

    def __call__(
        self, layer: Any, x_B1H: Tensor, mask: Tensor | None, turn: tuple[Tensor, Tensor], cache: Any
    ) -> Tensor:
        attention, first, second = layer.self_attn, layer.input_layernorm, layer.post_attention_layernorm
        B, D = len(x_B1H), attention.head_dim
        y = attention_inputs(x_B1H, first.weight, first.variance_epsilon, turn, self.inputs)
        outputs = [linear.out_features // D for linear, _ in self.prepared[: len(_INPUTS)]]
        query, key, value = y.view(B, 1, -1, D).transpose(1, 2).split(outputs, 1)
        key, value = cache.update(key, value, attention.layer_idx)
        shared = outputs[0] != outputs[1]
        a = scaled_dot_product_attention(query, key, value, mask, scale=attention.scaling, enable_gqa=shared)
        z = after_attention(a.reshape(B, -1), x_B1H, second.weight, second.variance_epsilon, self.rest)
        return z.view_as(x_B1H)


class DecodingLayer(nn.Module):
    """What is mixed into the class of a decoder layer; everything but a step of decoding on a CPU goes the layer's own way."""

    #: The layer's own class.
    original: type[nn.Module]

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        turn: Any = kwargs.get("position_embeddings")
        cache = kwargs.get("past_key_values")
        possible = not args and turn is not None and type(cache) is DynamicCache
        step = self._step() if possible and self._may_step(hidden_states, kwargs) else None
        if step is None:
            return super().forward(hidden_states, *args, **kwargs)
        if len(turn[0]) != len(hidden_states):
            turn = tuple(each.expand(len(hidden_states), -1, -1) for each in turn)
        return step(self, hidden_states, kwargs.get("attention_mask"), turn, cache)

    def _may_step(self, x: Tensor, kwargs: dict[str, Any]) -> bool:
        """Whether this call is such a step, as far as inputs tell."""
        return (
            type(x) is Tensor
            and x.ndim == 3
            and x.shape[1] == 1
            and 1 <= len(x) <= MOST_TOKENS
            and x.device.type == "cpu"
            and not torch.is_grad_enabled()
            and not self.training
            and not torch.compiler.is_compiling()
            and not torch.is_autocast_enabled("cpu")
            and not kwargs.get("output_attentions")
            and (kwargs.get("attention_mask") is None or kwargs["attention_mask"].ndim == 4)
            and not torch_module._has_any_global_hook()
        )

    def _step(self) -> _Step | None:
        """The layer's step, made anew where the layer has changed; None where it has none."""
        old: Any = self.__dict__.get("_decoding")
        if old is _NONE:
            return None
        if old is not None and old.holds():
            return cast(_Step, old)
        step = _Step.of(self)
        if step is not None and not step.holds():
            return None  # for as long as somebody looks
        # Other weights in the same modules, as those that are read when they run, change nothing of what a layer does.
        tried = old is not None and step is not None and step.modules == old.modules
        if step is not None and not tried and not self._agrees(step):
            step = None
        self.__dict__["_decoding"] = _NONE if step is None else step
        return step

    def _agrees(self, step: _Step) -> bool:
        """Whether a step gives what the layer itself does, tried with random numbers, but for how that rounds."""
        me: Any = self
        attention, weight = me.self_attn, me.input_layernorm.weight
        activation, implementation = type(me.mlp.act_fn), getattr(attention.config, "_attn_implementation", None)
        if implementation != "sdpa" or weight.device.type != "cpu" or "SiLU" not in activation.__name__:
            return False
        draw = torch.Generator().manual_seed(0)
        x_11H = torch.randn(1, 1, len(weight), generator=draw).mul_(0.1).to(weight.dtype)
        angle = torch.rand(1, 1, attention.head_dim // 2, generator=draw).repeat(1, 1, 2) * 6
        turn = angle.cos().to(weight.dtype), angle.sin().to(weight.dtype)
        heads = me.self_attn.k_proj.out_features // attention.head_dim
        kept = torch.randn(2, 1, heads, 5, attention.head_dim, generator=draw).to(weight.dtype)
        caches = DynamicCache(), DynamicCache()
        for cache in caches:
            cache.update(kept[0], kept[1], attention.layer_idx)
        want = super().forward(
            x_11H, attention_mask=None, past_key_values=caches[0], use_cache=True, position_embeddings=turn
        )
        if not isinstance(want, Tensor):
            return False
        found = step(self, x_11H, None, turn, caches[1])
        of = max(8 * torch.finfo(want.dtype).eps, 1e-4)
        return float((found - want).float().norm()) <= of * float(want.float().norm() + x_11H.float().norm())

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Classes that are made here cannot be found by their names.
        state = {key: value for key, value in self.__dict__.items() if key != "_decoding"}
        return _restored, (self.original, state)


def decode_in_steps(model: nn.Module) -> None:
    """Let the layers of a model that has packed linears, where they are of a kind that is known, take steps of decoding so."""
    known = [getattr(sys.modules.get(module), name, None) for module, name in _LAYERS]
    for layer in list(model.modules()):
        if type(layer) in known and any(isinstance(part, PackedLinear) for part in layer.modules()):
            layer.__class__ = _class_of(type(layer))


_CLASSES: dict[type[nn.Module], type[DecodingLayer]] = {}


def _class_of(original: type[nn.Module]) -> type[DecodingLayer]:
    """Of the same name, by which transformers knows what is not to be split between devices."""
    if original not in _CLASSES:
        _CLASSES[original] = type(original.__name__, (DecodingLayer, original), {"original": original})
    return _CLASSES[original]


def _restored(original: type[nn.Module], state: dict[str, Any]) -> DecodingLayer:
    cls = _class_of(original)
    layer = cls.__new__(cls)
    layer.__setstate__(state)
    return layer
