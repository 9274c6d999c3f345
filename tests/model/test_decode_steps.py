"""Packed Llamas that decode in few calls: they say what they say otherwise, and go the long way wherever somebody looks."""

import copy
import pickle

import pytest
import torch
from transformers import AutoModelForCausalLM

import secateur
from secateur.kernels.cpu import cpu_backend
from secateur.plugin import decode_steps

pytestmark = pytest.mark.skipif(cpu_backend.missing() is not None, reason=str(cpu_backend.missing()))
IDS_NS = torch.randint(2, 300, (2, 9), generator=torch.Generator().manual_seed(3))


def layers_of(model):
    return [layer for layer in model.modules() if isinstance(layer, decode_steps.DecodingLayer)]


@pytest.fixture
def counted(monkeypatch):
    """A list that has an entry for every step that a layer takes in few calls."""
    calls = []
    step = decode_steps.after_attention
    monkeypatch.setattr(decode_steps, "after_attention", lambda *args: calls.append(1) or step(*args))
    return calls


@torch.no_grad()
def scores(model, mask_NS=None):
    """The logits of five steps, after four tokens of each of two texts."""
    mask_NS = torch.ones_like(IDS_NS) if mask_NS is None else mask_NS
    cache = model(IDS_NS[:, :4], attention_mask=mask_NS[:, :4], use_cache=True).past_key_values
    steps = [
        model(IDS_NS[:, i : i + 1], attention_mask=mask_NS[:, : i + 1], past_key_values=cache).logits
        for i in range(4, 9)
    ]
    return torch.cat(steps, 1).float()


def without_steps(model):
    for layer in layers_of(model):
        layer.__dict__["_decoding"] = decode_steps._NONE
    return model


@pytest.mark.thin(2)
@pytest.mark.parametrize("layout", ["bitmap", "packed-int", "spqr"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_give_what_layers_give(packed_of, counted, layout, dtype):
    path = packed_of("llama", layout, dtype)
    steps, plain = secateur.load(path), without_steps(secateur.load(path))
    exact = without_steps(secateur.load(path, dtype=torch.float32))
    layers = len(layers_of(steps))
    assert layers == len(steps.model.layers) > 0
    # Padding on the left makes a mask.
    padded_NS = torch.ones_like(IDS_NS)
    padded_NS[0, :3] = 0
    for mask_NS in (None, padded_NS):
        counted.clear()
        found, usual, want = (scores(model, mask_NS) for model in (steps, plain, exact))
        assert len(counted) == layers * (5 + (mask_NS is None))  # and once to try it
        assert not torch.equal(found, usual)
        assert (found - want).norm() <= max(1.2 * float((usual - want).norm()), 1e-5 * float(want.norm()))


def test_generate_writes_the_same(packed_of, counted):
    path = packed_of("llama", "packed-int")
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    model = secateur.load(path)
    found = model.generate(IDS_NS, **options)
    assert len(counted) == len(layers_of(model)) * (5 + 1)
    assert torch.equal(found, without_steps(secateur.load(path)).generate(IDS_NS, **options))


def test_transformers_gets_them_as_well_and_other_families_do_not(packed_of, counted):
    model = AutoModelForCausalLM.from_pretrained(packed_of("llama", "packed-int"))
    assert layers_of(model)
    assert {type(layer).__name__ for layer in layers_of(model)} == {"LlamaDecoderLayer"}
    scores(model)
    assert counted
    assert not layers_of(secateur.load(packed_of("qwen2", "packed-int")))
    assert not layers_of(secateur.load(packed_of("llama", "packed-int"), "dense"))


def test_who_looks_between_the_parts_sees_them(packed_of, counted):
    model = secateur.load(packed_of("llama", "packed-int"))
    want, seen = scores(model), []
    taken = len(counted)
    hook = model.model.layers[0].mlp.down_proj.register_forward_hook(lambda *args: seen.append(1))
    torch.testing.assert_close(scores(model), want)
    assert len(seen) == 6
    assert 0 < len(counted) - taken < taken
    hook.remove()
    before = len(counted)
    scores(model)
    assert len(counted) - before == 5 * len(layers_of(model))
    # Nor is anything left out where gradients are wanted, or what layers give.
    before = len(counted)
    cache = model(IDS_NS[:, :4], use_cache=True).past_key_values
    model(IDS_NS[:, 4:5], past_key_values=cache)
    assert len(counted) == before
    with torch.no_grad():
        cache = model(IDS_NS[:, :4], use_cache=True).past_key_values
        out = model(IDS_NS[:, 4:5], past_key_values=cache, output_hidden_states=True)
    assert len(out.hidden_states) == len(layers_of(model)) + 1


def test_a_layer_that_does_something_else_goes_its_own_way(packed_of, counted, monkeypatch):
    model = secateur.load(packed_of("llama", "packed-int"))
    original = type(layers_of(model)[0]).original
    forward = original.forward
    monkeypatch.setattr(original, "forward", lambda *args, **kwargs: 2 * forward(*args, **kwargs))
    found = scores(model)
    assert len(counted) == len(layers_of(model))  # tried, and not taken
    assert torch.equal(found, scores(without_steps(model)))


def test_copies_and_dense_models(packed_of, counted):
    model = secateur.load(packed_of("llama", "bitmap"))
    want = scores(model)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        before = len(counted)
        assert torch.equal(scores(again), want)
        assert len(counted) - before == 6 * len(layers_of(model))
    model.dequantize()
    before = len(counted)
    torch.testing.assert_close(scores(model), want, rtol=1e-4, atol=1e-4)
    assert len(counted) == before
