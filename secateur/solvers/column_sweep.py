"""Settling the inputs of a linear one after the other, those still to come making up for the error: what SparseGPT, GPTQ and
SpQR have in common ("Optimal Brain Compression", Frantar & Alistarh 2022, arXiv:2208.11580, and their own papers).

O: output features, I: input features, B: input features of one block, S: of some of it.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

# Errors are kept for this many inputs before all inputs still to come are corrected for them.
_BLOCK = 512
# Inputs corrected one by one; the errors of more are applied as one product.
_LEAF = 16


class Settler(Protocol):
    """What a method does at each stop of a `sweep`."""

    def enter(self, first: int, W_SO: Tensor) -> None:
        """A unit begins, with the weights of its inputs as all before it have left them."""
        ...

    def settle(self, i: int, w_O: Tensor) -> Tensor:
        """The final weights of input i, given those that would be best now; a new tensor."""
        ...


def sweep(W_IO: Tensor, U_II: Tensor, settler: Settler, unit: int) -> None:
    """Settle the inputs in order; each one's error is made up for by all that follow, which minimises ‖X(Ŵ−W)ᵀ‖².

    The error w − ŵ of input i changes the weights of input j > i by −(w − ŵ)·U[i, j] / U[i, i].

    Args:
        W_IO: float32, the transposed weights: those of one input are contiguous. Overwritten with the settled ones.
        U_II: from `inverse_cholesky`.
        settler: says what the weights become.
        unit: the settler wants to see the weights of so many inputs at a time before the first of them is settled.
    """
    I = len(W_IO)
    fits = unit <= _BLOCK  # else a unit spans several blocks
    stride = _BLOCK // unit * unit if fits else unit
    for base in range(0, I, stride):
        if not fits:
            settler.enter(base, W_IO[base : base + unit])
        for start in range(base, min(base + stride, I), _BLOCK):
            stop = min(start + _BLOCK, base + stride, I)
            error_BO = torch.empty_like(W_IO[start:stop])
            _settle(W_IO, U_II, settler, unit, error_BO, start, start, stop)
            W_IO[stop:].addmm_(U_II[start:stop, stop:].T, error_BO, alpha=-1)


def _settle(
    W_IO: Tensor, U_II: Tensor, settler: Settler, unit: int, error_BO: Tensor, start: int, first: int, last: int
) -> None:
    """Settle inputs `first` to `last` of the block that begins at `start`, whose errors go to `error_BO`."""
    span = last - first
    if unit <= _BLOCK and first % unit == 0 and (span == unit or (span < unit and last == len(W_IO))):
        settler.enter(first, W_IO[first:last])
    if span > min(unit, _LEAF):
        # In two halves, so that products are as large as can be; cut where a unit begins, or a leaf of one.
        grain = unit if span > unit else _LEAF
        middle = first + -(-span // grain) // 2 * grain
        _settle(W_IO, U_II, settler, unit, error_BO, start, first, middle)
        error_SO = error_BO[first - start : middle - start]
        W_IO[middle:last].addmm_(U_II[first:middle, middle:last].T, error_SO, alpha=-1)
        _settle(W_IO, U_II, settler, unit, error_BO, start, middle, last)
        return
    for i in range(first, last):
        w_O, error_O = W_IO[i], error_BO[i - start]
        if i > first:
            w_O.addmv_(error_BO[first - start : i - start].T, U_II[first:i, i], alpha=-1)
        settled_O = settler.settle(i, w_O)
        torch.sub(w_O, settled_O, out=error_O).div_(U_II[i, i])
        w_O.copy_(settled_O)
