"""Codes of rows as streams of bytes, for weights of which rows store all or some.

O: output features, K: stored weights of a row, B: bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.kernels.bits import pack_bits, unpack_bits


@dataclass(frozen=True)
class Rows:
    """How many weights are stored of each row of a weight `[O, I]`: all, or those that a mask keeps.

    Attributes:
        shape: (O, I).
        length: of every row, or of each `[O]`.
    """

    shape: tuple[int, int]
    length: int | Tensor

    @classmethod
    def full(cls, shape: tuple[int, int]) -> Rows:
        """All weights of every row."""
        return cls(shape, shape[1])

    @property
    def length_O(self) -> Tensor:
        return torch.tensor(self.length).expand(self.shape[0]) if isinstance(self.length, int) else self.length

    @property
    def longest(self) -> int:
        return self.length if isinstance(self.length, int) else int(self.length.max())

    def groups(self, group_size: int) -> Rows:
        """The groups of each row, the last of which may be shorter."""
        return Rows(self.shape, -(-self.length // group_size))

    @property
    def filled(self) -> Tensor:
        """Bool `[O, longest]`: where a row has something."""
        return torch.arange(self.longest) < self.length_O[:, None]

    @property
    def starts(self) -> Tensor:
        """Where each row begins when they are laid end to end, and where the last one ends: int64 `[O + 1]`."""
        if isinstance(self.length, int):
            return torch.arange(self.shape[0] + 1) * self.length
        return torch.nn.functional.pad(self.length.cumsum(0), (1, 0))

    @property
    def total(self) -> int:
        """What all rows have together."""
        return self.shape[0] * self.length if isinstance(self.length, int) else int(self.length.sum())

    @property
    def _equal(self) -> bool:
        return isinstance(self.length, int) or int(self.length.min()) == self.longest

    def flatten(self, x_OK: Tensor) -> Tensor:
        """What the rows have, one after the other."""
        x_OK = x_OK[:, : self.longest]
        return x_OK.reshape(-1).contiguous() if self._equal else x_OK[self.filled]

    def spread(self, flat: Tensor) -> Tensor:
        """The reverse of `flatten`; zeros where a row has nothing."""
        if self._equal:
            return flat.view(self.shape[0], self.longest)
        x_OK = flat.new_zeros(self.shape[0], self.longest)
        x_OK[self.filled] = flat
        return x_OK

    def _bytes(self, bits: int) -> Rows:
        return Rows(self.shape, -(-self.length * bits // 8))

    def pack(self, code_OK: Tensor, bits: int) -> Tensor:
        """Codes as a stream of bytes, each row starting at a byte."""
        code_OK = code_OK[:, : self.longest]
        if not self._equal:
            # What lies beyond a row's end must not leave its bits in the last byte.
            code_OK = torch.where(self.filled, code_OK, 0)
        return self._bytes(bits).flatten(pack_bits(code_OK, bits))

    def unpack(self, stream_B: Tensor, bits: int, part: str) -> Tensor:
        """The codes of such a stream, `[O, longest]`. Raises ValueError when it has another length or bits too many."""
        return unpack_bits(self._checked(stream_B, bits, part).spread(stream_B), bits, self.longest)

    def check_stream(self, stream_B: Tensor, bits: int, part: str) -> Tensor:
        """The byte at which each row of such a stream begins, and that at which the last ends, `[O + 1]`.

        Raises ValueError when the stream has another length or bits too many.
        """
        return self._checked(stream_B, bits, part).starts

    def _checked(self, stream_B: Tensor, bits: int, part: str) -> Rows:
        """The bytes of each row of such a stream. Raises ValueError as `check_stream` does."""
        rows = self._bytes(bits)
        _check_length(stream_B, rows.total, part)  # before anything of that size is made
        if self._equal and self.longest:
            used = (self.longest * bits - 1) % 8 + 1
            # Where codes fill their last byte, there is nothing to look at, which would read a mapped stream all through.
            stray = used < 8 and bool((stream_B.view(self.shape[0], -1)[:, -1].int() >> used).any())
        else:
            some_O = rows.length_O > 0
            used_O = (self.length_O * bits - 1)[some_O] % 8 + 1
            stray = bool((stream_B[rows.starts[1:][some_O] - 1].int() >> used_O).any())
        if stray:
            raise ValueError(f"its {part} has bits set after the last code of a row")
        return rows


def pack_stream(code: Tensor, bits: int) -> Tensor:
    """Codes as one stream."""
    return Rows.full((1, code.numel())).pack(code.reshape(1, -1), bits)


def unpack_stream(stream_B: Tensor, bits: int, count: int, part: str) -> Tensor:
    """The reverse of `pack_stream`. Raises ValueError when it has another length, or bits after its last code."""
    return Rows.full((1, count)).unpack(stream_B, bits, part)[0]


def _check_length(stream_B: Tensor, wanted: int, part: str) -> None:
    if stream_B.numel() != wanted:
        raise ValueError(f"its {part} has {stream_B.numel()} bytes, not {wanted}: it is truncated, or of other bits")


def is_stream(tensor: Tensor) -> bool:
    return tensor.ndim == 1 and tensor.dtype == torch.uint8
