"""Inverting a damped Gram matrix: what the column sweep and the refits have in common.

I: input features.
"""

from __future__ import annotations

import torch
from torch import Tensor

DAMPING = 0.01
MAX_DAMPING = 1e4


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
