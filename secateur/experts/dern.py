"""DERN: "Dropping Experts, Recombining Neurons: Retraining-Free Pruning for Sparse Mixture-of-Experts LLMs", Zhou et al. 2025,
arXiv:2509.10377.

Written from the paper's abstract and from a summary of its text, not from the text itself or its authors' code. They agree
on the score, on what a segment is, on moving it to the expert with the most similar one if that is similar enough (0.6 did
best, and leaving the gate's part out of the similarity was a little better), and on clustering by weighted spherical k-means
whose first centres are those of the largest gate rows. Not confirmed: that the norm of a cluster is the weighted mean, what
becomes of an empty one, how many rounds there are, and what "soft" share of the router's weight moves with a segment: a
stock folder has no place for it, so the rows of the router that stay are as they were.

E: experts, I: inner size, S: segments of one expert with those that it is given, F: values of a segment, C: centres.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from secateur.core.options import check_options, option
from secateur.core.registry import expert_score
from secateur.experts.by_score import ByScore
from secateur.experts.kept_experts import KeptExperts
from secateur.experts.layer_seen import LayerSeen
from secateur.experts.segments import ExpertWeights

# Similarities that are computed at a time.
_AT_ONCE = 2**24


@expert_score
@dataclass(frozen=True)
class DERN(ByScore):
    """Drop the experts that get least of the router's weight, and give their neurons to those that stay.

    A neuron is a segment: its row of the gate and up projections and its column of the down projection. Each segment of an
    expert that goes is moved to the expert that has the most similar segment, by the cosine of its up and down parts, if that
    is more than `similarity`; else it goes. Each expert that was given some is clustered back to its size by spherical k-means,
    in which a segment counts as much as the expert that it comes from.
    """

    name: ClassVar[str] = "dern"
    paper: ClassVar[str] = "Zhou et al. 2025, arXiv:2509.10377"
    needs: ClassVar[str] = "the router's weights, and those of experts"
    merges: ClassVar[bool] = True

    similarity: float = option(0.6, "Least cosine of a neuron that moves to another expert.", low=-1, high=1)
    rounds: int = option(10, "Most rounds of clustering.", low=1)

    def __post_init__(self) -> None:
        check_options(self)

    def scores(self, seen: LayerSeen) -> Tensor:
        """The mean of the router's weight over all tokens, `[E]`."""
        return seen.gate_E / max(seen.tokens, 1)

    def choose(self, seen: LayerSeen, count: int, held: Collection[int] = ()) -> KeptExperts:
        """See `ByScore`; with the scores, by which segments count."""
        kept = super().choose(seen, count, held).kept
        return KeptExperts(kept, weights=tuple(self.scores(seen).tolist()))

    def merged(self, experts: Sequence[ExpertWeights], kept: KeptExperts) -> list[ExpertWeights]:
        """The experts that stay, with neurons of the others."""
        segments = [expert.segments() for expert in experts]
        lost = [e for e in range(len(experts)) if e not in kept.kept]
        skip = experts[0].gate_width
        own = [F.normalize(segments[e][:, skip:], dim=1) for e in kept.kept]
        given: list[list[Tensor]] = [[segments[e]] for e in kept.kept]
        counts = [[torch.full((len(segments[e]),), kept.weights[e])] for e in kept.kept]
        for e in lost:
            best_I, nearest_I = _nearest(F.normalize(segments[e][:, skip:], dim=1), own)
            for place in range(len(kept.kept)):
                moved_I = (nearest_I == place) & (best_I > self.similarity)
                given[place].append(segments[e][moved_I])
                counts[place].append(torch.full((int(moved_I.sum()),), kept.weights[e]))
        return [
            experts[e].with_segments(
                _clustered(torch.cat(given[place]), torch.cat(counts[place]), len(segments[e]), skip, self.rounds)
            )
            for place, e in enumerate(kept.kept)
        ]


def _nearest(unit_IF: Tensor, own: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """For each segment the greatest cosine with any of those of some experts, and the place of that expert."""
    rows = max(1, _AT_ONCE // max(len(each) for each in own))
    found = [
        torch.stack([(part_RF @ each_IF.T).amax(1) for each_IF in own], dim=1).max(dim=1)
        for part_RF in unit_IF.split(rows)
    ]
    return torch.cat([each.values for each in found]), torch.cat([each.indices for each in found])


def _clustered(segment_SF: Tensor, weight_S: Tensor, centres: int, gate: int, rounds: int) -> Tensor:
    """So many segments in the place of more, `[C, F]`; the same ones where there are no more."""
    if len(segment_SF) <= centres:
        return segment_SF
    size_S = segment_SF.norm(dim=1)
    unit_SF = F.normalize(segment_SF, dim=1)
    largest_S = segment_SF[:, : gate or segment_SF.shape[1]].abs().amax(1)
    first_C = largest_S.sort(descending=True, stable=True).indices[:centres]
    unit_CF, of_S = unit_SF[first_C], torch.full((len(segment_SF),), -1)
    # One that nothing depends on still has a direction.
    weight_S = weight_S.to(segment_SF).clamp(min=torch.finfo(torch.float32).tiny)
    for _ in range(rounds):
        rows = max(1, _AT_ONCE // centres)
        best = [(part_RF @ unit_CF.T).max(dim=1) for part_RF in unit_SF.split(rows)]
        now_S = torch.cat([each.indices for each in best])
        _fill(now_S, torch.cat([each.values for each in best]), centres)
        if torch.equal(now_S, of_S):
            break
        of_S = now_S
        sum_CF = torch.zeros_like(unit_CF).index_add_(0, of_S, weight_S[:, None] * unit_SF)
        unit_CF = F.normalize(sum_CF, dim=1)
    mass_C = weight_S.new_zeros(centres).index_add_(0, of_S, weight_S)
    size_C = weight_S.new_zeros(centres).index_add_(0, of_S, weight_S * size_S) / mass_C
    return unit_CF * size_C[:, None]


def _fill(of_S: Tensor, cosine_S: Tensor, centres: int) -> None:
    """Give each cluster that none is in the segment that is least like its centre and not alone there."""
    count_C = torch.bincount(of_S, minlength=centres)
    for c in (count_C == 0).nonzero()[:, 0].tolist():
        farthest = int(cosine_S.masked_fill(count_C[of_S] < 2, torch.inf).argmin())
        count_C[of_S[farthest]] -= 1
        count_C[c] += 1
        of_S[farthest], cosine_S[farthest] = c, 1.0
