"""The factors of what is of low rank beside weights that are compressed already, as they are stored.

O: output features, I: input features, R: rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from secateur.core.stack import Stack
from secateur.quant.storage import storage_dtype
from secateur.solvers.truncation import Truncation


def fit_factors(stack: Stack, found_OI: Tensor, ranks: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """Two factors for each linear, `[O, R]` and `[R, I]` in 16 bits, whose product is what its new weights lack most.

    Minimises ‖X(W − Ŵ − L)ᵀ‖² over L of its rank: what EoRA does in the eigenspace of the inputs (Liu et al. 2024,
    arXiv:2410.21271, section 3.2), without inverting anything.

    Args:
        stack: the dense weights, and inputs at `Level.GRAM`.
        found_OI: Ŵ.
        ranks: of each linear; 0: it gets none, and none gets any where new weights are not finite.

    Raises:
        ValueError: the statistics are not finite.
    """
    lost_OI = stack.W_OI - found_OI
    if not torch.isfinite(lost_OI).all():
        ranks = [0] * len(ranks)  # whoever packs the weights says which are not
    truncation = Truncation(stack.stats.gram(), stack.rows, ranks)
    return [_stored(*factors, stack.dtype) for factors in truncation.factors(lost_OI)]


def _stored(out_OR: Tensor, in_RI: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Factors of the same product whose columns and rows are about as large, in 16 bits."""
    if not out_OR.numel():
        return out_OR, in_RI
    out_R, in_R = out_OR.abs().amax(0), in_RI.abs().amax(1)
    scale_R = torch.where((out_R > 0) & (in_R > 0), (in_R / out_R).sqrt(), 0)
    out_OR, in_RI = out_OR * scale_R, in_RI * torch.where(scale_R > 0, 1 / scale_R, 0)[:, None]
    half = storage_dtype(torch.cat([out_OR.flatten(), in_RI.flatten()]), dtype)
    return out_OR.to(half), in_RI.to(half)
