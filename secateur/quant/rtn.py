"""Rounding each weight to the nearest level of its group's grid, without data.

O: output features, I: input features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from secateur.core.options import check_options
from secateur.core.pruned import Pruned
from secateur.core.quantized import BITS, Quantized
from secateur.core.registry import quantizer
from secateur.core.stack import Stack
from secateur.core.stats import Level
from secateur.quant.block_grid import block_grid, check_grid, grid_option, unpruned
from secateur.quant.grid import Grid
from secateur.quant.grid_options import bits_option, group_size_option, search_range_option, symmetric_option
from secateur.quant.groups import fit_groups, stored_rows


@quantizer
@dataclass(frozen=True)
class RTN:
    """Round to nearest."""

    bits: int = bits_option(4)
    group_size: int | str = group_size_option(64)
    symmetric: bool = symmetric_option()
    search_range: bool = search_range_option()
    grid: str = grid_option()

    name: ClassVar[str] = "rtn"
    paper: ClassVar[str] = ""
    all_bits: ClassVar[tuple[int, ...]] = BITS
    level: ClassVar[Level] = Level.NONE
    needs_fisher: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_options(self)
        check_grid(self, (("bits", 4), ("group_size", 64), ("symmetric", False), ("search_range", True)))

    @property
    def unpruned(self) -> str | None:
        """See `Quantizer`."""
        return unpruned(self.grid)

    def quantize(self, stack: Stack, pruned: Pruned | None = None) -> list[Quantized]:
        """The nearest levels of the weights (of the kept ones, as the pruner left them)."""
        grid: Any = block_grid(self, stack, pruned) or Grid.of(self, stack)
        W_OI, keep_OI = (stack.W_OI, None) if pruned is None else (pruned.W_OI, pruned.keep_OI)
        fitted = fit_groups(grid.fit, grid.group_size, W_OI, keep_OI)
        return [
            Quantized(grid.assemble(fitted, W, first, last), (last - first, W_OI.shape[1]), stack.dtype, keep)
            for first, last, W, keep in stored_rows(W_OI, keep_OI, stack.rows)
        ]
