"""The neurons of an expert as segments, each with all weights that belong to it.

I: inner size of an expert, H: hidden size, F: values of a segment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from secateur.experts.kept_experts import KeptExperts


@dataclass(frozen=True)
class ExpertWeights:
    """Of one expert, in float32.

    Attributes:
        firsts: gate and up projections, or up alone, `[I, H]` each; with a column more for the biases, where there are any.
        last_HI: the down projection.
        bias_H: of that.
    """

    firsts: tuple[Tensor, ...]
    last_HI: Tensor
    bias_H: Tensor | None = None

    def segments(self) -> Tensor:
        """The rows of the first projections and the columns of the last one, of each neuron, `[I, F]`."""
        return torch.cat([*self.firsts, self.last_HI.T], dim=1)

    def with_segments(self, segment_IF: Tensor, bias_H: Tensor | None = None) -> ExpertWeights:
        """An expert of other neurons."""
        widths = [first.shape[1] for first in self.firsts]
        *firsts, last_IH = segment_IF.split([*widths, len(self.last_HI)], dim=1)
        return ExpertWeights(tuple(firsts), last_IH.T, self.bias_H if bias_H is None else bias_H)

    @property
    def gate_width(self) -> int:
        """How many values of a segment are the gate's; 0 where an expert has none."""
        return self.firsts[0].shape[1] if len(self.firsts) > 1 else 0


class Merges(Protocol):
    """A method by which experts that stay take something over of those that go."""

    def merged(self, experts: Sequence[ExpertWeights], kept: KeptExperts) -> list[ExpertWeights]:
        """The experts that stay, of all of a layer."""
        ...
