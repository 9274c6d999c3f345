"""Removing units of input features one after the other, with what is left making up for each.

As ZipLM does (Kurtic et al. 2023, arXiv:2302.04089) and OSSCAR and SlimGPT after it.

O: output features, I: input features, U: units, S: features of a unit, R: features that go.
"""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.core.feature_units import Units
from secateur.core.stack import Stack

# Units that go at a time: one, or so many of a group of many that it takes this many rounds.
_ROUNDS = 64


def remove_units(stack: Stack, units: Units, damping: float, slope: bool = False) -> Tensor:
    """Remove the units that cost least, a few at a time, until as many are left as `units` says.

    A unit u costs ½ tr(W_u ([H⁻¹]_uu)⁻¹ W_uᵀ), by how much the error rises when it goes and all others adapt. What goes is
    made up for by W −= W_R ([H⁻¹]_RR)⁻¹ [H⁻¹]_R:, and H⁻¹ becomes that of what is left.

    Args:
        stack: a linear, and inputs at `Level.GRAM`.
        damping: of H, as a share of the Gram matrix's mean diagonal.
        slope: add the term of first order of Týr-the-Pruner (Li et al. 2025, arXiv:2503.09657): Σ W_u ∘ (WH)_u, for the weights
            as they are by then, and WH of the dense ones.

    Returns:
        keep_U: bool.

    Raises:
        ValueError: the statistics are not finite, or hold no Gram matrix.
    """
    U_II, used = stack.inverse(damping)
    inverse_II = U_II.T @ U_II
    W_OI = stack.W_OI.masked_fill(stack.dead_I, 0)
    slope_OI = W_OI @ stack.damped_gram(used) if slope else None
    gone_U = torch.zeros(units.count, dtype=torch.bool, device=W_OI.device)
    left = units.each
    while left > units.keep:
        score_U = _costs(W_OI, inverse_II, units)
        if slope_OI is not None:
            score_U += units.sums((W_OI * slope_OI).sum(0))
        score_GR = score_U.masked_fill(gone_U, torch.inf).view(units.groups, units.each)
        count = min(max(1, units.each // _ROUNDS), left - units.keep)
        chosen_GR = score_GR.topk(count, dim=1, largest=False).indices
        chosen_GR += torch.arange(units.groups, device=chosen_GR.device)[:, None] * units.each
        goes_U = torch.zeros_like(gone_U).index_fill_(0, chosen_GR.view(-1), True)
        gone_U |= goes_U
        goes_R = units.spread(goes_U).nonzero()[:, 0]
        _remove(W_OI, inverse_II, goes_R)
        left -= count
    return ~gone_U


def _costs(W_OI: Tensor, inverse_II: Tensor, units: Units) -> Tensor:
    """What each unit costs, `[U]`; of those that are gone already: anything."""
    U, S = units.count, units.size
    if S == 1:
        return W_OI.square().sum(0) / (2 * inverse_II.diagonal().clamp(min=torch.finfo(torch.float32).tiny))
    diagonal_USS = inverse_II.view(U, S, U, S).diagonal(dim1=0, dim2=2).permute(2, 0, 1).double()
    # A unit that is gone has zeros here.
    diagonal_USS.diagonal(dim1=1, dim2=2)[diagonal_USS.diagonal(dim1=1, dim2=2) == 0] = 1
    W_USO = W_OI.T.reshape(U, S, -1).double()
    return 0.5 * (W_USO * torch.linalg.solve(diagonal_USS, W_USO)).sum((1, 2)).float()


def _remove(W_OI: Tensor, inverse_II: Tensor, goes_R: Tensor) -> None:
    """Set columns to zero, and have the others adapt, in place."""
    inverse_RI = inverse_II[goes_R]
    share_RI = torch.linalg.solve(inverse_RI[:, goes_R].double(), inverse_RI.double()).to(W_OI.dtype)
    W_OI -= W_OI[:, goes_R] @ share_RI
    inverse_II -= inverse_RI.T @ share_RI
    W_OI[:, goes_R] = 0
    inverse_II[goes_R] = 0
    inverse_II[:, goes_R] = 0
