"""The best weights for a given mask: the last step of ALPS (Meng et al. 2024, arXiv:2406.07831, section 3.3), for any pruner.

O: output features, I: input features.
"""

import torch
from torch import Tensor

from secateur.calibration.stats import InputStats
from secateur.sweep import DAMPING, calibration_notes, inverse_cholesky

# Of conjugate gradients. On Gram matrices of language models ten leave about 1e-5 of what can be gained, whatever the mask.
_MOST_STEPS = 20
# A row ends when its squared residual has fallen to this share of what it was.
_RESIDUAL = 1e-4


def reconstruct(
    W_OI: Tensor, keep_OI: Tensor, stats: InputStats, start_OI: Tensor | None = None
) -> tuple[Tensor, tuple[str, ...]]:
    """Minimise ‖X(Ŵ−W)ᵀ‖² + λ‖Ŵ−W‖² over the weights Ŵ that are zero outside a mask.

    λ is 0.01 of the mean diagonal entry of the Gram matrix, or more where that is singular. Each row is a least squares problem
    on its own kept inputs; all are solved at once by conjugate gradients, preconditioned by the inverse of the whole matrix
    restricted to the mask. A row never ends with a larger error than it began with.

    Memory: three matrices `[I, I]` besides the statistics, and seven `[O, I]` besides the arguments.

    Args:
        W_OI: the dense weights, any floating dtype.
        keep_OI: bool, which weights may be other than zero.
        stats: inputs at `Level.GRAM`. Weights of a dead input (always zero) become zero: nothing depends on them.
        start_OI: weights to begin from; None: the dense ones where they are kept.

    Returns:
        The weights, float32, zero where `keep_OI` is false; and what the user should know.

    Raises:
        ValueError: the statistics are not finite.
    """
    dead_I = stats.square_I <= 0
    W_OI = W_OI.float().masked_fill(dead_I, 0)
    start_OI = W_OI if start_OI is None else start_OI.float().masked_fill(dead_I, 0)
    U_II, used = stats.once(("inverse", DAMPING), lambda: inverse_cholesky(stats.upper()))
    found_OI = conjugate_gradients(damped_gram(stats, used), U_II.T @ U_II, W_OI, keep_OI, start_OI * keep_OI)
    return found_OI, calibration_notes(stats, DAMPING, used)


def damped_gram(stats: InputStats, damping: float) -> Tensor:
    """The matrix that `inverse_cholesky` inverts, as a new `[I, I]` tensor: symmetric, float32."""
    gram_II = stats.gram()
    diagonal_I = gram_II.diagonal()
    mean = diagonal_I.mean().item() or 1.0
    diagonal_I.copy_(torch.where(diagonal_I <= 0, mean, diagonal_I) + damping * mean)
    return gram_II


def conjugate_gradients(gram_II: Tensor, inverse_II: Tensor, W_OI: Tensor, keep_OI: Tensor, start_OI: Tensor) -> Tensor:
    """For each row minimise (ŵ−w)G(ŵ−w)ᵀ over the ŵ that are zero where `keep_OI` is false.

    Args:
        gram_II: G, symmetric and positive definite.
        inverse_II: about the inverse of G; the better, the fewer steps.
        W_OI, keep_OI: see `reconstruct`.
        start_OI: where to begin, zero outside the mask.
    """
    X_OI = start_OI.clone()
    residual_OI = ((W_OI - X_OI) @ gram_II).mul_(keep_OI)
    direction_OI = (residual_OI @ inverse_II).mul_(keep_OI)
    slope_O1 = (residual_OI * direction_OI).sum(1, keepdim=True)
    enough_O1 = _RESIDUAL * slope_O1
    for _ in range(min(_MOST_STEPS, W_OI.shape[1])):
        running_O1 = slope_O1 > enough_O1
        if not running_O1.any():
            break
        image_OI = (direction_OI @ gram_II).mul_(keep_OI)
        curvature_O1 = (direction_OI * image_OI).sum(1, keepdim=True)
        step_O1 = torch.where(running_O1 & (curvature_O1 > 0), slope_O1 / curvature_O1, 0)
        X_OI.addcmul_(step_O1, direction_OI)
        residual_OI.addcmul_(step_O1, image_OI, value=-1)
        preconditioned_OI = torch.mm(residual_OI, inverse_II, out=image_OI).mul_(keep_OI)
        new_O1 = (residual_OI * preconditioned_OI).sum(1, keepdim=True)
        direction_OI.mul_(torch.where(running_O1, new_O1 / slope_O1, 0)).add_(preconditioned_OI)
        slope_O1 = torch.where(running_O1, new_O1, slope_O1)
    # Rounding may spoil a row that was at its best before.
    better_O = _errors(gram_II, X_OI - W_OI) <= _errors(gram_II, start_OI - W_OI)
    return torch.where(better_O[:, None], X_OI, start_OI)


def _errors(gram_II: Tensor, change_OI: Tensor) -> Tensor:
    return ((change_OI @ gram_II) * change_OI).sum(1)
