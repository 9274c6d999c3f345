"""The weights that come nearest to the dense model's outputs on the inputs that a linear has by now.

What the blocks before have lost changes the inputs of a linear from x̃, which it has in the dense model, to x. With the
Gram matrix G = Σxᵀx the square is completed by

    ‖XŴᵀ − X̃Wᵀ‖² = ‖X(Ŵ − W*)ᵀ‖² + a constant,   W* = W + W·Σ(x̃ − x)ᵀx·G⁻¹,

so that every method fits the dense model's outputs where it is given W* for W ("GPTAQ", Li et al. 2025, arXiv:2504.02692;
"Qronos", Zhang et al. 2025, arXiv:2505.11695, both of whom do it column by column). G is damped, and a share of the correction
is made: how much, and which share, is what would have served windows that were held out best.

O: output features, I: input features, R: those of one of several stacked linears.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from secateur.core.stack import Stack
from secateur.core.stats import InputStats

#: Shares of the mean diagonal entry of G that are tried as damping.
DAMPINGS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)


@dataclass(frozen=True)
class Correction:
    """How one linear is corrected.

    Attributes:
        damping: of G, as a share of its mean diagonal entry.
        share: of the correction that is made, 0 to 1.
    """

    damping: float
    share: float


def towards_dense(stack: Stack) -> tuple[Stack, list[Correction]]:
    """The stack with W* in the place of its weights, and how each of its linears was corrected.

    Raises:
        ValueError: the statistics hold no drift.
    """
    if stack.stats.drift_II is None:
        raise ValueError("the drift was not gathered: nobody knows the dense model's inputs")
    chosen = _choose(stack)
    W_OI, K_OI = stack.W_OI.clone(), _lost(stack.W_OI, stack.stats)
    for damping in {each.damping for each in chosen if each.share}:
        step_OI = _correction(K_OI, stack.stats, damping)
        assert step_OI is not None
        for W_RI, step_RI, each in zip(stack.split(W_OI), stack.split(step_OI), chosen, strict=True):
            if each.damping == damping:
                W_RI.add_(step_RI, alpha=each.share)
    return replace(stack, W_OI=W_OI), chosen


def _choose(stack: Stack) -> list[Correction]:
    """For each linear what lowers the error on each half of the windows most, where it is computed from the other.

    A share s of a correction D changes the squared error on held-out inputs by s²·DGDᵀ − 2s·⟨D, K⟩ for each row, with their
    G and K = W·Σ(x̃ − x)ᵀx: the best share is in closed form, and none is made where no share helps.
    """
    best = [(0.0, Correction(DAMPINGS[0], 0.0)) for _ in stack.rows]
    halves = stack.stats.both_halves
    if halves is None:
        return [correction for _, correction in best]
    parts = [(half, _lost(stack.W_OI, half)) for half in halves]
    for damping in DAMPINGS:
        gain_O, cost_O = torch.zeros_like(stack.W_OI[:, 0]), torch.zeros_like(stack.W_OI[:, 0])
        for (fitted, of_fitted_OI), (held, of_held_OI) in (parts, parts[::-1]):
            D_OI = _correction(of_fitted_OI, fitted, damping)
            if D_OI is None:
                break
            gain_O += (D_OI * of_held_OI).sum(1)
            cost_O += held.energy(D_OI)
        else:
            for i, (gain, cost) in enumerate(_sums(stack, gain_O, cost_O)):
                share = min(max(gain / cost, 0.0), 1.0) if cost > 0 else 0.0
                saved = share * (2 * gain - share * cost)
                if saved > best[i][0]:
                    best[i] = (saved, Correction(damping, share))
    return [correction for _, correction in best]


def _sums(stack: Stack, gain_O: Tensor, cost_O: Tensor) -> Iterator[tuple[float, float]]:
    for gain_R, cost_R in zip(stack.split(gain_O), stack.split(cost_O), strict=True):
        yield gain_R.double().sum().item(), cost_R.double().sum().item()


def _lost(W_OI: Tensor, stats: InputStats) -> Tensor:
    """K = W·Σ(x̃ − x)ᵀx of some windows, `[O, I]`."""
    assert stats.drift_II is not None
    return W_OI @ stats.drift_II


def _correction(K_OI: Tensor, stats: InputStats, damping: float) -> Tensor | None:
    """K·(G + λ)⁻¹, `[O, I]`; None where G needs more damping."""
    gram_II = Stack(K_OI, stats, (len(K_OI),)).damped_gram(damping)
    lower_II, info = torch.linalg.cholesky_ex(gram_II)
    if info.item():
        return None
    del gram_II
    step_OI = torch.cholesky_solve(K_OI.T, lower_II).T
    return step_OI if torch.isfinite(step_OI).all() else None
