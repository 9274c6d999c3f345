"""Experts taken apart: they compute what the module of transformers computes, and go back into it to the bit."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mixtures import KINDS, MIXTURES, known, random_model
from random_examples import tries
from torch import nn

from secateur.errors import UsageError
from secateur.mixture.expert_rows import Copied, Routed, borrowed
from secateur.mixture.experts import Experts, Visit, visited
from secateur.mixture.unfuse import check_unfused, experts_in, fused_in, routers_in, unfuse
from secateur.model.structure import block_linears

IDS_NS = torch.randint(2, 300, (2, 24), generator=torch.Generator().manual_seed(3))


def apart(model):
    """A copy of a model whose experts are linears, with their weights."""
    model = copy.deepcopy(model)
    fused = {name: dict(model.get_submodule(name).named_parameters()) for name in fused_in(model)}
    unfuse(model, fused)
    for name, experts in experts_in(model).items():
        for weight, piece in experts.pieces.items():
            linear = experts.get_submodule(weight.removesuffix(".weight"))
            linear.weight = nn.Parameter(piece.of(fused[name][piece.parameter]).detach().clone())
    return model


@torch.no_grad()
def logits(model, ids_NS=IDS_NS):
    return model(ids_NS, use_cache=False).logits


def same(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("name", known(MIXTURES))
def test_experts_apart_compute_what_they_do_together(name):
    model = random_model(name)
    loose = apart(model)
    assert experts_in(loose)
    assert not fused_in(loose)
    same(logits(loose), logits(model))
    one = IDS_NS[:1, :1]  # a step of decoding: few experts are hit
    same(logits(loose, one), logits(model, one))


@pytest.mark.parametrize("name", known(MIXTURES))
def test_they_go_together_again_to_the_bit(name):
    model = random_model(name)
    loose = apart(model)
    for path, experts in experts_in(loose).items():
        weights = {weight: experts.get_parameter(weight).detach() for weight in experts.pieces}
        loose.set_submodule(path, experts.fused(lambda weight, _, own=weights: own[weight], torch.device("cpu")))
    wanted = model.state_dict()
    found = loose.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert torch.equal(logits(loose), logits(model))


@pytest.mark.parametrize("name", known(MIXTURES))
def test_routers_are_no_linears_to_compress_and_shared_experts_are(name):
    loose = apart(random_model(name))
    (block, *_) = [m for m in loose.model.layers if experts_in(m)]
    linears, routers = block_linears(block, "block"), routers_in(block)
    assert routers
    assert not [n for n in linears if any(n.startswith(f"block.{router}") for router in routers)]
    sides = {n for n in linears if "shared" in n and "experts." not in n.replace("shared_experts.", "")}
    assert all(linears[n].out_features > 1 for n in linears)
    has_shared = name in (
        "qwen2_moe",
        "qwen3_next",
        "deepseek_v2",
        "deepseek_v3",
        "glm4_moe",
        "llama4_text",
        "ernie4_5_moe",
    )
    assert bool(sides) >= has_shared
    (experts,) = experts_in(block).values()
    assert {n for n in linears if ".experts." in n} >= {
        f"block.{path}.{n}" for path in experts_in(block) for n in experts.linears
    }


@pytest.mark.thin(2)
@pytest.mark.parametrize("name", known(KINDS))
@pytest.mark.parametrize("inputs", ["routed", "gate", "all"])
@pytest.mark.parametrize("at_once", [1, 3])
def test_a_visit_does_not_change_the_output(name, inputs, at_once):
    loose = apart(random_model(name))
    told = []

    def announce(experts, rows):
        told.append((id(experts), [(r.expert, r.linears, len(r.x_TI), r.borrowed) for r in rows]))
        return True

    with visited(loose, lambda _: Visit(announce, at_once, window=24, quota=16, inputs=inputs)):
        found = logits(loose)
    same(found, logits(loose))
    for experts in experts_in(loose).values():
        mine = [rows for who, rows in told if who == id(experts)]
        # Every linear of every expert once, without tokens too, and the first ones of all that go together before the last.
        names = [linear for rows in mine for _, linears, _, _ in rows for linear in linears]
        assert sorted(names) == sorted(experts.linears)
        assert all(len({len(linears) for _, linears, _, _ in rows}) == 1 for rows in mine)
        for rows in mine:
            for _, _, count, more in rows:
                assert count >= (48 if inputs == "all" else 32)
                assert 0 <= more <= count


def test_nothing_is_computed_where_that_is_not_wanted():
    loose = apart(random_model("mixtral"))
    for experts in experts_in(loose).values():
        for name in experts.linears:
            experts.get_submodule(name).weight = nn.Parameter(
                torch.full_like(experts.get_submodule(name).weight, torch.nan)
            )
    with visited(loose, lambda _: Visit(lambda *_: False)):
        assert torch.isfinite(logits(loose)).all()


@pytest.mark.parametrize(("experts", "top"), [(1, 1), (4, 4)])
def test_one_expert_and_all_of_them(experts, top):
    model = random_model("mixtral", num_local_experts=experts, num_experts_per_tok=top)
    loose = apart(model)
    same(logits(loose), logits(model))
    with visited(loose, lambda _: Visit(lambda *_: True, window=24, quota=16)):
        same(logits(loose), logits(model))


def test_an_index_beyond_the_experts_is_nobodys():
    experts = next(iter(experts_in(apart(random_model("mixtral"))).values()))
    x_TH = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    weight_TK = torch.full((5, 2), 0.5)
    found = experts(x_TH, torch.tensor([[0, 4]] * 5), weight_TK)
    assert torch.equal(found, experts(x_TH, torch.zeros(5, 1, dtype=torch.long), weight_TK[:, :1]))


# --- tokens that are borrowed


def slow_borrowed(own_T, score_T, window, quota):
    """From the words: of each window those with the highest scores, until the expert has its quota."""
    chosen = []
    for begin in range(0, len(own_T), window):
        tokens = range(begin, begin + window)
        lacking = max(0, quota - sum(bool(own_T[t]) for t in tokens))
        others = sorted((t for t in tokens if not own_T[t]), key=lambda t: -score_T[t])
        chosen += others[:lacking]
    return sorted(chosen)


@tries(200)
@given(
    windows=st.integers(1, 4), window=st.integers(1, 9), count=st.integers(1, 5), quota=st.integers(0, 12),
    seed=st.integers(0, 10**6),
)  # fmt: skip
def test_borrowed_tokens_are_those_of_the_definition(windows, window, count, quota, seed):
    draw = torch.Generator().manual_seed(seed)
    T = windows * window
    scores_TE = torch.randn(T, count, generator=draw)
    index_TK = torch.randint(0, count, (T, 1), generator=draw)
    routed = Routed(torch.zeros(T, 3), index_TK, torch.ones(T, 1), count)
    for e in range(count):
        found = borrowed(e, routed, scores_TE, window, quota)
        assert found.tolist() == slow_borrowed(index_TK[:, 0] == e, scores_TE[:, e], window, quota)
        # Windows that go in another batch get the same.
        last = slice(T - window, T)
        alone = Routed(torch.zeros(window, 3), index_TK[last], torch.ones(window, 1), count)
        wanted = [t - (T - window) for t in found.tolist() if t >= T - window]
        assert borrowed(e, alone, scores_TE[last], window, quota).tolist() == wanted
        # Without scores, as many.
        assert len(borrowed(e, routed, None, window, quota)) == len(found)


def test_a_token_that_an_expert_borrows_comes_as_another_was_given_it():
    x_TH = torch.arange(1.0, 13.0).view(4, 3)
    scale_ET = torch.tensor([[0.5, 0, 0, 0.25], [0, 0.75, 0.1, 0]])
    routed = Copied(x_TH[None] * scale_ET[:, :, None])
    assert routed.rows(0)[0].tolist() == [0, 3]
    torch.testing.assert_close(routed.tokens(torch.tensor([1, 2]), 0), x_TH[1:3] * torch.tensor([[0.75], [0.1]]))


def test_an_expert_without_tokens_of_its_own_borrows():
    model = random_model("mixtral")
    for layer in model.model.layers:
        layer.mlp.gate.weight.data[2] = -1e4 * layer.mlp.gate.weight.data[[0, 1, 3]].abs().sum(0)
    loose = apart(model)
    seen = {}

    def announce(_, rows):
        for r in rows:
            seen.setdefault(r.expert, []).append((len(r.x_TI), r.borrowed))
        return True

    with visited(loose, lambda _: Visit(announce, window=24, quota=10)):
        logits(loose)
    assert all(count >= 20 for counts in seen.values() for count, _ in counts)
    with visited(loose, lambda _: Visit(announce, window=24)):
        same(logits(loose), logits(model))


# --- what is refused


def test_what_cannot_be_taken_apart_is_named():
    class Experts3D(nn.Module):
        def __init__(self):
            super().__init__()
            self.w1 = nn.Parameter(torch.zeros(4, 8, 8))

    class Block(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.experts = inner

    with pytest.raises(
        UsageError, match=r"layers\.0\.experts \(Experts3D\) holds a mixture of experts in a form of its own"
    ):
        check_unfused(Block(Experts3D()), "layers.0")
    with pytest.raises(UsageError, match=r"layers\.0\.experts \(ModuleList\) .* as a list of modules"):
        check_unfused(Block(nn.ModuleList([nn.Linear(4, 4)])), "layers.0")
    check_unfused(Block(nn.Linear(4, 4)), "layers.0")


def test_a_module_shows_how_many_experts_it_has():
    experts = next(iter(experts_in(apart(random_model("mixtral"))).values()))
    assert isinstance(experts, Experts)
    assert "4 experts" in repr(experts)
