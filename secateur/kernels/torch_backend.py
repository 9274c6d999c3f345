"""The backend `torch`: every packed weight in plain torch, on any device. It is what the others are tested against.

O: output features, I: input features, R: some rows, T: tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from secateur.kernels.backends import backend
from secateur.kernels.packed import Packed, map_tensors


def times_rows(y_TO: Tensor, I: int, rows: Iterable[tuple[int, Tensor]]) -> Tensor:
    """y W `[T, I]` in the dtype of y, for a W that comes some rows at a time: products are rounded to that dtype, sums not."""
    total_TI = y_TO.new_zeros(len(y_TO), I, dtype=torch.float32)
    for start, W_RI in rows:
        total_TI += y_TO[:, start : start + len(W_RI)] @ W_RI.to(y_TO.dtype)
    return total_TI.to(y_TO.dtype)


@backend
class Torch:
    """Makes the weight dense for every call, and forgets it again."""

    name: ClassVar[str] = "torch"
    first_on: ClassVar[dict[str, int]] = {}

    def why_not(self, weight: Packed, device: torch.device, dtype: torch.dtype) -> str | None:
        return None

    def prepare(self, weight: Packed, device: torch.device, dtype: torch.dtype) -> Packed:
        return map_tensors(weight, lambda tensor: tensor.to(device))

    def linear(self, weight: Any, x_TI: Tensor, bias_O: Tensor | None) -> Tensor:
        found: Tensor = weight.linear(x_TI, bias_O)
        return found

    def gradient(self, weight: Any, grad_TO: Tensor) -> Tensor:
        return times_rows(grad_TO, weight.shape[1], weight.dense_rows())

    def packed(self, weight: Any) -> Packed:
        found: Packed = weight
        return found
