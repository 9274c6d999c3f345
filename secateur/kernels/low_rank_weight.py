"""A packed weight with a part of low rank beside it, and what computes on both: y = inner(x) + (x·Inᵀ)·Outᵀ.

O: output features, I: input features, R: rank, T: tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from secateur.kernels.packed import Packed

# Backends that ask a weight itself for what it is or does.
_OF_ANY = ("dense", "torch")


@dataclass(frozen=True)
class LowRankWeight(Packed):
    """A weight in layout `low-rank`.

    Attributes:
        main: the weight that the other part is added to.
        out_OR, in_RI: the factors of that part, float16 or bfloat16.
    """

    main: Packed
    out_OR: Tensor
    in_RI: Tensor

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]
        return self.main.shape

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.main.dtype

    @property
    def bare(self) -> Packed:
        return self.main

    def beside(self, backend: Any) -> Any:
        return backend if backend.name in _OF_ANY else Beside(backend)

    def dense(self) -> Tensor:
        return self._with(self.main.dense())

    def expanded(self) -> Tensor:
        return self._with(self.main.expanded())

    def _with(self, W_OI: Tensor) -> Tensor:
        return torch.addmm(W_OI.float(), self.out_OR.float(), self.in_RI.float()).to(self.dtype)

    def dense_rows(self) -> Iterator[tuple[int, Tensor]]:
        for start, W_RI in self.main.dense_rows():
            some = replace(self, out_OR=self.out_OR[start : start + len(W_RI)])
            yield start, some._with(W_RI)

    def rows(self, start: int, end: int) -> LowRankWeight:
        return replace(self, main=self.main.rows(start, end), out_OR=self.out_OR[start:end])

    def count(self) -> int:
        return self.main.count()

    def linear(self, x_TI: Tensor, bias_O: Tensor | None) -> Tensor:
        return _plus(self.main.linear(x_TI, bias_O), x_TI, self.out_OR, self.in_RI)


@dataclass(frozen=True)
class _Ready:
    """A weight as `Beside` computes on it, with factors in the dtype of the inputs."""

    main: Any
    out_OR: Tensor
    in_RI: Tensor


@dataclass(frozen=True)
class Beside:
    """The backend of the weight that a part of low rank is added to, with two thin products besides: see `Backend`."""

    main: Any
    first_on: ClassVar[dict[str, int]] = {}

    @property
    def name(self) -> str:
        found: str = self.main.name
        return found

    def why_not(self, weight: Any, device: torch.device, dtype: torch.dtype) -> str | None:
        found: str | None = self.main.why_not(weight.main, device, dtype)
        return found

    def prepare(self, weight: Any, device: torch.device, dtype: torch.dtype) -> _Ready:
        factors = (factor.to(device, dtype).contiguous() for factor in (weight.out_OR, weight.in_RI))
        return _Ready(self.main.prepare(weight.main, device, dtype), *factors)

    def linear(self, weight: Any, x_TI: Tensor, bias_O: Tensor | None) -> Tensor:
        return _plus(self.main.linear(weight.main, x_TI, bias_O), x_TI, weight.out_OR, weight.in_RI)

    def gradient(self, weight: Any, grad_TO: Tensor) -> Tensor:
        return _plus(self.main.gradient(weight.main, grad_TO), grad_TO, weight.in_RI.T, weight.out_OR.T)

    def packed(self, weight: Any) -> LowRankWeight | None:
        main = self.main.packed(weight.main)
        return None if main is None else LowRankWeight(main, weight.out_OR, weight.in_RI)


def _plus(y_TO: Tensor, x_TI: Tensor, out_OR: Tensor, in_RI: Tensor) -> Tensor:
    """y + (x·Inᵀ)·Outᵀ in the dtype of x."""
    return torch.addmm(y_TO, linear(x_TI, in_RI.to(x_TI.dtype)), out_OR.to(x_TI.dtype).T)
