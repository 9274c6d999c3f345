"""How large the inputs of a linear are: counts over sizes, from which any share of them has its threshold afterwards.

T: tokens, I: input features, B: bins.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

#: Positions of a window that are left out: the first tokens of a text have inputs of their own kind, and run dense.
FIRST = 8
# Bins of equal width in the logarithm: 16 to a doubling, from 2⁻²⁰ to 2¹²; what is beyond is in the first and the last.
_BINS, _TO_A_DOUBLING, _LEAST = 512, 16, -20


@dataclass
class Histogram:
    """Counts of |x_j|·s_j over tokens and features, s being a factor of each feature.

    Additive: those of two halves of the data, of the same factors, merge by `+`.

    Attributes:
        count_B: int64, of what is not zero.
        zeros: how many are zero.
        scale_I: the factors; None: all are 1.
    """

    count_B: Tensor = field(default_factory=lambda: torch.zeros(_BINS, dtype=torch.int64))
    zeros: int = 0
    scale_I: Tensor | None = None

    def add(self, x_TI: Tensor) -> None:
        """Count tokens in."""
        size_TI = scores(x_TI, self.scale_I)
        some = size_TI[size_TI > 0]
        self.zeros += size_TI.numel() - some.numel()
        bins = ((some.log2() - _LEAST) * _TO_A_DOUBLING).floor_().clamp_(0, _BINS - 1)
        self.count_B += torch.bincount(bins.long(), minlength=_BINS).to(self.count_B.device)

    def __add__(self, other: Histogram) -> Histogram:
        return replace(self, count_B=self.count_B + other.count_B, zeros=self.zeros + other.zeros)

    @property
    def total(self) -> int:
        """How many have been counted."""
        return self.zeros + int(self.count_B.sum())

    @property
    def zero_share(self) -> float:
        """The share of zeros: they need not be read whatever the threshold is."""
        return self.zeros / max(self.total, 1)

    def threshold(self, share: float) -> float:
        """What a share of all does not exceed, to a part of a bin's width of 4 %; 0 where zeros alone are as many."""
        beyond = share * self.total - self.zeros
        if beyond <= 0:
            return 0.0
        upto_B = self.count_B.cumsum(0).double()
        place = int(torch.searchsorted(upto_B, beyond).clamp_(max=_BINS - 1))
        before = float(upto_B[place]) - float(self.count_B[place])
        within = min((beyond - before) / max(float(self.count_B[place]), 1.0), 1.0)
        return float(2.0 ** (_LEAST + (place + within) / _TO_A_DOUBLING))


def scores(x: Tensor, scale_I: Tensor | None) -> Tensor:
    """|x_j|·s_j in float32, by which inputs are compared."""
    size = x.detach().float().abs()
    return size if scale_I is None else size * scale_I.to(size.device, torch.float32)
