"""REAP: "REAP the Experts: Why Pruning Prevails for One-Shot MoE compression", Lasby et al. 2025, arXiv:2510.13999.

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
class REAP(ByScore):
    """Keep the experts that add most to the layer's output where they are used: the mean of c‖f‖ over their tokens.

    c are the weights that the experts of a token have in the sum, which add up to 1 where the model makes them do.
    """

    name: ClassVar[str] = "reap"
    paper: ClassVar[str] = "Lasby et al. 2025, arXiv:2510.13999"

    def scores(self, seen: LayerSeen) -> Tensor:
        """score_E: see `ByScore`."""
        return seen.mean(seen.gated_E)
