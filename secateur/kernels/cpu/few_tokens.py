"""A decoder layer's work on a few tokens, before its attention and after it, in one call of the compiled kernels each.

H: features of a token, T: tokens, D: features of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from secateur.kernels.backends import Prepared

#: Tokens of a call, at most: more are multiplied by rows that are unpacked.
MOST_TOKENS = 8


@dataclass(frozen=True)
class Weights:
    """Some weights as one list of tensors, and five numbers of each that tell which they are; see `step.inl`."""

    parts: list[Tensor]
    forms: list[int]

    @classmethod
    def of(cls, prepared: Sequence[Prepared]) -> Weights | None:
        """None where the operators do not take one of them."""
        parts: list[Tensor] = []
        forms: list[int] = []
        for each in prepared:
            weight: Any = each.weight
            kernels = getattr(weight, "kernels", "")
            if each.backend.name != "cpu" or kernels not in ("sparse", "coded"):
                return None
            bits = group_size = tile_rows = 0
            tensors = weight.operands()
            if kernels == "coded":
                bits, codes, start, count, group_start, group_size, scale, zero, pair, second, tile_rows, *rest = (
                    tensors
                )
                tensors = (codes, start, count, group_start, scale, zero, pair, second, *rest)
            present = sum(1 << i for i, tensor in enumerate(tensors) if tensor is not None)
            forms += (bits, group_size, tile_rows, present, each.shape[1])
            parts += (tensor for tensor in tensors if tensor is not None)
        return cls(parts, forms)


def attention_inputs(x: Tensor, norm_H: Tensor, eps: float, turn: tuple[Tensor, Tensor], weights: Weights) -> Tensor:
    """Queries, keys and values, one after the other, of tokens: `[T, …]` in the dtype of x.

    Args:
        x: `[…, H]`, T tokens, at most `MOST_TOKENS`.
        norm_H: the weight of the root-mean-square norm that comes first, whose epsilon is `eps`.
        turn: cosines and sines `[…, D]` that heads of queries and keys are turned by.
        weights: of queries, keys and values.
    """
    found: Tensor = torch.ops.secateur.attention_inputs(x, norm_H, eps, *turn, weights.parts, weights.forms)
    return found


def after_attention(a: Tensor, x: Tensor, norm_H: Tensor, eps: float, weights: Weights) -> Tensor:
    """What a layer gives for tokens x, `[T, H]`: y = x + o(a) and then y + down(silu(gate(n)) · up(n)), n being y normed.

    Args:
        a: what attention gave, T tokens.
        x: as `attention_inputs` had it.
        norm_H: see there.
        weights: o, gate, up and down.
    """
    found: Tensor = torch.ops.secateur.after_attention(a, x, norm_H, eps, weights.parts, weights.forms)
    return found
