"""Blocks each with widths of its own: our loader, what others make of such folders, and the search."""

import json

import processes
import pytest
import torch
from breaking_off import compress_in_two_runs
from mixtures import config_of
from safetensors.torch import load_file
from test_structured_families import sites_of, zeroed
from transformers import AutoModel, AutoModelForCausalLM

import secateur
from secateur.errors import CheckpointError, UsageError
from secateur.model.source import open_source
from secateur.runs.forecast import forecast
from secateur.structured.sites import Width
from secateur.structured.structure_of import head_widths

TOKENS = torch.arange(2, 34)[None]
DOWN, O = "model.layers.{}.mlp.down_proj", "model.layers.{}.self_attn.o_proj"
GONE = secateur.Choice(units=0, groups=0)


def recipe_of(text_file, method="wanda", **more):
    text = secateur.Calibration(str(text_file), 8, 32)
    more = {"multiple": 8, "widths": "per-layer", **more}
    return secateur.Recipe(prune=method, pattern="structured", calibration=text, **more)


def logits(model, ids=TOKENS):
    with torch.no_grad():
        return model(ids).logits


def differing(model, head=None):
    """Widths that differ from block to block; of heads the one that is given for the first."""
    *_, neurons = sites_of(model, "neurons")
    *_, heads = sites_of(model, "heads")
    chosen = {site.name: secateur.Choice(units=24 + 16 * i) for i, site in enumerate(neurons)}
    if head is not None:
        chosen[heads[0].name] = secateur.Choice(units=head.units, groups=head.groups)
    return chosen


@pytest.fixture(scope="module")
def pruned(model_of, text_file, tmp_path_factory):
    """A Llama of three blocks: the first without attention, the second narrower, the third without an MLP."""
    folder = tmp_path_factory.mktemp("per-layer")
    model = model_of("llama", num_hidden_layers=3)
    chosen = {
        O.format(0): GONE,
        DOWN.format(0): secateur.Choice(units=40),
        O.format(1): secateur.Choice(units=2, groups=2),
        DOWN.format(1): secateur.Choice(units=24),
        DOWN.format(2): secateur.Choice(units=0),
    }
    secateur.compress(str(model), folder / "out", recipe_of(text_file, linears=chosen))
    return model, folder / "out"


@pytest.mark.parametrize(
    "family",
    [
        *["llama", "phi3", "gpt2"],
        *[
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("qwen2", "qwen3", "gpt-neox", "opt", "gemma2", "gemma3", "falcon")
        ],
    ],
)
def test_sliced_is_zeroed(family, model_of, text_file, tmp_path):
    *_, heads = sites_of(model_of(family), "heads")
    fewer = {"gpt2": Width(0, 0), "gpt-neox": Width(0, 0), "opt": Width(0, 0), "falcon": Width(0, 0)}
    width = fewer.get(family, head_widths(heads[0])[-1])
    chosen = differing(model_of(family), width)
    secateur.compress(str(model_of(family)), tmp_path / "out", recipe_of(text_file, "sparsegpt", linears=chosen))
    *_, sites = sites_of(model_of(family), "neurons")
    dense, small = zeroed(model_of(family), tmp_path / "out", [*sites, heads[0]])
    assert (logits(dense) - logits(small)).abs().max() <= 1e-6 * logits(dense).abs().max()
    assert secateur.verify(tmp_path / "out") == []
    loaded = secateur.load(tmp_path / "out", dtype=torch.float32)
    assert torch.allclose(logits(loaded), logits(small), atol=1e-5)


def test_what_is_left_of_a_block(pruned):
    _, out = pruned
    tensors = load_file(out / "model.safetensors")
    shapes = {name.removeprefix("model.layers."): tuple(t.shape) for name, t in tensors.items() if "layers" in name}
    assert shapes["0.self_attn.o_proj.weight"] == (32, 0)
    assert "0.self_attn.q_proj.weight" not in shapes
    assert shapes["0.mlp.down_proj.weight"] == (32, 40)
    assert shapes["1.self_attn.q_proj.weight"] == (16, 32)
    assert shapes["2.mlp.down_proj.weight"] == (32, 0)
    assert shapes["2.self_attn.q_proj.weight"] == (32, 32)
    assert secateur.verify(out) == []
    told = json.loads((out / "secateur.json").read_text())["structure"]
    before, after = told["weights"]
    assert after == sum(t.numel() for name, t in tensors.items() if "layers" in name and t.ndim == 2) < before
    assert told["neurons_in_all"] == [192, 64]
    assert {linear.name for linear in secateur.inspect(out).linears}.isdisjoint([O.format(0), DOWN.format(2)])


def test_transformers_and_secateur_give_the_same(pruned, tmp_path):
    _, out = pruned
    ours = secateur.load(out, dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    assert torch.equal(logits(ours), logits(theirs))
    body = AutoModel.from_pretrained(out, dtype=torch.float32).eval()
    assert body.layers[1].mlp.down_proj.weight.shape == (32, 24)
    for name, model in (("ours", ours), ("theirs", theirs)):
        model.save_pretrained(tmp_path / name)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32).eval()
        assert torch.equal(logits(again), logits(ours))
        theirs.set_attn_implementation("eager")
        assert torch.allclose(logits(theirs), logits(ours), atol=1e-5)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_cache_counts_tokens_without_attention(cache, pruned):
    _, out = pruned
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    ids = TOKENS[:, :8]
    given = model.generate(ids, max_new_tokens=8, do_sample=False, cache_implementation=cache, eos_token_id=None)
    for _ in range(8):
        ids = torch.cat([ids, logits(model, ids)[:, -1:].argmax(-1)], 1)
    assert torch.equal(given, ids)


_STOCK = """
import sys
sys.modules["secateur"] = None  # an import of it fails
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[1])
"""


@pytest.mark.parametrize("gone", [{DOWN.format(1): secateur.Choice(units=0)}, {O.format(1): GONE}])
def test_stock_transformers_does_not_open_it(gone, model_of, text_file, tmp_path):
    secateur.compress(str(model_of("llama")), tmp_path / "out", recipe_of(text_file, linears=gone))
    done = processes.script(_STOCK, tmp_path / "out", cwd=tmp_path)
    assert done.returncode == 1
    assert "Unknown quantization type, got secateur" in done.stderr
    assert "MISMATCH" in done.stderr


def test_widths_that_are_alike_are_a_stock_model(model_of, text_file, tmp_path):
    chosen = {DOWN.format(i): secateur.Choice(units=40) for i in range(2)}
    secateur.compress(str(model_of("llama")), tmp_path / "out", recipe_of(text_file, linears=chosen))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["intermediate_size"] == 40
    assert "quantization_config" not in config


@pytest.mark.parametrize(
    ("again", "layout"),
    [
        ({"quantize": "gptq", "quantization": {"bits": 4, "group_size": 8}}, "packed-int"),
        ({"prune": "wanda", "sparsity": 0.5}, "bitmap"),
    ],
)
def test_the_result_is_compressed_again(again, layout, pruned, text_file, tmp_path):
    _, out = pruned
    text = secateur.Calibration(str(text_file), 8, 32)
    secateur.compress(str(out), tmp_path / "out4", secateur.Recipe(**again, calibration=text))
    assert secateur.verify(tmp_path / "out4") == []
    section = json.loads((tmp_path / "out4" / "config.json").read_text())["quantization_config"]
    assert set(section["widths"]) == {f"model.layers.{i}" for i in range(3)}
    assert {entry["layout"] for entry in section["modules"].values()} == {layout}
    packed = secateur.load(tmp_path / "out4", dtype=torch.float32)
    dense = secateur.load(tmp_path / "out4", "dense", dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out4", dtype=torch.float32).eval()
    assert torch.allclose(logits(packed), logits(dense), atol=1e-4)
    assert torch.equal(logits(packed), logits(theirs))
    theirs.save_pretrained(tmp_path / "saved")
    saved = secateur.load(tmp_path / "saved", dtype=torch.float32)
    assert torch.equal(logits(saved), logits(theirs))
    secateur.export(str(tmp_path / "out4"), tmp_path / "dense", "dense")
    assert torch.allclose(logits(secateur.load(tmp_path / "dense", dtype=torch.float32)), logits(dense), atol=1e-6)


def test_a_narrower_model_gets_narrower_still(pruned, text_file, tmp_path):
    _, out = pruned
    secateur.compress(str(out), tmp_path / "narrow", recipe_of(text_file, sparsity=0.2, widths=None))
    tensors = load_file(tmp_path / "narrow" / "model.safetensors")
    widths = [tensors[f"{DOWN.format(i)}.weight"].shape[1] for i in range(3)]
    assert widths[0] < 40
    assert widths[1] < 24
    assert secateur.verify(tmp_path / "narrow") == []
    small = secateur.load(tmp_path / "narrow", dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "narrow", dtype=torch.float32).eval()
    assert torch.equal(logits(small), logits(theirs))


def test_shares_may_be_given_for_each_linear(model_of, text_file, tmp_path):
    chosen = {
        DOWN.format(0): secateur.Choice(sparsity=0.5),
        DOWN.format(1): secateur.Choice(sparsity=0.25),
        O.format(1): secateur.Choice(sparsity=0.5),
    }
    secateur.compress(str(model_of("llama")), tmp_path / "out", recipe_of(text_file, linears=chosen))
    source = open_source(str(tmp_path / "out"))
    assert {name: own.settings.get("intermediate_size") for name, own in source.widths.items()} == {
        "model.layers.0": 32,
        "model.layers.1": 48,
    }
    assert source.widths["model.layers.1"].settings["num_attention_heads"] == 2


@pytest.mark.thin(2)
@pytest.mark.parametrize("units", [None, "neurons", "neurons,blocks", "heads"])
def test_a_search_finds_the_share(units, model_of, text_file, tmp_path):
    model = str(model_of("llama", num_hidden_layers=4))
    share = 0.15 if units == "heads" else 0.35
    recipe = recipe_of(text_file, sparsity=share, units=units, allocation="search")
    report = secateur.compress(model, tmp_path / "out", recipe)
    before, after = report.structure["weights"]
    assert share - 0.005 < 1 - after / before < share + 0.05
    assert secateur.verify(tmp_path / "out") == []
    found = json.loads((tmp_path / "out" / "secateur.json").read_text())["recipe"]
    kinds = {name.rpartition(".")[2] for name, choice in found["linears"].items() if choice["units"] not in (64, 4)}
    assert (
        kinds
        <= {
            None: {"down_proj", "o_proj"},
            "neurons": {"down_proj"},
            "neurons,blocks": {"down_proj", "o_proj"},
            "heads": {"o_proj"},
        }[units]
    )
    secateur.compress(model, tmp_path / "again", found)
    name = "model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_a_search_that_loses_no_more_than_all_alike(model_of, text_file, tmp_path, monkeypatch):
    """Where blocks that are alike are nearest to the dense model, they are made alike."""
    from secateur.search.rehearsal import Rehearsal

    measured, make = Rehearsal.measure, Rehearsal.make
    sets = []

    def made(self, now, wider):
        sets.append(dict(now))
        make(self, now, wider)

    monkeypatch.setattr(Rehearsal, "make", made)
    monkeypatch.setattr(Rehearsal, "measure", lambda self: (float(len(set(sets[-1].values()))), measured(self)[1]))
    model = str(model_of("llama", num_hidden_layers=4))
    recipe = recipe_of(text_file, sparsity=0.35, units="neurons", allocation="search")
    secateur.compress(model, tmp_path / "out", recipe)
    assert len(sets) > 1
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_plan_tells_the_size(model_of, text_file, tmp_path):
    model = model_of("llama", num_hidden_layers=4)
    chosen = {DOWN.format(i): secateur.Choice(units=8 + 8 * i) for i in range(4)} | {O.format(2): GONE}
    recipe = recipe_of(text_file, linears=chosen)
    told = forecast(str(model), recipe, out=tmp_path)
    assert told.disk == pytest.approx(secateur.compress(str(model), tmp_path / "out", recipe).bytes, rel=2e-3)


def test_resuming_gives_the_same_bytes(model_of, text_file, tmp_path, monkeypatch):
    model = str(model_of("llama", num_hidden_layers=4))
    chosen = {DOWN.format(i): secateur.Choice(units=16 * i) for i in range(4)} | {O.format(1): GONE}
    recipe = recipe_of(text_file, linears=chosen)
    secateur.compress(model, tmp_path / "whole", recipe)
    compress_in_two_runs(model, tmp_path / "out", recipe, monkeypatch)
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"sparsity": 0.2}, "`widths` per-layer leaves open how wide each block is to be: add `allocation` search"),
        ({"sparsity": 0.2, "widths": "each"}, "`widths` 'each' is not known: it can be uniform, per-layer"),
        (
            {"sparsity": 0.2, "widths": None, "allocation": "search"},
            "has nothing to share where all blocks lose as many",
        ),
        ({"sparsity": 0.99, "allocation": "search", "units": "heads"}, "is out of reach: with `units` heads at most"),
        ({"sparsity": 0.2, "allocation": "owl"}, "`allocation` owl is for single weights"),
        ({"linears": {DOWN.format(0): secateur.Choice(units=72)}}, "reads 64 neurons, and is to read 72: give 0 to 64"),
        (
            {"linears": {O.format(0): secateur.Choice(units=3, groups=2)}},
            "and cannot read 3/2: it takes 2/2, 2/1, or 0",
        ),
        ({"linears": {DOWN.format(0): secateur.Choice(units=32)}, "widths": None}, "`widths` per-layer writes them"),
    ],
)
def test_bad_input_is_told_in_a_line(options, says, model_of, text_file, tmp_path):
    with pytest.raises(UsageError) as error:
        secateur.compress(str(model_of("llama")), tmp_path / "out", recipe_of(text_file, **options))
    assert says in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_without_a_structured_pattern_it_is_refused(model_of, text_file, tmp_path):
    recipe = secateur.Recipe(prune="wanda", sparsity=0.5, widths="per-layer")
    with pytest.raises(UsageError, match="`widths` is for `pattern` structured"):
        secateur.compress(str(model_of("llama")), tmp_path / "out", recipe)


@pytest.mark.parametrize(
    "widths",
    [
        [],
        {"model.layers.1": 5},
        {"model.layers.1": {"settings": {"intermediate_size": -8}}},
        {"model.layers.1": {"settings": {"intermediate_size": 2**40}}},
        {"model.layers.1": {"settings": {"intermediate_size": 128}}},
        {"model.layers.1": {"settings": {"intermediate_size": True}}},
        {"model.layers.1": {"settings": {"hidden_act": 3}}},
        {"model.layers.1": {"settings": {"num_attention_heads": 0}}},
        {"model.layers.1": {"absent": {"self_attn.o_proj": 9}}},
        {"model.layers.1": {"absent": {"self_attn": 2}}},
        {"model.layers.1": {"absent": {"self_attn.none": 2}}},
        {"model.layers.1": {"other": {}}},
        {"model.layers.9": {"settings": {"intermediate_size": 8}}},
        {"model.norm.1": {"settings": {"intermediate_size": 8}}},
        {"model.embed_tokens": {"settings": {"intermediate_size": 8}}},
    ],
)
def test_a_hostile_config_is_refused(widths, pruned, tmp_path):
    _, out = pruned
    folder = tmp_path / "out"
    folder.mkdir()
    for file in out.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["widths"] = widths
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as error:
        secateur.load(folder)
    assert "\n" not in str(error.value)
    assert secateur.verify(folder) != []


def test_the_command_line(model_of, text_file, tmp_path, says):
    options = ["--pattern", "structured", "--sparsity", "30%", "--multiple", "8", "--widths", "per-layer"]
    options += ["--allocation", "search", "--calibration", text_file, "--samples", "8", "--seq-len", "32"]
    code, _, err = says("compress", model_of("llama"), tmp_path / "out", "--prune", "wanda", *options)
    assert code == 0
    assert "of all blocks" in err
    code, _, _ = says("generate", tmp_path / "out", "bans", "--max-new-tokens", "4")
    assert code == 0
    code, _, err = says("export", tmp_path / "out", tmp_path / "gptq", "--to", "gptq")
    assert code == 2
    assert "have widths of their own, which gptq cannot say; decilm can, and secateur" in err


def test_blocks_of_a_mixture(build, text_file, tmp_path):
    folder = build(tmp_path / "model", config_of("qwen3_moe"))
    chosen = {O.format(0): GONE, O.format(1): secateur.Choice(units=2, groups=2)}
    secateur.compress(str(folder), tmp_path / "out", recipe_of(text_file, linears=chosen))
    ours = secateur.load(tmp_path / "out", dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert torch.allclose(logits(ours), logits(theirs), atol=1e-5)
    assert theirs.model.layers[1].self_attn.q_proj.weight.shape == (16, 32)
    assert secateur.verify(tmp_path / "out") == []


def test_it_is_streamed(pruned):
    _, out = pruned
    whole = secateur.load(out, dtype=torch.float32)
    streamed = secateur.load(out, dtype=torch.float32, max_memory="8GiB")
    assert torch.allclose(logits(streamed), logits(whole), atol=1e-5)


def test_a_model_in_memory_keeps_its_widths(pruned, text_file, tmp_path):
    _, out = pruned
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    secateur.compress(model, tmp_path / "again", secateur.Recipe(quantize="rtn", quantization={"bits": 8}))
    again = secateur.load(tmp_path / "again", "dense", dtype=torch.float32)
    assert again.model.layers[1].mlp.down_proj.weight.shape == (32, 24)
    assert (logits(again) - logits(model.eval())).abs().max() < 0.1
