"""Keeping the experts with the greatest scores: what most methods do.

E: experts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from secateur.experts.kept_experts import KeptExperts
from secateur.experts.layer_seen import LayerSeen

# A super expert gives what is greater than this quantile of all experts, this share of the greatest, and so many times the
# median; and lies in this share of the layers, from the first on.
_QUANTILE, _OF_GREATEST, _OF_MEDIAN, _FIRST = 0.995, 0.1, 10.0, 0.75


class ByScore(ABC):
    """A method that gives each expert a score, by which those of a layer are kept.

    Attributes:
        needs: what it looks at, in words.
        sampled: of how many tokens it wants to know what all experts make of them.
        of_task: whether it means a text of one task.
        merges: whether experts that stay take something over of those that go.
    """

    needs: ClassVar[str] = "what experts give for the text"
    sampled: ClassVar[int] = 0
    of_task: ClassVar[bool] = False
    merges: ClassVar[bool] = False

    def check(self) -> None:  # noqa: B027 - most lack nothing
        """Raise UsageError where it lacks something."""

    @abstractmethod
    def scores(self, seen: LayerSeen) -> Tensor:
        """What each expert of a layer is worth, `[E]`."""

    def choose(self, seen: LayerSeen, count: int, held: Collection[int] = ()) -> KeptExperts:
        """Which experts of a layer stay: so many, as many in each of the router's groups; `held`: those that do in any case."""
        return KeptExperts(best(self.scores(seen), count, seen.groups, held))


def best(score_E: Tensor, count: int, groups: int = 1, held: Collection[int] = ()) -> tuple[int, ...]:
    """The numbers of those with the greatest scores, rising: as many in each group of neighbours; of equal ones the first.

    Args:
        held: which count more than all others.
    """
    first_E = torch.zeros(len(score_E), dtype=torch.float64)
    first_E[list(held)] = 1.0
    kept: list[int] = []
    for members in torch.arange(len(score_E)).split(len(score_E) // groups):
        order = sorted(members.tolist(), key=lambda e: (-first_E[e].item(), -score_E[e].item(), e))
        kept += order[: count // groups]
    return tuple(sorted(kept))


def super_experts(peaks: Sequence[Tensor]) -> list[set[int]]:
    """Of each layer the experts whose outputs are far above all others', on which a model depends whatever their use.

    As Su et al. 2025, arXiv:2507.23279, find them: above the 99.5 % quantile and a tenth of the greatest of the experts of
    the first layers, here three quarters of them. In a model of few experts the greatest is always above that quantile, so
    it has to be ten times the median, too.

    Args:
        peaks: max‖f‖ of the experts of each layer, in order.
    """
    layers = max(1, round(_FIRST * len(peaks)))
    every = torch.cat(list(peaks[:layers]))
    limits = (every.quantile(_QUANTILE), _OF_GREATEST * every.max(), _OF_MEDIAN * every.median())
    limit = max(each.item() for each in limits)
    return [set((peak_E > limit).nonzero()[:, 0].tolist()) if i < layers else set() for i, peak_E in enumerate(peaks)]
