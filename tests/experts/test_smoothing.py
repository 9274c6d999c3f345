"""Smoothing and balanced calibration text of mixtures.

N: windows, S: tokens of a window, L: layers, E: experts, C: windows among which one is chosen, H: hidden size.
"""

import itertools

import mixtures
import pytest
import torch
from transformers import AutoModelForCausalLM

import secateur
from secateur.calibration.kept_windows import calibration_ids
from secateur.errors import UsageError
from secateur.experts.balanced_windows import _even, balanced
from secateur.experts.smoothing import smooth_experts
from secateur.mixture.skipping import modules_of
from secateur.model.source import open_source

IDS_NS = torch.randint(2, 300, (2, 40), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", mixtures.known(["mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "gpt_oss"]))
def test_smoothing_changes_weights_and_no_output(name):
    model = mixtures.random_model(name)
    with torch.no_grad():
        wanted = model(IDS_NS).logits
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        inputs = []
        handle = modules_of(model)[0].register_forward_pre_hook(lambda _, args: inputs.append(args))
        model(IDS_NS[:1])
        model(IDS_NS[1:])
        handle.remove()
        vectors = smooth_experts(model, list(IDS_NS))
        torch.testing.assert_close(model(IDS_NS).logits, wanted, rtol=1e-4, atol=1e-5)
    assert len(vectors) == len(modules_of(model))
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert any("gate_up_proj" in n for n in changed)
    assert any("norm" in n for n in changed)
    # The paper's formula, expert by expert.
    experts = modules_of(model)[0]
    experts_name = next(n for n, m in model.named_modules() if m is experts)
    W = before[f"{experts_name}.gate_up_proj"]
    largest = torch.zeros(len(W), vectors[0].numel())
    for x_TH, index_TK, _ in inputs:
        for t, e in itertools.product(range(len(index_TK)), range(len(W))):
            if e in index_TK[t].tolist():
                largest[e] = torch.maximum(largest[e], x_TH.reshape(len(index_TK), -1)[t].abs())
    own = W.abs().amax(2 if getattr(experts, "is_transposed", False) else 1)
    s_H = torch.where(largest > 0, largest.sqrt() / own.sqrt(), 0).amax(0)
    torch.testing.assert_close(vectors[0], s_H / s_H.log().mean().exp(), rtol=1e-4, atol=1e-5)


def test_what_cannot_be_smoothed_is_refused_and_left_as_it_is(model_of):
    with pytest.raises(UsageError, match="no experts to smooth"):
        smooth_experts(AutoModelForCausalLM.from_pretrained(model_of("llama")), list(IDS_NS))
    model = mixtures.random_model("mixtral")
    with pytest.raises(UsageError, match="`alpha` is 2"):
        smooth_experts(model, list(IDS_NS), 2)
    norm = model.model.layers[0].post_attention_layernorm
    handle = norm.register_forward_hook(lambda _, __, out: out + 1)  # as if it were of another kind
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(UsageError, match=r"does not read what a norm gives|cannot be smoothed"):
        smooth_experts(model, list(IDS_NS))
    handle.remove()
    for n, p in model.named_parameters():
        torch.testing.assert_close(p, before[n])


def test_windows_that_even_out_experts_are_kept():
    draw = torch.Generator().manual_seed(0)
    use_NCLE = torch.randint(0, 30, (5, 3, 2, 4), generator=draw).double()
    use_NCLE[..., 0] += 40
    chosen = _even(use_NCLE).tolist()
    total = torch.zeros(2, 4).double()
    for n, c in enumerate(chosen):  # none would have been better at its turn
        spread = []
        for each in use_NCLE[n]:
            p = (total + each) / (total + each).sum(1, keepdim=True)
            spread.append(float((p * (p.clamp(min=1e-30) * 4).log()).sum()))
        assert spread[c] == pytest.approx(min(spread))
        total += use_NCLE[n, c]
    model = mixtures.random_model("qwen3_moe")
    ids_NS = torch.randint(2, 300, (8, 12), generator=draw)
    found = balanced(model, ids_NS, 4)
    assert found.shape == (2, 12)
    for n in range(2):
        assert any(torch.equal(found[n], each) for each in ids_NS[4 * n : 4 * n + 4])
    assert torch.equal(balanced(model, ids_NS, 1), ids_NS)


def test_a_mixture_writes_more_text_than_it_is_calibrated_on(build, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = build(tmp_path / "source", mixtures.config_of("qwen3_moe"))
    source = open_source(str(folder))
    ids = {}
    for balance in (1, 3, 3):
        wanted = secateur.Calibration(samples=4, seq_len=16, expert_balance=balance)
        ids[balance], settings, _ = calibration_ids(source, wanted, torch.device("cpu"), lambda _: None)
        assert (ids[balance].shape, settings.expert_balance) == ((4, 16), balance)
    assert not torch.equal(ids[1], ids[3])
    assert len(list((tmp_path / "cache").rglob("self-*"))) == 2
    for more, says in ((0, "at least 1"), (2, "text that the model writes")):
        with pytest.raises(UsageError, match=says):
            secateur.Calibration("docs", expert_balance=more)
