"""Methods are frozen dataclasses whose fields are their options: what is made of the fields, and methods of other packages."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import processes
import pytest

import secateur
from secateur.core.options import given_options, options_of
from secateur.core.registry import PRUNERS, QUANTIZERS, REFINERS, ROLES
from secateur.errors import UsageError
from secateur.prune.sparsegpt import SparseGPT
from secateur.quant.gptq import GPTQ
from secateur.recipes.methods import OPTIONS_KEY, checked, find, make
from secateur.recipes.plan import plan
from secateur.recipes.recipe import Recipe

ROOT = Path(__file__).parents[2]
EVERY = [(role, name) for role, table in ROLES.items() for name in table]


@pytest.mark.parametrize(("role", "name"), EVERY)
def test_every_method_says_what_it_is(role, name):
    method = ROLES[role][name]
    made = method()
    assert method.name == name
    assert dataclasses.is_dataclass(method)
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.anything = 1
    assert set(options_of(method)) == {field.name for field in dataclasses.fields(method)}
    for about in options_of(method).values():
        assert about.help[0].isupper()
        assert about.help.endswith(".")
    assert make(role, name, given_options(made)) == made


@pytest.mark.parametrize(
    ("role", "name", "option", "value", "says"),
    [
        ("prune", "sparsegpt", "block", 0, "`block` 0 is not possible with sparsegpt: give at least 1"),
        (
            "prune",
            "alps",
            "damping",
            0.0,
            "`damping` 0 is not possible with alps: give more than 0 and less than 10000",
        ),
        ("refine", "dsnot", "cycles", 0, "`cycles` 0 is not possible with dsnot"),
        ("refine", "dsnot", "threshold", -0.5, "`threshold` -0.5 is not possible with dsnot"),
        ("quantize", "gptq", "bits", 9, "`bits` 9 is not possible with gptq: give 2, 3, 4, 5, 6, 7 or 8"),
        ("quantize", "squeezellm", "bits", 8, "a table of 8 bits takes as much"),
        ("quantize", "gptq", "order", "random", "natural, activation or permuted"),
        ("quantize", "gptq", "group_size", "column", "give at least 2 or 'row'"),
        ("quantize", "gptq", "symmetric", 1, "`symmetric` of gptq is 1, which is not a true or false"),
        ("quantize", "gptq", "bits", True, "`bits` of gptq is True, which is not a whole number"),
        ("quantize", "rtn", "damping", 0.1, "`damping` is not an option of rtn, which has `bits`"),
        ("prune", "wanda", "damping", 0.1, "`damping` is not an option of wanda, which has none"),
    ],
)
def test_a_wrong_value_names_the_option_and_its_range(role, name, option, value, says):
    with pytest.raises(UsageError) as error:
        make(role, name, {option: value})
    assert says in str(error.value)


def test_shares_may_be_text_and_whole_numbers_stand_for_others():
    assert checked(QUANTIZERS["spqr"], "outlier_share", "1%") == 0.01
    assert make("quantize", "gptq", {"damping": 1}) == GPTQ(damping=1.0)


def test_an_unknown_method_is_told_the_nearest():
    with pytest.raises(UsageError, match="quantization method 'gtpq' is not known: did you mean 'gptq'"):
        find("quantize", "gtpq")


def test_a_recipe_takes_methods_themselves():
    recipe = Recipe(prune=SparseGPT(block=64), sparsity=0.5, quantize=GPTQ(bits=3))
    assert (recipe.prune, recipe.pruning) == ("sparsegpt", {"damping": 0.01, "block": 64})
    assert (plan(recipe).pruning.pruner, plan(recipe).quantizer) == (SparseGPT(block=64), GPTQ(bits=3))
    assert Recipe.from_dict(recipe.to_dict()) == recipe


def test_a_recipe_of_the_form_before_pruners_had_options():
    before = {"prune": "sparsegpt", "sparsity": 0.5, "quantize": "gptq", "quantization": {"bits": 4, "damping": 0.05}}
    resolved = plan(Recipe.from_dict(before))
    assert (resolved.pruning.pruner, resolved.quantizer) == (SparseGPT(), GPTQ(damping=0.05))


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        (Recipe(quantize="rtn", pruning={"block": 64}), "`block` says how to prune"),
        (Recipe(prune="wanda", sparsity=0.5, refining={"cycles": 3}), "`cycles` says how to refine"),
        (Recipe(prune="wanda", sparsity=0.5, quantization={"bits": 4}), "`bits` says how to quantize"),
    ],
)
def test_options_without_their_method(recipe, says):
    with pytest.raises(UsageError) as error:
        plan(recipe)
    assert says in str(error.value)


def test_options_of_pruners_count(model_of, text_file, tmp_path):
    text = secateur.Calibration(str(text_file), 8, 32)
    weights = []
    for options in ({}, {"damping": 0.01, "block": 128}, {"block": 8}, {"damping": 1.0}):
        out = tmp_path / str(len(weights))
        recipe = Recipe(prune="sparsegpt", sparsity=0.5, pruning=options, calibration=text)
        secateur.compress(str(model_of("llama")), out, recipe)
        weights.append((out / "model.safetensors").read_bytes())
        told = json.loads((out / "secateur.json").read_text())["recipe"]["pruning"]
        assert told == {"damping": 0.01, "block": 128, **options}
    assert weights[0] == weights[1]
    assert len(set(weights)) == 3


def test_the_command_line_gives_an_option_to_each_method_that_has_it(says):
    code, _, err = says("compress", "x", "y", "--prune", "wanda", "--sparsity", "0.5", "--bits", "4")
    assert code == 2
    assert "--bits is an option of gptq, rtn, spqr, squeezellm, trellis: wanda would not heed it" in err
    code, _, err = says("compress", "x", "y", "--quantize", "gptq", "--group-size", "column")
    assert code == 2
    assert "--group-size column is not possible with gptq" in err


def test_methods_are_shown(says):
    code, out, _ = says("methods")
    assert code == 0
    assert all(name in out for table in (PRUNERS, REFINERS, QUANTIZERS) for name in table)
    code, out, _ = says("methods", "sparsegpt")
    assert code == 0
    assert "arXiv:2301.00774" in out
    assert "--block" in out
    code, out, _ = says("methods", "gptq", "--json")
    assert json.loads(out)["options"]["bits"] == {
        "default": 4,
        "type": "int",
        "values": "2, 3, 4, 5, 6, 7 or 8",
        "help": "Bits of a code.",
    }
    code, _, err = says("methods", "gtpq")
    assert code == 2
    assert "did you mean 'gptq'" in err


@pytest.mark.slow
def test_a_package_of_somebody_else_adds_a_method(model_of, text_file, tmp_path):
    """One file outside the package: its option is on the command line, in the help, in the manifest, and is checked."""
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    example = ROOT / "examples" / "custom_pruner"
    source = tmp_path / "custom_pruner"
    source.mkdir()
    for file in ("pyproject.toml", "custom_pruner.py"):
        (source / file).write_bytes((example / file).read_bytes())
    subprocess.run([*install, "--target", str(site), str(source)], check=True, cwd=tmp_path)

    def run(*arguments):
        return processes.command(*arguments, cwd=tmp_path, path=[site])

    calibration = ["--calibration", text_file, "--samples", 8, "--seq-len", 32]
    made = run("compress", model_of("llama"), "out", "--prune", "blend", "--sparsity", 0.5, "--power", 0, *calibration)
    assert made.returncode == 0, made.stderr
    assert json.loads((tmp_path / "out" / "secateur.json").read_text())["recipe"]["pruning"] == {"power": 0.0}
    plain = run("compress", model_of("llama"), "plain", "--prune", "magnitude", "--sparsity", 0.5, *calibration)
    assert plain.returncode == 0, plain.stderr
    same = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "plain")]
    assert same[0] == same[1]  # a power of 0 is magnitude
    wrong = run("compress", model_of("llama"), "other", "--prune", "blend", "--sparsity", 0.5, "--power", 3)
    assert wrong.returncode == 2
    assert "--power 3 is not possible with blend: give at least 0 and at most 2" in wrong.stderr


def test_the_keys_of_options():
    assert set(OPTIONS_KEY) == set(ROLES)
