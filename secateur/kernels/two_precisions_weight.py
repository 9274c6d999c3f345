"""A weight in codes of two precisions, as the kernels compute on it: one in low bits plus one in high bits under a mask.

O: output features, I: input features, T: tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from secateur.kernels.packed import CodedWeight, Packed


@dataclass(frozen=True)
class TwoPrecisionsWeight(Packed):
    """A weight in layout `sq`.

    Attributes:
        low: codes of all weights; of those in high bits the one that stands for zero.
        high: the others, under a mask.
    """

    shape: tuple[int, int]
    low: CodedWeight
    high: CodedWeight

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.low.dtype

    @property
    def kernels(self) -> str:
        return "two_precisions"

    def compiled(self, x_TI: Tensor, bias_O: Tensor | None) -> Tensor:
        return self.low.compiled(x_TI, bias_O).add_(self.high.compiled(x_TI, None))

    def dense(self) -> Tensor:
        return self.low.dense() + self.high.dense()  # of each weight one is zero

    def rows(self, start: int, end: int) -> TwoPrecisionsWeight:
        low, high = self.low.rows(start, end), self.high.rows(start, end)
        return replace(self, shape=(end - start, self.shape[1]), low=low, high=high)

    def count(self) -> int:
        return self.shape[0] * self.shape[1]
