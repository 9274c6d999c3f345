"""Models that take a step of decoding in one call of the compiled kernels: all layers, attention over the cache included.

A layer of a small model is some sixty operations on a token, and calling them takes longer than what they compute.

B: texts, H: features of a token, D: features of a head.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from itertools import repeat
from operator import contains, is_
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast

from secateur.kernels.cpu import cpu_backend
from secateur.kernels.cpu.decoder_stack import MOST_TOKENS, DecoderStack, UnknownWeightError
from secateur.kernels.module import PackedLinear
from secateur.kernels.packed import FLOAT_DTYPES
from secateur.plugin.room_in_cache import room_in

# Models that are such layers between a table of embeddings and a norm, by module and class.
_MODELS = (
    ("transformers.models.llama.modeling_llama", "LlamaModel"),
    ("transformers.models.mistral.modeling_mistral", "MistralModel"),
    ("transformers.models.qwen2.modeling_qwen2", "Qwen2Model"),
    ("transformers.models.qwen3.modeling_qwen3", "Qwen3Model"),
)
_LINEARS = (
    *(("self_attn", name) for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
    *(("mlp", name) for name in ("gate_proj", "up_proj", "down_proj")),
)
_NORMS = (("", "input_layernorm"), ("", "post_attention_layernorm"))
_NORMS_OF_HEADS = (("self_attn", "q_norm"), ("self_attn", "k_norm"))
_INPUTS = {"input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds", "use_cache"}

# In place of a step, where a model has none.
_NONE = object()


@dataclass(frozen=True)
class _Step:
    """What the layers of a model were when this was made of them.

    Attributes:
        stack: computes them.
        dicts, keys, things: where each of their parts and weights is found, and what was there.
        hooks: dictionaries of all hooks that parts may have.
        own: attributes of all parts, a `forward` in place of their class's not among them.
        modules: all parts in turn, which are equal only where they are the same.
    """

    stack: DecoderStack
    dicts: list[dict[str, Any]]
    keys: list[str]
    things: list[Any]
    hooks: list[dict[int, Any]]
    own: list[dict[str, Any]]
    modules: list[nn.Module]

    @classmethod
    def of(cls, model: Any) -> _Step | None:
        """None where layers have other parts, weights without kernels, or none that is packed."""
        if not any(isinstance(part, PackedLinear) for part in model.layers.modules()):
            return None
        try:
            return cls._of(model)
        except (UnknownWeightError, AttributeError, RuntimeError):
            return None

    @classmethod
    def _of(cls, model: Any) -> _Step | None:
        norms: list[Tensor] = []
        weights: list[tuple[Any, Tensor | None]] = []
        found: list[tuple[dict[str, Any], str, Any]] = []
        for layer in model.layers:
            heads = _NORMS_OF_HEADS if hasattr(layer.self_attn, "q_norm") else ()
            for parent, name in (*_NORMS, *heads):
                norm = getattr(layer.get_submodule(parent), name)
                norms.append(norm.weight)
                found.append((norm._parameters, "weight", norm.weight))
            for parent, name in _LINEARS:
                linear = getattr(layer.get_submodule(parent), name)
                if isinstance(linear, PackedLinear):
                    if linear.transposed or linear.away or linear._fetch or linear.prepared is None:
                        return None
                    found += ((vars(linear), "prepared", linear.prepared), (vars(linear), "_fetch", False))
                elif type(linear) is nn.Linear:
                    found.append((linear._parameters, "weight", linear.weight))
                else:
                    return None
                found.append((linear._parameters, "bias", linear.bias))
                weights.append((linear.prepared if isinstance(linear, PackedLinear) else linear.weight, linear.bias))
        attention, eps = model.layers[0].self_attn, model.norm.variance_epsilon
        stack = DecoderStack(weights, norms, eps, attention.head_dim, attention.scaling)
        within = [*model.layers.modules(), model.norm]
        found += ((model._modules, name, model._modules[name]) for name in ("layers", "norm"))
        for parent in within:
            found += ((parent._modules, name, module) for name, module in parent._modules.items())
        hooks = [hooks for module in within for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        dicts, keys, things = (list(each) for each in zip(*found, strict=True))
        return cls(stack, dicts, keys, things, hooks, [vars(module) for module in within], within)

    def holds(self) -> bool:
        """Whether the layers are still the same, and nobody looks at what goes between their parts."""
        return (
            all(map(is_, map(dict.get, self.dicts, self.keys), self.things))
            and not any(self.hooks)
            and not any(map(contains, self.own, repeat("forward")))
        )


class DecodingModel(nn.Module):
    """What is mixed into the class of a model; everything but a step of decoding on a CPU goes the model's own way."""

    #: The model's own class.
    original: type[nn.Module]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        step = self._step() if not args and self._may_step(kwargs) else None
        found = None if step is None else self._taken(step, kwargs)
        return super().forward(*args, **kwargs) if found is None else found

    def _may_step(self, kwargs: dict[str, Any]) -> bool:
        """Whether this call is such a step, as far as inputs tell."""
        ids, at, mask = kwargs.get("input_ids"), kwargs.get("position_ids"), kwargs.get("attention_mask")
        return (
            type(ids) is Tensor
            and ids.ndim == 2
            and ids.shape[1] == 1
            and 1 <= len(ids) <= MOST_TOKENS
            and ids.device.type == "cpu"
            and kwargs.get("past_key_values") is not None
            and kwargs.get("inputs_embeds") is None
            and (at is None or at.shape in ((1, 1), ids.shape))
            and (mask is None or (type(mask) is Tensor and mask.ndim == 2 and len(mask) == len(ids)))
            and not torch.is_grad_enabled()
            and not self.training
            and not torch.compiler.is_compiling()
            and not torch.is_autocast_enabled("cpu")
            and not torch_module._has_any_global_hook()
            and not any(value for key, value in kwargs.items() if key not in _INPUTS and key != "return_dict")
            and kwargs.get("return_dict", True)
            and self._is_usual()
        )

    def _is_usual(self) -> bool:
        """Whether all layers are gone through, by the usual attention, and nothing is asked of what is between them."""
        me: Any = self
        config = me.config
        return (
            getattr(config, "_attn_implementation", None) == "sdpa"
            and config.num_hidden_layers == len(me.layers)
            and not config.output_hidden_states
            and not config.output_attentions
        )

    def _taken(self, step: _Step, kwargs: dict[str, Any]) -> BaseModelOutputWithPast | None:
        """What a step gives; None where the cache or the mask are none for it."""
        me: Any = self
        ids_B1, cache = kwargs["input_ids"], kwargs["past_key_values"]
        mask, at = kwargs.get("attention_mask"), kwargs.get("position_ids")
        attention, B = me.layers[0].self_attn, len(ids_B1)
        D = attention.head_dim
        room = room_in(cache, (len(me.layers), B, attention.k_proj.out_features // D, D))
        if room is None or (mask is not None and mask.shape[1] != room.filled + 1):
            return None
        x_B1H = me.embed_tokens(ids_B1)
        if at is None:
            at = torch.full((1, 1), room.filled)
        turn = me.rotary_emb(x_B1H, position_ids=at)
        if len(turn[0]) != B:
            turn = tuple(each.expand(B, -1, -1) for each in turn)
        seen = None if mask is None else mask.bool()
        y = step.stack.step(x_B1H, turn, seen, me.norm.weight, room.slab, room.filled)
        room.grow(cache)
        return BaseModelOutputWithPast(last_hidden_state=y.view_as(x_B1H), past_key_values=cache)

    def _step(self) -> _Step | None:
        """The model's step, made anew where the model has changed; None where it has none."""
        old: Any = self.__dict__.get("_decoding")
        if old is _NONE:
            return None
        if old is not None and old.holds():
            return cast(_Step, old)
        step = _Step.of(self)
        if step is not None and not step.holds():
            return None  # for as long as somebody looks
        # Other weights in the same modules, as those that are read when they run, change nothing of what layers do.
        tried = old is not None and step is not None and step.modules == old.modules
        if step is not None and not tried and not self._agrees(step):
            step = None
        self.__dict__["_decoding"] = _NONE if step is None else step
        return step

    def _agrees(self, step: _Step) -> bool:
        """Whether a step gives what the model and its layers do, tried on random numbers, but for how that rounds."""
        me: Any = self
        attention, activation = me.layers[0].self_attn, type(me.layers[0].mlp.act_fn)
        if "SiLU" not in activation.__name__:
            return False
        draw, dtype = torch.Generator().manual_seed(0), me.norm.weight.dtype
        heads, D = attention.k_proj.out_features // attention.head_dim, attention.head_dim
        kept = torch.randn(len(me.layers), 2, 1, heads, 5, D, generator=draw).to(dtype)
        caches = DynamicCache(config=me.config), DynamicCache(config=me.config)
        for cache in caches:
            for i, (keys, values) in enumerate(kept):
                cache.update(keys, values, i)
        ids, at = torch.tensor([[min(7, me.embed_tokens.num_embeddings - 1)]]), torch.full((1, 1), 5)
        want = super().forward(input_ids=ids, position_ids=at, past_key_values=caches[0], use_cache=True)[0]
        taken = self._taken(step, {"input_ids": ids, "position_ids": at, "past_key_values": caches[1]})
        # What all layers make of random keys and values differs by far more than one layer's roundings.
        eps = torch.finfo(want.dtype).eps
        if taken is None or not _near(taken[0], want, max(64 * eps, 1e-3), want):
            return False
        x_11H = torch.randn(1, 1, want.shape[-1], generator=draw).mul_(0.1).to(dtype)
        turn = me.rotary_emb(x_11H, position_ids=at)
        for i, layer in enumerate(me.layers):
            cache, slab = DynamicCache(config=me.config), kept.new_empty(1, 2, 1, heads, 6, D)
            cache.update(kept[i, 0], kept[i, 1], i)
            slab[0, :, :, :, :5] = kept[i]
            want = cast(Any, layer)(
                x_11H, position_ids=at, past_key_values=cache, use_cache=True, position_embeddings=turn
            )
            found = step.stack.step(x_11H, turn, None, None, slab, 5, i)
            if not isinstance(want, Tensor) or not _near(found.view_as(want), want, max(8 * eps, 1e-4), want, x_11H):
                return False
        return True

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Classes that are made here cannot be found by their names.
        state = {key: value for key, value in self.__dict__.items() if key != "_decoding"}
        return _restored, (self.original, state)


def _near(found: Tensor, want: Tensor, of: float, *sizes: Tensor) -> bool:
    """Whether two tensors differ by less than that share of the sizes."""
    return float((found - want).float().norm()) <= of * sum(float(size.float().norm()) for size in sizes)


class DecodingHead(nn.Linear):
    """A dense head that multiplies a few tokens on a CPU by the compiled kernels; everything else goes its own way."""

    original: type[nn.Module] = nn.Linear

    def forward(self, x: Tensor) -> Tensor:
        I, weight = self.in_features, self.weight
        if (
            type(x) is Tensor
            and type(weight) is nn.Parameter
            and 1 <= x.numel() <= MOST_TOKENS * I
            and x.shape[-1] == I
            and x.dtype == weight.dtype
            and x.dtype in FLOAT_DTYPES
            and x.device.type == weight.device.type == "cpu"
            and weight.is_contiguous()
            and not torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
            and not torch.is_autocast_enabled("cpu")
        ):
            y: Tensor = torch.ops.secateur.dense_linear(x.reshape(-1, I), weight, self.bias)
            return y.view(*x.shape[:-1], self.out_features)
        return super().forward(x)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _restored, (self.original, self.__dict__)


def decode_in_steps(model: nn.Module) -> None:
    """Let a model that has packed linears, where it is of a kind that is known, take steps of decoding so."""
    known = [getattr(sys.modules.get(module), name, None) for module, name in _MODELS]
    for part in list(model.modules()):
        if type(part) in known and any(isinstance(linear, PackedLinear) for linear in part.modules()):
            part.__class__ = _class_of(type(part))
            head = cast(Any, model).get_output_embeddings()
            if type(head) is nn.Linear:
                cast(Any, head).__class__ = _class_of(nn.Linear)


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def _class_of(original: type[nn.Module]) -> type[nn.Module]:
    """Of the same name, by which transformers knows it; where there are no compiled kernels it stays as it is."""
    if cpu_backend.missing() is not None:  # which loads them, whatever backend the linears have
        return original
    if original not in _CLASSES:
        mixed = (DecodingHead,) if original is nn.Linear else (DecodingModel, original)
        names = {"original": original, "__module__": original.__module__}
        _CLASSES[original] = type(original.__name__, mixed, names)
    return _CLASSES[original]


def _restored(original: type[nn.Module], state: dict[str, Any]) -> nn.Module:
    cls = _class_of(original)
    module = cls.__new__(cls)
    module.__setstate__(state)
    return module
