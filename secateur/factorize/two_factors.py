"""What methods that make a weight the product of two matrices have in common: the metric, the size and how factors are stored.

O: output features, I: input features, K: atoms.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from secateur.composite_layouts.dictionary import Factor, Factors, Plain
from secateur.core.options import option
from secateur.core.pruned import Pruned
from secateur.core.quantized import Quantized
from secateur.core.stack import Stack
from secateur.core.stats import InputStats, Level
from secateur.formats.layouts.bitmap import Bitmap
from secateur.formats.layouts.choose import layout_for
from secateur.quant.rtn import RTN
from secateur.quant.storage import storage_dtype

#: Bits of a number that is no code.
HALF = 16
# Numbers that share a scale, where factors are quantized.
_GROUP = 64
# Of three parts `shape` at most.
_SHAPES = 3 * 16


def size_option() -> Any:
    # With less, a model would seem to be larger than its files can be for (`model.limits`).
    return option(0.7, "Size of the linears, of 16 bits a weight: 70% or 0.7.", low=0.05, below=1, share=True)


@dataclass(frozen=True)
class Metric:
    """Weights as signals whose squared error is that of the outputs: G = LᵀL, and ‖X(Ŵ−W)ᵀ‖² = ‖(Ŵ−W)Lᵀ‖².

    Attributes:
        U_II: from `inverse_cholesky`: G⁻¹ = UᵀU, so that Lᵀ = U⁻¹, both upper triangular.
    """

    U_II: Tensor

    def into(self, W_OI: Tensor) -> Tensor:
        """WLᵀ."""
        return torch.linalg.solve_triangular(self.U_II, W_OI, upper=True, left=False)

    def back(self, A_OI: Tensor) -> Tensor:
        """The reverse."""
        return A_OI @ self.U_II


def most_atoms(size: float, shape: tuple[int, int], bytes_with: Callable[[int], int], linears: int = 1) -> int:
    """The most atoms with which a weight takes no more than its share of 16 bits a weight; at least one, and one an output at
    most.

    Args:
        bytes_with: of both factors with so many atoms, which grow with them.
        linears: of which the weight is made, one below the other.
    """
    O, I = shape
    room = size * 2 * O * I - _SHAPES * linears
    return max(1, bisect.bisect_right(range(1, O + 1), room, key=bytes_with))


def bytes_of_numbers(rows: int, columns: int, bits: int) -> int:
    """Of a matrix with so many numbers stored in each row."""
    if bits == HALF:
        return 2 * rows * columns
    return rows * (-(-columns * bits // 8) + 2 * -(-columns // _GROUP))


def stored_atoms(D_KI: Tensor, bits: int, dtype: torch.dtype) -> Factor:
    """Atoms as they are stored, each scaled so that its largest number is one: coefficients make up for that."""
    D_KI = D_KI / D_KI.abs().amax(1, keepdim=True).clamp_(min=torch.finfo(D_KI.dtype).tiny)
    return _stored(D_KI, None, bits, dtype)


def stored_coefficients(S_OK: Tensor, bits: int, dtype: torch.dtype, sparse: bool) -> Factor:
    """Coefficients as they are stored; where they are `sparse`, without those that are zero."""
    keep_OK = None
    if sparse:
        keep_OK = S_OK != 0
        keep_OK[:, 0] |= ~keep_OK.any()  # of nothing at all no codes are made
    return _stored(S_OK, keep_OK, bits, dtype)


def _stored(M_RC: Tensor, keep_RC: Tensor | None, bits: int, dtype: torch.dtype) -> Factor:
    if bits == HALF:
        half = storage_dtype(M_RC, dtype)
        return Factor.of(Plain() if keep_RC is None else Bitmap(), M_RC.to(half).cpu().contiguous())
    nothing = InputStats.empty(M_RC.shape[1], Level.NONE, M_RC.device)
    pruned = None if keep_RC is None else Pruned(M_RC, keep_RC)
    [weight] = RTN(bits, _GROUP, symmetric=True).quantize(Stack.of([M_RC], nothing), pruned)
    return Factor.of(layout_for(weight), weight.cpu())


def product(factors: Factors, stack: Stack, shape: tuple[int, int], notes: tuple[str, ...]) -> Any:
    """A weight of a stack as the product of its factors."""
    return Quantized(factors, shape, stack.dtype, notes=notes)
