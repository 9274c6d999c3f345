"""A stack of decoder layers that the compiled kernels take a token of each of a few texts through in one call.

L: layers, H: features of a token, B: texts, D: features of a head, K: heads of keys and values, S: tokens in the cache.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from secateur.kernels.backends import Prepared

#: Tokens of a call, at most: more are multiplied by rows that are unpacked.
MOST_TOKENS = 8
_DENSE = -1
_BIAS = 14  # the number of the bias among the tensors of a weight


class DecoderStack:
    """Decoder layers as a Llama's, looked at once: see `stack.inl`. Norms, biases and dense weights are read anew by each call.

    Args:
        weights: of every layer q, k, v, o, gate, up and down, each packed or dense, with its bias.
        norms: of every layer the weights before attention and before the MLP, and for heads of queries and of keys where these
            have any.
        eps: of the norms.
        head: D.
        scale: of the products of queries and keys.

    Raises:
        UnknownWeightError: the kernels do not take one of the weights.
        RuntimeError: they do not fit together.
    """

    def __init__(
        self,
        weights: Sequence[tuple[Prepared | Tensor, Tensor | None]],
        norms: Sequence[Tensor],
        eps: float,
        head: int,
        scale: float,
    ) -> None:
        parts: list[Tensor] = []
        forms: list[int] = []
        for weight, bias_O in weights:
            tensors, numbers, features = _described(weight)
            present = sum(1 << i for i, tensor in enumerate(tensors) if tensor is not None)
            parts += (tensor for tensor in tensors if tensor is not None)
            if bias_O is not None:
                present |= 1 << _BIAS
                parts.append(bias_O)
            forms += (*numbers, present, features)
        self._number: int = torch.ops.secateur.make_stack(parts, forms, list(norms), eps, head, scale)
        weakref.finalize(self, torch.ops.secateur.free_stack, self._number)

    def step(
        self,
        x: Tensor,
        turn: tuple[Tensor, Tensor],
        seen: Tensor | None,
        norm_H: Tensor | None,
        cache: Tensor,
        filled: int,
        first: int = 0,
    ) -> Tensor:
        """What the layers give, `[B, H]` in the dtype of x, for one more token of each text.

        Args:
            x: `[B, …, H]`, at most `MOST_TOKENS` texts.
            turn: cosines and sines `[B, …, D]` that heads of queries and keys are turned by.
            seen: bool `[B, S + 1]`, which tokens are looked at; None where all are.
            norm_H: the weight of a norm that comes last, or None.
            cache: keys and values `[L, 2, B, K, room, D]`. Those of the token are written to place S, and no others.
            filled: S.
            first: of the layers that the cache is of.

        Raises:
            RuntimeError: a shape does not fit.
        """
        args = (first, first + cache.shape[0], x, *turn, seen, norm_H, cache, filled)
        found: Tensor = torch.ops.secateur.stack_step(self._number, *args)
        return found


class UnknownWeightError(Exception):
    """A weight that the stack's kernels do not take."""


def _described(weight: Prepared | Tensor) -> tuple[list[Tensor | None], tuple[int, int, int], int]:
    """Tensors of a weight; bits, size of groups and rows of a tile; input features."""
    if isinstance(weight, Tensor):
        return [weight], (_DENSE, 0, 0), weight.shape[1]
    packed: Any = weight.weight
    kernels = getattr(packed, "kernels", "")
    if weight.backend.name != "cpu" or kernels not in ("sparse", "coded"):
        raise UnknownWeightError(f"kernels: {kernels or weight.backend.name}")
    tensors = list(packed.operands())
    if kernels == "sparse":
        return tensors, (0, 0, 0), weight.shape[1]
    bits, codes, start, count, group_start, group_size, scale, zero, pair, second, tile_rows, *rest = tensors
    return (
        [codes, start, count, group_start, scale, zero, pair, second, *rest],
        (bits, group_size, tile_rows),
        weight.shape[1],
    )
