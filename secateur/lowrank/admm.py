"""The three blocks of 3BASiL: "3BASiL: An Algorithmic Framework for Sparse plus Low-Rank Compression of LLMs", Makni et al.
2025, arXiv:2603.01376, without its training of blocks.

O: output features, I: input features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from secateur.core.patterns import Pattern
from secateur.core.registry import low_ranker
from secateur.core.stack import Stack
from secateur.core.stats import Level
from secateur.prune.alps import eigen, keep_largest, penalties, scaled
from secateur.solvers.inverse_cholesky import DAMPING
from secateur.solvers.truncation import Truncation

# Within a stage of the penalty: more than `alps` takes for sparse weights alone.
ITERATIONS = 12


@low_ranker
@dataclass(frozen=True)
class ADMM:
    """Weights that fit the outputs beside a part of low rank, sparse ones, and that part, drawn together.

    Minimises ‖X(S + L − W)ᵀ‖² over S of a pattern and L of a rank by the alternating direction method of multipliers: the
    iterations of `alps` with a third block, in which L becomes the nearest to what the others leave.
    """

    name: ClassVar[str] = "admm"
    paper: ClassVar[str] = "Makni et al. 2025, arXiv:2603.01376"
    level: ClassVar[Level] = Level.GRAM
    needs_pattern: ClassVar[bool] = True

    def split(self, stack: Stack, ranks: Sequence[int], pattern: Pattern | None) -> Tensor:
        """L: see `LowRanker`. Raises ValueError where the statistics are not finite, or hold no Gram matrix."""
        assert pattern is not None
        spectrum = stack.once(("eigen", DAMPING), lambda: eigen(stack, DAMPING))
        W_OI = stack.W_OI.masked_fill(stack.dead_I, 0).mul_(spectrum.scale_I)
        truncation = Truncation(scaled(stack, spectrum.damping)[0], stack.rows, ranks)
        sizes = list(stack.rows)
        L_OI = torch.zeros_like(W_OI)
        Z_OI, keep_OI, before = W_OI, keep_largest(W_OI, pattern, sizes), 0.0
        for penalty in penalties():
            pull_II = spectrum.product(penalty / (spectrum.values_I + penalty))
            for _ in range(ITERATIONS):
                # See `alps`: X fits the outputs near D, which is sparse; U is the multiplier over the penalty.
                D_OI = Z_OI * keep_OI
                U_OI = (Z_OI - D_OI).mul_(before / penalty)
                before = penalty
                X_OI = W_OI - L_OI
                X_OI = torch.addmm(X_OI, D_OI - U_OI - X_OI, pull_II)
                Z_OI = X_OI + U_OI
                keep_OI = keep_largest(Z_OI, pattern, sizes)
                L_OI = truncation.nearest(W_OI - X_OI, steps=1)
        return L_OI.div_(spectrum.scale_I)
