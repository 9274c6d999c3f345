"""Rounding each weight to the nearest level of its group's grid, without data.

O: output features, I: input features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from secateur.calibration.stats import InputStats, Level
from secateur.codes import BITS, Quantized
from secateur.prune.registry import Pruned
from secateur.quant.grid import ROW, Grid, check_bits, check_group_size
from secateur.quant.groups import fit_groups, stored_rows
from secateur.quant.registry import quantizer, storage_dtype


@quantizer
@dataclass(frozen=True)
class RTN:
    """Round to nearest. Attributes: see `Grid`; a `group_size` of `row` is a whole row."""

    bits: int = 4
    group_size: int | str = 64
    symmetric: bool = False
    search_range: bool = True

    name: ClassVar[str] = "rtn"
    all_bits: ClassVar[tuple[int, ...]] = BITS
    level: ClassVar[Level] = Level.NONE
    needs_fisher: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_bits(self.bits)
        check_group_size(self.group_size)

    def solve(
        self,
        W_OI: Tensor,
        stats: InputStats,
        sizes: Sequence[int],
        dtype: torch.dtype,
        pruned: Pruned | None = None,
        fisher_OI: Tensor | None = None,
    ) -> list[Quantized]:
        """The nearest levels of the weights (of the kept ones, as the pruner left them)."""
        grid = Grid(
            self.bits,
            W_OI.shape[1] if self.group_size == ROW else int(self.group_size),
            self.symmetric,
            self.search_range,
            storage_dtype(W_OI, dtype),
        )
        W_OI, keep_OI = (W_OI, None) if pruned is None else (pruned.W_OI, pruned.keep_OI)
        fitted = fit_groups(grid.fit, grid.group_size, W_OI, keep_OI)
        return [
            Quantized(grid.assemble(fitted, W, first, last), (last - first, W_OI.shape[1]), dtype, keep)
            for first, last, W, keep in stored_rows(W_OI, keep_OI, sizes)
        ]
