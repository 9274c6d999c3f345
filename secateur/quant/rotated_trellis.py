"""Trellis codes of rotated weights: "QTIP: Quantization with Trellises and Incoherence Processing", Tseng et al. 2024,
arXiv:2406.11235, within GPTQ's sweep, so that what a column loses is made up for by all columns after it.

O: output features, I: input features (columns), R: rings of T outputs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import groupby
from typing import ClassVar

import torch
from torch import Tensor

from secateur.core.damping import damping_option, number
from secateur.core.options import check_options, option
from secateur.core.pruned import Pruned
from secateur.core.quantized import Quantized
from secateur.core.registry import quantizer
from secateur.core.stack import Stack
from secateur.core.stats import InputStats, Level
from secateur.formats.layouts.trellis_rings import BITS, TrellisCodes
from secateur.quant.grid_options import bits_option
from secateur.quant.storage import storage_dtype
from secateur.solvers.column_sweep import sweep
from secateur.solvers.hadamard import block_of, rotate
from secateur.solvers.inverse_cholesky import inverse_cholesky
from secateur.solvers.trellis import STATE_BITS, encode, ring_of

#: The most features that are rotated together.
BLOCK = 128
# By how much standard normal weights are scaled for the codes, which have no tails: what gives the least error in the sweep, on
# linears of two blocks of a model of 135 M parameters; 5 % more or less costs 0.5 % of the error.
_GAIN = {2: 0.95, 3: 0.9, 4: 0.87}


@quantizer
@dataclass(frozen=True)
class RotatedTrellis:
    """Scale and rotate until weights are as if drawn from a normal distribution, and code each column of them by a trellis."""

    bits: int = bits_option(3, BITS, "gptq and rtn have 8")
    states: int = option(2**STATE_BITS, "States of the trellis.", choices=(256, 1024, 4096, 16384, 65536))
    damping: float | str = damping_option()

    name: ClassVar[str] = "trellis"
    paper: ClassVar[str] = "Tseng et al. 2024, arXiv:2406.11235"
    all_bits: ClassVar[tuple[int, ...]] = BITS
    level: ClassVar[Level] = Level.GRAM
    needs_fisher: ClassVar[bool] = False
    unpruned: ClassVar[str] = "its rotation leaves no weight zero; leave one of them out, or quantize by gptq or spqr"

    def __post_init__(self) -> None:
        check_options(self)

    def quantize(self, stack: Stack, pruned: Pruned | None = None) -> list[Quantized]:
        """Code the weights, carrying on the error.

        Raises:
            ValueError: a weight or the statistics are not finite, or the weights were pruned.
        """
        if pruned is not None:
            raise ValueError(f"trellis does not go with pruned weights: {self.unpruned}")
        if not torch.isfinite(stack.W_OI).all():
            raise ValueError("trellis cannot code the weights: some are not finite")
        scales = _Scales.of(stack, _GAIN[self.bits])
        gram_II = scales.rotated_gram(stack)
        # Those that have most of the energy first: the others are then there to make up for them.
        order_I = gram_II.diagonal().argsort(descending=True, stable=True)
        damping = number(self.damping)
        U_II, used = inverse_cholesky(gram_II[order_I][:, order_I], damping)
        del gram_II
        W_IO = scales.rotated_weights(stack)[order_I]
        state_bits = self.states.bit_length() - 1
        rings = [(size, *ring_of(size, self.bits, state_bits)) for size in stack.rows]
        coding = _Coding(self.bits, rings, order_I.tolist(), W_IO)
        sweep(W_IO, U_II, coding, len(W_IO))
        del U_II, W_IO
        notes = stack.notes(damping, used)
        found = []
        pieces = map(stack.split, (stack.W_OI, coding.symbol_IO.T, scales.out_O))
        for (size, T, L), W_OI, symbol_OI, out_O in zip(rings, *pieces, strict=True):
            codes = TrellisCodes(self.bits, L, T, BLOCK, symbol_OI.contiguous(), out_O, scales.in_I)
            codes = _refitted(codes, W_OI, stack.stats, damping)
            found.append(Quantized(codes, (size, stack.features), stack.dtype, notes=notes))
        return found


@dataclass(frozen=True)
class _Scales:
    """By what rows and columns are multiplied before and after, with the random signs of the rotation, as they are stored.

    Attributes:
        out_O: the root mean square of each row.
        in_I: that of each column, of what is left when rows are divided by theirs.
        rows: how many rows each linear has.
    """

    out_O: Tensor
    in_I: Tensor
    rows: tuple[int, ...]

    @classmethod
    def of(cls, stack: Stack, gain: float) -> _Scales:
        """Those for which the scaled weights have a root mean square of `gain`."""
        W_OI = stack.W_OI
        half = storage_dtype(W_OI, stack.dtype)
        draw = torch.Generator().manual_seed(0)
        out_O = W_OI.square().mean(1).sqrt_()
        in_I = (W_OI * _inverse(out_O)[:, None]).square_().mean(0).sqrt_()
        signed = [scale * _signs(len(scale), draw).to(scale.device) for scale in (out_O / gain, in_I)]
        return cls(signed[0].to(half), signed[1].to(half), stack.rows)

    def rotated_weights(self, stack: Stack) -> Tensor:
        """The scaled weights, rotated on both sides and transposed: `[I, O]`."""
        W_OI = stack.W_OI * _inverse(self.out_O.float())[:, None]
        W_OI = rotate(W_OI.mul_(_inverse(self.in_I.float())), block_of(stack.features, BLOCK))
        parts = [rotate(W_RI, block_of(len(W_RI), BLOCK), 0) for W_RI in stack.split(W_OI)]
        return torch.cat(parts).T.contiguous()

    def rotated_gram(self, stack: Stack) -> Tensor:
        """The Gram matrix of the inputs as the rotated weights meet them."""
        scale_I, block = self.in_I.float(), block_of(stack.features, BLOCK)
        gram_II = stack.stats.gram().mul_(scale_I).mul_(scale_I[:, None])
        return rotate(rotate(gram_II, block), block, 0)


class _Coding:
    """Codes the columns of a sweep: `sweep.Settler`.

    Attributes:
        rings: rows of each linear, T and L.
        swept: the input that is settled at each stop.
        symbol_IO: uint8, what has been settled, inputs in natural order.
    """

    def __init__(self, bits: int, rings: list[tuple[int, int, int]], swept: list[int], W_IO: Tensor) -> None:
        self.bits = bits
        self.rings = rings
        self.swept = swept
        self.symbol_IO = torch.empty_like(W_IO, dtype=torch.uint8)

    def enter(self, first: int, W_SO: Tensor) -> None:
        pass

    def settle(self, i: int, w_O: Tensor) -> Tensor:
        settled_O = torch.empty_like(w_O)
        first = 0
        for (T, L), run in groupby(self.rings, key=lambda ring: ring[1:]):  # those that are alike are coded together
            last = first + sum(size for size, _, _ in run)
            symbol_RT, value_RT = encode(w_O[first:last].view(-1, T), self.bits, L)
            self.symbol_IO[self.swept[i], first:last] = symbol_RT.view(-1)
            settled_O[first:last] = value_RT.view(-1)
            first = last
        return settled_O


def _refitted(codes: TrellisCodes, W_OI: Tensor, stats: InputStats, damping: float) -> TrellisCodes:
    """The same with each row scaled for the least error of its output: by wGŵᵀ / ŵGŵᵀ."""

    def energy(x_OI: Tensor) -> Tensor:
        return stats.energy(x_OI) + damping * stats.square_I.mean() * x_OI.square().sum(1)

    coded_OI = codes.values()
    own_O = energy(coded_OI)
    product_O = (energy(W_OI) + own_O - energy(W_OI - coded_OI)) / 2
    factor_O = torch.where(product_O > 0, product_O / own_O, 1)
    return replace(codes, scale_out_O=(codes.scale_out_O.float() * factor_O).to(codes.scale_out_O.dtype))


def _signs(count: int, draw: torch.Generator) -> Tensor:
    return torch.randint(0, 2, (count,), generator=draw) * 2.0 - 1


def _inverse(scale: Tensor) -> Tensor:
    """Of each scale; zero where it is zero."""
    return torch.where(scale == 0, 0, 1 / scale)
