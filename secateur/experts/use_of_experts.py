"""How a model uses its experts on a text, in plain values."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from secateur.experts.bit_rules import bits_by_rules


@dataclass(frozen=True)
class LayerUse:
    """The experts of one layer.

    Attributes:
        name: of the module that they are in.
        share: of the tokens that each is sent.
        scores: what each is worth, by the name of the score.
        supers: the numbers of super experts.
        alike: the correlation of the router's scores of each two experts, a row for each.
        importance: of the block: 1 − the cosine of what it reads and what it gives, in the mean over tokens.
        outliers: by how much the weight of each expert that lies farthest out does, see `bit_rules.outlier_score`.
        linears: what the linears of one expert are called.
    """

    name: str
    share: list[float]
    scores: dict[str, list[float]]
    supers: list[int]
    alike: list[list[float]]
    importance: float = 0.0
    outliers: list[float] = field(default_factory=list)
    linears: list[str] = field(default_factory=list)

    @property
    def evenness(self) -> float:
        """The entropy of the use of experts, relative to that where all are used as much: 1; and 0 where one does all."""
        total = sum(self.share)
        entropy = -sum(s / total * math.log(s / total) for s in self.share if s > 0) if total else 0.0
        return entropy / math.log(len(self.share)) if len(self.share) > 1 else 1.0

    @property
    def most_alike(self) -> tuple[int, int, float] | None:
        """The two experts whose scores are most alike, and how much; None where there are no two."""
        pairs = [(i, j, row[j]) for i, row in enumerate(self.alike) for j in range(i + 1, len(row))]
        return max(pairs, key=lambda pair: pair[2], default=None)


@dataclass(frozen=True)
class ExpertUse:
    """What was found of a model.

    Attributes:
        model: its name.
        tokens: of the text.
        of_a_token: how many experts each token is sent to.
        groups: of experts, of which the router chooses some first.
        layers: in order.
    """

    model: str
    tokens: int
    of_a_token: int
    groups: int
    layers: list[LayerUse]

    def bits(self, mean: float) -> dict[str, int]:
        """Bits of every linear of every expert by the rules of QuantMoE-Bench, with so many in the mean: see `bit_rules`."""
        shares, importance = [layer.share for layer in self.layers], [layer.importance for layer in self.layers]
        return {
            f"{layer.name}.{e}.{linear}": bits
            for layer, found in zip(self.layers, bits_by_rules(shares, importance, mean), strict=True)
            for e, bits in enumerate(found)
            for linear in layer.linears
        }
