"""Scores of experts against their equations, written once more in double precision and token by token."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_examples import tries

from secateur.core.registry import EXPERT_SCORES
from secateur.errors import UsageError
from secateur.experts.by_score import best, super_experts
from secateur.experts.kept_experts import KeptExperts
from secateur.experts.layer_seen import LayerSeen, Sample
from secateur.recipes.methods import make

E, T, H, K = 6, 40, 5, 2


def text(seed=0, experts=E, tokens=T):
    """What goes where: for each token its experts, their weights, and what each gives; and the router's scores of all."""
    draw = torch.Generator().manual_seed(seed)
    scores_TE = torch.randn(tokens, experts, generator=draw)
    weight_TK, index_TK = scores_TE.softmax(1).topk(K, dim=1)
    output_ETH = torch.randn(experts, tokens, H, generator=draw) * torch.arange(1, experts + 1)[:, None, None]
    return scores_TE, index_TK, weight_TK / weight_TK.sum(1, keepdim=True), output_ETH


def seen(scores_TE, index_TK, weight_TK, output_ETH, batch=T):
    found = LayerSeen.empty(len(output_ETH))
    for first in range(0, len(scores_TE), batch):
        rows = slice(first, first + batch)
        for e in range(len(output_ETH)):
            token_R, k_R = (index_TK[rows] == e).nonzero(as_tuple=True)
            found.add_outputs(e, weight_TK[rows][token_R, k_R], output_ETH[e, rows][token_R])
        found.add_tokens(len(scores_TE[rows]), scores_TE[rows])
    return found


def slow(name, index_TK, weight_TK, output_ETH):
    """A score by its equation."""
    found = []
    for e in range(len(output_ETH)):
        own = [
            (float(weight_TK[t, k]), output_ETH[e, t].double().norm().item())
            for t, k in (index_TK == e).nonzero().tolist()
        ]
        n = max(len(own), 1)
        found.append(
            {
                "frequency": len(own),
                "gate": sum(c for c, _ in own),
                "reap": sum(c * f for c, f in own) / n,
                "ean": sum(f for _, f in own),
                "man": sum(f for _, f in own) / n,
                "msan": sum(f * f for _, f in own) / n,
                "dern": sum(c for c, _ in own) / len(index_TK),
                "uncurl": len(own),
            }[name]
        )
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("name", sorted(set(EXPERT_SCORES) - {"naee"}))
def test_a_score_is_its_equation(name):
    scores_TE, index_TK, weight_TK, output_ETH = text()
    index_TK[index_TK == 2] = 7  # expert 2 is sent nothing
    found = make("expert_score", name, {}).scores(seen(scores_TE, index_TK, weight_TK, output_ETH))
    torch.testing.assert_close(found, slow(name, index_TK, weight_TK, output_ETH), rtol=1e-6, atol=1e-9)


def test_batches_and_halves_of_a_text_do_not_matter():
    whole, parts = seen(*text()), seen(*text(), batch=7)
    one, two = (
        seen(*(x[part] if x.ndim < 3 else x[:, part] for x in text())) for part in (slice(0, 13), slice(13, None))
    )
    one += two
    for other in (parts, one):
        for field in vars(whole):
            a, b = getattr(whole, field), getattr(other, field)
            assert a == b if not isinstance(a, torch.Tensor) else torch.allclose(a, b, rtol=1e-12)


def test_likeness_is_the_correlation_of_scores_less_their_mean():
    scores_TE, *rest = text()
    found = seen(scores_TE, *rest).alike_EE()
    centred = (scores_TE - scores_TE.mean(1, keepdim=True)).double()
    torch.testing.assert_close(found, torch.corrcoef(centred.T), rtol=1e-6, atol=1e-9)
    again = seen(scores_TE + torch.randn(T, 1, generator=torch.Generator().manual_seed(1)), *rest).alike_EE()
    torch.testing.assert_close(again, found, rtol=1e-4, atol=1e-5)
    nothing = LayerSeen.empty(3).alike_EE()
    assert torch.equal(nothing, torch.eye(3, dtype=torch.float64))


@given(st.integers(1, 4), st.integers(1, 4), st.data())
@tries(30)
def test_the_best_of_every_group(groups, each, data):
    experts, own = groups * each, data.draw(st.integers(1, each))
    score_E = torch.tensor(
        data.draw(st.lists(st.sampled_from([0.0, 1.0, 2.0, 3.0]), min_size=experts, max_size=experts))
    )
    held = data.draw(st.sets(st.integers(0, experts - 1), max_size=own))
    kept = best(score_E, groups * own, groups, held)
    assert list(kept) == sorted(set(kept))
    for g in range(groups):
        members = range(g * each, (g + 1) * each)
        inside = [e for e in kept if e in members]
        assert len(inside) == own
        assert {e for e in held if e in members} <= set(inside)
        free = [e for e in inside if e not in held]
        lost = [e for e in members if e not in kept]
        assert not free or not lost or min(score_E[free]) >= max(score_E[lost])


def test_super_experts_stand_far_above_all_others():
    peaks = [torch.rand(16, generator=torch.Generator().manual_seed(i), dtype=torch.float64) + 0.5 for i in range(4)]
    assert super_experts(peaks) == [set(), set(), set(), set()]
    peaks[1][3], peaks[3][5] = 500.0, 600.0
    assert super_experts(peaks) == [set(), {3}, set(), set()]  # none in the last quarter of the layers


def sample(seed=0, experts=E):
    """A layer of experts on a few tokens, and what a router makes of them where only some are left."""
    scores_TE, _, _, output_ETH = text(seed, experts)

    def routed(kept):
        left_TE = torch.full_like(scores_TE, -math.inf)
        left_TE[:, list(kept)] = scores_TE[:, list(kept)]
        weight_TK, index_TK = left_TE.softmax(1).topk(K, dim=1)
        weight_TE = torch.zeros_like(scores_TE).scatter_(1, index_TK, weight_TK / weight_TK.sum(1, keepdim=True))
        return weight_TE[:, list(kept)]

    return Sample(output_ETH, routed)


def change(layer, kept, experts=E):
    """‖F − F_C‖, token by token."""
    total = 0.0
    ways = [(who, layer.routed(who)) for who in (range(experts), kept)]
    for t in range(T):
        sums = [
            sum(float(weight[t, i]) * layer.output_ETH[e, t].double() for i, e in enumerate(who))
            for who, weight in ways
        ]
        total += float((sums[0] - sums[1]).square().sum())
    return math.sqrt(total)


def test_naee_finds_the_set_that_changes_the_output_least():
    found = LayerSeen.empty(E)
    found.sample = sample()
    method = make("expert_score", "naee", {})
    best_set = min(itertools.combinations(range(E), 4), key=lambda kept: change(found.sample, kept))
    assert method.choose(found, 4).kept == best_set
    alone = [change(found.sample, [e for e in range(E) if e != lost]) for lost in range(E)]
    torch.testing.assert_close(method.scores(found), torch.tensor(alone, dtype=torch.float64), rtol=1e-5, atol=1e-6)


def test_naee_drops_one_after_the_other_where_sets_are_many():
    experts = 12
    found = LayerSeen.empty(experts)
    found.sample = sample(1, experts)
    kept = list(range(experts))
    while len(kept) > 9:  # C(12, 9) is 220
        kept.remove(min(kept, key=lambda lost: change(found.sample, [e for e in kept if e != lost], experts)))
    assert make("expert_score", "naee", {}).choose(found, 9).kept == tuple(kept)
    found.groups = 2
    of_groups = make("expert_score", "naee", {}).choose(found, 8).kept
    assert [sum(e < 6 for e in of_groups), len(of_groups)] == [4, 8]
    found.sample = None
    with pytest.raises(UsageError, match="take another"):
        make("expert_score", "naee", {}).choose(found, 6)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ([0, 1], "must be a mapping"),
        ({"kept": []}, "must be a mapping"),
        ({"kept": [0, 1], "more": []}, "must be a mapping"),
        ({"kept": [1, 0]}, "rising numbers"),
        ({"kept": [0, 0]}, "rising numbers"),
        ({"kept": [True]}, "numbers of at least 0"),
        ({"kept": [-1, 2]}, "numbers of at least 0"),
        ({"kept": [0], "groups": [0, 1]}, "places in 'kept', which has 1"),
        ({"kept": [0], "weights": ["x"]}, "numbers of at least 0"),
    ],
)
def test_a_choice_of_experts_that_is_none(content, says):
    with pytest.raises(UsageError, match=says):
        KeptExperts.from_dict(content, "the choice")


def test_a_choice_of_experts_comes_back_from_plain_values():
    kept = KeptExperts((1, 4), (0, 0, 1, 1, 1), (0.5, 1.0, 0.0, 2.0, 3.0))
    assert KeptExperts.from_dict(kept.to_dict(), "it") == kept
    kept.check(5, "it")
    with pytest.raises(UsageError, match="keeps expert 4, and there are 4"):
        kept.check(4, "it")
    with pytest.raises(UsageError, match="a value for each of the 6"):
        kept.check(6, "it")
