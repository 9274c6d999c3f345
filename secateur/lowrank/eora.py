"""EoRA: "EoRA: Fine-tuning-free Compensation for Compressed LLM with Eigenspace Low-Rank Approximation", Liu et al. 2024,
arXiv:2410.21271.

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


@low_ranker
@dataclass(frozen=True)
class EoRA:
    """Compress the weights as they are, and give what was lost back as far as the rank goes: nothing is split off before."""

    name: ClassVar[str] = "eora"
    paper: ClassVar[str] = "Liu et al. 2024, arXiv:2410.21271"
    level: ClassVar[Level] = Level.GRAM
    needs_pattern: ClassVar[bool] = False

    def split(self, stack: Stack, ranks: Sequence[int], pattern: Pattern | None) -> Tensor:
        """Nothing."""
        return torch.zeros_like(stack.W_OI)
