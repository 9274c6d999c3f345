"""MAN: the mean activation norm, of Liu et al. 2026, arXiv:2606.15716, who find gate-free means best for general use.

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
class MAN(ByScore):
    """Keep the experts whose outputs are largest where they are used: the mean of ‖f‖ over their tokens."""

    name: ClassVar[str] = "man"
    paper: ClassVar[str] = "Liu et al. 2026, arXiv:2606.15716"

    def scores(self, seen: LayerSeen) -> Tensor:
        """score_E: see `ByScore`."""
        return seen.mean(seen.norm_E)
