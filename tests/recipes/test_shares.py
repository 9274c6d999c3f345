"""Shares: 50% or 0.5 wherever one can be given, and never a bare number that may be meant either way."""

import json

import pytest

import secateur
from secateur.errors import UsageError
from secateur.evaluation.eval_text import Text
from secateur.evaluation.gate.tolerances import Tolerances
from secateur.recipes.recipe import Calibration, Choice, Recipe
from secateur.runs.generate import generate
from secateur.shares import exact_share, parse_share


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("50%", 0.5), ("0.5", 0.5), (" 12.5 % ", 0.125), (".25", 0.25), ("0", 0.0), ("0%", 0.0), ("1e-3", 0.001),
        ("33.3%", 0.333), ("150%", 1.5), ("-1%", -0.01), (0.03, 0.03), (1e-05, 1e-05), (0, 0.0), ("100%", 1.0),
    ],
)  # fmt: skip
def test_a_share(text, share):
    assert parse_share(text, "--x") == share


def test_shares_are_exact():
    assert 3 * exact_share("10%", "--x") == exact_share("0.3", "--x")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("3", "--x 3 is not clear without %: write 3%, or 0.03"),
        ("1", "--x 1 is not clear without %: write 1%, or 0.01"),
        ("1.0", "--x 1.0 is not clear without %: write 1.0%, or 0.01"),
        (50, "--x 50 is not clear without %: write 50%, or 0.5"),
        (2.5, "--x 2.5 is not clear without %: write 2.5%, or 0.025"),
        ("9" * 200, f"--x {'9' * 20}… is not clear without %: write it like 50% or 0.5"),
        *(
            (text, f"--x {text.strip()!r} is not a share: write it like 50% or 0.5")
            for text in ("", "%", "half", "nan", "inf", "1%%", "1 000", "0x1", "1,5%", "٣%", "0.5x")
        ),
        ("9" * 400, f"--x {'9' * 20 + '…'!r} is not a share: write it like 50% or 0.5"),
        ("1" * 200 + "e999%", f"--x {'1' * 200}e999% is not a share: write it like 50% or 0.5"),
        (float("nan"), "--x 'nan' is not a share: write it like 50% or 0.5"),
    ],
)
def test_what_is_no_share(text, message):
    with pytest.raises(UsageError) as error:
        parse_share(text, "--x")
    assert str(error.value) == message


WANDA = ["--prune", "wanda"]


@pytest.mark.thin(2)
@pytest.mark.parametrize("command", ["compress", "plan"])
@pytest.mark.parametrize(
    ("method", "option"),
    [
        (WANDA, "--sparsity"),
        (["--quantize", "spqr"], "--outlier-share"),
        (["--quantize", "squeezellm"], "--sensitive-share"),
        ([], "--max-perplexity-rise"),
    ],
)
@pytest.mark.parametrize("number", ["3", "1", "50"])
def test_compress_and_plan_take_no_bare_number_of_one_or_more(
    command, method, option, number, says, model_of, tmp_path
):
    out = [tmp_path / "out"] if command == "compress" else []
    code, stdout, stderr = says(command, model_of("llama"), *out, *method, option, number, "-q")
    assert (code, stdout) == (2, "")
    assert stderr == f"error: {option} {number} is not clear without %: write {number}%, or {int(number) / 100:g}\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", ["--max-perplexity-rise", "--max-size-rise", "--min-agreement", "--confidence"])
def test_the_gate_takes_no_bare_number_of_one_or_more(option, says, model_of, text_file, tmp_path):
    baseline = tmp_path / "b.json"
    text = ("--data", text_file, "--seq-len", 16, "--windows", 5, "-q")
    model = model_of("llama")
    assert says("gate", model, "--baseline", baseline, "--write", *text) == (0, "", "")
    code, stdout, stderr = says("gate", model, "--baseline", baseline, option, "1")
    assert (code, stdout) == (2, "")
    assert stderr == f"error: {option} 1 is not clear without %: write 1%, or 0.01\n"


def test_the_percent_sign_is_taken_everywhere(says, model_of, text_file, tmp_path):
    def recipe(name, *options):
        out = tmp_path / name
        text = ("--calibration", text_file, "--samples", 4, "--seq-len", 16)
        assert says("compress", model_of("llama"), out, *options, *text, "-q") == (0, "", "")
        return json.loads((out / "secateur.json").read_text())["recipe"]

    assert recipe("a", "--prune", "magnitude", "--sparsity", "50%")["sparsity"] == 0.5
    assert recipe("b", "--quantize", "spqr", "--outlier-share", "1%")["quantization"]["outlier_share"] == 0.01
    found = recipe("c", "--quantize", "squeezellm", "--sensitive-share", "0.1%", "--sensitivity", "hessian")
    assert found["quantization"]["sensitive_share"] == 0.001
    (tmp_path / "r.yaml").write_text("prune: magnitude\nsparsity: 25%\n")
    assert recipe("d", "--recipe", tmp_path / "r.yaml")["sparsity"] == 0.25


def test_recipe_files_and_scripts():
    asked = {
        "prune": "wanda",
        "sparsity": "50%",
        "quantization": {"outlier_share": "1%"},
        "linears": {"a": {"sparsity": "25%"}},
    }
    wanted = Recipe("wanda", 0.5, quantization={"outlier_share": 0.01}, linears={"a": Choice(0.25)})
    assert Recipe.from_dict(asked) == wanted
    assert Recipe("wanda", "50%", quantization={"outlier_share": "1%"}, linears={"a": Choice("25%")}) == wanted
    assert Recipe(max_perplexity_rise=0.03) == Recipe(max_perplexity_rise="0.03")
    assert Recipe.from_dict({"max_perplexity_rise": 0.03}) == Recipe(max_perplexity_rise="0.03")
    with pytest.raises(UsageError, match=r"'sparsity' of the recipe: 50 is not clear without %: write 50%, or 0.5"):
        Recipe.from_dict({"sparsity": "50"})
    for content in ({"sparsity": True}, {"sparsity": []}, {"max_perplexity_rise": True}):
        with pytest.raises(UsageError, match=r"which is not a (number|text)"):
            Recipe.from_dict(content)


@pytest.mark.parametrize("content", [{"sparsity": 50}, {"sparsity": 1}, {"max_perplexity_rise": 3}])
def test_a_number_of_a_recipe_file_that_is_no_share(content, model_of, tmp_path):
    with pytest.raises(UsageError, match=r"write 3%|like 0.5 or 50%"):
        secateur.compress(str(model_of("llama")), tmp_path / "out", {"prune": "magnitude", **content})


def test_tolerances_of_scripts():
    assert Tolerances.of(perplexity_rise="3%", size_rise=0.01) == Tolerances(0.03, 0.01)
    assert Tolerances.of(perplexity_rise="300%").perplexity_rise == 3
    assert Tolerances.of(max_kl=5.0).max_kl == 5
    with pytest.raises(UsageError, match=r"`perplexity_rise` 3 is not clear without %: write 3%, or 0.03"):
        Tolerances.of(perplexity_rise=3)


def test_what_removes_nothing_and_what_has_no_context(says, model_of, text_file, tmp_path):
    """And what is not there, not a number, or less than nothing."""

    def line(*options):
        code, stdout, stderr = says("compress", model_of("llama"), tmp_path / "out", *options, "-q")
        assert (code, stdout) == (2, "")
        assert stderr.count("\n") == 1
        return stderr.removeprefix("error: ").rstrip("\n")

    for zero in ("0", "0.0", "0%"):
        assert line(*WANDA, "--sparsity", zero).startswith("--sparsity 0 removes nothing: give the share")
    assert line(*WANDA, "--sparsity", "100%").startswith("sparsity 1 is outside [0, 1)")
    assert line(*WANDA, "--sparsity", "-50%").startswith("sparsity -0.5 is outside [0, 1)")
    assert line(*WANDA, "--sparsity", "nan").startswith("--sparsity 'nan' is not a share")
    some = (*WANDA, "--sparsity", "0.5", "--calibration", text_file)
    assert line(*some, "--seq-len", 1) == "seq_len is 1: it must be at least 2"
    for option in ("--samples", "--seq-len"):
        for number in (0, -3):
            assert f"is {number}: it must be at least" in line(*some, option, number)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UsageError, match=r"seq_len is 1"):
        Calibration(seq_len=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 1}, "`seq_len` 1 is too short: a window of 2 tokens has one prediction"),
        ({"seq_len": -5}, "`seq_len` -5 is too short"),
        ({"windows": 0}, "`windows` 0 leaves nothing to measure: give 1 or more"),
        ({"windows": -1}, "`windows` -1 leaves nothing to measure"),
        ({"stride": 0}, "`stride` 0 would leave out tokens"),
    ],
)
def test_windows_that_cannot_be_measured(options, message):
    with pytest.raises(UsageError, match=message):
        Text(**options)


def test_a_temperature_that_is_no_number(says, model_of):
    assert says("generate", model_of("llama"), "bon", "--temperature", "nan")[:2] == (2, "")
    code, _, stderr = says("generate", model_of("llama"), "bon", "--temperature", "inf")
    assert (code, stderr) == (2, "error: --temperature inf is not possible: give 0 or more, such as 0.7\n")
    for value in (-1.0, float("nan")):
        with pytest.raises(UsageError, match=r"`temperature` .* is not possible"):
            generate(str(model_of("llama")), "bon", temperature=value)
