"""EAN: the activation norm of experts, of "Finding Fantastic Experts in MoEs", Jaiswal et al. 2025, arXiv:2504.05586.

E: experts.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from secateur.core.registry import expert_score
from secateur.experts.by_score import ByScore
from secateur.experts.layer_seen import LayerSeen


@expert_score
@dataclass(frozen=True)
class EAN(ByScore):
    """Keep the experts whose outputs are largest over the text: Σ‖f‖."""

    name: ClassVar[str] = "ean"
    paper: ClassVar[str] = "Jaiswal et al. 2025, arXiv:2504.05586"

    def scores(self, seen: LayerSeen) -> Tensor:
        """score_E: see `ByScore`."""
        return seen.norm_E
