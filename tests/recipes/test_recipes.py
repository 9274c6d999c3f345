"""Recipes as files: what is written is read again to the last digit, runs are repeated by them, and those that are built in."""

import json
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from random_examples import tries

import secateur
from secateur.errors import UsageError
from secateur.recipes.built_in import NAMES, built_in
from secateur.recipes.built_in import recipe as find_recipe
from secateur.recipes.plan import plan
from secateur.recipes.recipe import Calibration, Choice, Recipe
from secateur.recipes.strings import parse_recipes

quickly = tries(150)
ROOT = Path(__file__).parents[2]


def files(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


# --- the file

_number = st.floats(allow_nan=False)
_count = st.integers(2, 2**63)
_flag = st.booleans()
# Words that one reading of YAML or another takes for something else.
_text = st.one_of(
    st.text(), st.sampled_from(["2:4", "1e-3", "1e5", ".5", "08", "0x1", "1_0", "no", "null", "~", "1.", "-", ""])
)


def _maybe(**kinds):
    return st.fixed_dictionaries({}, optional=kinds)


recipes = _maybe(
    prune=_text, sparsity=_number, pattern=_text, refine=_text, format=_text, dtype=_text, quantize=_text,
    targets=st.lists(_text).map(tuple), ignore=st.lists(_text).map(tuple),
    calibration=_maybe(
        source=_text.filter(str.strip), samples=_count, seq_len=_count, seed=st.integers(-(2**63), 2**63), text_field=_text
    ).map(lambda content: Calibration(**content)),
    quantization=_maybe(
        bits=_count, group_size=_count | _text, symmetric=_flag, search_range=_flag, order=_text, damping=_number,
        outlier_share=_number, outlier_threshold=_number, scale_bits=_count, tile_rows=_count, sensitivity=_text,
        sensitive_share=_number,
    ).map(lambda content: {**content}),
).map(lambda content: Recipe(**content))  # fmt: skip


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("recipe") / "recipe"


@quickly
@example(Recipe())
@example(Recipe("wanda", 0.0, calibration=Calibration("self", 3, 5, -7, "bödy ✂")))
@example(Recipe(ignore=("\x85", "\u2028 a", " \n\n", "\ufeff")))
@example(Recipe(quantize="gptq", quantization={"damping": 1e-05, "group_size": "128", "symmetric": False}))
@given(recipes)
def test_every_recipe_is_read_as_it_was_written(file, recipe):
    for text in (recipe.to_yaml(), json.dumps(recipe.to_dict()), json.dumps({"recipe": recipe.to_dict()}, indent=2)):
        file.write_text(text, encoding="utf-8")
        assert Recipe.read(file) == recipe
    # Another reader of YAML understands the same.
    assert Recipe.from_dict(yaml.safe_load(recipe.to_yaml())) == recipe


def test_a_recipe_file_says_what_differs_from_the_defaults():
    recipe = Recipe("wanda", 0.5, refine="dsnot", ignore=("*.0.*",), calibration=Calibration("docs", seed=3))
    assert recipe.to_yaml() == (
        "prune: wanda\nsparsity: 0.5\nrefine: dsnot\nignore:\n- '*.0.*'\ncalibration:\n  source: docs\n  seed: 3\n"
    )
    assert Recipe().to_yaml() == "{}\n"


def test_numbers_and_patterns_may_be_written_plainly(file):
    """YAML 1.1 has 2:4 as 124 and 1e-3 as a word."""
    file.write_text(
        "prune: wanda\npattern: 2:4\nquantize: gptq\nquantization: {damping: 1e-3, symmetric: no, bits: 4}\n"
    )
    options = {"bits": 4, "symmetric": False, "damping": 0.001}
    assert Recipe.read(file) == Recipe("wanda", pattern="2:4", quantize="gptq", quantization=options)


@pytest.mark.parametrize("name", ["nul\0byte.yaml", "x" * 300 + ".yaml"])
def test_a_file_that_cannot_be(name):
    with pytest.raises(UsageError, match="cannot be read"):
        find_recipe(name)


# --- a manifest repeats its run


@pytest.mark.thin(2)
@pytest.mark.parametrize(
    "options",
    [
        "--prune sparsegpt --sparsity 0.5",
        "--prune wanda --sparsity 0.5 --refine dsnot",
        "--prune sparsegpt --pattern 2:4 --format dense",
        "--prune magnitude --pattern 2:4 --dtype bfloat16 --targets *.mlp.*",
        # JSON writes this number as 1e-05.
        "--quantize gptq --bits 4 --group-size 16 --damping 0.00001",
        "--quantize spqr --bits 3 --group-size 16 --outlier-threshold 0.3 --ignore *.0.*",
        "--quantize squeezellm --sensitivity hessian --bits 3",
        "--prune sparsegpt --sparsity 0.5 --quantize spqr --outlier-share 0.01",
    ],
)
def test_the_manifest_of_a_run_gives_the_same_bytes(options, says, model_of, text_file, tmp_path):
    model, first, again = model_of("llama"), tmp_path / "first", tmp_path / "again"
    text = ("--calibration", text_file, "--samples", 12, "--seq-len", 24, "--seed", 3)
    assert says("compress", model, first, *options.split(), *text, "-q") == (0, "", "")
    assert says("compress", model, again, "--recipe", first / "secateur.json", "-q") == (0, "", "")
    assert files(again) == files(first)


def test_text_that_the_model_wrote_is_repeated_too(says, model_of, tmp_path):
    model, first, again = model_of("llama"), tmp_path / "first", tmp_path / "again"
    more = ("--samples", 6, "--seq-len", 16, "--seed", 5)
    assert says("compress", model, first, "--prune", "wanda", "--sparsity", 0.5, *more, "-q") == (0, "", "")
    assert says("compress", model, again, "--recipe", first / "secateur.json", "-q") == (0, "", "")
    assert files(again) == files(first)


def test_a_manifest_knows_a_text_by_any_name(says, model_of, text_file, tmp_path):
    """JSON escapes the scissors as two characters."""
    text = tmp_path / "têxt ✂ 𝒳.txt"
    text.write_bytes(text_file.read_bytes())
    options = ("--prune", "wanda", "--sparsity", 0.5, "--calibration", text, "--samples", 12, "--seq-len", 24, "-q")
    assert says("compress", model_of("llama"), tmp_path / "first", *options)[0] == 0
    given = ("--recipe", tmp_path / "first" / "secateur.json", "-q")
    assert says("compress", model_of("llama"), tmp_path / "again", *given) == (0, "", "")
    assert files(tmp_path / "again") == files(tmp_path / "first")


# --- the built-in recipes


@pytest.mark.parametrize("name", NAMES)
def test_a_built_in_recipe_is_sound(name, says, model_of, text_file, tmp_path):
    found = built_in(name)
    assert found.recipe == Recipe.from_dict(yaml.safe_load(found.text))
    model = model_of("llama", hidden_size=128, intermediate_size=128)
    text = ("--calibration", text_file, "--samples", 12, "--seq-len", 24)
    assert says("compress", model, tmp_path / "out", "--recipe", name, *text, "-q") == (0, "", "")
    used = Recipe.read(tmp_path / "out" / "secateur.json")
    assert plan(used) == plan(found.recipe)


@pytest.mark.parametrize("name", NAMES)
def test_its_figures_are_those_of_the_docs(name):
    costs = built_in(name).costs
    bits, perplexity, dense = re.match(
        r"(\S+) bits a weight.*?perplexity (\S+) on SmolLM2-135M \(dense (\S+)\)", costs
    ).groups()
    measured = (ROOT / "docs/choosing.md").read_text() + (ROOT / "benchmarks/README.md").read_text()
    rows = [line for line in measured.splitlines() if re.search(rf"\| {re.escape(perplexity)} \|", line)]
    assert rows
    assert any(bits in row for row in rows) or bits == "9.00"  # of 16-bit models, by the layout
    assert f"ense: {dense}" in measured


@pytest.mark.parametrize("name", ["gptq-4bit", "gptq-4bit-vllm", "rtn-8bit"])
def test_those_for_other_software_can_be_exported(name, says, model_of, tmp_path):
    model = model_of("llama", hidden_size=256, intermediate_size=256)
    assert says("compress", model, tmp_path / "out", "--recipe", name, "--samples", 4, "--seq-len", 16, "-q")[0] == 0
    assert says("export", tmp_path / "out", tmp_path / "other", "--to", "compressed-tensors", "-q") == (0, "", "")
    config = json.loads((tmp_path / "other" / "config.json").read_text())["quantization_config"]
    [group] = config["config_groups"].values()
    recipe = built_in(name).recipe
    assert group["weights"]["num_bits"] == recipe.quantization["bits"]
    assert group["weights"]["group_size"] == recipe.quantization["group_size"]
    assert group["weights"]["symmetric"] == recipe.quantization.get("symmetric", False)


def test_they_are_listed(says, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    code, table, err = says("recipes")
    assert (code, err) == (0, "")
    for name in NAMES:
        found = built_in(name)
        assert re.search(rf"^{name} ", table, re.MULTILINE)
        assert found.good_for in table
        assert found.costs in table


def test_they_are_listed_as_json(says):
    listed = json.loads(says("recipes", "--json")[1])
    assert [each["name"] for each in listed] == list(NAMES)
    for each in listed:
        assert Recipe.from_dict(each["recipe"]) == built_in(each["name"]).recipe
        assert each["good_for"]
        assert each["costs"]
    assert json.loads(says("recipes", NAMES[0], "--json")[1]) == listed[0]


def test_one_is_written_to_be_changed(says, model_of, tmp_path):
    code, text, err = says("recipes", "rtn-4bit")
    assert (code, err) == (0, "")
    (tmp_path / "my.yaml").write_text(text.replace("bits: 4", "bits: 3"))
    assert text.startswith("# Good for: ")
    assert says("compress", model_of("llama"), tmp_path / "out", "--recipe", tmp_path / "my.yaml", "-q") == (0, "", "")
    options = {**built_in("rtn-4bit").recipe.quantization, "bits": 3}
    assert plan(Recipe.read(tmp_path / "out" / "secateur.json")) == plan(Recipe(quantize="rtn", quantization=options))


def test_options_stand_above_a_built_in_recipe(says, model_of, tmp_path):
    given = ("--recipe", "rtn-8bit", "--bits", 2, "--prune", "magnitude", "--sparsity", 0.5)
    assert says("compress", model_of("llama"), tmp_path / "out", *given, "-q") == (0, "", "")
    used = Recipe.read(tmp_path / "out" / "secateur.json")
    assert (used.prune, used.sparsity, used.quantization["bits"], used.quantization["group_size"]) == (
        "magnitude",
        0.5,
        2,
        64,
    )


def test_plan_takes_one_too(says, model_of, tmp_path):
    code, out, _ = says("plan", model_of("llama"), "--recipe", "rtn-8bit", "--out", tmp_path / "out", "--json", "-q")
    assert (code, json.loads(out)["blocks"]) == (0, 2)


def test_a_file_stands_above_a_built_in_recipe_and_a_folder_does_not(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rtn-8bit").mkdir()  # the output of an earlier run, perhaps
    assert find_recipe("rtn-8bit") == built_in("rtn-8bit").recipe
    (tmp_path / "rtn-4bit").write_text("prune: magnitude\nsparsity: 0.5\n")
    assert find_recipe("rtn-4bit") == Recipe("magnitude", 0.5)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("rtn8bit", "--recipe 'rtn8bit' is neither a file nor a built-in recipe: did you mean 'rtn-8bit'?"),
        ("zzz", f"--recipe 'zzz' is neither a file nor a built-in recipe: it can be {', '.join(NAMES)}"),
        ("rtn-8bit.yaml", "recipe rtn-8bit.yaml cannot be read: "),
        ("recipes/rtn-8bit", "recipe recipes/rtn-8bit cannot be read: "),
        ("/", "--recipe / is a folder without secateur.json: "),
    ],
)
def test_a_recipe_that_is_nowhere(name, words, says, model_of, tmp_path):
    code, out, err = says("compress", model_of("llama"), tmp_path / "out", "--recipe", name, "-q")
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {words}")
    assert err.count("\n") == 1


def test_a_name_that_is_not_built_in(says):
    message = "error: built-in recipe 'spqr-4bits' is not known: did you mean 'spqr-4bit'?\n"
    assert says("recipes", "spqr-4bits") == (2, "", message)


# --- files that nobody means


@pytest.mark.thin(2)
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "prune: wanda\nsparsity: 0.5\nprune: alps\n",
            "has the key 'prune' twice, in lines 1 and 3: leave one of them out",
        ),
        ("quantization:\n  bits: 3\n  bits: 4\n", "has the key 'bits' twice, in lines 2 and 3: leave one of them out"),
        ("{prune: wanda, prune: wanda}", "has the key 'prune' twice, in lines 1 and 1: leave one of them out"),
        ('{"prune": "wanda", "sparsity": 0.5, "prune": "alps"}', "has the key 'prune' twice: leave one of them out"),
        ('{"recipe": {"linears": {"a": {}, "a": {}}}}', "has the key 'a' twice: leave one of them out"),
        ("[" * 20000, "is not a recipe: its brackets are nested too deep"),
        ("targets: " + "[" * 20000, "is not a recipe: its brackets are nested too deep"),
        ("{a: " * 20000, "is not a recipe: its brackets are nested too deep"),
        ("- " * 20000, "is not a recipe: its brackets are nested too deep"),
        (
            "prune: wanda\n#" + "x" * 2**20,
            "cannot be read: it has 1048590 characters, and YAML may have 1048576 at most",
        ),
    ],
    ids=lambda text: text[:30],
)
@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_a_recipe_file_that_nobody_means(text, message, suffix, says, model_of, tmp_path):
    path = tmp_path / f"r.{suffix}"
    path.write_text(text)
    for command in (
        ["compress", model_of("llama"), tmp_path / "out", "--recipe"],
        ["plan", model_of("llama"), "--recipe"],
    ):
        code, stdout, stderr = says(*command, path)
        assert (code, stdout) == (2, "")
        assert stderr.startswith(f"error: recipe {path} {message}")
        assert stderr.count("\n") == 1
    with pytest.raises(UsageError, match="`recipes`, character 1"):
        parse_recipes(str(path))


def test_a_file_of_any_size_is_not_read(tmp_path):
    path = tmp_path / "r.yaml"
    with path.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(UsageError, match="cannot be read: it has 1099511627776 bytes, and a recipe 268435456 at most"):
        Recipe.read(path)


def test_values_that_stand_for_many_are_not_written_out(tmp_path):
    """Thirty lists, each of ten times the one before."""
    lines = ["a0: &a0 [x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 30)]
    (tmp_path / "r.yaml").write_text("\n".join([*lines, "prune: *a29\n"]))
    with pytest.raises(UsageError, match="unknown key 'a0'"):
        Recipe.read(tmp_path / "r.yaml")
    (tmp_path / "r.yaml").write_text("prune:\n  " + "\n  ".join([*lines, "a: *a29\n"]))
    with pytest.raises(UsageError, match=r"'prune' of the recipe is \{…\}, which is not a text"):
        Recipe.read(tmp_path / "r.yaml")


def test_merged_keys_may_be_overridden(tmp_path):
    (tmp_path / "r.yaml").write_text(
        "linears:\n  a: &a {sparsity: 0.5}\n  b: &b {<<: *a, bits: 4}\n  c: {<<: *b, sparsity: 0.25}\n"
    )
    found = Recipe.read(tmp_path / "r.yaml").linears
    assert found == {"a": Choice(0.5), "b": Choice(0.5, 4), "c": Choice(0.25, 4)}


# --- what scripts may give


def test_a_script_names_a_recipe_in_any_way(model_of, tmp_path):
    (tmp_path / "r.yaml").write_text("prune: magnitude\nsparsity: 50%\ntargets: ['*.q_proj']\n")
    content = {"prune": "magnitude", "sparsity": "50%", "targets": ("*.q_proj",)}
    wanted = Recipe("magnitude", 0.5, targets=("*.q_proj",)).to_dict()
    given = [Recipe.read(tmp_path / "r.yaml"), content, tmp_path / "r.yaml", str(tmp_path / "r.yaml")]
    for i, recipe in enumerate(given):
        report = secateur.compress(str(model_of("llama")), tmp_path / f"out-{i}", recipe)
        assert report.recipe == wanted
    assert content == {"prune": "magnitude", "sparsity": "50%", "targets": ("*.q_proj",)}
    report = secateur.compress(str(model_of("llama")), tmp_path / "named", "rtn-4bit")
    assert report.recipe["quantize"] == "rtn"
    assert secateur.forecast(str(model_of("llama")), "rtn-4bit", out=tmp_path).blocks == 2


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("spqr-4bits", "'spqr-4bits' is neither a file nor a built-in recipe: did you mean 'spqr-4bit'"),
        ({"prun": "wanda"}, "the recipe has an unknown key 'prun'"),
        (
            {"prune": "wanda", "sparsity": 0.5, "quantization": {"bit": 4}},
            "`bit` says how to quantize, but no method is given",
        ),
        (3, "a recipe is a secateur.Recipe, a dict, the name of a built-in recipe or a file, not int"),
        (None, "a recipe is a secateur.Recipe, .* not NoneType"),
    ],
)
def test_a_script_that_names_none(recipe, message, model_of, tmp_path):
    for run in (lambda: secateur.compress(str(model_of("llama")), tmp_path / "out", recipe),
                lambda: secateur.forecast(str(model_of("llama")), recipe)):  # fmt: skip
        with pytest.raises(UsageError, match=message):
            run()
