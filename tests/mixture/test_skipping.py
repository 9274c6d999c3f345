"""Experts that are left out when a mixture runs: which ones, what the others weigh then, and what a checkpoint knows of it.

T: tokens, K: experts of a token, H: features.
"""

import json
import shutil
from copy import deepcopy

import mixtures
import pytest
import torch
from transformers import AutoModelForCausalLM

import secateur
from secateur.errors import CheckpointError, UsageError
from secateur.evaluation.eval_text import Text
from secateur.evaluation.quality import Runner, evaluate
from secateur.mixture.skipping import QUANTILES, beta_of, modules_of, parse_skip, quantiles_on, ratios, skip_experts
from secateur.mixture.skipping import without_weak as without
from secateur.mixture.unfuse import fused_in, unfuse
from secateur.plugin.quantization_config import SecateurConfig
from secateur.recipes.plan import plan

IDS_NS = torch.randint(2, 300, (2, 40), generator=torch.Generator().manual_seed(3))
EVEN = [n / (QUANTILES - 1) for n in range(QUANTILES)]


def section(share, layers):
    return {"expert_skip": {"share": share, "ratios": [list(EVEN)] * layers}}


def test_weak_ones_go_and_the_others_have_their_weight():
    weight_TK = torch.tensor([[0.6, 0.3, 0.1], [0.4, 0.35, 0.25], [0.5, 0.5, 0.0], [0.2, 0.7, 0.1], [0.0, 0.0, 0.0]])
    wanted_TK = torch.tensor(
        [[2 / 3, 1 / 3, 0], [0.4, 0.35, 0.25], [0.5, 0.5, 0], [0, 1.0, 0], [0.0, 0.0, 0.0]], dtype=torch.float32
    )
    scaled_TK, out_TK = without(weight_TK, 0.5)
    torch.testing.assert_close(scaled_TK, wanted_TK)
    assert out_TK.tolist() == [
        [False, False, True], [False, False, False], [False, False, True], [True, False, True], [False, True, True],
    ]  # fmt: skip
    # Of a sum that is not 1, as where the router does not renormalise, that sum.
    torch.testing.assert_close(without(weight_TK / 4, 0.5)[0], wanted_TK / 4)
    scaled_TK, out_TK = without(weight_TK, 0)
    torch.testing.assert_close(scaled_TK, weight_TK)
    assert not out_TK.any()
    # The first expert always stays, if others are as good.
    assert (~without(weight_TK, 1)[1]).sum(1).tolist() == [1, 1, 2, 1, 1]


@pytest.mark.parametrize("name", mixtures.known(["mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss"]))
def test_it_is_as_if_the_router_had_not_chosen_them(name):
    fused = mixtures.random_model(name)
    apart = deepcopy(fused)
    held = {n: deepcopy(fused.get_submodule(n)) for n in fused_in(fused)}
    unfuse(apart, held)
    for n, module in held.items():
        experts = apart.get_submodule(n)
        for weight, piece in experts.pieces.items():
            owner = experts.get_submodule(weight.removesuffix(".weight"))
            W_OI = piece.of(module.get_parameter(piece.parameter)).detach().clone()
            owner.weight = torch.nn.Parameter(W_OI, requires_grad=False)
    draw = torch.Generator().manual_seed(1)
    for one, other in zip(modules_of(fused), modules_of(apart), strict=True):
        H = fused.config.hidden_size
        x_TH = torch.randn(50, H, generator=draw)
        index_TK = torch.rand(50, 4, generator=draw).argsort(1)[:, :3]
        weight_TK = torch.rand(50, 3, generator=draw)
        beta = beta_of(EVEN, 0.37)
        scaled_TK, out_TK = without(weight_TK, beta)
        assert 0.1 < out_TK.float().mean() < 0.5
        wanted_TH = torch.zeros(50, H)
        for t in range(50):
            few = ~out_TK[t]
            wanted_TH[t] = one(x_TH[t : t + 1], index_TK[t : t + 1, few], scaled_TK[t : t + 1, few])[0]
        before = one(x_TH, index_TK, weight_TK)
        called = []
        for model in (fused, apart):
            skip_experts(model, section(0.37, len(held)))
        experts = [other.get_submodule(str(e)) for e in range(other.count)]
        handles = [
            e.get_submodule(other.last).register_forward_pre_hook(
                lambda _, args, called=called: called.append(len(args[0]))
            )
            for e in experts
        ]
        for module in (one, other):
            torch.testing.assert_close(module(x_TH, index_TK, weight_TK), wanted_TH, rtol=1e-4, atol=1e-5)
        # Not only without weight: where experts are linears of their own, nothing is computed.
        assert sum(called) == int((~out_TK).sum())
        for handle in handles:
            handle.remove()
        for model in (fused, apart):
            skip_experts(model, section(0.37, len(held)), 0)
        torch.testing.assert_close(one(x_TH, index_TK, weight_TK), before)


def test_thresholds_are_the_quantiles_of_what_routers_say():
    model = mixtures.random_model("qwen3_moe")
    seen = [[] for _ in modules_of(model)]
    handles = [
        m.register_forward_pre_hook(lambda _, args, n=n: seen[n].append(ratios(args[2])))
        for n, m in enumerate(modules_of(model))
    ]
    ids_NS = torch.randint(2, 300, (10, 60), generator=torch.Generator().manual_seed(4))
    found = quantiles_on(model, list(ids_NS), lambda done, total: None)
    for handle in handles:
        handle.remove()
    assert len(found) == len(seen) == 2
    for quantiles, each in zip(found, seen, strict=True):
        ratio_T = torch.cat(each).min(1).values  # of the second of two
        exact_Q = torch.quantile(ratio_T, torch.tensor(EVEN))
        assert (torch.tensor(quantiles)[1:-1] - exact_Q[1:-1]).abs().max() < 0.05
        assert parse_skip({"expert_skip": {"share": 0.1, "ratios": [quantiles]}}) is not None
        for share in (0.1, 0.25, 0.5, 0.9):
            assert abs((ratio_T < beta_of(quantiles, share)).float().mean() - share) < 0.06


@pytest.fixture(scope="module")
def made(build, text_file, tmp_path_factory):
    """A mixture that was compressed to skip 40 % of its weaker experts. Not to be written to."""
    folder = tmp_path_factory.mktemp("skipping")
    build(folder / "source", mixtures.config_of("qwen3_moe"))
    calibration = secateur.Calibration(str(text_file), 8, 32)
    recipe = secateur.Recipe(
        quantize="rtn", quantization={"group_size": 16}, expert_skip="40%", calibration=calibration
    )
    secateur.compress(str(folder / "source"), folder / "out", recipe)
    return folder / "out"


@torch.no_grad()
def skipped(model):
    """The share of weaker experts that are left out on a text, and the logits."""
    gone, total = 0, 0

    def count(_, args):
        nonlocal gone, total
        gone += int((args[2] == 0).sum())
        total += args[2].numel() // 2

    # After the model's own hooks.
    handles = [module.register_forward_pre_hook(count) for module in modules_of(model)]
    logits = model(IDS_NS, use_cache=False).logits.float()
    for handle in handles:
        handle.remove()
    return gone / total, logits


def test_a_checkpoint_knows_what_to_skip(made, tmp_path):
    said = json.loads((made / "config.json").read_text())["quantization_config"]["expert_skip"]
    assert (said["share"], [len(each) for each in said["ratios"]]) == (0.4, [QUANTILES, QUANTILES])
    shares, logits = zip(
        *(skipped(secateur.load(made, backend, expert_skip=share)) for backend, share in (
            (None, None), ("dense", None), (None, 0.4), (None, 0), (None, 0.9)
        )),
        strict=True,
    )  # fmt: skip
    assert 0.2 < shares[0] == shares[1] == shares[2] < 0.6
    assert shares[3] == 0
    assert shares[4] > 0.7
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-3, atol=1e-4)
    assert torch.equal(logits[0], logits[2])
    assert not torch.allclose(logits[0], logits[3])
    theirs = AutoModelForCausalLM.from_pretrained(made)
    torch.testing.assert_close(skipped(theirs)[1], logits[0])
    torch.testing.assert_close(skipped(deepcopy(theirs))[1], logits[0])
    theirs.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]["expert_skip"] == said
    torch.testing.assert_close(skipped(secateur.load(made, max_memory="3GiB"))[1], logits[0])
    assert secateur.verify(made) == []


def test_eval_measures_with_it(made, text_file):
    text = Text(str(text_file), 32, 3)
    losses = [
        evaluate(str(made), text=text, runner=Runner(expert_skip=share, max_memory=memory)).quality.loss
        for share, memory in ((None, None), (0.4, None), (0.0, None), (0.9, None), (None, "3GiB"), (0.9, "3GiB"))
    ]
    assert losses[0] == losses[1]
    assert len(set(losses[:4])) == 3
    assert losses[4:] == pytest.approx([losses[0], losses[3]], rel=1e-5)


def test_a_share_that_makes_no_sense_is_refused(made, says):
    source = made.parent / "source"
    with pytest.raises(UsageError, match=r"`expert_skip` is 1: give a share from 0 to less than 1"):
        secateur.load(made, expert_skip=1)
    with pytest.raises(UsageError, match="which experts are weak is not known of this model"):
        secateur.load(source, expert_skip=0.3)
    secateur.load(source, expert_skip=0)
    with pytest.raises(UsageError, match="not known of this model"):
        evaluate(str(source), runner=Runner(expert_skip=0.3))
    with pytest.raises(UsageError, match="written dense: leave it out"):
        plan(secateur.Recipe(quantize="rtn", format="dense", expert_skip=0.3))
    code, _, err = says("eval", made, "--expert-skip", "150%")
    assert code == 2
    assert "--expert-skip is 1.5: give a share" in err


def test_dense_models_skip_nothing(model_of, text_file, tmp_path):
    recipe = secateur.Recipe(quantize="rtn", expert_skip=0.3, calibration=secateur.Calibration(str(text_file), 4, 16))
    with pytest.raises(UsageError, match=r"is for mixtures of experts, and .* is none"):
        secateur.compress(str(model_of("llama")), tmp_path / "out", recipe)


@pytest.mark.parametrize(
    "said",
    [
        3, [], {"share": 0.3}, {"share": None, "ratios": [EVEN]}, {"share": True, "ratios": [EVEN]},
        {"share": 1.0, "ratios": [EVEN]}, {"share": float("nan"), "ratios": [EVEN]}, {"share": 0.3, "ratios": EVEN},
        {"share": 0.3, "ratios": [EVEN[:-1]]}, {"share": 0.3, "ratios": [EVEN[::-1]]},
        {"share": 0.3, "ratios": [[*EVEN[:-1], 1.5]]}, {"share": 0.3, "ratios": [[*EVEN[:-1], "1"]]},
        {"share": 0.3, "ratios": [[*EVEN[:-1], float("nan")]]}, {"share": 0.3, "ratios": {"0": EVEN}},
    ],
)  # fmt: skip
def test_what_a_hostile_config_says_is_refused(said):
    with pytest.raises(CheckpointError, match="'expert_skip' of the checkpoint's quantization_config makes no sense"):
        SecateurConfig(1, {}, expert_skip=said)


def test_another_number_of_layers_is_refused(made, tmp_path):
    shutil.copytree(made, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["quantization_config"]["expert_skip"]["ratios"].append(list(EVEN))
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="has 3 layers, and the model 2 with experts"):
        secateur.load(tmp_path / "out")
