"""Units of a linear's input features, which are kept or go together, and choosing which.

O: output features, I: input features, U: units, K: features that are kept, R: units of a group.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from secateur.core.patterns import drop_lowest


@dataclass(frozen=True)
class Units:
    """How input features make units, and how many of those stay.

    Attributes:
        size: features of a unit, neighbours: 1 for a neuron, those of a head for attention.
        each: units of a group, neighbours, too.
        groups: of which as many units stay in each: one of all neurons, those of the heads that share keys and values.
        keep: how many stay in each group.
    """

    size: int
    each: int
    groups: int
    keep: int

    @property
    def count(self) -> int:
        """U."""
        return self.each * self.groups

    @property
    def features(self) -> int:
        """I."""
        return self.size * self.count

    @property
    def kept(self) -> int:
        """How many stay in all."""
        return self.keep * self.groups

    def sums(self, x_I: Tensor) -> Tensor:
        """What a value of each feature comes to for each unit, `[U]`."""
        return x_I.view(-1, self.size).sum(1)

    def spread(self, x_U: Tensor) -> Tensor:
        """The value of its unit for each feature, `[I]`."""
        return x_U.repeat_interleave(self.size)

    def keep_best(self, score_U: Tensor) -> Tensor:
        """Mask of the units of highest score in each group; of equal ones the last."""
        score_GR = score_U.view(self.groups, self.each)
        return ~drop_lowest(score_GR, self.each - self.keep).view(-1)
