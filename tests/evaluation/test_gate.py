"""The regression gate on tiny models: its verdicts, what it refuses to compare, and what it writes."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import reseal, set_json

import secateur
from secateur.errors import CheckpointError, UsageError
from secateur.evaluation.eval_text import Text
from secateur.evaluation.gate.baseline import Baseline, write_baseline
from secateur.evaluation.gate.checks import Check
from secateur.evaluation.gate.gate import GateResult, gate
from secateur.evaluation.gate.tolerances import Tolerances
from secateur.evaluation.quality import Runner
from secateur.report.gate_report import junit, markdown

WINDOWS, SEQ_LEN = 8, 24


@pytest.fixture(scope="module")
def text(text_file):
    return Text(str(text_file), SEQ_LEN, WINDOWS)


@pytest.fixture(scope="module")
def checkpoint(model_of, tmp_path_factory):
    """A tiny Llama at 50 %. Not to be written to."""
    out = tmp_path_factory.mktemp("gate") / "out"
    secateur.compress(str(model_of("llama")), out, secateur.Recipe("magnitude", 0.5))
    return out


@pytest.fixture(scope="module")
def written(checkpoint, model_of, text, tmp_path_factory):
    """What it measured, with divergences from the dense model. Not to be written to."""
    file = tmp_path_factory.mktemp("baseline") / "baseline.json"
    write_baseline(str(checkpoint), file, text, reference=str(model_of("llama")))
    return file


@pytest.fixture
def baseline(written, tmp_path):
    """A copy of it that the test may spoil."""
    return Path(shutil.copy(written, tmp_path / "baseline.json"))


@pytest.fixture
def changed(checkpoint, tmp_path):
    """The checkpoint with its tensors changed: `changed(lambda tensors: …)`."""

    def make(change, name="changed"):
        out = Path(shutil.copytree(checkpoint, tmp_path / name))
        tensors = load_file(out / "model.safetensors")
        change(tensors)
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
        reseal(out)
        return out

    return make


def worse(tensors):
    """Nearly noise: perplexity rises in every window."""
    torch.manual_seed(0)
    tensors["lm_head.weight"] += 0.3 * torch.randn_like(tensors["lm_head.weight"])


def larger(tensors):
    tensors["more"] = torch.zeros(5000)


def verdicts(result):
    return {check.name: check.verdict for check in result.checks}


# --- verdicts


def test_the_same_checkpoint_passes(checkpoint, written, model_of):
    result = gate(str(checkpoint), Baseline.read(written), reference=str(model_of("llama")))
    assert result.passed
    assert verdicts(result) == {"perplexity": "ok", "size": "ok", "kl": "ok", "agreement": "ok"}
    assert all(check.change == pytest.approx(0, abs=1e-6) for check in result.checks)
    assert [check.p for check in result.checks][1] is None
    assert result.notes == ()


def test_a_worse_checkpoint_fails(changed, written):
    result = gate(str(changed(worse)), Baseline.read(written))
    assert not result.passed
    perplexity, size = result.checks
    assert (perplexity.verdict, size.verdict) == ("failed", "ok")
    assert perplexity.p == 2**-WINDOWS
    assert perplexity.change == pytest.approx(perplexity.value / perplexity.baseline - 1, rel=1e-6)
    assert 0.01 < perplexity.interval[0] < perplexity.change < perplexity.interval[1]
    assert perplexity.words == f"{perplexity.change:+.2%}, more than 1.00%, and not by chance (p = 0.0039)"


def test_a_better_checkpoint_passes(checkpoint, changed, tmp_path, text):
    before = tmp_path / "before.json"
    write_baseline(str(changed(worse)), before, text)
    result = gate(str(checkpoint), Baseline.read(before))
    assert result.passed
    assert result.checks[0].change < -0.01
    assert result.checks[0].p == 1


def test_a_rise_within_the_tolerance_passes(changed, written):
    assert gate(str(changed(worse)), Baseline.read(written), Tolerances(perplexity_rise=1000)).passed


def earlier(change_K):
    """Make a baseline's losses so much lower than they were."""

    def change(content):
        losses = content["per_window"]["loss"]
        content["per_window"]["loss"] = [loss - less for loss, less in zip(losses, change_K, strict=True)]

    return change


@pytest.mark.parametrize(
    ("change_K", "verdict"),
    [
        ([0.05] * 8, "failed"),
        ([0.009] * 8, "ok"),
        # One window is all that it comes from: 1/2 of all sign flips give as much.
        ([0.4] + [0.0] * 7, "unclear"),
        ([0.5, -0.3, 0.4, -0.2, 0.3, -0.2, 0.2, -0.1], "unclear"),
        ([-0.5] * 8, "ok"),
    ],
)
def test_a_rise_has_to_be_more_than_the_tolerance_and_more_than_chance(
    changed, baseline, checkpoint, change_K, verdict
):
    set_json(baseline, earlier(change_K))
    result = gate(str(checkpoint), Baseline.read(baseline))
    check = result.checks[0]
    assert check.verdict == verdict
    assert result.passed == (verdict != "failed")
    assert check.change == pytest.approx(math.expm1(sum(change_K) / 8), rel=1e-4)
    assert (check.change > check.limit) == (verdict != "ok")
    if verdict == "unclear":
        assert check.p > 0.05
        assert "but it may be chance" in check.words
    # At a confidence of a half, more than half of the ways must give less.
    lax = gate(str(checkpoint), Baseline.read(baseline), Tolerances(confidence=0.5)).checks[0]
    assert lax.verdict == ("failed" if lax.p <= 0.5 and lax.change > 0.01 else verdict)


def test_size_has_a_limit_of_its_own(changed, written):
    out, kept = str(changed(larger)), Baseline.read(written)
    result = gate(out, kept)
    assert verdicts(result) == {"perplexity": "ok", "size": "failed"}
    assert not result.passed
    rise = result.checks[1].change
    assert rise == (Path(out) / "model.safetensors").stat().st_size / kept.size - 1 > 0.1
    assert gate(out, kept, Tolerances(size_rise=rise)).passed
    assert not gate(out, kept, Tolerances(size_rise=rise * 0.999)).passed


def test_a_smaller_checkpoint_passes(checkpoint, changed, text, tmp_path):
    write_baseline(str(changed(larger)), tmp_path / "before.json", text)
    assert gate(str(checkpoint), Baseline.read(tmp_path / "before.json")).checks[1].verdict == "ok"


def test_limits_of_divergence_and_agreement(checkpoint, written, model_of):
    kept, dense = Baseline.read(written), str(model_of("llama"))
    found = gate(str(checkpoint), kept, reference=dense).evaluation.quality
    assert found.kl > 0
    assert 0 < found.agreement < 1
    for limits, name, verdict in (
        ({"max_kl": found.kl * 1.001}, "kl", "ok"),
        ({"max_kl": found.kl * 0.999}, "kl", "failed"),
        ({"min_agreement": found.agreement}, "agreement", "ok"),
        ({"min_agreement": found.agreement + 1e-6}, "agreement", "failed"),
    ):
        result = gate(str(checkpoint), kept, Tolerances(**limits), reference=dense)
        assert verdicts(result)[name] == verdict
        assert result.passed == (verdict == "ok")


def test_divergence_can_be_limited_where_the_baseline_has_none(checkpoint, text, model_of, tmp_path):
    write_baseline(str(checkpoint), tmp_path / "b.json", text)
    result = gate(
        str(checkpoint), Baseline.read(tmp_path / "b.json"), Tolerances(max_kl=0.0), reference=str(model_of("llama"))
    )
    kl = result.checks[2]
    assert (kl.verdict, kl.baseline, kl.change, kl.interval, kl.p) == ("failed", None, None, None, None)
    assert result.notes == ("the baseline's reference was none",)
    assert markdown(result).count("–") >= 3


@pytest.mark.thin(2)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("batch_tokens", [None, 3 * SEQ_LEN])
def test_unchanged_weights_raise_no_alarm(checkpoint, written, threads, batch_tokens):
    """Twenty in all. Sums are taken in other orders, which is all that may differ: far below any tolerance."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for _ in range(5):
            runner = Runner(batch_tokens=batch_tokens)
            result = gate(str(checkpoint), Baseline.read(written), Tolerances(1e-5, 0.0), runner=runner)
            assert verdicts(result) == {"perplexity": "ok", "size": "ok"}
    finally:
        torch.set_num_threads(before)


# --- what it cannot compare


@pytest.fixture
def fails(says, checkpoint):
    """The one line on which `secateur gate` ends with this exit code."""

    def run(code, *args, model=checkpoint):
        found, out, err = says("gate", model, *args)
        assert (found, out) == (code, ""), err
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        return err.removeprefix("error: ").rstrip("\n")

    return run


def test_a_baseline_that_is_not_there(fails, tmp_path):
    file = tmp_path / "none.json"
    assert fails(2, "--baseline", file) == (
        f"there is no baseline {file}: make one by `secateur gate MODEL --write --baseline {file}`"
    )


@pytest.mark.parametrize("layout", [0, 2, "1", None])
def test_a_baseline_of_another_layout(fails, baseline, layout):
    set_json(baseline, lambda content: content.update(layout=layout))
    assert fails(1, "--baseline", baseline) == (
        f"baseline {baseline} has layout {layout!r} and this version reads 1: write it again"
    )


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "\x00"])
def test_a_baseline_that_is_not_json(fails, baseline, content):
    baseline.write_text(content)
    assert str(baseline) in fails(1, "--baseline", baseline)


def put(*path):
    """Set something deep in a baseline: the last two are the key and the value."""
    *way, key, value = path

    def change(content):
        for part in way:
            content = content[part]
        content[key] = value

    return change


def drop(*path):
    *way, key = path

    def change(content):
        for part in way:
            content = content[part]
        del content[key]

    return change


@pytest.mark.parametrize(
    "damage",
    [
        *[drop(key) for key in ("text", "metrics", "per_window", "size", "versions", "dtype", "model")],
        *[drop("text", key) for key in ("sha256", "data", "seq_len", "windows", "stride", "text_field")],
        drop("per_window", "loss"),
        drop("per_window", "predictions"),
        drop("metrics", "perplexity"),
        drop("metrics", "kl"),
        drop("size", "bytes"),
        put("text", None),
        put("text", "data", ["a"]),
        put("text", "data", "self"),
        put("text", "seq_len", "24"),
        put("text", "seq_len", 24.5),
        put("text", "windows", 7),
        put("text", "windows", True),
        put("text", "stride", 0.5),
        put("text", "stride", "a"),
        put("text", "stride", 25),
        put("text", "sha256", 3),
        put("per_window", []),
        put("per_window", "loss", 3.0),
        put("per_window", "loss", [1.0] * 7),
        put("per_window", "loss", ["a"] * 8),
        put("per_window", "loss", [None] * 8),
        put("per_window", "loss", [math.nan] * 8),
        put("per_window", "loss", [10**400] * 8),
        put("per_window", "predictions", [0] * 8),
        put("per_window", "predictions", [-1] * 8),
        put("metrics", "perplexity", "value", None),
        put("metrics", "perplexity", "value", math.inf),
        put("metrics", "agreement", {}),
        put("size", "bytes", 0),
        put("size", "bytes", "large"),
        put("versions", []),
        put("dtype", 32),
    ],
)
def test_a_damaged_baseline(fails, baseline, damage):
    set_json(baseline, damage)
    assert fails(1, "--baseline", baseline) == f"baseline {baseline} is damaged: write it again"


def test_a_baseline_of_no_windows(fails, baseline):
    def change(content):
        content["text"]["windows"] = 0
        content["per_window"] = {name: [] for name in content["per_window"]}

    set_json(baseline, change)
    assert fails(1, "--baseline", baseline) == f"baseline {baseline} is damaged: write it again"


def test_text_that_has_changed(fails, checkpoint, text, tmp_path):
    file, baseline = tmp_path / "text.txt", tmp_path / "b.json"
    shutil.copy(text.data, file)
    write_baseline(str(checkpoint), baseline, replace(text, data=str(file)))
    file.write_text(file.read_text().replace("n", "m", 3))
    assert fails(1 + 1, "--baseline", baseline) == (
        f"baseline {baseline} was measured on another text, or with another tokenizer, than --data {file} gives now: "
        "it cannot be compared with; write another"
    )


def test_docs_are_another_text_in_another_python(checkpoint, written):
    kept = Baseline.read(written)
    content = {**kept.content, "text": {**kept.content["text"], "data": "docs"}}
    with pytest.raises(
        UsageError, match=r"than `data` docs gives now \(it comes with Python, and each version has its own\)"
    ):
        gate(str(checkpoint), Baseline(kept.file, content))


def test_another_tokenizer(fails, changed, written):
    out = changed(lambda tensors: None)

    def swap(content):
        vocabulary = content["model"]["vocab"]
        vocabulary["a"], vocabulary["o"] = vocabulary["o"], vocabulary["a"]

    set_json(out / "tokenizer.json", swap)
    assert "or with another tokenizer" in fails(2, "--baseline", written, model=out)


@pytest.mark.parametrize(
    ("option", "value", "was"),
    [("--windows", 7, WINDOWS), ("--seq-len", 23, SEQ_LEN)],
)
def test_other_windows_than_the_baselines(fails, written, option, value, was):
    assert fails(2, "--baseline", written, option, value) == (
        f"baseline {written} was measured with {option} {was}, not {value}: leave the option out, or write another baseline"
    )


def test_the_same_text_may_lie_elsewhere(says, checkpoint, written, text, tmp_path):
    (tmp_path / "moved.txt").write_bytes(Path(text.data).read_bytes())
    options = ("--data", tmp_path / "moved.txt", "--text-field", "body")
    assert says("gate", checkpoint, "--baseline", written, *options)[0] == 0


def test_a_relative_path_is_that_of_a_file_beside_the_baseline(says, checkpoint, text, tmp_path, monkeypatch):
    """Tests are started from anywhere; another text of that name in the working folder is not taken for it."""
    kept, elsewhere = tmp_path / "kept", tmp_path / "elsewhere"
    kept.mkdir()
    elsewhere.mkdir()
    (kept / "text.txt").write_bytes(Path(text.data).read_bytes())
    monkeypatch.chdir(kept)
    write_baseline(str(checkpoint), Path("b.json"), replace(text, data="text.txt"))
    monkeypatch.chdir(elsewhere)
    assert says("gate", checkpoint, "--baseline", kept / "b.json")[0] == 0
    (elsewhere / "text.txt").write_text("another text")
    assert says("gate", checkpoint, "--baseline", kept / "b.json")[0] == 0
    # The working folder is next.
    (elsewhere / "text.txt").write_bytes((kept / "text.txt").read_bytes())
    (kept / "text.txt").unlink()
    assert says("gate", checkpoint, "--baseline", kept / "b.json")[0] == 0


def test_windows_that_overlap_make_no_baseline(checkpoint, text, tmp_path):
    with pytest.raises(UsageError, match="hang together"):
        write_baseline(str(checkpoint), tmp_path / "baseline.json", replace(text, stride=20))


def test_the_baselines_own_windows_may_be_named(says, checkpoint, written, text):
    options = ("--data", text.data, "--windows", WINDOWS, "--seq-len", SEQ_LEN, "--dtype", "float32")
    assert says("gate", checkpoint, "--baseline", written, *options)[0] == 0


def test_another_dtype(fails, written):
    assert fails(2, "--baseline", written, "--dtype", "bfloat16") == (
        f"baseline {written} was measured in float32, not in bfloat16: write another"
    )


def test_a_baseline_in_bfloat16_is_compared_in_bfloat16(says, checkpoint, tmp_path, text):
    file = tmp_path / "b.json"
    write_baseline(str(checkpoint), file, text, runner=Runner("bfloat16"))
    assert says("gate", checkpoint, "--baseline", file, "--max-perplexity-rise", "0.001%")[0] == 0


def test_too_few_windows_for_the_confidence(says, fails, checkpoint, written):
    assert fails(2, "--baseline", written, "--confidence", "99.9%") == (
        f"baseline {written} has 8 windows, which cannot tell a change from chance at 0.999 confidence: "
        "write one of 10 windows at least, better 16"
    )
    # Eight are enough for 1 − 2^-8.
    assert says("gate", checkpoint, "--baseline", written, "--confidence", "99.6%", "--quiet") == (0, "", "")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-perplexity-rise", "-1%"], "--max-perplexity-rise -0.01 is not a rise: give 0 or more, such as 1%"),
        (["--max-perplexity-rise", "nan"], "--max-perplexity-rise 'nan' is not a share"),
        (["--max-size-rise", "inf"], "--max-size-rise 'inf' is not a share: write it like 50% or 0.5"),
        (["--max-size-rise", "little"], "--max-size-rise 'little' is not a share: write it like 50% or 0.5"),
        (["--max-kl", "-1"], "--max-kl -1.0 is not a divergence"),
        (["--max-kl", "nan"], "--max-kl nan is not a divergence"),
        (["--min-agreement", "101%"], "--min-agreement 1.01 is not a share: give 0 to 1, or a percentage"),
        (["--confidence", "100%"], "--confidence 1.0 cannot be had: give 50% to 99.99%"),
        (["--confidence", "0.999999"], "--confidence 0.999999 cannot be had"),
        (["--confidence", "5%"], "--confidence 0.05 cannot be had"),
        (
            ["--max-kl", "1"],
            "--max-kl and --min-agreement measure the distance from the dense model: name it by --reference",
        ),
        (["--min-agreement", "0"], "--max-kl and --min-agreement measure the distance"),
        (["--overwrite"], "--overwrite replaces a baseline, which only --write writes: leave it out"),
    ],
)
def test_options_that_make_no_sense(fails, written, options, message):
    assert message in fails(2, "--baseline", written, *options)


def test_a_model_that_cannot_be_measured(fails, changed, written, model_of):
    out = changed(lambda tensors: None, "no-tokenizer")
    for file in out.glob("tokenizer*"):
        file.unlink()
    assert f"{out} has no usable tokenizer" in fails(1, "--baseline", written, model=out)
    spoiled = changed(lambda tensors: tensors["lm_head.weight"].fill_(math.nan), "nan")
    assert "loss is nan in window 1 of 8" in fails(1, "--baseline", written, model=spoiled)
    assert "no such model" in fails(2, "--baseline", written, model="./nothing.gguf")


# --- what --write writes


def test_write_then_compare(says, checkpoint, text, tmp_path):
    file = tmp_path / "baseline.json"
    options = ("--data", text.data, "--seq-len", SEQ_LEN, "--windows", WINDOWS)
    code, out, err = says("gate", checkpoint, "--write", "--baseline", file, *options)
    assert (code, out) == (0, "")
    content = json.loads(file.read_text(), parse_constant=pytest.fail)
    perplexity = content["metrics"]["perplexity"]
    low, high = perplexity["interval"]
    assert err == f"{file}: perplexity {perplexity['value']:.3f} ({low:.3f} to {high:.3f}), on windows with BOS\n"
    assert content["text"]["stride"] is None
    assert content["per_window"]["predictions"] == [SEQ_LEN - 1] * WINDOWS
    assert content["recipe"]["sparsity"] == 0.5
    assert set(content["metrics"]) == {"perplexity", "bits_per_byte"}
    assert len(file.read_text()) < 5000
    code, out, err = says("gate", checkpoint, "--baseline", file)
    assert (code, err) == (0, "")
    assert "perplexity" in out
    assert says("gate", checkpoint, "--baseline", file, "--quiet") == (0, "", "")
    assert [path.name for path in tmp_path.iterdir()] == ["baseline.json"]


def test_a_baseline_does_not_say_where_on_this_machine_the_model_lies(checkpoint, model_of, written, says):
    content = json.loads(written.read_text())
    assert checkpoint.is_absolute()
    assert (content["model"], content["reference"]) == (checkpoint.name, model_of("llama").name)
    # It is the same reference that is given again.
    assert says("gate", checkpoint, "--baseline", written, "--reference", model_of("llama"))[2] == ""


def test_write_leaves_a_baseline_that_is_there(says, fails, written, baseline, text, changed):
    before = baseline.read_bytes()
    options = ("--data", text.data, "--seq-len", SEQ_LEN, "--windows", WINDOWS)
    assert fails(2, "--write", "--baseline", baseline, *options) == (
        f"{baseline} exists already: choose another name, or give --overwrite"
    )
    assert baseline.read_bytes() == before
    assert says("gate", changed(worse), "--write", "--baseline", baseline, *options, "--overwrite")[0] == 0
    assert Baseline.read(baseline).per_window["loss"] != Baseline.read(written).per_window["loss"]


@pytest.mark.parametrize(
    "options",
    [
        ["--max-perplexity-rise", "2%"], ["--max-size-rise", "0"], ["--max-kl", "1"], ["--min-agreement", "1%"],
        ["--confidence", "0.9"], ["--json", "a"], ["--junit", "a"], ["--markdown", "a"],
    ],
)  # fmt: skip
def test_write_with_limits(fails, tmp_path, options):
    assert fails(2, "--write", "--baseline", tmp_path / "b.json", *options) == (
        "--write compares with nothing: leave out the limits and --json, --junit and --markdown"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--windows", 4], 2, "4 windows cannot tell a change from chance: give --windows 5 at least, better 16"),
        (["--seq-len", 64, "--windows", 100000], 2, "and 6300001 are needed (100000 windows of 64): give more text"),
        (["--data", "/nowhere.txt"], 2, "no such file: /nowhere.txt"),
        (["--data", "self"], 2, "--data self would let the model judge its own words"),
        (["--dtype", "float31"], 2, "--dtype 'float31' is not known"),
    ],
)
def test_what_cannot_be_written(fails, text, tmp_path, options, code, message):
    defaults = {"--data": text.data, "--seq-len": SEQ_LEN, "--windows": WINDOWS}
    merged = {**defaults, **dict(zip(options[::2], options[1::2], strict=True))}
    args = [word for pair in merged.items() for word in pair]
    assert message in fails(code, "--write", "--baseline", tmp_path / "b.json", *args)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("write", [True, False])
def test_no_windows(says, checkpoint, written, tmp_path, write):
    where = ("--write", "--baseline", tmp_path / "b.json") if write else ("--baseline", written)
    code, _, err = says("gate", checkpoint, *where, "--windows", 0)
    assert code == 2
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_text_shorter_than_one_window(fails, tmp_path):
    (tmp_path / "short.txt").write_text("bon dun")
    line = fails(2, "--write", "--baseline", tmp_path / "b.json", "--data", tmp_path / "short.txt", "--seq-len", 24)
    assert "give more text, or lower --windows or --seq-len" in line


def test_a_baseline_in_a_folder_that_is_not_there(fails, tmp_path):
    file = tmp_path / "no" / "b.json"
    assert fails(2, "--write", "--baseline", file) == (
        f"--baseline {file} cannot be written: there is no folder {file.parent}"
    )


def test_a_folder_where_the_baseline_should_be(fails, tmp_path, text):
    (tmp_path / "b.json").mkdir()
    options = ("--data", text.data, "--seq-len", SEQ_LEN, "--windows", WINDOWS, "--overwrite")
    assert "cannot be written: " in fails(2, "--write", "--baseline", tmp_path / "b.json", *options)
    assert [path.name for path in tmp_path.iterdir()] == ["b.json"]
    assert "there is no baseline" in fails(2, "--baseline", tmp_path / "b.json")


def test_a_hopeless_model_gets_no_baseline(fails, changed, tmp_path, text):
    out = changed(lambda tensors: tensors["lm_head.weight"].mul_(1e4))
    options = ("--data", text.data, "--seq-len", SEQ_LEN, "--windows", WINDOWS)
    line = fails(1, "--write", "--baseline", tmp_path / "b.json", *options, model=out)
    assert "nats a token: no baseline to compare with" in line
    assert not (tmp_path / "b.json").exists()


# --- notes


def test_what_else_has_changed_is_noted(says, checkpoint, baseline):
    def change(content):
        content["versions"]["torch"] = "1.0"
        content["device"] = "cuda"
        content["recipe"]["sparsity"] = 0.4

    set_json(baseline, change)
    code, _, err = says("gate", checkpoint, "--baseline", baseline)
    assert code == 0
    assert err.splitlines() == [
        f"note: torch was 1.0, and is {torch.__version__}",
        "note: the baseline was measured on cuda, this on cpu",
        "note: the recipe is not the baseline's",
    ]


# --- exit codes and reports


def test_a_regression_ends_with_1_and_says_which(says, changed, written, tmp_path):
    figures, xml, table = (tmp_path / name for name in ("figures.json", "gate.xml", "summary.md"))
    table.write_text("# before\n")
    args = ("gate", changed(worse), "--baseline", written)
    code, out, err = says(*args, "--json", figures, "--junit", xml, "--markdown", table)
    assert code == 1
    assert "failed" in out
    assert err.startswith("failed: perplexity +")
    assert err.count("\n") == 1

    found = json.loads(figures.read_text(), parse_constant=pytest.fail)
    assert found["passed"] is False
    assert [check["verdict"] for check in found["checks"]] == ["failed", "ok"]
    assert found["evaluation"]["quality"]["perplexity"] > 1

    suite = ElementTree.parse(xml).getroot().find("testsuite")
    assert (suite.get("tests"), suite.get("failures")) == ("2", "1")

    # It is added to what is there, each time.
    assert table.read_text().startswith("# before\n### secateur gate: failed\n")
    assert says(*args, "--markdown", table, "--quiet") == (1, "", "")
    assert table.read_text().count("### secateur gate") == 2

    code, out, _ = says(*args, "--json", "-")
    assert code == 1
    assert json.loads(out)["passed"] is False


def test_what_is_unclear_is_said_and_passes(says, checkpoint, baseline, tmp_path):
    set_json(baseline, earlier([0.4] + [0.0] * 7))
    code, out, err = says("gate", checkpoint, "--baseline", baseline, "--junit", tmp_path / "gate.xml")
    assert code == 0
    assert "unclear" in out
    assert err.startswith("unclear: perplexity +5.1")
    assert err.endswith("more windows would tell\n")
    suite = ElementTree.parse(tmp_path / "gate.xml").getroot().find("testsuite")
    assert suite.get("failures") == "0"
    assert suite.find("testcase/system-out").text.startswith("unclear: ")


@pytest.mark.parametrize("option", ["--json", "--junit", "--markdown"])
def test_a_report_that_cannot_be_written(fails, written, tmp_path, option):
    file = tmp_path / "no" / "file"
    assert fails(2, "--baseline", written, option, file) == (
        f"{option} {file} cannot be written: there is no folder {file.parent}"
    )


def result_of(*checks, model="a model", baseline="baseline.json", notes=()):
    evaluation = SimpleNamespace(seconds=1.5, text={"bos": True})
    return GateResult(model, baseline, checks, notes, 0.95, evaluation)


OK = Check("size", 900, 1000, -0.1, None, None, 0.005, "ok", "-10.00%, within 0.50%")
FAILED = Check("perplexity", 12.0, 10.0, 0.2, (0.1, 0.3), 0.004, 0.01, "failed", "+20.00%, more than 1.00%")
UNCLEAR = Check("perplexity", 12.0, 10.0, 0.2, (-0.1, 0.3), 0.1, 0.01, "unclear", "+20.00%, but it may be chance")
KL = Check("kl", math.inf, None, None, None, None, 0.1, "failed", "inf nats a token, more than 0.1000")


@pytest.mark.parametrize("checks", [(OK,), (FAILED, OK), (UNCLEAR, OK, KL), (FAILED, KL)])
def test_junit_is_what_its_schema_wants(checks):
    """What Jenkins' schema asks of a report, and GitLab reads: these elements, in this order, and counts that are right."""
    root = ElementTree.fromstring(junit(result_of(*checks)).encode())
    assert root.tag == "testsuites"
    (suite,) = root
    assert suite.tag == "testsuite"
    assert {"name", "tests", "failures", "errors", "skipped", "time"} == set(suite.attrib)
    cases = list(suite)
    assert {case.tag for case in cases} == {"testcase"}
    assert [(case.get("classname"), case.get("name")) for case in cases] == [
        ("a model", check.name) for check in checks
    ]
    assert int(suite.get("tests")) == len(checks)
    assert int(suite.get("failures")) == len(suite.findall("testcase/failure"))
    assert float(suite.get("time")) == 1.5
    for case, check in zip(cases, checks, strict=True):
        wanted = ["failure", "system-out"] if check.verdict == "failed" else ["system-out"]
        assert [child.tag for child in case] == wanted
        assert case.find("system-out").text == f"{check.verdict}: {check.words}"
        if check.verdict == "failed":
            assert case.find("failure").get("message") == check.words


@pytest.mark.parametrize(
    "name", ["<a> & \"b\" 'c'", "]]>", "a\x00b\x1b[31m", "new\nline", "\ud800 \ufffe", "käse 面 🧀"]
)
def test_names_of_all_kinds_are_harmless(name):
    root = ElementTree.fromstring(junit(result_of(FAILED, model=name)).encode("utf-8"))
    found = root.find("testsuite/testcase").get("classname")
    assert found == "".join(c if c.isprintable() else "\ufffd" for c in name)


def test_markdown_is_a_table():
    words = replace(OK, words="a | b")
    lines = markdown(result_of(FAILED, words, UNCLEAR, KL, notes=("torch was 1.0",))).splitlines()
    assert lines[0] == "### secateur gate: failed"
    rows = [line for line in lines if line.startswith("|")]
    assert len(rows) == 2 + 4
    # As many columns in each, where `\|` is none.
    assert {row.replace("\\|", "").count("|") for row in rows} == {8}
    assert rows[2] == (
        "| ❌ | perplexity | 12.000 | 10.000 | +20.00% | +10.00% to +30.00% | +20.00%, more than 1.00% |"
    )
    assert "a \\| b" in rows[3]
    assert rows[5].startswith("| ❌ | kl | inf | – | – | – |")
    assert lines[-2:] == ["", "- `torch was 1.0`"]
    assert markdown(result_of(OK)).startswith("### secateur gate: passed\n")


def test_json_has_no_nan(says, checkpoint, written, model_of, tmp_path):
    file = tmp_path / "figures.json"
    args = ("--reference", model_of("llama"), "--max-kl", 100, "--json", file)
    assert says("gate", checkpoint, "--baseline", written, *args)[0] == 0
    found = json.loads(file.read_text(), parse_constant=pytest.fail)
    assert found["passed"] is True
    assert [check["name"] for check in found["checks"]] == ["perplexity", "size", "kl", "agreement"]
    assert found["evaluation"]["reference"] == str(model_of("llama"))


def test_the_references_predictions_can_be_kept(says, checkpoint, written, model_of, tmp_path):
    """As CI does: the dense model runs once, and is the same to the gate from then on."""
    cache = tmp_path / "cache"
    args = ("gate", checkpoint, "--baseline", written, "--reference", model_of("llama"), "--max-kl", 100, "--json", "-")
    first, second = (json.loads(says(*args, "--reference-cache", cache)[1]) for _ in range(2))
    assert first["checks"] == second["checks"]
    assert len(list(cache.glob("*/*.safetensors"))) == WINDOWS


def test_a_damaged_manifest_is_said(fails, changed, written):
    out = changed(lambda tensors: None)
    (out / "secateur.json").write_text("{")
    assert "secateur.json" in fails(1, "--baseline", written, model=out)


def test_from_python_too(checkpoint, tmp_path):
    with pytest.raises(UsageError, match="there is no baseline"):
        Baseline.read(tmp_path / "none.json")
    (tmp_path / "b.json").write_text("{}")
    with pytest.raises(CheckpointError, match="has layout None"):
        Baseline.read(tmp_path / "b.json")
