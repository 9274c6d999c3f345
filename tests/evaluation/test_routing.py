"""Whether two mixtures of experts send their tokens to the same experts."""

import json

import pytest
import torch
from mixtures import MIXTURES, known, random_model
from safetensors.torch import load_file, save_file

import secateur
from secateur import Tolerances, UsageError
from secateur.errors import CheckpointError
from secateur.evaluation import routing
from secateur.evaluation.eval_text import Text
from secateur.evaluation.gate.baseline import Baseline, write_baseline
from secateur.evaluation.perplexity import CutText, measure
from secateur.evaluation.quality import evaluate
from secateur.evaluation.reference import keep_reference
from secateur.evaluation.routing import Call, watched

TOKENS = 24


@pytest.fixture
def ids_KS():
    return torch.randint(2, 300, (3, TOKENS), generator=torch.Generator().manual_seed(5))


def disturbed(name, share=0.1, **options):
    """A model with other weights than the family's random one."""
    model = random_model(name, **options)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += share * parameter.std() * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture(scope="module")
def pair(tokenizer, tmp_path_factory):
    """Folders of a mixture and of the model that it is measured against."""
    folders = []
    for model in (disturbed("qwen3_moe"), random_model("qwen3_moe")):
        folders.append(tmp_path_factory.mktemp("mixture"))
        model.save_pretrained(folders[-1])
        tokenizer.save_pretrained(folders[-1])
    return [str(folder) for folder in folders]


@pytest.mark.thin(2)
@pytest.mark.parametrize("name", known(MIXTURES))
def test_the_routing_of_every_family_is_seen(name, ids_KS):
    model = random_model(name)
    with torch.no_grad(), watched(model) as calls:
        model(ids_KS)
    assert calls
    assert len({call.name for call in calls}) == len(calls)
    for call in calls:
        assert call.scores_TE is not None
        chosen_TK = call.chosen()
        k = getattr(model.config, "num_experts_per_tok", None) or model.config.moe_k
        assert chosen_TK.shape == (ids_KS.numel(), k)
        assert chosen_TK.min() >= 0
        assert len(chosen_TK.unique()) > 1
    same = measure(model, ids_KS, model)
    assert (same.same_experts, same.routing_agreement, same.routing_kl) == (1, 1, 0)
    other = measure(disturbed(name, 0.5), ids_KS, model)
    assert 0 < other.same_experts <= other.routing_agreement < 1
    assert other.routing_kl > 0


def by_hand(model, ids_S):
    """Of each layer the probabilities of experts, and the two best."""
    found = []
    handles = [
        layer.mlp.gate.register_forward_pre_hook(
            lambda gate, args: found.append(args[0].reshape(-1, 32) @ gate.weight.T)
        )
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(ids_S[None])
    for handle in handles:
        handle.remove()
    return [[(row.softmax(0).tolist(), set(row.topk(2).indices.tolist())) for row in logits] for logits in found]


def test_figures_are_those_of_a_slow_count(ids_KS):
    model, reference = disturbed("mixtral"), random_model("mixtral")
    equal, overlap, divergence = [], [], []
    for ids_S in ids_KS:
        for own, other in zip(by_hand(model, ids_S), by_hand(reference, ids_S), strict=True):
            for (q, mine), (p, theirs) in list(zip(own, other, strict=True))[:-1]:
                equal.append(mine == theirs)
                overlap.append(len(mine & theirs) / 2)
                divergence.append(sum(a * torch.tensor(a / b).log().item() for a, b in zip(p, q, strict=True)))
    found = measure(model, ids_KS, reference)
    assert 0 < found.same_experts < found.routing_agreement < 1
    assert found.same_experts == pytest.approx(sum(equal) / len(equal))
    assert found.routing_agreement == pytest.approx(sum(overlap) / len(overlap))
    assert found.routing_kl == pytest.approx(sum(divergence) / len(divergence), rel=1e-3)
    assert found.routing_agreement_interval[0] <= found.routing_agreement <= found.routing_agreement_interval[1]
    assert measure(model, ids_KS, reference, batch_tokens=3 * TOKENS).same_experts == found.same_experts
    assert measure(model, ids_KS).routing_agreement is None


def test_only_scored_predictions_count(ids_KS):
    model, reference = disturbed("mixtral"), random_model("mixtral")
    scores = measure(model, ids_KS, reference, stride=10).scores
    assert torch.equal(scores.routing_KP.isnan(), scores.loss_KP.isnan())


def test_experts_packed_and_apart_are_seen_alike(ids_KS, pair, tmp_path):
    secateur.compress(pair[1], tmp_path / "out", secateur.Recipe(quantize="rtn", quantization={"bits": 8}))
    dense = measure(secateur.load(tmp_path / "out", "dense", dtype=torch.float32), ids_KS, random_model("qwen3_moe"))
    packed = measure(secateur.load(tmp_path / "out", dtype=torch.float32), ids_KS, random_model("qwen3_moe"))
    for name in ("same_experts", "routing_agreement", "routing_kl"):
        assert getattr(packed, name) == pytest.approx(getattr(dense, name), abs=1e-3)
    assert 0.9 < dense.routing_agreement <= 1


def test_models_with_other_layers_are_not_compared(ids_KS, model_of):
    more = measure(random_model("qwen3_moe"), ids_KS, random_model("qwen3_moe", num_experts=8))
    none = measure(random_model("qwen3_moe"), ids_KS, secateur.load(model_of("llama")))
    for found in (more, none):
        assert found.kl > 0
        assert (found.same_experts, found.routing_agreement, found.routing_kl) == (None, None, None)


def test_tokens_that_no_expert_gets():
    copies_ETH = torch.tensor([[[1.0], [0.0], [0.0]], [[2.0], [3.0], [0.0]]])
    call = Call("", 2, (copies_ETH.view(-1, 1),), None)
    assert [set(row) - {-1} for row in call.chosen().tolist()] == [{0, 1}, {1}, set()]
    index_TK = torch.tensor([[1, 2], [0, 1]])  # an index of no expert here
    call = Call("", 2, (torch.ones(2, 1), index_TK, torch.ones(2, 2)), None)
    assert call.chosen().tolist() == [[1, -1], [0, 1]]


# --- what is kept of a reference


def keep(folder, ids_KS, model):
    return keep_reference(folder, {"model": "reference"}, lambda: model, CutText(ids_KS), tokens=16)


@pytest.mark.parametrize("kept", [4, 32])
@pytest.mark.parametrize("name", known(["qwen3_moe", "llama4_text"]))
def test_a_kept_reference_gives_the_same_figures(name, kept, ids_KS, tmp_path, monkeypatch):
    monkeypatch.setattr(routing, "KEPT_EXPERTS", kept)
    model, reference = disturbed(name, 0.3), random_model(name)
    live, read = measure(model, ids_KS, reference), measure(model, ids_KS, keep(tmp_path, ids_KS, reference))
    for figure in ("same_experts", "routing_agreement", "routing_kl", "routing_agreement_interval"):
        assert getattr(read, figure) == getattr(live, figure)
    monkeypatch.setattr(routing, "KEPT_EXPERTS", 32)
    whole = measure(model, ids_KS, reference)
    assert 0 < live.routing_kl <= whole.routing_kl + 1e-7


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("chosen", lambda t: t + 100),
        ("chosen", lambda t: t[1:]),
        ("chosen", lambda t: t.int()),
        ("expert", lambda t: t - 100),
        ("log_p", lambda t: t[:, 1:]),
        ("log_rest", None),
        ("more", lambda t: torch.zeros(1)),
    ],
)
def test_damaged_routing_is_noticed(part, change, ids_KS, tmp_path, monkeypatch):
    monkeypatch.setattr(routing, "KEPT_EXPERTS", 4)
    kept = keep(tmp_path, ids_KS, random_model("qwen3_moe"))
    file = kept.folder / "window-00001.safetensors"
    tensors = load_file(file)
    name = f"routing.1.{part}"
    if change is None:
        del tensors[name]
    else:
        tensors[name] = change(tensors.get(name)).contiguous()
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"window-00001\.safetensors does not hold what it should"):
        measure(random_model("qwen3_moe"), ids_KS, keep(tmp_path, ids_KS, None))


def test_damaged_layers_are_noticed(ids_KS, tmp_path):
    kept = keep(tmp_path, ids_KS, random_model("qwen3_moe"))
    about = kept.folder / "reference.json"
    for layers, message in ((3, "cannot be read"), ([[6]], "cannot be read"), ([[2, 2], [2, 2]], "does not hold")):
        about.write_text(json.dumps({**json.loads(about.read_text()), "layers": layers}))
        with pytest.raises(CheckpointError, match=message):
            measure(random_model("qwen3_moe"), ids_KS, keep(tmp_path, ids_KS, None))


# --- what a user sees


@pytest.fixture
def text(text_file):
    return Text(str(text_file), seq_len=32, windows=16)


def test_eval_tells_how_alike_routing_is(says, pair, text_file, text, tmp_path):
    options = ["--reference", pair[1], "--data", text_file, "--seq-len", 32, "--windows", 16]
    code, out, _ = says("eval", pair[0], *options)
    assert code == 0
    found = evaluate(*pair, text)
    for row, figure in (
        ("experts of a token that are the same", f"{found.quality.routing_agreement:.2%}"),
        ("tokens with all experts the same", f"{found.quality.same_experts:.2%}"),
        ("KL divergence of routers, nats per token", f"{found.quality.routing_kl:.4f}"),
    ):
        assert figure in next(line for line in out.splitlines() if row in line)
    assert found.to_dict()["quality"]["routing_agreement"] == found.quality.routing_agreement
    assert set(found.to_dict()["per_window"]) >= {"same_experts", "routing_agreement", "routing_kl"}
    cached = evaluate(*pair, text, cache=tmp_path / "cache")
    assert cached.quality.routing_kl == found.quality.routing_kl


def test_the_gate_holds_a_mixture_to_its_routing(pair, text, tmp_path):
    file = tmp_path / "baseline.json"
    found = write_baseline(pair[0], file, text, reference=pair[1]).quality
    metrics = json.loads(file.read_text())["metrics"]
    assert metrics["routing_agreement"]["value"] == found.routing_agreement
    assert metrics["routing_kl"]["value"] == found.routing_kl
    for limit, verdict in ((found.routing_agreement, "ok"), (found.routing_agreement + 1e-6, "failed")):
        result = secateur.gate(pair[0], Baseline.read(file), Tolerances(min_routing_agreement=limit), reference=pair[1])
        check = {check.name: check for check in result.checks}["routing_agreement"]
        assert (check.verdict, check.change, result.passed) == (verdict, 0, verdict == "ok")
    with pytest.raises(UsageError, match="`min_routing_agreement` compares routing with that of the dense model"):
        secateur.gate(pair[0], Baseline.read(file), Tolerances(min_routing_agreement=0.5))
    with pytest.raises(UsageError, match=r"`min_routing_agreement` 1\.5 is not a share"):
        Tolerances(min_routing_agreement=1.5)


def test_a_baseline_without_routing_is_still_read(pair, text, tmp_path):
    file = tmp_path / "baseline.json"
    write_baseline(pair[0], file, text, reference=pair[1])
    content = json.loads(file.read_text())
    for name in ("same_experts", "routing_agreement", "routing_kl"):
        del content["metrics"][name], content["per_window"][name]
    file.write_text(json.dumps(content))
    result = secateur.gate(pair[0], Baseline.read(file), reference=pair[1])
    check = {check.name: check for check in result.checks}["routing_agreement"]
    assert (check.verdict, check.baseline, check.change) == ("ok", None, None)
    assert result.passed


def test_a_model_without_experts_has_no_routing_to_hold_it_to(model_of, text, tmp_path):
    model, file = str(model_of("llama")), tmp_path / "baseline.json"
    write_baseline(model, file, text, reference=model)
    assert "routing_agreement" not in json.loads(file.read_text())["metrics"]
    assert {c.name for c in secateur.gate(model, Baseline.read(file), reference=model).checks} == {
        "perplexity", "size", "kl", "agreement",
    }  # fmt: skip
    with pytest.raises(UsageError, match=r"`min_routing_agreement` is for mixtures of experts, and .* leave it out"):
        secateur.gate(model, Baseline.read(file), Tolerances(min_routing_agreement=0.5), reference=model)


def test_the_command_takes_a_limit_of_routing(says, pair, text, tmp_path):
    file = tmp_path / "baseline.json"
    write_baseline(pair[0], file, text, reference=pair[1])
    code, out, _ = says(
        "gate", pair[0], "--baseline", file, "--reference", pair[1], "--min-routing-agreement", "99.99%"
    )
    assert code == 1
    assert "routing_agreement" in out
