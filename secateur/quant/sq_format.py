"""SQ-format: "SQ-format: A Unified Sparse-Quantized Hardware-friendly Data Format for LLMs", Huang et al. 2025,
arXiv:2512.05409.

O: output features, I: input features, T: tokens, G: banks of a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from secateur.core.damping import damping_option, number
from secateur.core.options import check_options, option
from secateur.core.pruned import Pruned
from secateur.core.quantized import BITS, Quantized
from secateur.core.registry import quantizer
from secateur.core.stack import Stack
from secateur.core.stats import Level
from secateur.errors import UsageError
from secateur.formats.layouts.two_precisions import MOST_IN_BANK
from secateur.quant.bank_grid import BankGrid
from secateur.quant.error_feedback import carry_error
from secateur.quant.grid import Grid
from secateur.quant.grid_options import search_range_option
from secateur.quant.storage import storage_dtype


@quantizer
@dataclass(frozen=True)
class SQFormat:
    """GPTQ in banks of weights: in each the most important ones, by w²/[H⁻¹]ⱼⱼ², have codes of high bits, the rest of low bits.

    A bank's weights in low bits share a scale, and so do all of a row in high bits. `static_mask` orders the columns by how
    much their inputs give to all outputs, |mean Aⱼ · Σ_o W_oj|, so that the inputs worth high bits come first: what hardware
    with two precisions wants of activations. Nothing here computes on such: inputs stay as they are.
    """

    high_bits: int = option(8, "Bits of a code of the most important weights.", choices=BITS)
    low_bits: int = option(4, "Bits of a code of all others.", choices=BITS)
    high_share: float = option(0.125, "Fraction of a bank in high bits.", above=0, below=1, share=True)
    bank: int = option(64, "Weights of a bank.", low=2, high=MOST_IN_BANK)
    search_range: bool = search_range_option()
    static_mask: bool = option(False, "Columns in order of what their inputs give to the outputs.")
    damping: float | str = damping_option()

    name: ClassVar[str] = "sq"
    paper: ClassVar[str] = "Huang et al. 2025, arXiv:2512.05409"
    #: Two numbers of bits say what it is, of which a search chooses neither.
    all_bits: ClassVar[tuple[int, ...]] = ()
    level: ClassVar[Level] = Level.GRAM
    needs_fisher: ClassVar[bool] = False
    unpruned: ClassVar[str] = "its banks have a code for every weight; give gptq, or spqr for weights in high bits"

    def __post_init__(self) -> None:
        check_options(self)
        if self.high_bits <= self.low_bits:
            raise UsageError(f"`high_bits` {self.high_bits} is not more than `low_bits` {self.low_bits}: give more")
        if not 0 < self.high < self.bank:
            raise UsageError(
                f"`high_share` {self.high_share:g} of banks of {self.bank} is {'all' if self.high else 'none'} of them: give "
                f"{1 / self.bank:.4g} to {1 - 1 / self.bank:.4g}"
            )

    @property
    def bits(self) -> int:
        """Of most codes."""
        return self.low_bits

    @property
    def high(self) -> int:
        """How many weights of a bank are in high bits."""
        return round(self.high_share * self.bank)

    def quantize(self, stack: Stack, pruned: Pruned | None = None) -> list[Quantized]:
        """See `GPTQ.quantize`; nothing is pruned."""
        low = Grid(self.low_bits, self.bank, True, self.search_range, storage_dtype(stack.W_OI, stack.dtype))
        grid = BankGrid.of(low, self.high_bits, self.high, stack.W_OI)
        stored_I = static_order(stack) if self.static_mask else None
        return carry_error(stack, grid, "activation", number(self.damping), None, stored_I=stored_I)


def static_order(stack: Stack) -> Tensor:
    """The inputs by falling |mean A_j · Σ_o W_oj|."""
    return (stack.stats.mean() * stack.W_OI.sum(0)).abs().argsort(descending=True, stable=True)


def emulated_inputs(x_TI: Tensor, order_I: Tensor, high_share: float, bits: tuple[int, int], bank: int) -> Tensor:
    """Inputs as hardware with two precisions would see them, in floating point: what comes of them can be measured so, but
    nothing is faster.

    Args:
        order_I: that of the columns; the first ones are in high bits.
        bits: high and low.
        bank: inputs, in that order, that share a scale: their largest is the last level.
    """
    I = x_TI.shape[1]
    x_TI = x_TI[:, order_I].float()
    high_TI, low_TI = (_rounded(x_TI, each, bank) for each in bits)
    mixed_TI = torch.where(torch.arange(I, device=x_TI.device) < round(high_share * I), high_TI, low_TI)
    return torch.empty_like(x_TI).index_copy_(1, order_I, mixed_TI)


def _rounded(x_TI: Tensor, bits: int, bank: int) -> Tensor:
    T, I = x_TI.shape
    x_TGB = torch.nn.functional.pad(x_TI, (0, -I % bank)).view(T, -1, bank)
    scale_TG1 = x_TGB.abs().amax(2, keepdim=True) / (2 ** (bits - 1) - 1)
    code_TGB = torch.where(scale_TG1 > 0, x_TGB / scale_TG1, 0).round_()
    return (code_TGB * scale_TG1).view(T, -1)[:, :I]
