"""SpQR: "A Sparse-Quantized Representation for Near-Lossless LLM Weight Compression", Dettmers et al. 2023, arXiv:2306.03078.

O: output features, I: input features.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from secateur.core.damping import damping_option, number
from secateur.core.options import check_options, option
from secateur.core.pruned import Pruned
from secateur.core.quantized import BITS, Quantized
from secateur.core.registry import quantizer
from secateur.core.stack import Stack
from secateur.core.stats import Level
from secateur.errors import UsageError
from secateur.quant.error_feedback import carry_error
from secateur.quant.grid_options import (
    bits_option,
    group_size_option,
    order_option,
    outlier_share_option,
    search_range_option,
)
from secateur.quant.storage import storage_dtype
from secateur.quant.two_level import TwoLevelGrid

DEFAULT_THRESHOLD = 0.2
# How near the share of outliers must come to the one asked for, and after how many sweeps it is taken as it is.
_SHARE_TOLERANCE = 0.03
_MOST_SWEEPS = 10


@quantizer
@dataclass(frozen=True)
class SpQR:
    """GPTQ in small groups whose scales are quantized too, with the few weights that hurt most kept in 16 bits (algorithm 1).

    A weight is an outlier when rounding it costs (w − ŵ)² / U[i, i]² more than a threshold; those whose absence would save so
    much in their group are left out when the group's grid is fitted.
    """

    bits: int = bits_option(3)
    group_size: int = group_size_option(16, words=())
    scale_bits: int = option(3, "Bits of quantized scales and zero points.", low=1, high=8)
    tile_rows: int = option(16, "Rows that share the grid of their scales.", low=2)
    outlier_threshold: float | None = option(
        None, "Error from which a weight is kept in 16 bits, relative to the mean of the linear.", above=0
    )
    outlier_share: float | None = outlier_share_option(None)
    search_range: bool = search_range_option()
    order: str = order_option("permuted")
    damping: float | str = damping_option()

    name: ClassVar[str] = "spqr"
    paper: ClassVar[str] = "Dettmers et al. 2023, arXiv:2306.03078"
    all_bits: ClassVar[tuple[int, ...]] = BITS
    level: ClassVar[Level] = Level.GRAM
    needs_fisher: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_options(self)
        if self.outlier_threshold is not None and self.outlier_share is not None:
            raise UsageError("`outlier_threshold` and `outlier_share` say the same in two ways: drop one")
        if self.outlier_threshold is None and self.outlier_share is None:
            object.__setattr__(self, "outlier_threshold", DEFAULT_THRESHOLD)

    def quantize(self, stack: Stack, pruned: Pruned | None = None) -> list[Quantized]:
        """Round the weights, carrying on the error: see `GPTQ.quantize`."""
        grid = TwoLevelGrid(
            self.bits,
            self.group_size,
            self.scale_bits,
            self.tile_rows,
            self.search_range,
            storage_dtype(stack.W_OI, stack.dtype),
            stack.rows,
        )

        def with_threshold(threshold: float | None) -> list[Quantized]:
            return carry_error(stack, grid, self.order, number(self.damping), pruned, threshold)

        if self.outlier_share == 0:
            return with_threshold(None)
        if self.outlier_share is None:
            return with_threshold(self.outlier_threshold)
        return self._with_share(with_threshold, self.outlier_share)

    @staticmethod
    def _with_share(with_threshold: Callable[[float], list[Quantized]], wanted: float) -> list[Quantized]:
        """Bisect the logarithm of the threshold until the share of outliers is nearly the one wanted."""
        middle = math.log(DEFAULT_THRESHOLD)
        # The nearest tried on either side, with the logarithm of how many times too many outliers there were.
        low: tuple[float, float] | None = None
        high: tuple[float, float] | None = None
        best: list[Quantized] = []
        least = math.inf
        for _ in range(_MOST_SWEEPS):
            found = with_threshold(math.exp(middle))
            share = outlier_share(found)
            if abs(share - wanted) < least:
                best, least = found, abs(share - wanted)
            if least <= _SHARE_TOLERANCE * wanted:
                break
            excess = math.log(max(share, wanted / 100) / wanted)
            low, high = ((middle, excess), high) if excess > 0 else (low, (middle, excess))
            if low is None or high is None:
                middle += excess  # as if the share fell as fast as the threshold rises
            else:
                # Where a straight line between the two crosses zero, but well inside.
                crossing = low[1] / (low[1] - high[1])
                middle = low[0] + min(max(crossing, 0.1), 0.9) * (high[0] - low[0])
        return best


def outlier_share(weights: list[Quantized]) -> float:
    """The share of the stored weights that are outliers."""
    return sum(weight.outlier_count for weight in weights) / sum(weight.stored for weight in weights)
