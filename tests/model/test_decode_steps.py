"""Packed models that decode in one call a token: they say what they say otherwise, and go the long way where somebody looks."""

import copy
import pickle

import processes
import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

import secateur
from secateur.kernels.cpu import cpu_backend
from secateur.plugin import decode_steps, room_in_cache

pytestmark = pytest.mark.skipif(cpu_backend.missing() is not None, reason=str(cpu_backend.missing()))
IDS_NS = torch.randint(2, 300, (2, 9), generator=torch.Generator().manual_seed(3))


def steps_of(model):
    """The part of a model that takes such steps, if there is one."""
    return next((part for part in model.modules() if isinstance(part, decode_steps.DecodingModel)), None)


@pytest.fixture
def counted(monkeypatch):
    """A list that has an entry for every step that a whole model takes in one call."""
    calls = []
    taken = decode_steps.DecodingModel._taken

    def counts(self, *args):
        found = taken(self, *args)
        calls.extend([1] * (found is not None))
        return found

    monkeypatch.setattr(decode_steps.DecodingModel, "_taken", counts)
    return calls


@torch.no_grad()
def scores(model, mask_NS=None, cache=None):
    """The logits of five steps, after four tokens of each of two texts."""
    mask_NS = torch.ones_like(IDS_NS) if mask_NS is None else mask_NS
    start = model(IDS_NS[:, :4], attention_mask=mask_NS[:, :4], past_key_values=cache, use_cache=True)
    cache = start.past_key_values
    steps = [
        model(IDS_NS[:, i : i + 1], attention_mask=mask_NS[:, : i + 1], past_key_values=cache).logits
        for i in range(4, 9)
    ]
    return torch.cat(steps, 1).float()


def without_steps(model):
    steps_of(model).__dict__["_decoding"] = decode_steps._NONE
    model.get_output_embeddings().__class__ = torch.nn.Linear
    return model


@pytest.mark.thin(2)
@pytest.mark.parametrize("layout", ["bitmap", "packed-int", "spqr"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_give_what_layers_give(packed_of, counted, layout, dtype):
    agree_with_layers(packed_of("llama", layout, dtype), counted)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_families_whose_layers_have_biases_and_norms_of_heads(packed_of, counted, family):
    agree_with_layers(packed_of(family, "packed-int"), counted)


def test_windows_go_their_own_way(packed_of, counted):
    path = packed_of("mistral", "packed-int")
    model = secateur.load(path)
    # A cache that keeps all does not make the model look at all.
    found = [scores(model), scores(model, cache=DynamicCache())]
    assert not counted
    for each in found:
        torch.testing.assert_close(each, scores(without_steps(model)))


def test_layers_with_some_dense_linears(packed_of, counted):
    model = secateur.load(packed_of("llama", "packed-int"))
    want = scores(without_steps(secateur.load(packed_of("llama", "packed-int"))))
    down = model.model.layers[0].mlp.down_proj
    dense = torch.nn.Linear(down.in_features, down.out_features, bias=False)
    dense.weight.data = down.dense()
    model.model.layers[0].mlp.down_proj = dense
    torch.testing.assert_close(scores(model), want, rtol=1e-4, atol=1e-4)
    assert len(counted) == 6
    # Weights that are put in place of others, or written to, are seen.
    for change in (
        lambda: dense.weight.data.mul_(0),
        lambda: setattr(dense, "weight", torch.nn.Parameter(down.dense())),
    ):
        change()
        again = copy.deepcopy(model)
        torch.testing.assert_close(scores(model), scores(without_steps(again)), rtol=1e-4, atol=1e-4)
    assert len(counted) == 6 + 5 + 5


def agree_with_layers(path, counted):
    steps, plain = secateur.load(path), without_steps(secateur.load(path))
    exact = without_steps(secateur.load(path, dtype=torch.float32))
    # Padding on the left makes a mask.
    padded_NS = torch.ones_like(IDS_NS)
    padded_NS[0, :3] = 0
    for mask_NS in (None, padded_NS):
        counted.clear()
        found, usual, want = (scores(model, mask_NS) for model in (steps, plain, exact))
        assert len(counted) == 5 + (mask_NS is None)  # and once to try it
        assert not torch.equal(found, usual)
        assert (found - want).norm() <= max(1.2 * float((usual - want).norm()), 1e-5 * float(want.norm()))


def test_generate_writes_the_same(packed_of, counted):
    path = packed_of("llama", "packed-int")
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    model = secateur.load(path)
    found = model.generate(IDS_NS, **options)
    assert len(counted) == 5 + 1
    assert torch.equal(found, without_steps(secateur.load(path)).generate(IDS_NS, **options))


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3, "do_sample": False},
        {"do_sample": True, "top_k": 5, "num_return_sequences": 2},
        {"prompt_lookup_num_tokens": 3, "do_sample": False},
    ],
    ids=["beams", "samples", "looked up"],
)
def test_other_ways_to_generate(packed_of, counted, options):
    path = packed_of("llama", "packed-int")
    ids_NS = IDS_NS[:1].repeat(1, 2)
    options = {"max_new_tokens": 12, "pad_token_id": 0, **options}
    found, want = [], []
    for written, model in ((found, secateur.load(path)), (want, without_steps(secateur.load(path)))):
        torch.manual_seed(0)
        written.append(model.generate(ids_NS, **options))
    assert counted
    assert torch.equal(found[0], want[0])


def test_what_a_cache_has_shown_stays_as_it_is(packed_of, counted):
    """Caches are cropped, copied, made of one another's tensors and gone on with, as transformers' own."""
    path = packed_of("llama", "bitmap")
    model, plain = secateur.load(path), without_steps(secateur.load(path))

    @torch.no_grad()
    def step(model, cache, token):
        return model(torch.tensor([[token]]), past_key_values=cache).logits

    def run(model):
        with torch.no_grad():
            cache = model(IDS_NS[:1, :4], use_cache=True).past_key_values
        outs = [step(model, cache, 5), step(model, cache, 6)]
        shown = [cache.layers[0].keys, cache.layers[1].values]
        before = [tensor.clone() for tensor in shown]
        deep, shallow = copy.deepcopy(cache), copy.copy(cache)
        shallow.layers = [copy.copy(layer) for layer in cache.layers]
        again = DynamicCache([(layer.keys, layer.values) for layer in cache.layers])
        pickled = pickle.loads(pickle.dumps(cache))
        for token, each in enumerate((deep, shallow, again, pickled, cache), 7):
            outs += [step(model, each, token), step(model, each, token + 20)]
            assert each.get_seq_length() == 8
        cache.crop(-3)
        assert cache.get_seq_length() == 5
        outs += [step(model, cache, 12), step(model, cache, 13)]
        cache.reorder_cache(torch.tensor([0]))
        outs.append(step(model, cache, 14))
        cache.batch_repeat_interleave(2)
        with torch.no_grad():
            outs.append(model(torch.tensor([[3], [4]]), past_key_values=cache).logits[:1])
            # Several tokens at once, by transformers, and one more.
            outs.append(model(torch.tensor([[3, 4], [4, 5]]), past_key_values=cache).logits[:1, -1:])
            outs.append(model(torch.tensor([[3], [4]]), past_key_values=cache).logits[:1])
        assert all(torch.equal(now, was) for now, was in zip(shown, before, strict=True))
        return torch.cat(outs)

    found = run(model)
    assert len(counted) == 1 + 2 + 2 * 5 + 2 + 1 + 2
    torch.testing.assert_close(found, run(plain), rtol=1e-4, atol=1e-4)


def test_room_is_made_anew_when_it_is_full(packed_of, counted, monkeypatch):
    monkeypatch.setattr(room_in_cache, "_LEAST_ROOM", 2)
    path = packed_of("llama", "packed-int")
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    found = secateur.load(path).generate(IDS_NS, **options)
    assert len(counted) == 11 + 1
    assert torch.equal(found, without_steps(secateur.load(path)).generate(IDS_NS, **options))


def test_caches_go_from_inference_mode_to_no_grad_and_back(packed_of, counted):
    model = secateur.load(packed_of("llama", "packed-int"))
    want = scores(model)
    with torch.inference_mode():
        cache = model(IDS_NS[:, :4], use_cache=True).past_key_values
        found = [model(IDS_NS[:, 4:5], past_key_values=cache).logits]
    with torch.no_grad():
        found.append(model(IDS_NS[:, 5:6], past_key_values=cache).logits)
    with torch.inference_mode():
        found.append(model(IDS_NS[:, 6:7], past_key_values=cache).logits)
    assert torch.equal(torch.cat(found, 1), want[:, :3])


def test_other_caches_go_their_own_way(packed_of, counted):
    model = secateur.load(packed_of("llama", "packed-int"))
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    want = without_steps(secateur.load(packed_of("llama", "packed-int"))).generate(IDS_NS, **options)
    counted.clear()
    assert torch.equal(model.generate(IDS_NS, cache_implementation="static", **options), want)
    assert torch.equal(model.generate(IDS_NS, use_cache=False, **options), want)
    assert not counted


def test_wrong_inputs_are_refused_as_the_model_refuses_them(packed_of, counted):
    model = secateur.load(packed_of("llama", "packed-int"))
    with torch.no_grad():
        cache = model(IDS_NS[:, :4], use_cache=True).past_key_values
        model(IDS_NS[:, 4:5], past_key_values=cache)
        taken = len(counted)
        for ids, mask in ((torch.tensor([[5000], [3]]), None), (IDS_NS[:1, :1].repeat(3, 1), None)):
            with pytest.raises((IndexError, RuntimeError)):
                model(ids, attention_mask=mask, past_key_values=copy.deepcopy(cache))
    assert len(counted) == taken
    assert cache.get_seq_length() == 5


def test_transformers_gets_them_as_well_and_other_families_do_not(packed_of, counted):
    model = AutoModelForCausalLM.from_pretrained(packed_of("llama", "packed-int"))
    assert type(steps_of(model)).__name__ == "LlamaModel"
    scores(model)
    assert counted
    assert not steps_of(secateur.load(packed_of("gemma2", "packed-int")))
    assert not steps_of(secateur.load(packed_of("llama", "packed-int"), "dense"))


def test_who_looks_between_the_parts_sees_them(packed_of, counted):
    model = secateur.load(packed_of("llama", "packed-int"))
    want, seen = scores(model), []
    taken = len(counted)
    hook = model.model.layers[0].mlp.down_proj.register_forward_hook(lambda *args: seen.append(1))
    torch.testing.assert_close(scores(model), want)
    assert len(seen) == 6
    assert len(counted) == taken
    hook.remove()
    before = len(counted)
    scores(model)
    assert len(counted) - before == 5
    # Nor is anything left out where gradients are wanted, or what layers give.
    before = len(counted)
    cache = model(IDS_NS[:, :4], use_cache=True).past_key_values
    model(IDS_NS[:, 4:5], past_key_values=cache)
    assert len(counted) == before
    with torch.no_grad():
        cache = model(IDS_NS[:, :4], use_cache=True).past_key_values
        out = model(IDS_NS[:, 4:5], past_key_values=cache, output_hidden_states=True)
    assert len(out.hidden_states) == len(model.model.layers) + 1


def test_a_layer_that_does_something_else_goes_its_own_way(packed_of, counted, monkeypatch):
    model = secateur.load(packed_of("llama", "packed-int"))
    original = type(model.model.layers[1])
    forward = original.forward
    monkeypatch.setattr(original, "forward", lambda *args, **kwargs: 2 * forward(*args, **kwargs))
    found = scores(model)
    assert len(counted) == 1  # tried, and not taken
    torch.testing.assert_close(found, scores(without_steps(model)))


def test_copies_and_dense_models(packed_of, counted):
    model = secateur.load(packed_of("llama", "bitmap"))
    want = scores(model)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        before = len(counted)
        assert torch.equal(scores(again), want)
        assert len(counted) - before == 6
        assert type(again.get_output_embeddings()) is type(model.get_output_embeddings())
    model.dequantize()
    before = len(counted)
    torch.testing.assert_close(scores(model), want, rtol=1e-4, atol=1e-4)
    assert len(counted) == before


_OTHER_BACKEND = """
import sys, torch, secateur
model = secateur.load(sys.argv[1], "torch")
with torch.no_grad():
    print(model(torch.arange(2, 6)[None]).logits.isfinite().all().item())
"""


def test_another_backend_alone_needs_no_kernels(packed_of, monkeypatch, tmp_path):
    """Nothing else has loaded the compiled kernels in a process of its own; and where there are none, nothing asks for them."""
    folder = packed_of("llama", "bitmap")
    done = processes.script(_OTHER_BACKEND, folder, cwd=tmp_path)
    assert done.stdout.split() == ["True"], done.stderr
    monkeypatch.setattr(cpu_backend, "missing", lambda: "none here")
    model = secateur.load(folder, "torch")
    assert steps_of(model) is None
    assert type(model.get_output_embeddings()) is torch.nn.Linear
    with torch.no_grad():
        assert model(IDS_NS[:, :4]).logits.isfinite().all()
