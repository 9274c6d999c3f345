"""How the tokens of a text that the model writes itself are drawn, and the steps in which it writes."""

import math
from contextlib import suppress

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import secateur
from secateur.calibration import sampling
from secateur.calibration.quick_steps import attend, make_room, packed_linears, quick_attention
from secateur.calibration.sampling import _draw, sample_windows
from secateur.errors import SecateurError


def drawn(p_V, rows=20000, seed=0):
    return _draw(torch.tensor([p_V]).log().expand(rows, -1), torch.Generator().manual_seed(seed))


def test_tokens_are_drawn_as_often_as_their_probability_says():
    p_V = [0.0, 0.25, 0.0, 0.7, 0.05, 0.0]
    counts_V = drawn(p_V).bincount(minlength=6)
    assert counts_V[torch.tensor(p_V) == 0].sum() == 0
    for count, p in zip(counts_V.tolist(), p_V, strict=True):
        assert abs(count / 20000 - p) < 5 * math.sqrt(p * (1 - p) / 20000) + 1e-9


@pytest.mark.parametrize("V", [1, 2, 255, 256, 257, 511, 777])
def test_large_vocabularies_are_drawn_from_alike(V):
    """Compared with the probabilities themselves, those of a piece together."""
    p_V = torch.randn(V, generator=torch.Generator().manual_seed(V)).mul(2).softmax(0)
    p_V[::3] = 0 if V > 1 else 1
    counts_V = drawn(p_V.tolist()).bincount(minlength=V)
    assert len(counts_V) == V
    assert counts_V[p_V == 0].sum() == 0
    p_V = p_V / p_V.sum()
    assert ((counts_V / 20000 - p_V).abs() <= 5 * (p_V * (1 - p_V) / 20000).sqrt() + 1e-9).all()
    for piece in p_V.split(256):
        p = float(piece.sum())
        drawn_there = counts_V[: len(piece)].sum() / 20000
        counts_V = counts_V[len(piece) :]
        assert abs(drawn_there - p) <= 5 * math.sqrt(abs(p * (1 - p)) / 20000) + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("far", [0.0, 1e4, -3e4])
def test_only_differences_of_what_is_predicted_count(dtype, far):
    logits_V = torch.tensor([[-math.inf, 0.0, -math.inf, -math.inf]], dtype=dtype).expand(8, -1)
    assert _draw(logits_V + far, torch.Generator().manual_seed(0)).unique().tolist() == [1]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_no_distribution_is_refused(bad):
    with pytest.raises(SecateurError, match=r"predictions are not finite: it is damaged; choose a text by `source`"):
        _draw(torch.tensor([[0.5, bad, 0.5]] * 2), torch.Generator())
    with pytest.raises(SecateurError, match=r"predictions are not finite"):
        _draw(torch.full((2, 300), -math.inf), torch.Generator())


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 1), (3, 2, 3, 7, 8), (5, 1, 4, 33, 6), (2, 3, 1, 129, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_attention_is_that_of_its_formula(sizes, dtype, scale):
    B, K, G, S, D = sizes
    draw = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(B, heads, tokens, D, generator=draw).to(dtype) for heads, tokens in ((K * G, 1), (K, S), (K, S))
    )
    found = attend(q, k, v, scale)
    assert (found.shape, found.dtype) == ((B, 1, K * G, D), dtype)
    for b in range(B):
        for h in range(K * G):
            scores_S = (k[b, h // G].double() @ q[b, h, 0].double()) * (D**-0.5 if scale is None else scale)
            wanted_D = scores_S.softmax(0) @ v[b, h // G].double()
            assert (found[b, 0, h] - wanted_D).abs().max() <= (1e-5 if dtype == torch.float32 else 0.03)


def test_values_may_have_other_features_than_keys():
    q, k, v = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 3)
    assert attend(q, k, v).shape == (2, 1, 4, 3)


@pytest.mark.parametrize(
    "family", ["llama", "mistral", "qwen3", "gemma2", "gemma3", "phi3", "gpt2", "bloom", "falcon", "opt"]
)
def test_steps_predict_what_the_model_does(family, model_of):
    """Of every family, those with windows that slide past what the text is long included."""
    model = secateur.load(model_of(family))
    ids_BL = torch.randint(0, model.config.vocab_size, (3, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted_BLV = model(input_ids=ids_BL).logits
        cache, found = None, []
        with quick_attention():
            for at in range(20):
                out = model(input_ids=ids_BL[:, at : at + 1], past_key_values=cache, use_cache=True)
                if cache is None:
                    make_room(out.past_key_values, 20)
                cache = out.past_key_values
                found.append(out.logits)
    torch.testing.assert_close(torch.cat(found, 1), wanted_BLV, rtol=1e-4, atol=1e-4)


def test_attention_is_as_it_was_afterwards():
    usual = ALL_ATTENTION_FUNCTIONS["sdpa"]
    with quick_attention():
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not usual
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is usual
    with suppress(ValueError), quick_attention():
        raise ValueError
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is usual


def test_other_caches_stay_as_they_are():
    cache = StaticCache(config=LlamaConfig(num_hidden_layers=1), max_cache_len=4)
    layers = list(cache.layers)
    make_room(cache, 8)
    assert all(now is before for now, before in zip(cache.layers, layers, strict=True))
    make_room(None, 8)


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="the processor has no bfloat16 for oneDNN")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (3, 5, 7), (16, 33, 17), (40, 64, 96)])
def test_packed_linears_multiply_alike(bias, sizes):
    T, I, O = sizes
    linear = nn.Linear(I, O, bias).bfloat16()
    model, x_TI = nn.Sequential(linear), torch.randn(T, I).bfloat16()
    with torch.no_grad():
        wanted_TO = x_TI.float() @ linear.weight.float().T + (linear.bias.float() if bias else 0)
        with packed_linears(model, 4):
            assert "forward" in vars(linear)
            found_TO = model(x_TI)
            assert model(x_TI[None]).shape == (1, T, O)
        assert "forward" not in vars(linear)
    assert found_TO.dtype == torch.bfloat16
    torch.testing.assert_close(found_TO.float(), wanted_TO, rtol=0.02, atol=0.02)


def test_other_linears_are_left_alone():
    model = nn.Sequential(nn.Linear(4, 4), nn.Embedding(4, 4).bfloat16())
    with packed_linears(model, 4):
        assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("frugal", [True, False])
def test_text_is_the_same_with_copies_of_weights_and_without(frugal, model_of, monkeypatch):
    model = secateur.load(model_of("llama"), dtype=torch.bfloat16)
    packed = []
    monkeypatch.setattr(sampling, "packed_linears", lambda *args: packed.append(args) or packed_linears(*args))
    ids_NS = sample_windows(model, [0], 2, 24, 0, frugal=frugal)
    assert len(packed) == (not frugal)
    assert ids_NS.shape == (2, 24)
    if frugal:
        monkeypatch.undo()
        assert (sample_windows(model, [0], 2, 24, 0) == ids_NS).float().mean() > 0.4  # but for roundings


def test_weights_are_not_copied_where_there_is_no_room(model_of, monkeypatch):
    monkeypatch.setattr(sampling, "free_memory", lambda: 1000)
    monkeypatch.setattr(sampling, "packed_linears", lambda *_: pytest.fail("copied"))
    assert sample_windows(secateur.load(model_of("llama")), [0], 1, 8, 0).shape == (1, 8)
