"""`secateur doctor`, `cache` and `compare`, and what all commands share: the log, completion, help that fits."""

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import processes
import pytest

import secateur
from secateur.commands import doctor_command
from secateur.commands.command import build
from secateur.commands.find_commands import find, names

ROOT = Path(secateur.__file__).parent.parent
SECTIONS = ["versions", "processor", "accelerators", "memory", "disk", "backends", "optional packages"]


def test_the_doctor_tells_what_an_issue_needs(says, tmp_path):
    code, out, err = says("doctor", "--json", tmp_path / "found.json")
    assert (code, err) == (0, "")
    assert f"  secateur: {secateur.__version__}\n" in out
    found = json.loads((tmp_path / "found.json").read_text())
    assert list(found)[: len(SECTIONS)] == SECTIONS
    assert found["backends"]["dense, 4 bits, cpu"] == found["backends"]["torch, 2:4, cpu"] == "works"
    assert found["backends"]["cuda-2:4, 4 bits, cpu"].startswith("no: ")
    assert "BROKEN" not in out
    assert json.loads(says("doctor", "--json", "-")[1]).keys() == found.keys()


def test_the_doctor_works_where_parts_are_missing():
    """Without torch, which half of its sections need, and without any package that is not needed."""
    code = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "psutil", "triton"):
            raise ImportError(f"no {name} here")
sys.meta_path.insert(0, Missing())
import importlib.metadata as metadata
whole = metadata.version
def version(name):
    raise metadata.PackageNotFoundError(name)
metadata.version = version
sys.argv = ["secateur", "doctor"]
from secateur.cli import main
main()
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    assert (found.returncode, found.stderr) == (0, "")
    assert "  torch: NOT INSTALLED\n" in found.stdout
    assert found.stdout.count("  not known: ImportError: no torch here\n") == 3
    assert "  matplotlib: not installed (--plot)\n" in found.stdout


def test_a_broken_backend_is_told(says, monkeypatch):
    class Broken:
        def why_not(self, *_):
            return None

        def prepare(self, *_):
            raise RuntimeError("no such\ninstruction")

        linear = None

    from secateur import kernels

    monkeypatch.setitem(kernels.BACKENDS, "broken", Broken())
    assert "  broken, 4 bits, cpu: BROKEN: RuntimeError: no such instruction\n" in says("doctor")[1]
    assert doctor_command._guarded(lambda: 1 / 0) == {"not known": "ZeroDivisionError: division by zero"}


# --- cache


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "secateur"


def test_the_cache_is_shown_and_cleared(cache, says, model_of, tmp_path):
    assert says("cache") == (0, f"{cache}: 0 files kept, 0 B\n", "")
    text = ("--samples", 4, "--seq-len", 16)
    assert says("compress", model_of("llama"), tmp_path / "out", "--recipe", "gptq-4bit", *text, "-q")[0] == 0
    (cache / "mine.txt").write_text("not secateur's")
    code, out, _ = says("cache")
    assert code == 0
    assert re.search(r"^self-[0-9a-f]{32}\.safetensors +[\d.]+ k?B +\d{4}-\d\d-\d\d", out, re.MULTILINE)
    assert out.splitlines()[-1].startswith(f"{cache}: 1 file kept, ")
    found = json.loads(says("cache", "--json", "-")[1])
    assert (found["folder"], len(found["files"]), found["cleared"]) == (str(cache), 1, False)
    assert says("cache", "--clear")[1].startswith(f"{cache}: 1 file deleted, ")
    assert [file.name for file in cache.iterdir()] == ["mine.txt"]
    assert says("cache", "--clear", "-q") == (0, "", "")


# --- compare


def test_models_are_compared_window_by_window(says, model_of, text_file, tmp_path):
    model, out = model_of("llama"), tmp_path / "out"
    assert says("compress", model, out, "--quantize", "rtn", "--bits", 2, "--group-size", 16, "-q")[0] == 0
    options = ("--data", text_file, "--seq-len", 32, "--windows", 6)
    code, table, _ = says("compare", model, out, model, *options, "--json", tmp_path / "found.json")
    assert code == 0
    found = json.loads((tmp_path / "found.json").read_text())
    first, small, same = found["models"]
    assert first["change"] is None
    assert (same["change"], same["p"], same["verdict"]) == (0, 1, "the same")
    assert small["bytes"] < first["bytes"]
    assert small["change"] == pytest.approx(small["perplexity"] / first["perplexity"] - 1, rel=1e-4)
    low, high = small["change_interval"]
    assert low <= small["change"] <= high
    assert small["verdict"] in ("worse", "better", "unclear")
    assert f"{small['change']:+.2%}" in table
    # What the gate says of the same windows is the same.
    alone = json.loads(says("eval", out, *options, "--json", "-")[1])
    assert alone["quality"]["perplexity"] == pytest.approx(small["perplexity"], rel=1e-6)
    assert alone["text"]["sha256"] == found["text"]["sha256"]


def test_what_cannot_be_compared(says, model_of):
    code, _, err = says("compare", model_of("llama"))
    assert code == 2
    assert err == "error: one model alone compares with nothing: name two or more, or see `secateur eval`\n"


# --- what all share


@pytest.mark.parametrize("name", ["compress", "plan"])
def test_the_help_fits_two_screens(name, says, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERMINAL_WIDTH", "100")
    out = processes.command(name, "--help").stdout
    assert len(out.splitlines()) <= 80
    assert max(map(len, out.splitlines())) <= 100
    assert out.index("--recipe") < out.index("--device") < out.index("─ Pruning ")
    assert "secateur methods NAME" in out
    # Options of methods are not shown, and are there.
    assert find(name) is not None
    flags = {flag for parameter in build(name).params for flag in parameter.opts}
    for flag in ("--bits", "--group-size", "--damping", "--outlier-share"):
        assert flag in flags
        assert f" {flag} " not in out.partition("─ Arguments")[2]


@pytest.mark.parametrize("name", names())
def test_help_is_noun_phrases(name):
    """No sentence in the imperative, and a full stop at the end."""
    assert find(name) is not None
    for parameter in build(name).params:
        text = getattr(parameter, "help", None)
        if text and parameter.name != "help":
            assert re.match(r"[A-Z0-9]|docs|dense|N:M|\.", text), (parameter.name, text)
            assert text.endswith((".", ".)", ")", "lines")) or "[" in text, (parameter.name, text)
            first = text.split()[0]
            assert first not in ("Write", "Show", "Print", "Draw", "Replace", "Keep", "Let", "Put", "Go", "Measure"), (
                text
            )


@pytest.fixture
def no_log():
    log = logging.getLogger("secateur")
    before, level = list(log.handlers), log.level
    yield log
    log.handlers[:] = before
    log.setLevel(level)


def test_the_log_goes_where_a_script_says(says, no_log, model_of, tmp_path, caplog):
    args = ("compress", model_of("llama"), tmp_path / "out", "--quantize", "rtn", "-q")
    assert says(*args) == (0, "", "")
    code, out, err = says(*args, "--overwrite", "-v")
    assert (code, out) == (0, "")
    assert "INFO" in err
    assert "model.layers.1.mlp.down_proj: block 2 of 2, " in " ".join(err.split())
    with caplog.at_level(logging.INFO, "secateur"):
        secateur.compress(str(model_of("llama")), tmp_path / "again", "rtn-4bit")
    told = [record.getMessage() for record in caplog.records if record.name.startswith("secateur.")]
    assert "verifying" in told


def test_a_shell_completes_commands():
    env = {**os.environ, "PYTHONPATH": str(ROOT), "_SECATEUR_COMPLETE": "complete_bash"}
    env |= {"COMP_WORDS": "secateur co", "COMP_CWORD": "1"}
    code = "import sys; sys.argv = ['secateur']; from secateur.cli import main; main()"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    assert (found.returncode, found.stderr) == (0, "")
    assert found.stdout.split() == ["compress", "compare"]
