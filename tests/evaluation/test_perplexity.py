"""Perplexity and divergence against a slow calculation in float64."""

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from secateur.errors import SecateurError, UsageError
from secateur.evaluation import distributions as module
from secateur.evaluation.perplexity import measure

V = 61


def tiny(seed=0, vocab=V, dtype=torch.float32):
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        attention_dropout=0.5,  # which must not be felt
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        parameter.data.mul_(8)  # far from uniform
    return model.to(dtype).train()


@pytest.fixture(name="ids_KS")
def some_windows():
    return torch.randint(V, (3, 20), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def distributions(model, ids_KS):
    """Next-token probabilities after every token but a window's last, one list a prediction, in float64."""
    model.eval()
    rows = [row_V for ids_S in ids_KS for row_V in model(ids_S[None]).logits[0, :-1].double()]
    return [[e / sum(exps) for e in exps] for exps in ([math.exp(x) for x in row_V.tolist()] for row_V in rows)]


def slow(model, ids_KS, reference):
    q, p = distributions(model, ids_KS), distributions(reference, ids_KS)
    targets = [token for ids_S in ids_KS.tolist() for token in ids_S[1:]]
    n = len(targets)
    loss = -sum(math.log(row[t]) for row, t in zip(q, targets, strict=True)) / n
    reference_loss = -sum(math.log(row[t]) for row, t in zip(p, targets, strict=True)) / n
    kl = sum(a * math.log(a / b) for pr, qr in zip(p, q, strict=True) for a, b in zip(pr, qr, strict=True)) / n
    agreement = sum(pr.index(max(pr)) == qr.index(max(qr)) for pr, qr in zip(p, q, strict=True)) / n
    return loss, reference_loss, kl, agreement


@pytest.mark.parametrize("chunk", [1, 7 * V, 1 << 23])
def test_against_float64(ids_KS, monkeypatch, chunk):
    monkeypatch.setattr(module, "_CHUNK_VALUES", chunk)
    model, reference = tiny(0), tiny(0)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.02)
    loss, reference_loss, kl, agreement = slow(model, ids_KS, reference)
    assert kl > 0.01
    assert 0 < agreement < 1
    model.train()
    found = measure(model, ids_KS, reference)
    assert found.loss == pytest.approx(loss, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(loss), rel=1e-5)
    assert found.reference_perplexity == pytest.approx(math.exp(reference_loss), rel=1e-5)
    assert found.kl == pytest.approx(kl, rel=1e-4)
    assert found.agreement == agreement
    assert (found.tokens, found.windows, found.seq_len) == (3 * 19, 3, 20)
    alone = measure(model, ids_KS)
    assert (alone.perplexity, alone.tokens, alone.kl, alone.agreement) == (found.perplexity, 57, None, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_agrees_with_itself(ids_KS, dtype):
    model = tiny(dtype=dtype)
    found = measure(model, ids_KS, model)
    assert found.kl == 0.0
    assert found.agreement == 1.0
    assert found.reference_perplexity == found.perplexity


def test_bfloat16_logits_are_normalised_in_float32(ids_KS):
    model = tiny(dtype=torch.bfloat16)
    loss, *_ = slow(model, ids_KS, model)
    assert measure(model, ids_KS).loss == pytest.approx(loss, rel=1e-5)


def test_windows_are_read_one_by_one(ids_KS):
    model, seen = tiny(), []
    model.register_forward_pre_hook(lambda _, __, kwargs: seen.append(kwargs["input_ids"].shape), with_kwargs=True)
    done = []
    found = measure(model, ids_KS, progress=lambda *step: done.append(step))
    assert seen == [(1, 20)] * 3
    assert done == [(1, 3), (2, 3), (3, 3)]
    losses = [measure(model, ids_KS[k : k + 1]).loss for k in range(3)]
    assert found.loss == pytest.approx(sum(losses) / 3)


class Ruling(torch.nn.Module):
    """A head that gives some tokens no chance."""

    def __init__(self, head, ruled_out):
        super().__init__()
        self.head, self.ruled_out = head, ruled_out

    def forward(self, x):
        return self.head(x).index_fill(-1, torch.tensor(self.ruled_out), -torch.inf)


def test_tokens_that_are_ruled_out(ids_KS):
    ids_KS = ids_KS.clamp(max=V - 3)
    model, reference = tiny(0), tiny(1)
    model.lm_head, reference.lm_head = Ruling(model.lm_head, [V - 1]), Ruling(reference.lm_head, [V - 1, V - 2])
    assert math.isfinite(measure(model, ids_KS, reference).kl)
    with pytest.raises(SecateurError, match="the model's divergence from the reference is inf in window 1 of 3"):
        measure(reference, ids_KS, model)


def test_a_loss_that_is_not_finite_names_the_window(ids_KS):
    ids_KS = ids_KS.clamp(max=V - 2)
    ids_KS[1, 4] = V - 1
    damaged = tiny()
    damaged.model.embed_tokens.weight.data[V - 1] = torch.nan
    with pytest.raises(SecateurError, match=r"the model's loss is nan in window 2 of 3 \(tokens 20 to 39\).*float32"):
        measure(damaged, ids_KS)
    with pytest.raises(SecateurError, match="the reference's loss is nan in window 2 of 3"):
        measure(tiny(), ids_KS, damaged)
    ruling = tiny()
    ruling.lm_head = Ruling(ruling.lm_head, [V - 1])
    with pytest.raises(SecateurError, match="the model's loss is inf in window 2 of 3"):
        measure(ruling, ids_KS)


def test_a_hopeless_model_has_infinite_perplexity(ids_KS):
    model = tiny()
    model.lm_head.weight.data *= 1e4
    found = measure(model, ids_KS)
    assert found.loss > 1000
    assert found.perplexity == math.inf


def test_what_cannot_be_measured(ids_KS):
    with pytest.raises(UsageError, match=r"the model has 61 tokens and the reference 67"):
        measure(tiny(), ids_KS, tiny(vocab=67))
    with pytest.raises(UsageError, match=r"the text has token 61, but the model only 61"):
        measure(tiny(), torch.full((1, 8), V))
    with pytest.raises(
        UsageError, match=r"windows of 65 tokens are longer than the model's 64 positions: lower `seq_len`"
    ):
        measure(tiny(), torch.zeros(1, 65, dtype=torch.long))
    for shape in ((0, 8), (3, 1)):
        with pytest.raises(UsageError, match="hold no prediction"):
            measure(tiny(), torch.zeros(shape, dtype=torch.long))
