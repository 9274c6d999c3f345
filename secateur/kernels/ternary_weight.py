"""A weight of three values a row, coded by a dictionary of sequences, as the kernels compute on it.

O: output features, I: input features, N: codes of all rows, T: tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from secateur.kernels.cpu.cpu_backend import missing
from secateur.kernels.packed import Packed
from secateur.solvers.ternary_dictionary import Dictionary, decode


@dataclass(frozen=True)
class TernaryWeight(Packed):
    """A weight in layout `ternary-dict`.

    Attributes:
        shape: (O, I).
        dtype: of the dense weight.
        codes_N: int16, the bits of codes without sign, row after row.
        offset_O1: int64, where each row's codes begin, and where the last one's end.
        low_O, high_O: float16 or bfloat16, what each row has beside zeros.
        dictionary: that the codes are of.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    codes_N: Tensor
    offset_O1: Tensor
    low_O: Tensor
    high_O: Tensor
    dictionary: Dictionary

    @property
    def kernels(self) -> str:
        return "ternary"

    def operands(self) -> tuple[Any, ...]:
        tables = self.dictionary.on(self.codes_N.device)
        parts = self.codes_N, self.offset_O1, self.low_O, self.high_O
        return self.shape[1], *parts, tables.length_E, tables.start_E1, tables.item_L

    def dense(self) -> Tensor:
        first_1, last_1 = self.offset_O1[:1], self.offset_O1[-1:]
        code_N = self.codes_N[int(first_1) : int(last_1)].long() & 0xFFFF
        row_M, column_M, high_M = decode(code_N, self.offset_O1 - first_1, self.dictionary)
        value_M = torch.where(high_M, self.high_O[row_M], self.low_O[row_M])
        W_OI = torch.zeros(self.shape, dtype=self.dtype, device=self.codes_N.device)
        return W_OI.index_put_((row_M, column_M), value_M.to(self.dtype))

    def expanded(self) -> Tensor:
        if self.codes_N.device.type != "cpu" or missing() is not None:
            return self.dense()
        W_OI: Tensor = torch.ops.secateur.ternary_decode(*self.operands(), torch.empty(0, dtype=self.dtype))
        return W_OI

    def rows(self, start: int, end: int) -> TernaryWeight:
        return replace(
            self,
            shape=(end - start, self.shape[1]),
            offset_O1=self.offset_O1[start : end + 1],
            low_O=self.low_O[start:end],
            high_O=self.high_O[start:end],
        )

    def count(self) -> int:
        return self.shape[0] * self.shape[1]
