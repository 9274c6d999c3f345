"""A weight that is rotated on both sides and coded by a trellis, as the kernels compute on it.

W = diag(scale_out) · R_out · Q · R_in · diag(scale_in), with block-diagonal Walsh-Hadamard matrices R.

O: output features, I: input features, R: rings of T outputs, B: bytes of a ring, S: bytes of all, Z: rows of a piece, T: tokens
(of inputs).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from secateur.kernels.bits import bytes_of, unpack_bits
from secateur.kernels.packed import Packed, largest, unpadded
from secateur.solvers.hadamard import rotate
from secateur.solvers.trellis import code_values, decode

# What is decoded at a time: for a CPU's caches, and where as few operations as possible matter more.
_WEIGHTS_AT_ONCE, _WEIGHTS_OF_A_PIECE = 2**19, 2**22


def rotated_back(Q_OI: Tensor, scale_out_O: Tensor, scale_in_I: Tensor, block_out: int, block_in: int) -> Tensor:
    """The weight that a coded one stands for, float32."""
    W_OI = rotate(rotate(Q_OI, block_in), block_out, 0)
    return W_OI.mul_(scale_out_O.float()[:, None]).mul_(scale_in_I.float())


@dataclass(frozen=True)
class TrellisWeight(Packed):
    """A weight in layout `trellis`.

    Attributes:
        shape: (O, I).
        dtype: of the dense weight.
        bits: of a weight, K.
        state_bits: of a state, L.
        ring: weights of a ring, which are outputs of one input: T, a divisor of O.
        block_out, block_in: of the rotations: powers of two that divide O and I.
        codes_S: uint8, R times I rings of B bytes, and `PADDING` bytes after the last. A ring's symbols lie one after
            the other, least significant bit first, and the bits after the last are zero.
        scale_out_O, scale_in_I: float16 or bfloat16, of either sign.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    bits: int
    state_bits: int
    ring: int
    block_out: int
    block_in: int
    codes_S: Tensor
    scale_out_O: Tensor
    scale_in_I: Tensor

    @property
    def kernels(self) -> str:
        return "trellis"

    def operands(self) -> tuple[Any, ...]:
        form = self.bits, self.state_bits, self.ring, self.block_out, self.block_in
        return *form, self.codes_S, self.scale_out_O, self.scale_in_I

    @property
    def unit(self) -> int:
        """Rows that belong together: they share rings, or are rotated together."""
        return math.lcm(self.ring, self.block_out)

    def coded(self) -> Tensor:
        """Q `[O, I]`, float32."""
        O, I = self.shape
        codes_NB = unpadded(self.codes_S).view(-1, bytes_of(self.ring, self.bits))
        symbol_NT = unpack_bits(codes_NB, self.bits, self.ring)
        Q_NT = decode(symbol_NT, self.bits, self.state_bits)
        return Q_NT.view(O // self.ring, I, self.ring).transpose(1, 2).reshape(O, I)

    def dense(self) -> Tensor:
        return torch.cat([piece.expanded() for _, piece in self._pieces(_WEIGHTS_OF_A_PIECE)])

    def expanded(self) -> Tensor:
        scales = self.scale_out_O, self.scale_in_I
        return rotated_back(self.coded(), *scales, self.block_out, self.block_in).to(self.dtype)

    def dense_rows(self) -> Iterator[tuple[int, Tensor]]:
        for start, piece in self._pieces(_WEIGHTS_AT_ONCE):
            yield start, piece.expanded()

    def linear(self, x_TI: Tensor, bias_O: Tensor | None) -> Tensor:
        x_TI, dtype = rotate(x_TI.float() * self.scale_in_I.float(), self.block_in), x_TI.dtype
        y_TO = torch.cat([x_TI @ piece.coded().T for _, piece in self._pieces(_WEIGHTS_OF_A_PIECE)], 1)
        y_TO = rotate(y_TO, self.block_out) * self.scale_out_O.float()
        return (y_TO if bias_O is None else y_TO + bias_O.float()).to(dtype)

    def _pieces(self, weights: int) -> Iterator[tuple[int, TrellisWeight]]:
        """It some rows at a time, of about so many weights, with the number of the first."""
        O, I = self.shape
        step = max(1, weights // (self.unit * I)) * self.unit
        for start in range(0, O, step):
            yield start, self.rows(start, min(start + step, O))

    def rows(self, start: int, end: int) -> TrellisWeight:
        """Some consecutive rows; both numbers are multiples of `unit`."""
        if start % self.unit or end % self.unit:
            raise ValueError(f"rows {start} to {end} are not whole: {self.unit} of them belong together")
        I = self.shape[1]
        size = I * bytes_of(self.ring, self.bits)
        padding = self.codes_S.numel() - self.shape[0] // self.ring * size
        return replace(
            self,
            shape=(end - start, I),
            codes_S=self.codes_S[start // self.ring * size : end // self.ring * size + padding],
            scale_out_O=self.scale_out_O[start:end],
        )

    def count(self) -> int:
        return self.shape[0] * self.shape[1]

    def bound(self) -> float:
        """What no weight is greater than, whatever its sign."""
        of_code = largest(code_values(self.state_bits)) * math.sqrt(self.block_out * self.block_in)
        return largest(self.scale_out_O) * largest(self.scale_in_I) * of_code
