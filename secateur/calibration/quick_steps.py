"""Steps of decoding for many texts at once, one token each: what torch and transformers do slowly on a CPU, done by products.

B: texts of a batch, O: output features, I: input features, K: heads of keys and values, G: heads of queries for each of
them, S: tokens so far, D: features of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


@contextmanager
def quick_attention() -> Iterator[None]:
    """Within it, models that use torch's attention take the products of one token of each text with its keys by `attend`.

    torch's own on a CPU makes blocks of queries, of which there is one here: at 128 texts it takes ten times as long.
    """
    usual = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def quick(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **kwargs: Any) -> tuple[Tensor, None]:
        special = any(kwargs.get(key) is not None for key in ("position_bias", "softcap", "cache"))
        if special or kwargs.get("dropout") or mask is not None or q.shape[2] != 1 or q.device.type != "cpu":
            found: tuple[Tensor, None] = usual(module, q, k, v, mask, **kwargs)
            return found
        return attend(q, k, v, kwargs.get("scaling")), None

    ALL_ATTENTION_FUNCTIONS["sdpa"] = quick
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = usual


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """Attention of the last token of each text to all of it, softmax(q kᵀ · scale) v, as transformers wants it.

    Args:
        q: `[B, K·G, 1, D]`.
        k, v: `[B, K, S, D]`; the features of v may be others.
        scale: None for 1/√D.

    Returns:
        `[B, 1, K·G, D]`, in the dtype of v. The softmax is taken in float32.
    """
    B, heads, _, D = q.shape
    q_BKGD = q.reshape(B, k.shape[1], -1, D)
    scores_BKGS = (q_BKGD @ k.transpose(2, 3)).float().mul_(D**-0.5 if scale is None else scale)
    return (scores_BKGS.softmax(-1).to(v.dtype) @ v).view(B, 1, heads, v.shape[-1])


class _LayerWithRoom(DynamicLayer):
    """Keys and values of a layer with room for those to come, so that a step does not copy all that there are."""

    def __init__(self, layer: DynamicLayer, tokens: int) -> None:
        super().__init__()
        self.lazy_initialization(layer.keys, layer.values)
        self._all = [t.new_empty((*t.shape[:2], tokens, t.shape[3])) for t in (layer.keys, layer.values)]
        self._keep(layer.keys, layer.values, 0)

    def _keep(self, keys: Tensor, values: Tensor, at: int) -> None:
        end = at + keys.shape[2]
        for room, new in zip(self._all, (keys, values), strict=True):
            room[:, :, at:end] = new
        self.keys, self.values = (room[:, :, :end] for room in self._all)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self._keep(key_states, value_states, self.keys.shape[2])
        return self.keys, self.values


def make_room(cache: Any, tokens: int) -> None:
    """Give layers of a cache room for so many tokens in all, where they are of the usual kind; others stay as they are."""
    if type(cache) is DynamicCache and not cache.offloading:
        for i, layer in enumerate(cache.layers):
            if type(layer) is DynamicLayer and layer.is_initialized:
                cache.layers[i] = _LayerWithRoom(layer, tokens)


@contextmanager
def packed_linears(model: nn.Module, texts: int) -> Iterator[None]:
    """Within it, linears in bfloat16 on a CPU multiply by copies of their weights in blocks, which oneDNN reads faster.

    It makes such a copy by every product otherwise; of 16 texts that takes as long as the product. All copies together are as
    large as the weights.

    Args:
        texts: of a batch: what the blocks are for. Others are multiplied as well.
    """
    known = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    with ExitStack() as left:
        for linear in model.modules() if known else ():
            if (
                type(linear) is nn.Linear
                and "forward" not in vars(linear)
                and linear.weight.dtype == torch.bfloat16
                and linear.weight.device.type == "cpu"
            ):
                blocks: Tensor = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), texts)
                vars(linear)["forward"] = partial(_times_blocks, blocks, linear.bias)
                left.callback(delattr, linear, "forward")
        yield


def _times_blocks(blocks: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """x Wᵀ + bias."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, blocks, bias, "none", [], "")
    return y
