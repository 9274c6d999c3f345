"""Truncated singular value decomposition in the inputs' metric: "SVD-LLM: Truncation-aware Singular Value Decomposition for
Large Language Model Compression", Wang et al. 2024, arXiv:2403.07378.

O: output features, I: input features, R: rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from secateur.composite_layouts.dictionary import Factors
from secateur.core.damping import damping_option, number
from secateur.core.options import check_options
from secateur.core.quantized import Quantized
from secateur.core.registry import factorizer
from secateur.core.stack import Stack
from secateur.core.stats import Level
from secateur.factorize.two_factors import (
    HALF,
    Metric,
    bytes_of_numbers,
    most_atoms,
    product,
    size_option,
    stored_atoms,
    stored_coefficients,
)


@factorizer
@dataclass(frozen=True)
class TruncatedSVD:
    """The matrix of a lower rank whose outputs are nearest: no other of its rank has a smaller ‖X(Ŵ−W)ᵀ‖² (section 3.2)."""

    size: float = size_option()
    damping: float | str = damping_option()

    name: ClassVar[str] = "svd"
    paper: ClassVar[str] = "Wang et al. 2024, arXiv:2403.07378"
    level: ClassVar[Level] = Level.GRAM

    def __post_init__(self) -> None:
        check_options(self)

    def factorize(self, stack: Stack) -> list[Quantized]:
        """See `Factorizer`."""
        damping = number(self.damping)
        U_II, used = stack.inverse(damping)
        metric, notes = Metric(U_II), stack.notes(damping, used)
        found = []
        for W_OI in stack.split(stack.W_OI):
            O, I = W_OI.shape
            rank = most_atoms(self.size, (O, I), lambda r, n=O + I: bytes_of_numbers(n, r, HALF))  # type: ignore[misc]
            left_OR, value_R, right_RI = torch.linalg.svd(metric.into(W_OI), full_matrices=False)
            D_RI = metric.back(right_RI[:rank])
            atoms = stored_atoms(D_RI, HALF, stack.dtype)
            # Atoms were scaled as they were stored, and rounded.
            length_R = D_RI.abs().amax(1)
            S_OR = left_OR[:, :rank] * (value_R[:rank] * length_R)
            coefficients = stored_coefficients(S_OR, HALF, stack.dtype, sparse=False)
            found.append(product(Factors(atoms, coefficients), stack, (O, I), notes))
        return found
