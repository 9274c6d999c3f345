"""Factorizing from end to end: what `compress` writes, every way of reading it, and what is said when something is wrong."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import secateur
from secateur.checkpoint.inspect import inspect
from secateur.errors import UsageError
from secateur.model.source import open_source
from secateur.recipes.command_line import flags_of
from secateur.recipes.plan import plan
from secateur.recipes.recipe import Calibration, Recipe
from secateur.recipes.strings import parse_recipes

BF16, FP16 = torch.bfloat16, torch.float16
METHODS = {
    "cospadi": ("cospadi", {"size": 0.6}),
    "cospadi-coded": ("cospadi", {"size": 0.5, "dictionary_bits": 8, "coefficient_bits": 4, "ratio": 3.0}),
    "svd": ("svd", {"size": 0.7}),
}
CASES = [("llama", BF16, "cospadi"), ("llama", BF16, "svd"), ("gpt2", FP16, "cospadi-coded")]
EACH = pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[2]}")


@pytest.fixture(scope="module")
def compressed(model_of, text_file, tmp_path_factory):
    """A case's folder, that with `--format dense`, and its report. Not to be written to."""
    made = {}

    def make(family, dtype, method):
        if (family, method) not in made:
            source, folder = model_of(family, dtype=dtype), tmp_path_factory.mktemp("case")
            name, options = METHODS[method]
            recipe = Recipe(factorize=name, factorization=options, calibration=Calibration(str(text_file), 12, 24))
            report = secateur.compress(str(source), folder / "packed", recipe)
            secateur.compress(str(source), folder / "dense", Recipe(**{**vars(recipe), "format": "dense"}))
            made[family, method] = folder / "packed", folder / "dense", report
        return made[family, method]

    return make


def stored(folder):
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


@EACH
def test_every_reader_finds_the_same_weights(case, compressed, tmp_path):
    packed, dense, report = compressed(*case)
    expected = stored(dense)
    with secateur.backend("dense"):
        models = [secateur.load(packed), AutoModelForCausalLM.from_pretrained(packed, dtype="auto")]
    for model in models:
        found = {name: parameter.detach() for name, parameter in model.named_parameters()}
        assert {name for name in expected if name in found} == set(found)
        assert all(torch.equal(found[name], expected[name]) for name in found)
    models[0].save_pretrained(tmp_path / "again")
    again, before = stored(tmp_path / "again"), stored(packed)
    assert again.keys() == before.keys()
    assert all(torch.equal(again[name], before[name]) for name in before)
    assert secateur.verify(packed) == []
    assert inspect(open_source(str(packed))).linears == report.linears
    size = METHODS[case[2]][1]["size"]
    for linear in report.linears:
        assert linear.layout == "dictionary"
        assert linear.bits <= 16 * size
        assert 0 < linear.error < 1
        assert linear.error_kind == "output"
    modules = json.loads((packed / "config.json").read_text())["quantization_config"]["modules"]
    assert {entry["layout"] for entry in modules.values()} == {"dictionary"}


def computes_what_dense_does(packed, dense):
    """Fail unless each backend makes nearly the same logits of a packed folder as the dense folder has."""
    tokens = torch.arange(5, 17)[None]
    wanted = secateur.load(dense)(tokens).logits
    for backend in ("cpu", "torch"):
        with secateur.backend(backend):
            found = secateur.load(packed)(tokens).logits
        assert (found - wanted).abs().max() < 0.05 * wanted.abs().max(), backend


@EACH
def test_packed_weights_compute_what_dense_ones_do(case, compressed):
    packed, dense, _ = compressed(*case)
    computes_what_dense_does(packed, dense)


def test_the_command_line(says, model_of, text_file, tmp_path):
    words = ["--factorize", "cospadi", "--size", "60%", "--iterations", 2]
    text = ["--calibration", text_file, "--samples", 8, "--seq-len", 24]
    code, _, err = says("compress", model_of("llama", dtype=BF16), tmp_path / "out", *words, *text)
    assert code == 0, err
    code, out, err = says("plan", model_of("llama", dtype=BF16), *words, *text)
    assert code == 0, err
    assert "2 blocks" in out
    recipe = json.loads((tmp_path / "out" / "secateur.json").read_text())["recipe"]
    assert recipe["factorize"] == "cospadi"
    assert recipe["factorization"]["size"] == 0.6
    assert recipe["factorization"]["iterations"] == 2
    assert flags_of(Recipe(factorize="svd", factorization={"size": 0.6})) == ["--factorize", "svd", "--size", "0.6"]


WRONG = {
    "--size 0.5": "--size is an option of cospadi, svd: name one by --factorize",
    "--factorize svd --size 1.5": "--size",
    "--factorize svd --size half": "--size",
    "--factorize svd --iterations 3": "--iterations is an option of cospadi: svd would not heed it",
    "--factorize csopadi": "factorization method 'csopadi' is not known: did you mean 'cospadi'?",
    "--factorize svd --prune wanda --sparsity 0.5": "--prune wanda does not go together with --factorize svd",
    "--factorize svd --quantize gptq": "--quantize gptq does not go together with --factorize svd",
    "--factorize svd --target-size 0.5x": "--target-size 0.5x does not go together with --factorize svd",
    "--factorize svd --allocation owl": "--allocation owl does not go together with --factorize svd",
    "--factorize svd --sparsity 0.5": "--sparsity says how to prune",
    "--factorize svd --format bitmap": "--format bitmap does not hold factors",
}


@pytest.mark.parametrize("words", WRONG)
def test_what_is_wrong_is_said(words, says, model_of, tmp_path):
    code, out, err = says("compress", model_of("llama", dtype=BF16), tmp_path / "out", *words.split())
    assert (code, out) == (2, "")
    assert WRONG[words] in err
    assert not (tmp_path / "out").exists()


def test_recipe_strings():
    [(name, recipe)] = parse_recipes("cospadi:70%(ratio=4, dictionary_bits=8)")
    assert name == "cospadi:0.7(ratio=4.0,dictionary_bits=8)"
    assert recipe.factorization == {"size": 0.7, "ratio": 4.0, "dictionary_bits": 8}
    assert [name for name, _ in parse_recipes("svd:0.5..0.6, svd")] == ["svd:0.5", "svd:0.6", "svd"]
    with pytest.raises(UsageError, match="does not go together with `factorize`"):
        parse_recipes("gptq:4+svd:0.7")
    with pytest.raises(UsageError, match="'size' is no option here"):
        parse_recipes("svd(size=0.7)")
    with pytest.raises(UsageError, match="says how to factorize, but no method is given"):
        plan(Recipe(factorization={"size": 0.5}))


@pytest.mark.parametrize("more", [{"match_dense": True}, {"factorization": {"damping": "auto"}}])
def test_damping_is_chosen_and_the_dense_models_outputs_are_met(more, model_of, text_file, tmp_path):
    recipe = Recipe(factorize="svd", calibration=Calibration(str(text_file), 12, 24), **more)
    report = secateur.compress(str(model_of("llama", dtype=BF16)), tmp_path / "out", recipe)
    key = "match_share" if "match_dense" in more else "damping"
    assert all(key in linear.chosen() for linear in report.linears)
