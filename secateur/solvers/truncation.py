"""The matrix of low rank that is nearest to another in the metric of a Gram matrix.

Of all L of rank r, ‖X(E − L)ᵀ‖² is least for L = AAᵀE, where the columns of A are the r leading eigenvectors of E·G·Eᵀ with
G = XᵀX: that is the truncated singular value decomposition of E·G^½, with G^½ taken off again. G is neither inverted nor
factorised, so that it may be singular.

O: output features, I: input features, R: rank, K: columns of a basis, some more than R.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Columns that a basis has besides those that are wanted, and steps that it takes: what is left then is nearest within a
# thousandth of the error, on Gram matrices of language models.
_MORE, _STEPS = 8, 6


class Truncation:
    """Truncates matrices of linears that are stacked, each to a rank of its own.

    The leading eigenvectors are found by subspace iteration, which begins with random columns, and from then on with what it
    has found: one step is enough for a matrix that differs little from the one before.

    Args:
        gram_II: G, symmetric, positive semidefinite.
        rows: of each linear.
        ranks: of each linear.
    """

    def __init__(self, gram_II: Tensor, rows: Sequence[int], ranks: Sequence[int]) -> None:
        self._gram_II, self._rows, self._ranks = gram_II, list(rows), list(ranks)
        draw = torch.Generator().manual_seed(0)
        self._basis = [
            torch.randn(O, min(O, R + _MORE) if R else 0, generator=draw).to(gram_II)
            for O, R in zip(rows, ranks, strict=True)
        ]

    def nearest(self, E_OI: Tensor, steps: int = _STEPS) -> Tensor:
        """What is nearest to all of them, stacked, as a dense matrix."""
        return torch.cat([out_OR @ in_RI for out_OR, in_RI in self.factors(E_OI, steps)])

    def factors(self, E_OI: Tensor, steps: int = _STEPS) -> list[tuple[Tensor, Tensor]]:
        """The same of each linear as two factors, `[O, R]` and `[R, I]`. Raises ValueError where values are not finite."""
        return [self._factors(i, E_RI, steps) for i, E_RI in enumerate(E_OI.split(self._rows))]

    def _factors(self, i: int, E_OI: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        (O, I), R = E_OI.shape, self._ranks[i]
        if min(O, I) <= R:  # E itself
            eye = torch.eye(min(O, I), device=E_OI.device)
            return (eye, E_OI.clone()) if O <= I else (E_OI.clone(), eye)
        if not R:
            return E_OI[:, :0].clone(), E_OI[:0].clone()
        basis_OK = self._basis[i]
        for _ in range(steps):
            basis_OK = torch.linalg.qr(E_OI @ (self._gram_II @ (E_OI.T @ basis_OK)))[0]
        inner_IK = E_OI.T @ basis_OK
        # Within the basis exactly, the leading ones first.
        within_KK = (inner_IK.T @ (self._gram_II @ inner_IK)).cpu().double()
        if not torch.isfinite(within_KK).all():
            raise ValueError("no part of low rank is nearest: weights or statistics hold values that are not finite")
        turn_KK = torch.linalg.eigh(within_KK)[1]
        turn_KK = turn_KK.flip(1).to(E_OI)
        self._basis[i] = basis_OK @ turn_KK
        return self._basis[i][:, :R].clone(), (inner_IK @ turn_KK[:, :R]).T.contiguous()
