"""GPTQ: "Accurate Post-Training Quantization for Generative Pre-trained Transformers", Frantar et al. 2022, arXiv:2210.17323.

O: output features, I: input features (columns, in the order in which they are stored).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from secateur.core.damping import damping_option, number
from secateur.core.options import check_options
from secateur.core.pruned import Pruned
from secateur.core.quantized import BITS, Quantized
from secateur.core.registry import quantizer
from secateur.core.stack import Stack
from secateur.core.stats import Level
from secateur.errors import UsageError
from secateur.quant.block_grid import UNIFORM, block_grid, check_grid, grid_option, unpruned
from secateur.quant.error_feedback import carry_error
from secateur.quant.grid import Grid
from secateur.quant.grid_options import (
    bits_option,
    group_size_option,
    order_option,
    search_range_option,
    symmetric_option,
)


@quantizer
@dataclass(frozen=True)
class GPTQ:
    """Round column by column, and let the columns still to come make up for the error (algorithm 1)."""

    bits: int = bits_option(4)
    group_size: int | str = group_size_option(64)
    symmetric: bool = symmetric_option()
    search_range: bool = search_range_option()
    order: str = order_option("activation")
    damping: float | str = damping_option()
    grid: str = grid_option()

    name: ClassVar[str] = "gptq"
    paper: ClassVar[str] = "Frantar et al. 2022, arXiv:2210.17323"
    all_bits: ClassVar[tuple[int, ...]] = BITS
    level: ClassVar[Level] = Level.GRAM
    needs_fisher: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_options(self)
        decided = (("bits", 4), ("group_size", 64), ("symmetric", False), ("search_range", True))
        check_grid(self, decided)
        if self.grid != UNIFORM and self.order == "permuted":
            raise UsageError(
                f"`order` permuted has to be stored, and `grid` {self.grid} stores no order: give activation"
            )

    @property
    def unpruned(self) -> str | None:
        """See `Quantizer`."""
        return unpruned(self.grid)

    def quantize(self, stack: Stack, pruned: Pruned | None = None) -> list[Quantized]:
        """Round the weights, carrying on the error; with a mask also that of what it removes.

        With `pruned` a column is pruned and rounded at once, and the sum of both errors is carried on (Frantar & Alistarh
        2023, arXiv:2301.00774, section 3.5). The grids are those of the weights that the pruner left.
        """
        grid = block_grid(self, stack, pruned) or Grid.of(self, stack)
        return carry_error(stack, grid, self.order, number(self.damping), pruned)
