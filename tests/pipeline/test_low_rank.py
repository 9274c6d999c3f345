"""A part of low rank from end to end: what `compress` writes, every way of reading it, and what is said when it makes no sense.

O: output features, I: input features.
"""

import json
from dataclasses import replace

import mixtures
import pytest
import torch
from safetensors.torch import load_file

import secateur
from secateur.checkpoint.inspect import inspect
from secateur.errors import UsageError
from secateur.model.source import open_source
from secateur.plugin.packed_modules import packed_linears
from secateur.recipes.plan import plan
from secateur.recipes.recipe import Calibration, Recipe
from secateur.recipes.strings import parse_recipes

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
GPTQ = {"quantize": "gptq", "quantization": {"bits": 3, "group_size": 16}}
WAYS = {
    "alps": {"prune": "alps", "pattern": "2:4", "low_rank": 0.1},
    "wanda": {"prune": "wanda", "sparsity": 0.5, "rank": 3, "low_rank_method": "eora"},
    "gptq": {**GPTQ, "low_rank": 0.1},
    "trellis": {"quantize": "trellis", "quantization": {"bits": 2, "states": 256}, "rank": 2},
    "both": {"prune": "alps", "pattern": "2:4", **GPTQ, "rank": 4},
}


@pytest.fixture(scope="module")
def recipe_of(text_file):
    def make(way, **more):
        return Recipe(**{**WAYS[way], **more}, calibration=Calibration(str(text_file), 8, 24))

    return make


@pytest.fixture(scope="module")
def compressed(model_of, recipe_of, tmp_path_factory):
    """`compressed("llama", dtype, way)`: the source and the folder. Not to be written to."""
    made = {}

    def make(family, dtype, way):
        if (family, dtype, way) not in made:
            out = tmp_path_factory.mktemp("low-rank") / "out"
            secateur.compress(model_of(family, dtype), out, recipe_of(way))
            made[family, dtype, way] = model_of(family, dtype), out
        return made[family, dtype, way]

    return make


EACH = pytest.mark.parametrize(
    ("family", "dtype", "way"),
    [
        *(pytest.param("llama", BF16, way, marks=[pytest.mark.slow] * (way in ("wanda", "gptq"))) for way in WAYS),
        *(("gpt2", FP16, "wanda"), ("gpt2", FP32, "gptq")),
    ],
)


def parts_of(folder, name):
    stored = load_file(folder / "model.safetensors")
    return {
        key.removeprefix(f"{name}.weight."): value for key, value in stored.items() if key.startswith(f"{name}.weight.")
    }


@EACH
def test_it_is_loaded_packed_and_exported_dense(compressed, tmp_path, family, dtype, way):
    _, out = compressed(family, dtype, way)
    assert secateur.verify(out) == []
    ids = torch.tensor([[5, 9, 2, 7]])
    packed = secateur.load(out, dtype=FP32)
    assert len(list(packed_linears(packed))) == len(json.loads((out / "secateur.json").read_text())["linears"])
    dense = secateur.load(out, "dense", dtype=FP32)
    secateur.export(out, tmp_path / "dense", to="dense")
    assert secateur.verify(tmp_path / "dense") == []
    exported = secateur.load(tmp_path / "dense", dtype=FP32)
    with torch.no_grad():
        wanted = exported(ids).logits
        assert torch.equal(dense(ids).logits, wanted)
        # Packed, the sum is not rounded to the dtype of the weight.
        assert (packed(ids).logits - wanted).abs().max() < 0.02 * wanted.abs().max()
    packed.save_pretrained(tmp_path / "again")
    assert contents_of(tmp_path / "again") == contents_of(out)


def contents_of(folder):
    """What is packed."""
    return {
        name.removeprefix("transformer."): (tensor.dtype, tensor.tolist())
        for name, tensor in load_file(folder / "model.safetensors").items()
        if ".weight." in name
    }


@EACH
def test_bytes_and_errors_are_those_of_what_is_written(compressed, family, dtype, way):
    _, out = compressed(family, dtype, way)
    told = json.loads((out / "secateur.json").read_text())["linears"]
    names = {row.name for row in inspect(out).linears}
    assert set(told) <= names
    name, linear = next(iter(told.items()))
    parts = parts_of(out, name)
    assert linear["layout"] == "low-rank"
    assert linear["bytes"] == sum(part.nbytes for part in parts.values())
    (O, I), rank = linear["shape"], len(parts["low_in"])
    share = WAYS[way].get("low_rank", 0)
    assert rank == WAYS[way].get("rank", int(share * O * I / (O + I)))
    assert linear["sparsity"] == pytest.approx(0.5 if "prune" in WAYS[way] else 0, abs=0.02)


@pytest.mark.thin(2)
@pytest.mark.parametrize("way", WAYS)
def test_it_is_nearer_than_without(model_of, recipe_of, compressed, tmp_path, way):
    source, out = compressed("llama", BF16, way)
    none = replace(recipe_of(way), low_rank=None, rank=None, low_rank_method=None)
    secateur.compress(source, tmp_path / "none", none)
    errors = [
        sum(linear["error"] for linear in json.loads((folder / "secateur.json").read_text())["linears"].values())
        for folder in (out, tmp_path / "none")
    ]
    assert errors[0] < 0.9 * errors[1]


def test_full_rank_gives_the_dense_weight_back(model_of, recipe_of, tmp_path):
    source = model_of("llama", BF16)
    report = secateur.compress(source, tmp_path / "out", recipe_of("gptq", low_rank=None, rank=10**6, format="dense"))
    assert max(linear.error for linear in report.linears) < 1e-4
    assert secateur.verify(tmp_path / "out") == []


def test_a_share_too_small_for_any_rank_leaves_nothing_beside(model_of, recipe_of, tmp_path):
    secateur.compress(model_of("llama", BF16), tmp_path / "out", recipe_of("gptq", low_rank=1e-4))
    secateur.compress(model_of("llama", BF16), tmp_path / "none", recipe_of("gptq", low_rank=None))
    assert contents_of(tmp_path / "out") == contents_of(tmp_path / "none")


def test_what_is_dense_is_the_sum(model_of, recipe_of, compressed, tmp_path):
    _, out = compressed("llama", BF16, "alps")
    secateur.compress(model_of("llama", BF16), tmp_path / "dense", recipe_of("alps", format="dense"))
    assert secateur.verify(tmp_path / "dense") == []
    packed, dense = (open_source(str(folder)).weights for folder in (out, tmp_path / "dense"))
    for name in packed:
        assert torch.equal(packed[name], dense[name])


@pytest.mark.parametrize("to", ["gptq", "compressed-tensors", "mlx"])
def test_other_formats_refuse_it(compressed, tmp_path, to):
    _, out = compressed("llama", BF16, "gptq")
    with pytest.raises(UsageError, match=rf"cannot be written as {to}: it has a part of low rank.*`to='dense'`"):
        secateur.export(out, tmp_path / "out", to=to)


def test_ours_keeps_it(compressed, tmp_path):
    _, out = compressed("llama", BF16, "gptq")
    secateur.export(out, tmp_path / "again", to="secateur")
    assert contents_of(tmp_path / "again") == contents_of(out)


def test_an_interrupted_run_goes_on(model_of, recipe_of, compressed, tmp_path, monkeypatch):
    from secateur.pipeline import recorder

    source, out = compressed("llama", BF16, "alps")
    end = recorder.Recorder.end_block

    def stop(self, number, *args):
        end(self, number, *args)
        raise KeyboardInterrupt

    monkeypatch.setattr(recorder.Recorder, "end_block", stop)
    with pytest.raises(KeyboardInterrupt):
        secateur.compress(source, tmp_path / "out", recipe_of("alps"))
    monkeypatch.undo()
    secateur.compress(source, tmp_path / "out", recipe_of("alps"), resume=True)
    assert contents_of(tmp_path / "out") == contents_of(out)


def test_experts_have_it_too(build, recipe_of, tmp_path):
    source = build(tmp_path / "source", mixtures.config_of("mixtral"))
    secateur.compress(source, tmp_path / "out", recipe_of("alps"))
    assert secateur.verify(tmp_path / "out") == []
    told = json.loads((tmp_path / "out" / "secateur.json").read_text())["linears"]
    assert {linear["layout"] for name, linear in told.items() if ".experts." in name} == {"low-rank"}
    ids = torch.tensor([[5, 9, 2, 7]])
    with torch.no_grad():
        packed, dense = (secateur.load(tmp_path / "out", way, dtype=FP32)(ids).logits for way in ("torch", "dense"))
    assert (packed - dense).abs().max() < 0.02 * dense.abs().max()


# --- recipes

WRONG = [
    ({**GPTQ, "rank": 0}, "`rank` 0 is not possible: give 1 or more"),
    ({**GPTQ, "low_rank": 0.0}, r"`low_rank` 0 is outside \(0, 1\)"),
    ({**GPTQ, "low_rank": 1.5}, r"`low_rank` 1.5 is outside \(0, 1\)"),
    ({**GPTQ, "low_rank": 0.1, "rank": 3}, "`low_rank` and `rank` each say how much"),
    ({**GPTQ, "low_rank_method": "eora"}, "`low_rank_method` says how, but not how much"),
    ({**GPTQ, "rank": 3, "low_rank_method": "eaor"}, "`low_rank_method` 'eaor' is not known: did you mean 'eora'"),
    ({**GPTQ, "rank": 3, "low_rank_method": "admm"}, "`low_rank_method` admm splits weights to be pruned: add `prune`"),
    ({"embeddings": 8, "rank": 3}, "`rank` is beside what is pruned or quantized: `prune` or `quantize` is missing"),
    (
        {"prune": "wanda", "pattern": "structured", "sparsity": 0.2, "rank": 3},
        "`rank` does not go together with `pattern` structured",
    ),
]


@pytest.mark.parametrize(("options", "what"), WRONG, ids=lambda value: value if isinstance(value, str) else "")
def test_what_makes_no_sense_is_refused(options, what):
    with pytest.raises(UsageError, match=what):
        plan(Recipe(**options))


def test_recipes_say_it_in_every_form():
    recipe = Recipe(prune="alps", pattern="2:4", low_rank="5%")
    assert recipe.low_rank == 0.05
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    ((name, found),) = parse_recipes("alps:2:4(low_rank=5%)")
    assert found == recipe
    assert parse_recipes(name) == [(name, recipe)]
    assert plan(recipe).low_rank.method.name == "admm"
    assert plan(Recipe(**GPTQ, rank=3)).low_rank.method.name == "eora"
