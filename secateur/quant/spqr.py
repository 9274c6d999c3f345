"""SpQR: "A Sparse-Quantized Representation for Near-Lossless LLM Weight Compression", Dettmers et al. 2023, arXiv:2306.03078.

O: output features, I: input features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from secateur.calibration.stats import InputStats, Level
from secateur.codes import Quantized
from secateur.errors import UsageError
from secateur.prune.registry import Pruned
from secateur.quant.gptq import carry_error, check_damping, check_order
from secateur.quant.grid import check_group_size
from secateur.quant.registry import quantizer, storage_dtype
from secateur.quant.two_level import TwoLevelGrid
from secateur.sweep import DAMPING

DEFAULT_THRESHOLD = 0.2
MOST_OUTLIERS = 0.2
# How near the share of outliers must come to the one asked for, and after how many sweeps it is taken as it is.
_SHARE_TOLERANCE = 0.03
_MOST_SWEEPS = 10


@quantizer
@dataclass(frozen=True)
class SpQR:
    """GPTQ in small groups whose scales are quantized too, with the few weights that hurt most kept in 16 bits (algorithm 1).

    A weight is an outlier when rounding it costs (w − ŵ)² / U[i, i]² more than a threshold; those whose absence would save so
    much in their group are left out when the group's grid is fitted.

    Attributes:
        bits: 2, 3 or 4.
        group_size: weights that share a scale and a zero point.
        scale_bits: of scales and zero points.
        tile_rows: rows that share the grid of their scales.
        outlier_threshold: relative to the mean of w² / U[i, i]² over the linear; 0.2 where no share is given.
        outlier_share: of the weights, 0.2 at most: the threshold is found by bisection. 0: none.
        search_range, order, damping: see `GPTQ`.
    """

    bits: int = 3
    group_size: int = 16
    scale_bits: int = 3
    tile_rows: int = 16
    outlier_threshold: float | None = None
    outlier_share: float | None = None
    search_range: bool = True
    order: str = "permuted"
    damping: float = DAMPING

    name: ClassVar[str] = "spqr"
    all_bits: ClassVar[tuple[int, ...]] = (2, 3, 4)
    level: ClassVar[Level] = Level.GRAM
    needs_fisher: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.bits not in self.all_bits:
            raise UsageError(
                f"--bits {self.bits} is not possible with spqr, which is for {', '.join(map(str, self.all_bits))}: "
                "use --quantize gptq or rtn for 8"
            )
        check_group_size(self.group_size)
        if isinstance(self.group_size, str):
            raise UsageError("--group-size row is not possible with spqr: its groups are small, like 16")
        if not 1 <= self.scale_bits <= 8:
            raise UsageError(f"--scale-bits {self.scale_bits} is not possible: give 1 to 8")
        if self.tile_rows < 2:
            raise UsageError(f"--tile-rows {self.tile_rows} is not possible: give 2 at least")
        check_share("outlier-share", self.outlier_share)
        if self.outlier_threshold is not None and not 0 < self.outlier_threshold < math.inf:
            raise UsageError(f"--outlier-threshold {self.outlier_threshold:g} is not possible: give a positive number")
        if self.outlier_threshold is not None and self.outlier_share is not None:
            raise UsageError("--outlier-threshold and --outlier-share say the same in two ways: drop one")
        if self.outlier_threshold is None and self.outlier_share is None:
            object.__setattr__(self, "outlier_threshold", DEFAULT_THRESHOLD)
        check_order(self.order)
        check_damping(self.damping)

    def solve(
        self,
        W_OI: Tensor,
        stats: InputStats,
        sizes: Sequence[int],
        dtype: torch.dtype,
        pruned: Pruned | None = None,
        fisher_OI: Tensor | None = None,
    ) -> list[Quantized]:
        """Round the weights, carrying on the error: see `GPTQ.solve`."""
        grid = TwoLevelGrid(
            self.bits,
            self.group_size,
            self.scale_bits,
            self.tile_rows,
            self.search_range,
            storage_dtype(W_OI, dtype),
            tuple(sizes),
        )

        def with_threshold(threshold: float | None) -> list[Quantized]:
            return carry_error(W_OI, stats, sizes, dtype, grid, self.order, self.damping, pruned, threshold)

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


def check_share(option: str, share: float | None) -> None:
    """Raise UsageError unless so many of the weights can be outliers."""
    if share is not None and not 0 <= share <= MOST_OUTLIERS:
        raise UsageError(
            f"--{option} {share:g} is not possible: give a share of the weights from 0 to {MOST_OUTLIERS}, like 0.01 or 1%"
        )
