"""Settling the inputs of a linear one after the other, those still to come making up for the error: what SparseGPT, GPTQ and
SpQR have in common ("Optimal Brain Compression", Frantar & Alistarh 2022, arXiv:2208.11580, and their own papers).

O: output features, I: input features, B: input features of one block, S: of some of it.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from secateur.calibration.stats import InputStats

DAMPING = 0.01
MAX_DAMPING = 1e4
# Errors are kept for this many inputs before all inputs still to come are corrected for them.
_BLOCK = 512
# Inputs corrected one by one; the errors of more are applied as one product.
_LEAF = 16


def inverse_cholesky(gram_II: Tensor, damping: float = DAMPING) -> tuple[Tensor, float]:
    """The upper triangular U with UᵀU = (G + λ·mean(diag G)·1)⁻¹.

    Row i of U, from the diagonal on, is what optimal brain surgery needs once the inputs before i are settled: U[i, i]² is
    the i-th diagonal entry of the inverse over the inputs that remain, and U[i, i:] / U[i, i] the direction of the correction
    (Frantar & Alistarh 2023, arXiv:2301.00774, section 3.3).

    Args:
        gram_II: symmetric, positive semidefinite, float32; only its upper triangle is read. An input that is always zero gets
            the mean diagonal entry.
        damping: λ; raised tenfold as often as the factorisation needs.

    Returns:
        U_II and the λ that was used.

    Raises:
        ValueError: no damping helps, which is only possible when the matrix is not finite.
    """
    diagonal_I = gram_II.diagonal()
    dead_I = diagonal_I <= 0
    mean = diagonal_I.mean().item() or 1.0
    while damping <= MAX_DAMPING:
        # With the order of the inputs reversed, Cholesky's lower factor is an upper one here: G = R Rᵀ, so U = R⁻¹. One
        # factorisation and one triangular inverse do the work of inverting G and factorising the inverse. Every matrix is
        # dropped or overwritten as soon as it can be: there are as many as fit in memory that bound the size of a linear.
        reversed_II = gram_II.flip(0, 1)  # the upper triangle is now the lower one, which is all that Cholesky reads
        reversed_II.diagonal().copy_((torch.where(dead_I, mean, diagonal_I) + damping * mean).flip(0))
        lower_II, info = torch.linalg.cholesky_ex(reversed_II)
        del reversed_II
        if info.item() == 0:
            inverse_II = torch.eye(len(lower_II), device=lower_II.device, dtype=lower_II.dtype)
            torch.linalg.solve_triangular(lower_II, inverse_II, upper=False, out=inverse_II)
            del lower_II
            if torch.isfinite(inverse_II).all():
                return inverse_II.flip(0, 1), damping
        damping = max(damping, 1e-4) * 10
    raise ValueError("the Gram matrix cannot be factorised with any damping: it holds values that are not finite")


def calibration_notes(stats: InputStats, damping: float, used: float) -> tuple[str, ...]:
    """What the user should know about a Gram matrix that was factorised with the damping `used` instead of `damping`."""
    notes = []
    if stats.tokens < stats.features:
        notes.append(f"{stats.tokens} calibration tokens are fewer than the {stats.features} inputs: give more")
    if used != damping:
        notes.append(f"damping raised from {damping:g} to {used:g} of the mean diagonal: the Gram matrix is singular")
    return tuple(notes)


def dead_notes(stats: InputStats) -> tuple[str, ...]:
    """What the user should know about inputs that never were anything but zero, whose weights a pruner sets to zero."""
    dead = int((stats.square_I <= 0).sum())
    return (f"{dead} of {stats.features} inputs are always zero in the calibration text",) if dead else ()


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
