"""K-SVD: a dictionary of which each signal is a sum of few atoms (Aharon, Elad & Bruckstein 2006).

N: signals, U: those that use an atom, M: numbers of a signal, K: atoms.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def k_svd(
    X_NM: Tensor, atoms: int, code: Callable[[Tensor, Tensor], Tensor], iterations: int, power_steps: int
) -> Tensor:
    """A dictionary `[K, M]` of atoms of length one.

    It begins with the signals' leading directions and, where there are more atoms than directions, the largest signals; with as
    many atoms as signals it is those signals.

    Args:
        X_NM: float32 or float64, not all zero.
        atoms: K, no more than there are signals.
        code: gives the coefficients of signals for a dictionary, as `sparse_coding.pursue` does.
        iterations: of coding all signals and then making the atoms better one after the other.
        power_steps: of the power iteration by which an atom becomes the leading direction of what the others leave of the
            signals that use it.
    """
    D_KM = _first_atoms(X_NM, atoms)
    for _ in range(iterations):
        _improve(X_NM, D_KM, code(X_NM, D_KM), power_steps)
    return D_KM


def _first_atoms(X_NM: Tensor, atoms: int) -> Tensor:
    if atoms == len(X_NM):
        return _unit(X_NM)
    _, _, V_RM = torch.linalg.svd(X_NM, full_matrices=False)
    largest_N = X_NM.square().sum(1).argsort(descending=True, stable=True)
    return torch.cat([V_RM, _unit(X_NM[largest_N])])[:atoms].clone()


def _improve(X_NM: Tensor, D_KM: Tensor, coefficient_NK: Tensor, power_steps: int) -> None:
    """Make the atoms better, one after the other, and the coefficients with them; both in place."""
    rest_NM = X_NM - coefficient_NK @ D_KM
    replaced: set[int] = set()
    for k in range(len(D_KM)):
        c_N, d_M = coefficient_NK[:, k], D_KM[k]
        user_U = c_N.nonzero()[:, 0]
        if not len(user_U):
            _replace(rest_NM, d_M, replaced)
            continue
        rest_UM, c_U = rest_NM[user_U], c_N[user_U]
        new_M, new_U = d_M, c_U
        for _ in range(power_steps):
            # E = rest + c dᵀ is what the other atoms leave; it is never made.
            new_M = _unit(new_U @ rest_UM + (new_U @ c_U) * d_M)
            new_U = rest_UM @ new_M + c_U * (d_M @ new_M)
        rest_NM[user_U] = rest_UM.addr_(c_U, d_M).addr_(new_U, new_M, alpha=-1)
        c_N[user_U], D_KM[k] = new_U, new_M


def _replace(rest_NM: Tensor, d_M: Tensor, replaced: set[int]) -> None:
    """An atom that no signal uses becomes the direction of the signal of which most is missing, if anything is."""
    size_N = rest_NM.square().sum(1)
    size_N[list(replaced)] = 0
    worst = int(size_N.argmax())
    if size_N[worst] > 0:
        replaced.add(worst)
        d_M.copy_(_unit(rest_NM[worst]))


def _unit(x: Tensor) -> Tensor:
    """Rows, or a vector, of length one; zeros stay."""
    return torch.nn.functional.normalize(x, dim=-1, eps=torch.finfo(x.dtype).tiny)
