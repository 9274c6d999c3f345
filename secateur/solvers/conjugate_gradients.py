"""Least squares on the kept inputs of every row, all rows at once.

O: output features, I: input features, P: rows that are computed on together, R: those of them that have not ended.
"""

from __future__ import annotations

import torch
from torch import Tensor

# A row ends when its error is at most so much above the least that there is, as a share. On Gram matrices of language models
# that takes 3 to 10 steps.
_TOLERANCE, _MOST_STEPS = 2e-3, 30


# Weights that are computed on together, and of how many rows at least.
_PIECE, _LEAST_ROWS = 2**19, 256


def conjugate_gradients(
    gram_II: Tensor,
    inverse_II: Tensor,
    W_OI: Tensor,
    keep_OI: Tensor,
    start_OI: Tensor,
    tolerance: float = _TOLERANCE,
    most_steps: int = _MOST_STEPS,
) -> Tensor:
    """For each row minimise (ŵ−w)G(ŵ−w)ᵀ over the ŵ that are zero where `keep_OI` is false.

    The preconditioner M of a row is the block of G⁻¹ on its mask. It is never smaller than the inverse of G's block, the exact
    one, so rᵀMr of a residual r bounds what the row can still gain: it ends when that is a small share of its error.

    Args:
        gram_II: G, symmetric and positive definite.
        inverse_II: its inverse.
        W_OI, keep_OI: see `reconstruct`.
        start_OI: where to begin, zero outside the mask. No row ends with a larger error.
        tolerance: how much the error of a row may be above the least possible, as a share.
        most_steps: that a row may take to come there.
    """
    X_OI = start_OI.clone()
    height = rows_at_a_time(W_OI)
    for W_PI, keep_PI, X_PI in zip(*(M_OI.split(height) for M_OI in (W_OI, keep_OI, X_OI)), strict=True):
        _descend(gram_II, inverse_II, W_PI, keep_PI, X_PI, tolerance, most_steps)
    return X_OI


def rows_at_a_time(W_OI: Tensor) -> int:
    """How many rows to compute on together: what stays in a CPU's cache, and makes products that are large enough."""
    O, I = W_OI.shape
    if W_OI.device.type != "cpu":
        return O
    pieces = -(-O // max(_LEAST_ROWS, _PIECE // I))
    return -(-O // pieces)


def _descend(
    gram_II: Tensor, inverse_II: Tensor, W_PI: Tensor, keep_PI: Tensor, X_PI: Tensor, tolerance: float, most_steps: int
) -> None:
    """Turn X_PI from where to begin into what is found. R are the rows that have not ended, at `left_R` of them all."""
    away_PI = W_PI - X_PI
    residual_RI = away_PI @ gram_II
    first_P = (away_PI * residual_RI).sum(1)
    left_R = torch.arange(len(W_PI), device=W_PI.device)
    keep_RI, X_RI, error_R = keep_PI, X_PI.clone(), first_P
    residual_RI.mul_(keep_RI)
    direction_RI = (residual_RI @ inverse_II).mul_(keep_RI)
    gain_R = (residual_RI * direction_RI).sum(1)
    for step in range(most_steps + 1):
        open_R = ~(gain_R <= tolerance * error_R)  # what is not a number does not end before the check below
        if not open_R.all():
            X_PI[left_R[~open_R]] = X_RI[~open_R]
            state = (left_R, keep_RI, X_RI, residual_RI, direction_RI, gain_R, error_R)
            left_R, keep_RI, X_RI, residual_RI, direction_RI, gain_R, error_R = (part[open_R] for part in state)
        if step == most_steps or not len(left_R):
            break
        image_RI = (direction_RI @ gram_II).mul_(keep_RI)
        length_R1 = (gain_R / (direction_RI * image_RI).sum(1))[:, None]
        X_RI.addcmul_(length_R1, direction_RI)
        residual_RI.addcmul_(length_R1, image_RI, value=-1)
        error_R = error_R - length_R1[:, 0] * gain_R
        preconditioned_RI = torch.mm(residual_RI, inverse_II, out=image_RI).mul_(keep_RI)
        before_R, gain_R = gain_R, (residual_RI * preconditioned_RI).sum(1)
        direction_RI.mul_((gain_R / before_R)[:, None]).add_(preconditioned_RI)
    if len(left_R):
        # Rounding may spoil rows that are so hard to solve.
        away_RI = W_PI[left_R] - X_RI
        better_R = ((away_RI @ gram_II) * away_RI).sum(1) <= first_P[left_R]
        X_PI[left_R[better_R]] = X_RI[better_R]
