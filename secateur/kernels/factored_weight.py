"""A weight that is the product of two, as the kernels compute on it: inputs go through the one, and what comes of them through
the other.

O: output features, I: input features, K: atoms, V: values, R: some rows, T: tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from secateur.kernels.expand import pack_mask
from secateur.kernels.packed import Packed, SparseWeight, padded


def full(W_OI: Tensor) -> SparseWeight:
    """A dense weight as the kernels take it that know masks: all bits are set."""
    O, I = W_OI.shape
    bitmask_OB = pack_mask(torch.ones(O, I, dtype=torch.bool))
    return SparseWeight((O, I), padded(W_OI.reshape(-1)), bitmask_OB, torch.arange(O + 1) * I)


@dataclass(frozen=True)
class FactoredWeight(Packed):
    """A weight in layout `dictionary`.

    Attributes:
        shape: (O, I).
        dtype: of the dense weight.
        atoms: `[K, I]`.
        coefficients: of the atoms in each output, `[O, K]`.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    atoms: Packed
    coefficients: Packed

    @property
    def kernels(self) -> str:
        return "factored"

    def compiled(self, x_TI: Tensor, bias_O: Tensor | None) -> Tensor:
        return self.coefficients.compiled(self.atoms.compiled(x_TI, None), bias_O)

    def dense(self) -> Tensor:
        return torch.cat([W_RI for _, W_RI in self.dense_rows()])  # the same products as there, to the bit

    def dense_rows(self) -> Iterator[tuple[int, Tensor]]:
        D_KI = self.atoms.dense().float()
        for start, S_RK in self.coefficients.dense_rows():
            yield start, (S_RK.float() @ D_KI).to(self.dtype)

    def linear(self, x_TI: Tensor, bias_O: Tensor | None) -> Tensor:
        return self.coefficients.linear(self.atoms.linear(x_TI, None), bias_O)

    def rows(self, start: int, end: int) -> FactoredWeight:
        some = self.coefficients.rows(start, end)
        return replace(self, shape=(end - start, self.shape[1]), coefficients=some)

    def count(self) -> int:
        return self.shape[0] * self.shape[1]
