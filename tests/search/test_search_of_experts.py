"""Searching among the linears of mixtures of experts, of which each sees but some of the tokens."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mixtures import known, random_model
from test_allocation import true_divergence

import secateur
from secateur import Calibration, Choice, Recipe, UsageError
from secateur.calibration.effects import gather_effects
from secateur.mixture.unfuse import experts_in, fused_in, unfuse
from secateur.model.block_names import without_expert
from secateur.search.candidates import Candidate
from secateur.search.shared_choices import SharedChoices
from secateur.search.unreached import expect_unreached, share_of

FAMILIES = known(["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss"])


@pytest.fixture(scope="module")
def mixture(tokenizer, tmp_path_factory):
    """The folder of a mixture's tiny model."""
    made = {}

    def make(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            random_model(name).save_pretrained(made[name])
            tokenizer.save_pretrained(made[name])
        return str(made[name])

    return make


@pytest.fixture
def base(text_file):
    return Recipe("sparsegpt", 0.5, calibration=Calibration(str(text_file), samples=8, seq_len=32))


def apart(name, **options):
    """A mixture in memory whose experts are linears of their own."""
    whole = random_model(name, **options)
    stored = {key: tensor.clone() for key, tensor in whole.state_dict().items()}
    unfuse(whole, fused_in(whole))
    for prefix, experts in experts_in(whole).items():
        for weight, piece in experts.pieces.items():
            linear = experts.get_submodule(weight.removesuffix(".weight"))
            W_OI = piece.of(stored[f"{prefix}.{piece.parameter}"]).contiguous()
            linear.weight = torch.nn.Parameter(W_OI, requires_grad=False)
    return whole.eval()


# --- what a change of an expert does


@pytest.mark.thin(2)
@pytest.mark.parametrize("name", [*FAMILIES, *known(["llama4_text"])])
def test_effects_of_experts_are_the_divergence_of_small_changes_over_all_tokens(name, tmp_path):
    model = apart(name)
    ids_NS = torch.randint(2, model.config.vocab_size, (24, 48), generator=torch.Generator().manual_seed(3))
    prefix, experts = list(experts_in(model).items())[-1]
    names = [f"{prefix}.{e}.{linear}" for e in range(2) for linear in (experts.firsts[0], experts.last)]
    effects = gather_effects(model, ids_NS, names, tmp_path, 0, lambda *_: None)
    assert effects.tokens == 24 * 48
    generator = torch.Generator().manual_seed(1)
    for linear in names:
        W_OI = model.get_submodule(linear).weight
        change_OI = 0.02 * W_OI.std() * torch.randn(W_OI.shape, generator=generator)
        true = true_divergence(model, ids_NS, W_OI, change_OI)
        assert 0 < effects.reached(linear) < effects.tokens
        [found] = effects.divergence(linear, [change_OI])
        assert found == pytest.approx(true, rel=0.6), linear


def test_an_expert_that_no_token_reaches_has_no_rows(tmp_path):
    model = apart("mixtral", num_experts_per_tok=1)
    for name, weight in model.named_parameters():
        if name.endswith("mlp.gate.weight"):
            # Experts 0 and 1 lie between the other two, whatever the input.
            weight.data[2], weight.data[0], weight.data[1] = (
                -weight.data[3],
                0.5 * weight.data[3],
                -0.5 * weight.data[3],
            )
    experts = dict(experts_in(model))
    prefix = next(iter(experts))
    counts = torch.zeros(4)

    def count(_, args):
        counts.add_(torch.bincount(args[1].flatten(), minlength=4))

    handle = experts[prefix].register_forward_pre_hook(count)
    ids_NS = torch.randint(2, model.config.vocab_size, (3, 20), generator=torch.Generator().manual_seed(3))
    names = [f"{prefix}.{e}.{linear}" for e in range(4) for linear in ("w1", "w3", "w2")]
    effects = gather_effects(model, ids_NS, names, tmp_path, 0, lambda *_: None)
    handle.remove()
    assert [effects.reached(f"{prefix}.{e}.w1") for e in range(4)] == counts.tolist()
    assert counts[:2].tolist() == [0, 0]
    for e, count in enumerate(counts.tolist()):
        for linear in ("w1", "w3", "w2"):
            W_OI = model.get_submodule(f"{prefix}.{e}.{linear}").weight
            if count:
                assert effects.divergence(f"{prefix}.{e}.{linear}", [0.1 * W_OI])[0] > 0
            else:
                with pytest.raises(ValueError, match="no token reaches"):
                    effects.divergence(f"{prefix}.{e}.{linear}", [W_OI])


def test_an_unreached_expert_is_expected_to_do_to_a_token_what_others_did():
    def candidates(*divergences):
        return [Candidate(Choice(bits=bits), 10 * bits, cost) for bits, cost in zip((2, 4), divergences, strict=True)]

    library = {
        "layers.0.q": candidates(7.0, 5.0),
        "layers.0.experts.0.up": candidates(0.3, 0.1),
        "layers.0.experts.1.up": candidates(0.1, 0.05),
        "layers.0.experts.2.up": candidates(math.nan, math.nan),
        "layers.1.experts.0.up": candidates(9.0, 8.0),
    }
    reached = dict(zip(list(library)[1:], (30, 10, 0, 5), strict=True))
    shares = dict.fromkeys(reached, 0.5) | {"layers.0.experts.2.up": share_of(0, 98)}
    found = expect_unreached(library, reached, shares, 100)
    # 0.3 and 0.1 nats a token of 100 are 40 nats over the 40 tokens that reached them; of 100 tokens one is expected.
    assert [c.divergence for c in found["layers.0.experts.2.up"]] == pytest.approx([1.0 * 0.01, 0.375 * 0.01])
    assert {name: each for name, each in found.items() if "2.up" not in name} == {
        name: each for name, each in library.items() if "2.up" not in name
    }
    assert share_of(1000, 1998) == pytest.approx(0.5, abs=1e-3)
    with pytest.raises(UsageError, match=r"none of 100 tokens is sent to any of the experts layers.0.experts.\*.up"):
        expect_unreached(
            {"layers.0.experts.2.up": library["layers.0.experts.2.up"]}, {"layers.0.experts.2.up": 0}, shares, 100
        )


# --- what a user gets


GOALS = [
    {"target_size": "0.8x", "quantize": "gptq"},
    {"prune": "wanda", "sparsity": 0.5, "allocation": "owl"},
    {"prune": "wanda", "sparsity": 0.5, "allocation": "search"},
    {"quantize": "rtn", "quantization": {"bits": 3}, "allocation": "search"},
    {"max_perplexity_rise": "30%", "quantize": "rtn"},
]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *(("mixtral", goal) for goal in GOALS[1:4]),
        *((name, GOALS[0]) for name in FAMILIES[-1:]),
        *(pytest.param("mixtral", goal, marks=pytest.mark.slow) for goal in (GOALS[0], GOALS[4])),
        *(pytest.param(name, GOALS[0], marks=pytest.mark.slow) for name in FAMILIES[1:-1]),
    ],
    ids=str,
)
def test_every_goal_is_reached_on_mixtures(name, options, base, mixture, tmp_path):
    report = secateur.compress(mixture(name), tmp_path / "out", Recipe(**options, calibration=base.calibration))
    kept = Recipe.read(tmp_path / "out" / "secateur.json")
    assert any("experts.1." in linear for linear in kept.linears)
    if "sparsity" in options:
        assert 0.43 < report.sparsity <= 0.5 + 1e-9
    if "target_size" in options:
        assert report.bytes <= 0.8 * report.source_bytes
    assert report.bytes < report.source_bytes


@pytest.mark.thin(3)
@pytest.mark.parametrize(
    ("within", "options"),
    [
        ("layer", {"prune": "wanda", "sparsity": 0.5, "allocation": "search"}),
        ("expert", {"quantize": "rtn", "quantization": {"bits": 3}, "allocation": "search"}),
        ("layer", {"target_size": "0.75x", "quantize": "rtn"}),
        ("expert", {"target_size": "0.85x", "prune": "wanda"}),
    ],
    ids=str,
)
def test_experts_share_their_choices(within, options, base, mixture, tmp_path):
    recipe = Recipe(**options, calibration=base.calibration)
    found = {}
    for share in (None, within):
        report = secateur.compress(mixture("qwen3_moe"), tmp_path / str(share), replace(recipe, share_choice=share))
        groups = {}
        for name, choice in Recipe.read(tmp_path / str(share) / "secateur.json").linears.items():
            if "experts." in name:
                key = name.rpartition(".")[0]
                groups.setdefault(without_expert(key) if within == "layer" else key, set()).add(choice)
        found[share] = max(len(choices) for choices in groups.values())
        if "target_size" in options:
            assert report.bytes <= float(options["target_size"][:-1]) * report.source_bytes
        elif "sparsity" in options:
            assert 0.43 < report.sparsity <= 0.5 + 1e-9
    assert found[within] == 1 < found[None]


def test_shared_candidates_are_the_sums_of_what_was_tried_for_all():
    one = [Candidate(Choice(bits=2), 20, 3.0), Candidate(Choice(bits=4), 40, 1.0), Candidate(Choice(bits=8), 80, 0.5)]
    other = [Candidate(Choice(bits=4), 41, 0.25), Candidate(Choice(bits=2), 22, 0.5)]
    shared = SharedChoices({"a": ["a", "b"], "c": ["c"]})
    found = shared.library({"a": one, "b": other, "c": one})
    assert found == {"a": [Candidate(Choice(bits=2), 42, 3.5), Candidate(Choice(bits=4), 81, 1.25)], "c": one}
    assert shared.weights({"a": 1, "b": 2, "c": 4}) == {"a": 3, "c": 4}
    assert list(shared.spread({"a": Choice(bits=2), "c": Choice()}).items()) == [
        ("a", Choice(bits=2)), ("b", Choice(bits=2)), ("c", Choice()),
    ]  # fmt: skip


def test_sharing_makes_no_sense_without_experts_or_search(base, mixture, model_of, tmp_path):
    with pytest.raises(UsageError, match="`share_choice` 'block' is not known: it can be expert, layer"):
        Recipe(share_choice="block")
    with pytest.raises(UsageError, match="`share_choice` is for a search"):
        secateur.compress(mixture("mixtral"), tmp_path / "out", replace(base, share_choice="layer"))
    recipe = replace(base, share_choice="layer", allocation="search")
    for run in (
        lambda model: secateur.compress(model, tmp_path / "out", recipe),
        lambda model: secateur.forecast(model, recipe),
    ):
        with pytest.raises(UsageError, match=r"`share_choice` layer is for experts of a mixture, and .* has none"):
            run(str(model_of("llama")))
    with pytest.raises(UsageError, match="has none that are compressed"):
        secateur.compress(mixture("mixtral"), tmp_path / "out", replace(recipe, ignore=("*experts*",)))
    assert not (tmp_path / "out").exists()


def test_what_was_chosen_for_experts_is_shown_together(says, text_file, mixture, tmp_path):
    options = ["--calibration", text_file, "--samples", 8, "--seq-len", 32, "--plot", tmp_path / "map.svg"]
    searched = ["--quantize", "rtn", "--bits", 3, "--allocation", "search"]
    code, _, err = says("compress", mixture("qwen3_moe"), tmp_path / "out", *searched, *options)
    assert code == 0
    lines = err[
        err.index("removed, and bits per weight, of each linear, of experts the mean and the range") :
    ].splitlines()
    projections = [f"*.{x}_proj" for x in ("gate", "up", "down")]
    assert lines[1].split() == ["block", *(f"{x}_proj" for x in ("q", "k", "v", "o")), *projections]
    assert lines[2].split()[0] == "0"
    assert "–" in lines[3]  # a range, below the means
    assert "experts.*.up_proj" in Path(tmp_path / "map.svg").read_text()
