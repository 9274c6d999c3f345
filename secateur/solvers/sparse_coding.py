"""Sparse coding: signals as sums of few atoms of a dictionary, for many signals at once.

N: signals, B: those of a batch, M: numbers of a signal, K: atoms, S: those that a signal uses at most.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Floats of what is kept of the atoms chosen, which a CPU's caches hold.
_FLOATS_AT_ONCE = 2**20
# What of an atom lies outside those chosen, as a share of its square: with less it is one of their sums.
_INDEPENDENT = 1e-6
# Steps of conjugate gradients after each round, and after the last, whose coefficients are the ones that stay.
_STEPS, _LAST_STEPS = 4, 16


def pursue(X_NM: Tensor, D_KM: Tensor, most: int) -> Tensor:
    """For each signal the coefficients of atoms chosen one by one: orthogonal matching pursuit, for batches of signals
    (Rubinstein, Zibulevsky & Elad 2008).

    The atom of the next step is the one along which the residual is largest, and after each step the coefficients of those
    chosen are the best ones: ‖x − Σ c·d‖² is least for this support.

    Args:
        X_NM: float32 or float64.
        D_KM: atoms of any length, of which zeros are never chosen.
        most: S; that many are used, as far as there are as many that do not depend on each other and anything is left of the
            signal.

    Returns:
        coefficient_NK: zero where an atom is not used.
    """
    gram_KK = D_KM @ D_KM.T
    K, most = len(D_KM), min(most, len(D_KM))
    found_NK = X_NM.new_zeros(len(X_NM), K)
    size = max(1, _FLOATS_AT_ONCE // max(K * most, 1))
    for start in range(0, len(X_NM), size):
        found_NK[start : start + size] = _pursue_batch(X_NM[start : start + size] @ D_KM.T, gram_KK, most)
    return found_NK


def _pursue_batch(along_BK: Tensor, gram_KK: Tensor, most: int) -> Tensor:
    """The coefficients of signals whose products with the atoms are `along_BK`.

    Atoms chosen are made orthonormal one after the other: `basis_BSK` has the products of each such direction with all atoms,
    so that row t of the triangular factor of the chosen atoms' Gram matrix lies in it at the atoms chosen.
    """
    B, K = along_BK.shape
    every_B = torch.arange(B, device=along_BK.device)
    basis_BSK = along_BK.new_zeros(B, most, K)
    chosen_BS = torch.zeros(B, most, dtype=torch.int64, device=along_BK.device)
    part_BS = along_BK.new_zeros(B, most)
    inverse_K = inverse_lengths(gram_KK)
    least_B = torch.finfo(along_BK.dtype).eps * (along_BK.abs() * inverse_K).amax(1)
    left_BK = along_BK.clone()
    free_BK = (inverse_K > 0).expand(B, K).clone()
    for step in range(most):
        largest_B, atom_B = (left_BK.abs() * inverse_K).masked_fill_(~free_BK, -1).max(1)
        row_BK = gram_KK[atom_B]
        if step:
            before_BS = basis_BSK[every_B, :step, atom_B]
            row_BK = row_BK - torch.bmm(before_BS[:, None], basis_BSK[:, :step])[:, 0]
        square_B = row_BK[every_B, atom_B]
        # Nothing is left of the signal, or of the atom only what rounding left.
        used_B = (largest_B > least_B) & (square_B * inverse_K[atom_B].square() > _INDEPENDENT)
        free_BK[every_B, atom_B] = False
        row_BK = row_BK * torch.where(used_B, square_B.rsqrt(), 0)[:, None]
        part_B = torch.where(used_B, left_BK[every_B, atom_B] / row_BK[every_B, atom_B], 0)
        left_BK -= part_B[:, None] * row_BK
        basis_BSK[:, step], chosen_BS[:, step], part_BS[:, step] = row_BK, atom_B, part_B
    # Lᵀ c = the parts along the directions, where L is the factor of the chosen atoms' Gram matrix.
    upper_BSS = basis_BSK.gather(2, chosen_BS[:, None].expand(B, most, most)).triu()
    unused_BS = upper_BSS.diagonal(dim1=1, dim2=2) <= 0
    upper_BSS = upper_BSS.masked_fill(unused_BS[:, None, :] | unused_BS[:, :, None], 0)
    upper_BSS.diagonal(dim1=1, dim2=2)[unused_BS] = 1
    solved_BS = torch.linalg.solve_triangular(upper_BSS, part_BS[..., None], upper=True)[..., 0]
    return torch.zeros_like(along_BK).scatter_add_(1, chosen_BS, solved_BS.masked_fill(unused_BS, 0))


def pursue_in_rounds(X_NM: Tensor, D_KM: Tensor, most: int, rounds: int) -> Tensor:
    """The same with as many atoms chosen at once as make so many rounds (Wang, Kwon & Shim 2012): a small part of the time.

    Coefficients come from a few steps of conjugate gradients, which never make the error of a signal larger; all signals go
    through them together, as products of whole matrices.
    """
    gram_KK = D_KM @ D_KM.T
    inverse_K = inverse_lengths(gram_KK)
    # As if all atoms had length one, which conjugate gradients get along with best.
    gram_KK = gram_KK * inverse_K * inverse_K[:, None]
    along_NK = (X_NM @ D_KM.T).mul_(inverse_K)
    most = min(most, int((inverse_K > 0).sum()))
    found_NK, chosen_NK = torch.zeros_like(along_NK), torch.zeros_like(along_NK)
    chosen_NK[:, inverse_K == 0] = -1  # never
    before = 0
    for turn in range(1, rounds + 1):
        now = most * turn // rounds
        if now > before:
            left_NK = (along_NK - found_NK @ gram_KK).abs_().masked_fill_(chosen_NK != 0, -1)
            chosen_NK.scatter_(1, left_NK.topk(now - before, 1).indices, 1)
            steps = _LAST_STEPS if turn == rounds else _STEPS
            found_NK = _descend(gram_KK, along_NK, chosen_NK, found_NK, steps)
            before = now
    return found_NK * inverse_K


def inverse_lengths(gram_KK: Tensor) -> Tensor:
    """1 / ‖d‖ of each atom; 0 for zeros, and for what is so short that this would overflow."""
    length_K = gram_KK.diagonal().clamp(min=0).sqrt()
    return torch.where(length_K > torch.finfo(length_K.dtype).tiny, 1 / length_K, 0)


def _descend(gram_KK: Tensor, along_NK: Tensor, chosen_NK: Tensor, start_NK: Tensor, steps: int) -> Tensor:
    """Better coefficients of the atoms chosen, by conjugate gradients."""
    eps = torch.finfo(along_NK.dtype).eps
    found_NK, chosen_NK = start_NK, chosen_NK > 0
    residual_NK = (along_NK - found_NK @ gram_KK).mul_(chosen_NK)
    direction_NK = residual_NK.clone()
    square_N1 = residual_NK.square().sum(1, keepdim=True)
    for _ in range(steps):
        image_NK = (direction_NK @ gram_KK).mul_(chosen_NK)
        curve_N1 = (direction_NK * image_NK).sum(1, keepdim=True)
        # Along sums of atoms that are zero there is nothing to go for.
        bent_N1 = curve_N1 > eps * direction_NK.square().sum(1, keepdim=True)
        length_N1 = torch.where(bent_N1, square_N1 / curve_N1, 0)
        found_NK = found_NK + length_N1 * direction_NK
        residual_NK -= length_N1 * image_NK
        before_N1, square_N1 = square_N1, residual_NK.square().sum(1, keepdim=True)
        direction_NK = residual_NK + torch.where(before_N1 > 0, square_N1 / before_N1, 0) * direction_NK
    return found_NK
