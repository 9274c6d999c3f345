"""CoreInfer: "CoreInfer: Accelerating Large Language Model Inference with Semantics-Inspired Adaptive Sparse Activation",
Wang et al. 2024, arXiv:2410.18311, section 3; and GRIFFIN: "Prompt-prompted Adaptive Structured Pruning for Efficient LLM
Generation", Dong et al. 2024, arXiv:2404.01365, section 4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from secateur.core.options import check_options, option
from secateur.core.registry import sparsifier
from secateur.core.stats import Level
from secateur.gates.section import NORM, OFTEN


@sparsifier
@dataclass(frozen=True)
class CoreInfer:
    """Chooses neurons by the prompt and reads their weights alone for all that is written then.

    By `often` (CoreInfer) they are those that are most often among the largest 40 % of a token's; by `norm` (GRIFFIN) those
    of the greatest norm over the tokens, each token's neurons scaled to norm 1. It acts on what reads the neurons.
    """

    neurons: str = option(OFTEN, "What tells which neurons a prompt needs.", choices=(OFTEN, NORM))

    name: ClassVar[str] = "coreinfer"
    level: ClassVar[Level] = Level.MOMENTS
    neurons_only: ClassVar[bool] = True
    paper: ClassVar[str] = "Wang et al. 2024, arXiv:2410.18311"

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def rule(self) -> str:
        return self.neurons
