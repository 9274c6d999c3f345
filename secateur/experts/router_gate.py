"""Gate: how much the router trusts an expert.

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
class Gate(ByScore):
    """Keep the experts to which the router gives most weight: Σc, over the tokens that they are sent."""

    name: ClassVar[str] = "gate"
    paper: ClassVar[str] = ""

    def scores(self, seen: LayerSeen) -> Tensor:
        """score_E: see `ByScore`."""
        return seen.gate_E
