"""UNCURL: "Revisiting SMoE Language Models by Evaluating Inefficiencies with Task Specific Expert Pruning", Sarkar et al. 2024,
arXiv:2409.01483.

Written from the paper's abstract and from what others say of its method, not from its text: groups of experts by spectral
clustering of the router's logits on the text of a task, neurons aligned by permutation, and a mean by how often each expert is
used. Not confirmed: how logits become the affinity (here their correlation over tokens), and what becomes of the router. A
whole router whose rows lead to the same experts would save no byte in a stock folder, so the row of the most used expert of a
group stays and stands for the group.

E: experts, C: clusters, D: dimensions of the spectral embedding, I: inner size of an expert, F: values of a segment.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from secateur.core.registry import expert_score
from secateur.errors import UsageError
from secateur.experts.by_score import ByScore
from secateur.experts.kept_experts import KeptExperts
from secateur.experts.layer_seen import LayerSeen
from secateur.experts.segments import ExpertWeights

_STARTS, _ROUNDS = 16, 50


@expert_score
@dataclass(frozen=True)
class UNCURL(ByScore):
    """Merge experts that the router chooses for the same tokens of a task.

    Experts are grouped by spectral clustering of the router's scores. In each group the neurons of all are matched to those of
    the most used one, and the mean of their weights, each counting by its use, takes its place. The text has to be one of
    the task.
    """

    name: ClassVar[str] = "uncurl"
    paper: ClassVar[str] = "Sarkar et al. 2024, arXiv:2409.01483"
    needs: ClassVar[str] = "the router's scores, and the weights of experts"
    of_task: ClassVar[bool] = True
    merges: ClassVar[bool] = True

    def check(self) -> None:
        """Raise UsageError where neurons cannot be matched."""
        if find_spec("scipy") is None:
            raise UsageError(
                "`expert_score` uncurl needs scipy, which is not installed: pip install 'secateur[experts]'"
            )

    def scores(self, seen: LayerSeen) -> Tensor:
        """How often each is used, `[E]`: the most used one of a group stands for it."""
        return seen.count_E

    def choose(self, seen: LayerSeen, count: int, held: Collection[int] = ()) -> KeptExperts:
        """Groups of experts, each of one of the router's; an expert that is held stands for its own."""
        alike_EE, used_E = seen.alike_EE(), seen.count_E.clone()
        used_E[list(held)] += used_E.sum() + 1
        each, own = seen.experts // seen.groups, count // seen.groups
        kept: list[int] = []
        head_E = torch.zeros(seen.experts, dtype=torch.long)
        for first in range(0, seen.experts, each):
            cluster_E = _spectral((1 + alike_EE[first : first + each, first : first + each]) / 2, own)
            for c in range(own):
                members = first + (cluster_E == c).nonzero()[:, 0]
                head = int(members[used_E[members].argmax()])
                head_E[members] = head
                kept.append(head)
        kept.sort()
        places = tuple(kept.index(head) for head in head_E.tolist())
        return KeptExperts(tuple(kept), places, tuple(seen.count_E.tolist()))

    def merged(self, experts: Sequence[ExpertWeights], kept: KeptExperts) -> list[ExpertWeights]:
        """The experts that stay, each the mean of its group."""
        return [self._mean(experts, kept, place) for place in range(len(kept.kept))]

    def _mean(self, experts: Sequence[ExpertWeights], kept: KeptExperts, place: int) -> ExpertWeights:
        head = kept.kept[place]
        members = [e for e, group in enumerate(kept.groups) if group == place and kept.weights[e] > 0]
        if members in ([], [head]):
            return experts[head]
        total = sum(kept.weights[e] for e in members)
        own_IF = experts[head].segments()
        mean_IF, bias_H = torch.zeros_like(own_IF), experts[head].bias_H
        mean_H = None if bias_H is None else torch.zeros_like(bias_H)
        for e in members:
            share, segment_IF = kept.weights[e] / total, experts[e].segments()
            mean_IF += share * (segment_IF if e == head else segment_IF[_matching(own_IF, segment_IF)])
            if mean_H is not None:
                other_H = experts[e].bias_H
                assert other_H is not None
                mean_H += share * other_H
        return experts[head].with_segments(mean_IF, mean_H)


def _matching(own_IF: Tensor, other_IF: Tensor) -> Tensor:
    """Which segment of another expert goes to the place of each own one, so that the sum of their products is the greatest."""
    from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped,unused-ignore]

    _, columns = linear_sum_assignment((own_IF @ other_IF.T).numpy(force=True), maximize=True)
    return torch.as_tensor(columns)


def _spectral(affinity_EE: Tensor, clusters: int) -> Tensor:
    """The cluster of each expert, none of them empty, as Ng et al. 2001 find them: k-means of the rows of eigenvectors."""
    if clusters >= len(affinity_EE):
        return torch.arange(len(affinity_EE))
    degree_E = affinity_EE.sum(1).clamp(min=torch.finfo(torch.float64).tiny)
    scaled_EE = affinity_EE / (degree_E[:, None] * degree_E).sqrt()
    row_ED = F.normalize(torch.linalg.eigh(scaled_EE).eigenvectors[:, -clusters:], dim=1)
    draw = torch.Generator().manual_seed(0)
    found = [_kmeans(row_ED, clusters, draw) for _ in range(_STARTS)]
    return min(found, key=lambda each: each[1])[0]


def _kmeans(row_ED: Tensor, clusters: int, draw: torch.Generator) -> tuple[Tensor, float]:
    """The cluster of each row, none empty, and the sum of squared distances from the centres."""
    centre_CD = row_ED[_spread(row_ED, clusters, draw)]
    of_E = torch.full((len(row_ED),), -1)
    for _ in range(_ROUNDS):
        distance_EC = torch.cdist(row_ED, centre_CD).square()
        now_E = distance_EC.argmin(1)
        # What lies farthest from its centre begins a cluster that would be empty.
        for c in set(range(clusters)) - set(now_E.tolist()):
            several_E = torch.bincount(now_E, minlength=clusters)[now_E] > 1
            own_E = distance_EC.gather(1, now_E[:, None])[:, 0].masked_fill(~several_E, -1)
            now_E[own_E.argmax()] = c
        if torch.equal(now_E, of_E):
            break
        of_E = now_E
        centre_CD = torch.stack([row_ED[of_E == c].mean(0) for c in range(clusters)])
    error: float = (row_ED - centre_CD[of_E]).square().sum().item()
    return of_E, error


def _spread(row_ED: Tensor, clusters: int, draw: torch.Generator) -> list[int]:
    """First centres far from each other, as k-means++ draws them."""
    chosen = [int(torch.randint(len(row_ED), (1,), generator=draw))]
    while len(chosen) < clusters:
        distance_E = torch.cdist(row_ED, row_ED[chosen]).square().amin(1)
        distance_E[chosen] = 0
        if not distance_E.any():  # equal rows
            distance_E = torch.ones_like(distance_E)
            distance_E[chosen] = 0
        chosen.append(int(torch.multinomial(distance_E, 1, generator=draw)))
    return chosen
