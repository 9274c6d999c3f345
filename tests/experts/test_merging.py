"""Experts that take something over of those that go: DERN's neurons and UNCURL's means, on weights whose answer is known."""

import pytest
import torch

from secateur.experts.dern import _clustered
from secateur.experts.kept_experts import KeptExperts
from secateur.experts.layer_seen import LayerSeen
from secateur.experts.segments import ExpertWeights
from secateur.experts.uncurl import _kmeans, _spectral
from secateur.recipes.methods import make

I, H = 6, 5


def expert(seed, bias=False):
    draw = torch.Generator().manual_seed(seed)
    width = H + bias
    firsts = tuple(torch.randn(I, width, generator=draw) for _ in range(2))
    return ExpertWeights(firsts, torch.randn(H, I, generator=draw), torch.randn(H, generator=draw) if bias else None)


def output(own, x_TH):
    """What such an expert computes."""
    if own.firsts[0].shape[1] > H:
        x_TH = torch.cat([x_TH, torch.ones(len(x_TH), 1)], dim=1)
    gate, up = (x_TH @ W.T for W in own.firsts)
    out = torch.nn.functional.silu(gate) * up @ own.last_HI.T
    return out if own.bias_H is None else out + own.bias_H


def shuffled(own, order):
    return ExpertWeights(tuple(W[order] for W in own.firsts), own.last_HI[:, order], own.bias_H)


@pytest.mark.parametrize("bias", [False, True])
def test_segments_are_all_of_an_expert(bias):
    own, x_TH = expert(0, bias), torch.randn(7, H, generator=torch.Generator().manual_seed(9))
    again = own.with_segments(own.segments())
    assert all(map(torch.equal, (*again.firsts, again.last_HI), (*own.firsts, own.last_HI)))
    assert again.bias_H is own.bias_H
    order = torch.randperm(I, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(output(own.with_segments(own.segments()[order]), x_TH), output(own, x_TH))


def test_dern_leaves_experts_alone_that_get_nothing():
    experts = [expert(e) for e in range(3)]
    found = make("expert_score", "dern", {"similarity": 1.0}).merged(
        experts, KeptExperts((0, 2), weights=(0.2, 0.1, 0.3))
    )
    for own, was in zip(found, (experts[0], experts[2]), strict=True):
        assert torch.equal(own.segments(), was.segments())


def test_dern_gives_a_neuron_to_the_expert_that_has_one_like_it():
    experts = [expert(e) for e in range(3)]
    twin = experts[2].segments().clone()
    experts[1] = experts[1].with_segments(torch.cat([twin[:2], experts[1].segments()[2:]]))
    found = make("expert_score", "dern", {"similarity": 0.999}).merged(
        experts, KeptExperts((0, 2), weights=(0.2, 0.1, 0.3))
    )
    assert torch.equal(found[0].segments(), experts[0].segments())
    # Two equal ones are one cluster, and leave what they were, in another order.
    before, after = experts[2].segments(), found[1].segments()
    nearest = torch.cdist(after, before).argmin(1)
    assert sorted(nearest.tolist()) == list(range(I))
    torch.testing.assert_close(after, before[nearest], rtol=1e-4, atol=1e-5)


def test_clusters_are_weighted_and_their_norms_the_weighted_mean():
    direction = torch.eye(4)
    segment_SF = torch.stack([3 * direction[0], direction[0], 2 * direction[1]])
    found = _clustered(segment_SF, torch.tensor([1.0, 3.0, 1.0]), 2, 2, 10)
    sizes = sorted(found.norm(dim=1).tolist())
    assert sizes == pytest.approx([(3 * 1 + 1 * 3) / 4, 2.0])
    assert torch.equal(found > 0, torch.stack([direction[0], direction[1]]).bool()[found.argmax(1)])


def seen_of(scores_TE):
    found = LayerSeen.empty(scores_TE.shape[1])
    found.add_tokens(len(scores_TE), scores_TE)
    index_TK = scores_TE.topk(2, dim=1).indices
    for e in range(scores_TE.shape[1]):
        found.count_E[e] = (index_TK == e).sum()
    return found


def test_uncurl_groups_experts_that_are_chosen_together():
    draw = torch.Generator().manual_seed(0)
    topics = torch.randn(200, 3, generator=draw)
    scores_TE = topics[:, [0, 1, 2, 0, 1, 2, 0]] + 0.1 * torch.randn(200, 7, generator=draw)
    kept = make("expert_score", "uncurl", {}).choose(seen_of(scores_TE), 3)
    groups = {}
    for e, place in enumerate(kept.groups):
        groups.setdefault(kept.kept[place], set()).add(e)
    assert sorted(map(sorted, groups.values())) == [[0, 3, 6], [1, 4], [2, 5]]
    assert all(
        head in members and kept.weights[head] == max(kept.weights[e] for e in members)
        for head, members in groups.items()
    )


@pytest.mark.parametrize("bias", [False, True])
def test_uncurl_undoes_any_order_of_neurons(bias):
    pytest.importorskip("scipy")
    own, x_TH = expert(0, bias), torch.randn(7, H, generator=torch.Generator().manual_seed(9))
    order = torch.randperm(I, generator=torch.Generator().manual_seed(1))
    kept = KeptExperts((0,), (0, 0), (3.0, 1.0))
    (found,) = make("expert_score", "uncurl", {}).merged([own, shuffled(own, order)], kept)
    torch.testing.assert_close(output(found, x_TH), output(own, x_TH), rtol=1e-4, atol=1e-5)
    plain = 0.75 * own.segments() + 0.25 * shuffled(own, order).segments()
    assert not torch.allclose(found.segments(), plain)


def test_uncurl_weighs_by_use():
    pytest.importorskip("scipy")
    own, scaled = expert(0), expert(0)
    scaled = ExpertWeights(scaled.firsts, 5 * scaled.last_HI)
    (found,) = make("expert_score", "uncurl", {}).merged([own, scaled], KeptExperts((0,), (0, 0), (3.0, 1.0)))
    torch.testing.assert_close(found.last_HI, 2 * own.last_HI)
    (alone,) = make("expert_score", "uncurl", {}).merged([own, scaled], KeptExperts((0,), (0, 0), (3.0, 0.0)))
    assert alone is own


def test_no_cluster_is_empty():
    row = torch.zeros(5, 2, dtype=torch.float64)  # all alike
    for clusters in range(1, 6):
        of_E, _ = _kmeans(row, clusters, torch.Generator().manual_seed(0))
        assert sorted(set(of_E.tolist())) == list(range(clusters))
        of_E = _spectral(torch.ones(5, 5, dtype=torch.float64), clusters)
        assert sorted(set(of_E.tolist())) == list(range(clusters))
