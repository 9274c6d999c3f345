"""The best weights for the units that stay, with as much regularisation as inputs that were held out ask for.

O: output features, I: input features, K: features that are kept, R: features that go.
"""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.core.stack import Stack
from secateur.core.stats import InputStats

#: Regularisation that is tried, as shares of the Gram matrix's mean diagonal. The last one is to leave the weights as they are.
DAMPINGS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, float("inf"))


def refit(stack: Stack, keep_I: Tensor, centred: bool = False) -> tuple[Tensor, tuple[str, ...]]:
    """Minimise ‖X(Ŵ−W)ᵀ‖² + λ‖Ŵ_K−W_K‖² over weights that are zero outside the columns K.

    Which λ is best hangs on how many tokens there are: found on the even windows, the weights of each are tried on the odd
    ones, and those of the best λ are found again on all. They never are worse on the odd windows than none would be.

    Args:
        stack: the dense weights, and inputs of even and of odd windows apart.
        keep_I: bool, the columns that are kept.
        centred: a bias takes up what is lost on average: only what changes from token to token counts.

    Returns:
        The weights, float32; and what the user should know.
    """
    damping = choose_damping(stack, keep_I, centred)
    if damping is None:
        return stack.W_OI * keep_I, ("nothing is refitted: that takes two calibration windows or more",)
    return refit_with(stack, keep_I, damping, centred), ()


def choose_damping(stack: Stack, keep_I: Tensor, centred: bool = False) -> float | None:
    """The λ with which weights found on the even windows are best on the odd ones; None of a single window."""
    W_OI, halves = stack.W_OI, stack.stats.both_halves
    if halves is None:
        return None
    even_II, held_II = (_gram(part, centred) for part in halves)
    errors = [_error(_solve(W_OI, even_II, keep_I, damping) - W_OI, held_II) for damping in DAMPINGS]
    return DAMPINGS[min(range(len(DAMPINGS)), key=lambda i: (errors[i], -i))]


def refit_with(stack: Stack, keep_I: Tensor, damping: float, centred: bool = False) -> Tensor:
    """The weights for a λ, found on all windows."""
    return _solve(stack.W_OI, _gram(stack.stats, centred), keep_I, damping)


def _gram(stats: InputStats, centred: bool) -> Tensor:
    gram_II = stats.gram()
    if centred:
        gram_II -= torch.outer(stats.sum_I, stats.mean())
    return gram_II


def _error(change_OI: Tensor, gram_II: Tensor) -> float:
    error = float(((change_OI @ gram_II) * change_OI).sum(dtype=torch.float64))
    return error if error == error else float("inf")


def _solve(W_OI: Tensor, gram_II: Tensor, keep_I: Tensor, damping: float) -> Tensor:
    """W_K + W_R G_RK (G_KK + λ)⁻¹; without a factor of that matrix, or without end of λ, only what is kept."""
    kept_OI = W_OI * keep_I
    if damping == float("inf"):
        return kept_OI
    kept_K, gone_R = keep_I.nonzero()[:, 0], (~keep_I).nonzero()[:, 0]
    damped_KK = gram_II[kept_K][:, kept_K]
    mean = gram_II.diagonal().mean()
    damped_KK.diagonal().add_(damping * mean)
    factor_KK, failed = torch.linalg.cholesky_ex(damped_KK)
    if failed or mean <= 0:
        return kept_OI
    pull_KO = gram_II[kept_K][:, gone_R] @ W_OI[:, gone_R].T
    kept_OI[:, kept_K] += torch.cholesky_solve(pull_KO, factor_KK).T
    return kept_OI
