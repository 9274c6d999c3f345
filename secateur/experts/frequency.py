"""Frequency: how often the router chooses an expert.

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
class Frequency(ByScore):
    """Keep the experts that the router sends most tokens to."""

    name: ClassVar[str] = "frequency"
    paper: ClassVar[str] = ""

    def scores(self, seen: LayerSeen) -> Tensor:
        """score_E: see `ByScore`."""
        return seen.count_E
