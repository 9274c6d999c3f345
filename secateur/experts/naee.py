"""NAEE: "Not All Experts are Equal: Efficient Expert Pruning and Skipping for Mixture-of-Experts LLMs", Lu et al. 2024,
arXiv:2402.14800.

E: experts, T: tokens of the sample, H: hidden size.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import combinations, product
from math import comb
from typing import ClassVar

import torch
from torch import Tensor

from secateur.core.registry import expert_score
from secateur.errors import UsageError
from secateur.experts.by_score import ByScore
from secateur.experts.kept_experts import KeptExperts
from secateur.experts.layer_seen import LayerSeen, Sample

# So many sets of experts are tried one by one, as the 70 of four of eight; of more, experts go one after the other.
_MOST_SETS = 70


@expert_score
@dataclass(frozen=True)
class NAEE(ByScore):
    """Keep the set C of experts for which the layer's output changes least: min ‖F(x) − F_C(x)‖ (equation 3).

    F_C is the layer whose router has lost the rows of the others: what it would have sent there goes to the next best. All
    sets are tried where there are few, as in the paper; else the expert goes whose loss costs least beside those that have
    gone, one after the other, which is no part of the paper.
    """

    name: ClassVar[str] = "naee"
    paper: ClassVar[str] = "Lu et al. 2024, arXiv:2402.14800"
    needs: ClassVar[str] = "what all experts make of some of the text"
    sampled: ClassVar[int] = 256

    def scores(self, seen: LayerSeen) -> Tensor:
        """What each expert is worth: how much the output changes if it alone goes, `[E]`."""
        losses, whole_TH = _Losses(seen), list(range(seen.experts))
        return torch.tensor([losses.of([e for e in whole_TH if e != lost]) for lost in whole_TH], dtype=torch.float64)

    def choose(self, seen: LayerSeen, count: int, held: Collection[int] = ()) -> KeptExperts:
        """See `ByScore`; what super experts do is in the outputs, so that none is held."""
        losses = _Losses(seen)
        each, own = seen.experts // seen.groups, count // seen.groups
        if comb(each, own) ** seen.groups <= _MOST_SETS:
            return KeptExperts(min(_sets(seen.groups, each, own), key=losses.of))
        kept = list(range(seen.experts))
        # With groups one of each goes at a time: the router takes groups of one size.
        while len(kept) > count:
            gone = set()
            for members in (
                kept[i : i + len(kept) // seen.groups] for i in range(0, len(kept), len(kept) // seen.groups)
            ):
                gone.add(min(members, key=lambda lost: losses.of([e for e in kept if e != lost])))
            kept = [e for e in kept if e not in gone]
        return KeptExperts(tuple(kept))


def _sets(groups: int, each: int, own: int) -> Iterator[tuple[int, ...]]:
    """All ways to keep `own` of the `each` experts of every group."""
    of_group = [combinations(range(g * each, (g + 1) * each), own) for g in range(groups)]
    return (tuple(e for part in parts for e in part) for parts in product(*of_group))


class _Losses:
    """How much the output of a layer changes where only some of its experts are left."""

    def __init__(self, seen: LayerSeen) -> None:
        if seen.sample is None:
            raise UsageError(
                "`expert_score` naee has to route the text anew, which this router does not let it do: take another"
            )
        self._sample: Sample = seen.sample
        self._whole_TH = self._sample.layer(range(seen.experts))

    def of(self, kept: Collection[int]) -> float:
        """‖F − F_C‖."""
        change: float = (self._sample.layer(sorted(kept)) - self._whole_TH).norm().item()
        return change
