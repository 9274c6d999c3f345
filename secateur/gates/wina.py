"""WINA: "WINA: Weight Informed Neuron Activation for Accelerating Large Language Model Inference", Chen et al. 2025,
arXiv:2505.19427, section 3.

O: output features, I: input features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from secateur.core.options import check_options, option
from secateur.core.registry import sparsifier
from secateur.core.stats import Level
from secateur.gates.section import LARGEST, THRESHOLD


@sparsifier
@dataclass(frozen=True)
class WINA:
    """Reads the weights of the inputs with the largest |x_j|·‖W_:j‖₂, as many for every token.

    The rotation that the paper also proposes, which makes this the best choice, is left out: its products take more than it
    saves.
    """

    keep: str = option(
        "largest",
        "Inputs read: as many largest for each token, or those over a threshold.",
        choices=(LARGEST, THRESHOLD),
    )

    name: ClassVar[str] = "wina"
    level: ClassVar[Level] = Level.MOMENTS
    neurons_only: ClassVar[bool] = False
    paper: ClassVar[str] = "Chen et al. 2025, arXiv:2505.19427"

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def rule(self) -> str:
        return self.keep

    def scale(self, weights: Sequence[Tensor]) -> Tensor:
        # Of all that read the input: one choice is made for them together.
        square_I = torch.stack([W_OI.float().square().sum(0) for W_OI in weights]).sum(0)
        return square_I.sqrt().cpu()
