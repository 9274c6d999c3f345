"""R-Sparse: "R-Sparse: Rank-Aware Activation Sparsity for Efficient LLM Inference", Zhang et al. 2025, arXiv:2504.19449,
section 4.

O: output features, I: input features, R: ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from secateur.core.options import check_options, option
from secateur.core.registry import sparsifier
from secateur.core.stats import Level
from secateur.gates.section import THRESHOLD


@sparsifier
@dataclass(frozen=True)
class RSparse:
    """Reads the weights of inputs over a threshold, and has a matrix of low rank stand for the others:
    y = W s(x) + U_R S_R V_Rᵀ (x − s(x)), of the singular value decomposition of W."""

    rank_share: float = option(
        0.05, "Share of the weights read that the low rank takes.", low=0.0, high=0.9, share=True
    )

    name: ClassVar[str] = "rsparse"
    level: ClassVar[Level] = Level.MOMENTS
    neurons_only: ClassVar[bool] = False
    paper: ClassVar[str] = "Zhang et al. 2025, arXiv:2504.19449"
    rule: ClassVar[str] = THRESHOLD

    def __post_init__(self) -> None:
        check_options(self)

    def rank(self, shape: tuple[int, int], sparsity: float) -> int:
        O, I = shape
        return int(self.rank_share * (1 - sparsity) * O * I / (O + I))

    def rest(self, W_OI: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        U_OK, value_K, Vt_KI = torch.linalg.svd(W_OI.float(), full_matrices=False)
        root_R = value_K[:rank].sqrt()
        return U_OK[:, :rank] * root_R, root_R[:, None] * Vt_KI[:rank]
