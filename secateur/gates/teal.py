"""TEAL: "Training-Free Activation Sparsity in Large Language Models", Liu et al. 2024, arXiv:2408.14690, section 4."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from secateur.core.registry import sparsifier
from secateur.core.stats import Level
from secateur.gates.section import THRESHOLD


@sparsifier
@dataclass(frozen=True)
class TEAL:
    """Reads the weights of those inputs that exceed a threshold: y = W s(x), s(x)_j = x_j where |x_j| > t, else 0."""

    name: ClassVar[str] = "teal"
    level: ClassVar[Level] = Level.MOMENTS
    neurons_only: ClassVar[bool] = False
    paper: ClassVar[str] = "Liu et al. 2024, arXiv:2408.14690"
    rule: ClassVar[str] = THRESHOLD
