"""The backend `dense`: weights are unpacked once, when they are loaded, for those who want speed of prefill over memory."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from secateur.kernels.backends import backend
from secateur.kernels.packed import Packed


@backend
class Dense:
    """Dense weights in the dtype of the inputs."""

    name: ClassVar[str] = "dense"
    first_on: ClassVar[dict[str, int]] = {}

    def why_not(self, weight: Packed, device: torch.device, dtype: torch.dtype) -> str | None:
        return None

    def prepare(self, weight: Packed, device: torch.device, dtype: torch.dtype) -> Tensor:
        return weight.dense().to(device, dtype)

    def linear(self, weight: Any, x_TI: Tensor, bias_O: Tensor | None) -> Tensor:
        return linear(x_TI, weight.to(x_TI.dtype), bias_O)

    def gradient(self, weight: Any, grad_TO: Tensor) -> Tensor:
        return grad_TO @ weight.to(grad_TO.dtype)

    def packed(self, weight: Any) -> None:
        return None
