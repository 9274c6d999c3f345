"""A backend of somebody else's, in one file: in float64, and the one that `auto` takes on the CPU."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from secateur.kernels.backends import backend
from secateur.kernels.packed import Packed, map_tensors


@backend
class Slow:
    """Makes the weight dense for every call."""

    name: ClassVar[str] = "slow"
    first_on: ClassVar[dict[str, int]] = {"cpu": 10}

    def why_not(self, weight: Packed, device: torch.device, dtype: torch.dtype) -> str | None:
        return None

    def prepare(self, weight: Packed, device: torch.device, dtype: torch.dtype) -> Packed:
        return map_tensors(weight, lambda tensor: tensor.to(device))

    def linear(self, weight: Any, x_TI: Tensor, bias_O: Tensor | None) -> Tensor:
        y_TO = x_TI.double() @ weight.dense().double().T
        return (y_TO if bias_O is None else y_TO + bias_O).to(x_TI.dtype)

    def gradient(self, weight: Any, grad_TO: Tensor) -> Tensor:
        return (grad_TO.double() @ weight.dense().double()).to(grad_TO.dtype)

    def packed(self, weight: Any) -> Packed:
        found: Packed = weight
        return found
