"""Weights by input feature: what an input is multiplied by lies in one piece, and is passed over where the input is not kept.

O: output features, I: input features, V: values, S: bytes of a stream, G: groups of inputs, W: chunks of the outputs, B: bytes
of the mask of an input's weights, ⌈O/8⌉.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from secateur.kernels.bits import bytes_of, unpack_bits
from secateur.kernels.packed import Packed, SparseWeight, largest, nbytes, padded, unpadded

#: Outputs of a chunk, where the values under a mask are counted.
CHUNK = 256
# What is expanded at a time: for a CPU's caches.
_WEIGHTS_AT_ONCE = 2**19


class ColumnWeight(Packed):
    """A weight of which kernels read what belongs to some inputs."""

    @property
    def kernels(self) -> str:
        return "columns"

    @abstractmethod
    def inputs(self, start: int, end: int) -> Tensor:
        """The dense weights of some consecutive inputs, `[end − start, O]`."""

    def dense_IO(self) -> Tensor:
        """All of them, `[I, O]`."""
        O, I = self.shape
        step = max(1, _WEIGHTS_AT_ONCE // O)
        return torch.cat([self.inputs(start, min(start + step, I)) for start in range(0, I, step)])

    def read_bytes(self, share: float) -> float:
        return share * nbytes(self)

    def dense(self) -> Tensor:
        return self.dense_IO().T

    def dense_rows(self) -> Iterator[tuple[int, Tensor]]:
        yield 0, self.dense()  # rows are what it has not in one piece

    def rows(self, start: int, end: int) -> DenseColumns:
        return DenseColumns.of(self.dense()[start:end])


@dataclass(frozen=True)
class DenseColumns(ColumnWeight):
    """All of them, as they are.

    Attributes:
        values_V: bfloat16, float16 or float32: O for each input, and `PADDING` bytes after the last.
    """

    shape: tuple[int, int]
    values_V: Tensor

    @classmethod
    def of(cls, W_OI: Tensor) -> DenseColumns:
        """Of a dense weight."""
        return cls((W_OI.shape[0], W_OI.shape[1]), padded(W_OI.T.reshape(-1)))

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.values_V.dtype

    def operands(self) -> tuple[Any, ...]:
        return self.shape[0], self.values_V, *(None,) * 3, *(None, 0, 0, None, None)

    def inputs(self, start: int, end: int) -> Tensor:
        return self.dense_IO()[start:end]

    def dense_IO(self) -> Tensor:
        return unpadded(self.values_V).view(self.shape[::-1])

    def count(self) -> int:
        return int(torch.count_nonzero(unpadded(self.values_V)))


@dataclass(frozen=True)
class SparseColumns(ColumnWeight):
    """Those that are not zero.

    Attributes:
        inner: of them the transpose `[I, O]`: what it calls rows is of one input.
        before_IW: int32, how many values of an input stand before each chunk of `CHUNK` outputs.
    """

    shape: tuple[int, int]
    inner: SparseWeight
    before_IW: Tensor

    @classmethod
    def of(cls, inner: SparseWeight) -> SparseColumns:
        """With its chunks counted."""
        return cls(inner.shape[::-1], inner, chunk_starts(inner.bitmask_OB).int())

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.inner.dtype

    def operands(self) -> tuple[Any, ...]:
        inner = self.inner
        return (
            self.shape[0],
            inner.values_V,
            inner.bitmask_OB,
            inner.start_O1,
            self.before_IW,
            *(None, 0, 0, None, None),
        )

    def inputs(self, start: int, end: int) -> Tensor:
        return self.inner.rows(start, end).expanded()

    def dense_IO(self) -> Tensor:
        return self.inner.dense()

    def dense_rows(self) -> Iterator[tuple[int, Tensor]]:
        yield 0, self.inner.expanded().T

    def expanded(self) -> Tensor:
        return self.inner.expanded().T

    def count(self) -> int:
        return self.inner.count()


@dataclass(frozen=True)
class CodedColumns(ColumnWeight):
    """Codes; w = (code − zero) · scale, where some consecutive inputs of an output have one scale and zero point.

    Attributes:
        dtype: of the dense weight.
        bits: of a code, 2 to 8.
        group_size: inputs that share; the last group may have fewer.
        codes_S: uint8, the codes of one input after the other, each from a new byte; `PADDING` bytes after the last.
        scale_S: float16 or bfloat16, G times O, and `PADDING` bytes.
        zero_S: uint8, the same; None when all zero points are 2^(bits − 1).
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    bits: int
    group_size: int
    codes_S: Tensor
    scale_S: Tensor
    zero_S: Tensor | None

    def operands(self) -> tuple[Any, ...]:
        coded = self.codes_S, self.bits, self.group_size, self.scale_S, self.zero_S
        return self.shape[0], *(None,) * 4, *coded

    @property
    def scale_GO(self) -> Tensor:
        return unpadded(self.scale_S).view(-1, self.shape[0])

    @property
    def zero_GO(self) -> Tensor | None:
        return None if self.zero_S is None else unpadded(self.zero_S).view(-1, self.shape[0])

    def codes(self, start: int, end: int) -> Tensor:
        """Those of some consecutive inputs, uint8 `[end − start, O]`."""
        O, I = self.shape
        codes_IB = unpadded(self.codes_S).view(I, bytes_of(O, self.bits))
        return unpack_bits(codes_IB[start:end], self.bits, O)

    def inputs(self, start: int, end: int) -> Tensor:
        group = torch.arange(start, end, device=self.codes_S.device) // self.group_size
        scale, zero_GO = self.scale_GO[group].float(), self.zero_GO
        zero = 2.0 ** (self.bits - 1) if zero_GO is None else zero_GO[group].float()
        return (self.codes(start, end) - zero).mul_(scale).to(self.dtype)

    def count(self) -> int:
        return self.shape[0] * self.shape[1]

    def read_bytes(self, share: float) -> float:
        # A group's scales are read for the first of its inputs that is kept.
        grid = self.scale_S.nbytes + (0 if self.zero_S is None else self.zero_S.nbytes)
        return share * self.codes_S.nbytes + (1 - (1 - share) ** self.group_size) * grid

    def bound(self) -> float:
        """What no weight is greater than, whatever its sign."""
        return largest(self.scale_S) * 2**self.bits


def chunk_starts(bitmask_RB: Tensor) -> Tensor:
    """How many bits of each row stand before each of its chunks, int64 `[R, W]`."""
    R, B = bitmask_RB.shape
    bits_256 = torch.tensor([byte.bit_count() for byte in range(256)], dtype=torch.uint8, device=bitmask_RB.device)
    count_RB = pad(bits_256[bitmask_RB.int()], (0, -B % (CHUNK // 8)))
    count_RW = count_RB.view(R, -1, CHUNK // 8).sum(2)
    return count_RW.cumsum(1) - count_RW
