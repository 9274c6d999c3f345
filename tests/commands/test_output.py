"""Output for terminals and pipes of any encoding, and what the help says of exit codes and devices."""

import io
import os
import re
import sys
from pathlib import Path

import processes
import pytest
import torch

import secateur
from secateur import cli
from secateur.errors import UsageError
from secateur.model.load import open_device
from secateur.terminal.output import write_any_text

ROOT = Path(secateur.__file__).parent.parent
TEXT = "Crème × 日本 → ✓ \N{GRINNING FACE}"


@pytest.mark.parametrize(
    ("encoding", "said"),
    [
        ("ascii", rb"Cr\xe8me x \u65e5\u672c -> \u2713 \U0001f600"),
        ("latin-1", rb"Cr" + b"\xe8" + rb"me " + b"\xd7" + rb" \u65e5\u672c -> \u2713 \U0001f600"),
        ("utf-8", TEXT.encode()),
    ],
)
def test_what_a_model_says(encoding, said, monkeypatch):
    monkeypatch.setattr("secateur.runs.generate.generate", lambda *args, **options: TEXT)
    monkeypatch.setattr(sys, "argv", ["secateur", "generate", "any", "prompt"])
    pipe = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", pipe)
    write_any_text()
    assert cli.run(cli.app) == 0
    pipe.flush()
    assert pipe.buffer.getvalue() == said + os.linesep.encode()


def test_tables_and_messages(model_of, tmp_path):
    """Of the command itself, in a process of its own."""

    def run(*args):
        env = {**os.environ, "PYTHONIOENCODING": "ascii", "LANG": "C", "LC_ALL": "C"}
        return processes.command(*args, env=env)

    out = tmp_path / "café"
    found = run("compress", model_of("llama"), out, "--quantize", "rtn")
    assert (found.returncode, found.stdout) == (0, "")
    assert r"caf\xe9" in found.stderr
    assert "| bits per weight, 14 compressed linears |" in found.stderr
    found = run("inspect", out)
    assert (found.returncode, found.stderr) == (0, "")
    assert "| model.layers.0.self_attn.q_proj | 32x32 |" in " ".join(found.stdout.split())


def test_a_name_that_is_no_text(says, tmp_path):
    """Bytes that no encoding of the file system made."""
    code, _, stderr = says("inspect", os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    assert code == 2
    assert stderr.startswith("error: no such model: ")


def test_exit_codes_are_told(says):
    help_text = " ".join(says("--help")[1].split())
    assert "Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted by a signal." in help_text
    page = " ".join((ROOT / "docs" / "command-line.md").read_text(encoding="utf-8").split())
    assert "Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted" in page


@pytest.mark.parametrize("name", ["gpu", "GPU:1", "nvidia"])
def test_a_device_by_another_name(name):
    with pytest.raises(UsageError) as error:
        open_device(name)
    assert re.fullmatch(
        rf"`device` {name} cannot be used here: did you mean 'cuda'\? here it can be cpu( or \S+)*", str(error.value)
    )


@pytest.mark.parametrize("name", ["nonsense", "", "xla", "meta", "cuda:99", "cpu:cpu"])
def test_a_device_that_is_not_there(name):
    with pytest.raises(UsageError) as error:
        open_device(name)
    assert "here it can be cpu" in str(error.value)
    assert len(str(error.value)) < 250
    assert "\n" not in str(error.value)


def test_devices_that_are_there(monkeypatch):
    assert open_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    for count, said in ((1, "cpu or cuda"), (4, "cpu or cuda or cuda:0 to 3")):
        monkeypatch.setattr(torch.accelerator, "device_count", lambda count=count: count)
        with pytest.raises(UsageError, match=f"here it can be {said}$"):
            open_device("gpu")
