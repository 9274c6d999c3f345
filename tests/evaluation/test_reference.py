"""Predictions that are kept: against a calculation in float64, against the model that made them, and what damage does."""

import json
import math
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from secateur.errors import CheckpointError, UsageError
from secateur.evaluation import distributions as module
from secateur.evaluation.distributions import Distributions, divergence, shortened
from secateur.evaluation.perplexity import CutText, measure
from secateur.evaluation.reference import keep_reference

V, K, S = 61, 5, 20
IDENTITY = {"model": {"model.safetensors": "0123"}, "dtype": "float32"}


def tiny(seed=0, vocab=V):
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data.mul_(8)  # far from uniform
    return model


@pytest.fixture(scope="module", name="ids_KS")
def some_windows():
    return torch.randint(V, (K, S), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def pair():
    """A model and the one that it was made from."""
    model, dense = tiny(1), tiny(1)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.02)
    return model, dense


@pytest.fixture
def counted():
    """A model that counts how often it was run, and the count."""
    model, calls = tiny(1), []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    return model, calls


def keep(cache, model, ids_KS, identity=IDENTITY, stride=None, **options):
    return keep_reference(cache, identity, lambda: model, CutText(ids_KS, stride), **options)


def files(cache):
    return sorted(cache.glob("*/*.safetensors"))


# --- divergences of the likeliest tokens


def whole(logits_BV):
    log_p_BV = logits_BV.float().log_softmax(1)
    return Distributions(log_p_BV, -log_p_BV[:, 0], log_p_BV.argmax(1))


def slow(p_V, q_V, kept):
    """KL of two lists of probabilities, where all but the kept ones of p count as one."""
    terms = [(p_V[t], q_V[t]) for t in kept]
    terms.append((math.fsum(p for t, p in enumerate(p_V) if t not in kept),
                  math.fsum(q for t, q in enumerate(q_V) if t not in kept)))  # fmt: skip
    return math.fsum(p * math.log(p / q) for p, q in terms if p > 0)


@pytest.mark.parametrize("tokens", [1, 2, 17, V - 1])
def test_divergence_of_kept_tokens_against_float64(tokens):
    draw = torch.Generator().manual_seed(tokens)
    p, q = (whole(3 * torch.randn(7, V, generator=draw)) for _ in range(2))
    found_B = divergence(shortened(p, tokens), q)
    for row, found in enumerate(found_B.tolist()):
        p_V, q_V = ([math.exp(x) for x in each.log_p_BT[row].tolist()] for each in (p, q))
        kept = sorted(range(V), key=lambda t: p_V[t])[-tokens:]
        assert found == pytest.approx(slow(p_V, q_V, kept), rel=1e-4, abs=1e-6)


def test_the_rest_is_known_exactly_even_where_next_to_nothing_is_left():
    """1 − Σp would be rounding and nothing else here."""
    logits = torch.full((1, V), -30.0)
    logits[0, 3] = 0
    other = torch.full((1, V), -20.0)
    other[0, 3] = 0
    short = shortened(whole(logits), 1)
    assert short.log_rest_B.item() == pytest.approx(math.log(60) - 30, abs=1e-4)
    mass_p, mass_q = 60 * math.exp(-30), 60 * math.exp(-20)
    wanted = -math.log1p(mass_p) + math.log1p(mass_q) + mass_p * (-10)
    assert divergence(short, whole(other)).item() == pytest.approx(wanted, rel=0.1)


LOGITS = st.lists(st.floats(-30, 30, width=32), min_size=12, max_size=12)


@given(LOGITS, LOGITS, st.integers(1, 11))
def test_kept_tokens_never_tell_of_more_divergence_than_there_is(p, q, tokens):
    p, q = (whole(torch.tensor([logits])) for logits in (p, q))
    all_of_it, some = divergence(p, q).item(), divergence(shortened(p, tokens), q).item()
    assert -1e-5 <= some <= all_of_it + 1e-5 * (1 + all_of_it)


def test_a_token_that_is_ruled_out_may_be_among_the_rest_or_be_the_rest():
    logits = torch.randn(1, V, generator=torch.Generator().manual_seed(0))
    logits[0, 5:] = -torch.inf
    p, q = whole(logits), whole(torch.randn(1, V))
    for tokens in (2, 5, 9):
        assert math.isfinite(divergence(shortened(p, tokens), q).item())
    assert divergence(shortened(p, 5), q).item() == pytest.approx(divergence(p, q).item(), rel=1e-5)
    assert divergence(shortened(q, 5), p).item() == math.inf


# --- what is kept, and what is made of it


@pytest.mark.parametrize("stride", [None, 7])
@pytest.mark.parametrize("chunk", [3 * V, 1 << 20])
def test_whole_predictions_give_the_same_figures_to_the_bit(pair, ids_KS, tmp_path, stride, chunk, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK_VALUES", chunk)
    model, dense = pair
    live = measure(model, ids_KS, dense, stride=stride)
    kept = keep(tmp_path, dense, ids_KS, tokens=None, stride=stride)
    assert measure(model, ids_KS, kept, stride=stride) == live
    assert live.kl > 0.01


@pytest.mark.parametrize("tokens", [1, 8, 60])
def test_kept_tokens_give_the_same_loss_and_agreement_to_the_bit(pair, ids_KS, tmp_path, tokens):
    model, dense = pair
    live, found = measure(model, ids_KS, dense), measure(model, ids_KS, keep(tmp_path, dense, ids_KS, tokens=tokens))
    for name in ("loss", "agreement", "reference_perplexity", "perplexity_interval", "agreement_interval"):
        assert getattr(found, name) == getattr(live, name)
    assert 0 < live.agreement < 1
    assert 0 < found.kl < live.kl * (1 + 1e-6)
    if tokens == 1:
        assert found.kl < 0.9 * live.kl
    if tokens == V - 1:
        assert found.kl == pytest.approx(live.kl, rel=1e-4)


@pytest.mark.parametrize("tokens", [V, V + 1, 1000])
def test_more_tokens_than_there_are_keep_all(pair, ids_KS, tmp_path, tokens):
    model, dense = pair
    found = measure(model, ids_KS, keep(tmp_path, dense, ids_KS, tokens=tokens))
    assert found.kl == measure(model, ids_KS, dense).kl


def test_a_cache_is_as_small_as_it_says(ids_KS, tmp_path):
    keep(tmp_path, tiny(), ids_KS, tokens=4)
    tensors = load_file(files(tmp_path)[0])
    assert {name: (str(t.dtype), tuple(t.shape)) for name, t in tensors.items()} == {
        "loss": ("torch.float32", (S - 1,)),
        "likeliest": ("torch.int32", (S - 1,)),
        "log_p": ("torch.float32", (S - 1, 4)),
        "token": ("torch.int32", (S - 1, 4)),
        "log_rest": ("torch.float32", (S - 1,)),
    }


def test_the_reference_runs_once(ids_KS, tmp_path, counted):
    model, calls = counted
    steps = []
    keep(tmp_path, model, ids_KS, progress=lambda *step: steps.append(step))
    assert (len(calls), steps) == (K, [(k + 1, K) for k in range(K)])

    def refuse():
        raise AssertionError("it was loaded again")

    keep_reference(tmp_path, IDENTITY, refuse, CutText(ids_KS))


def test_an_interrupted_cache_is_completed(ids_KS, tmp_path, counted):
    model, calls = counted
    whole_kl = measure(tiny(0), ids_KS, keep(tmp_path / "whole", model, ids_KS)).kl

    def stop(done, _):
        if done == 2:
            raise KeyboardInterrupt

    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        keep(tmp_path / "cut", model, ids_KS, progress=stop)
    assert (len(calls), len(files(tmp_path / "cut"))) == (2, 2)
    calls.clear()
    found = keep(tmp_path / "cut", model, ids_KS)
    assert len(calls) == K - 2
    assert measure(tiny(0), ids_KS, found).kl == whole_kl
    # A hole in the middle is filled, too, and nothing else is run.
    files(tmp_path / "cut")[3].unlink()
    calls.clear()
    assert measure(tiny(0), ids_KS, keep(tmp_path / "cut", model, ids_KS)).kl == whole_kl
    assert len(calls) == 1
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize(
    "change",
    [
        {"identity": {**IDENTITY, "model": {"model.safetensors": "4567"}}},
        {"identity": {**IDENTITY, "dtype": "bfloat16"}},
        {"tokens": 8},
        {"tokens": None},
        {"stride": 7},
        {"ids_KS": "other text"},
        {"ids_KS": "fewer windows"},
        {"ids_KS": "shorter windows"},
    ],
    ids=str,
)
def test_another_model_way_to_run_it_or_text_has_a_folder_of_its_own(ids_KS, tmp_path, counted, change):
    model, calls = counted
    keep(tmp_path, model, ids_KS)
    others = {
        "other text": ids_KS.roll(1, 0),
        "fewer windows": ids_KS[:4],
        "shorter windows": ids_KS.reshape(2 * K, S // 2),
    }
    change = {name: others[value] if name == "ids_KS" else value for name, value in change.items()}
    before = len(calls)
    keep(tmp_path, model, **{"ids_KS": ids_KS, **change})
    assert len(list(tmp_path.iterdir())) == 2
    assert len(calls) == before + len(change.get("ids_KS", ids_KS))


# --- damage


def spoil(change):
    def by(file):
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)

    return by


def truncate(file):
    file.write_bytes(file.read_bytes()[:-10])


def empty(file):
    file.write_bytes(b"")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "cannot be read"),
        (empty, "cannot be read"),
        (lambda file: (file.unlink(), file.mkdir()), "cannot be read"),
        (spoil(lambda t: t.update(loss=t["loss"][1:])), "does not hold what it should"),
        (spoil(lambda t: t.update(log_p=t["log_p"][:, 1:].clone())), "does not hold what it should"),
        (spoil(lambda t: t.update(log_p=t["log_p"].half())), "does not hold what it should"),
        (spoil(lambda t: t.pop("log_rest")), "does not hold what it should"),
        (spoil(lambda t: t.update(more=torch.zeros(1))), "does not hold what it should"),
        (spoil(lambda t: t["token"][2].fill_(V)), "does not hold what it should"),
        (spoil(lambda t: t["token"][2].fill_(-1)), "does not hold what it should"),
        (spoil(lambda t: t["likeliest"].fill_(V)), "does not hold what it should"),
    ],
)
def test_a_damaged_window_is_one_line(ids_KS, tmp_path, damage, message):
    keep(tmp_path, tiny(), ids_KS, tokens=8)
    file = files(tmp_path)[2]
    damage(file)
    with pytest.raises(CheckpointError) as caught:
        measure(tiny(1), ids_KS, keep(tmp_path, tiny(), ids_KS, tokens=8))
    assert str(caught.value) == f"{file} {message}: remove its folder, to have it made again"
    shutil.rmtree(file.parent)
    assert measure(tiny(1), ids_KS, keep(tmp_path, tiny(), ids_KS, tokens=8)).kl > 0


@pytest.mark.parametrize("content", ["", "[1]", "{}", '{"vocabulary": null}', '{"vocabulary": "many"}', "{"])
def test_a_damaged_description_is_one_line(ids_KS, tmp_path, content):
    keep(tmp_path, tiny(), ids_KS)
    (about,) = tmp_path.glob("*/reference.json")
    about.write_text(content)
    with pytest.raises(CheckpointError) as caught:
        keep(tmp_path, tiny(), ids_KS)
    assert str(caught.value) == f"{about} cannot be read: remove its folder, to have it made again"


def test_a_description_of_another_vocabulary_is_noticed(ids_KS, tmp_path):
    keep(tmp_path, tiny(), ids_KS, tokens=8)
    (about,) = tmp_path.glob("*/reference.json")
    about.write_text(json.dumps({**json.loads(about.read_text()), "vocabulary": V + 1}))
    with pytest.raises(UsageError, match="the model has 61 tokens and the reference 62"):
        measure(tiny(1), ids_KS, keep(tmp_path, tiny(), ids_KS, tokens=8))


def test_a_cache_that_cannot_be_written(ids_KS, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UsageError, match=r"file cannot be written: Not a directory"):
        keep(tmp_path / "file", tiny(), ids_KS)


def test_a_disk_that_fills_up(ids_KS, tmp_path, monkeypatch):
    """safetensors has an error of its own for it."""
    monkeypatch.setattr("os.getpid", lambda: 7)
    keep(tmp_path, tiny(), ids_KS)
    file = files(tmp_path)[2]
    file.unlink()
    file.with_name(f"{file.name}.7.part").mkdir()
    with pytest.raises(UsageError, match=f"{tmp_path} cannot be written: "):
        keep(tmp_path, tiny(), ids_KS)


def test_a_reference_with_other_tokens(ids_KS, tmp_path):
    kept = keep(tmp_path, tiny(vocab=V + 6), ids_KS)
    with pytest.raises(UsageError, match="the model has 61 tokens and the reference 67"):
        measure(tiny(), ids_KS, kept)


def test_windows_that_the_reference_cannot_read(tmp_path):
    with pytest.raises(UsageError, match="windows of 65 tokens are longer than the model's 64 positions"):
        keep(tmp_path, tiny(), torch.zeros(1, 65, dtype=torch.long))
    assert list(tmp_path.iterdir()) == []
