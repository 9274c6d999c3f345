"""What a run shows while it goes and at its end: a bar where there is a terminal, a few plain lines elsewhere."""

import io
import os
import re
from pathlib import Path

import processes
import pytest
from rich.console import Console

import secateur
from secateur.commands import compress_summary
from secateur.commands.notes import grouped
from secateur.pipeline.outcome import LinearReport, Progress, Report
from secateur.terminal import display, screen
from secateur.terminal.figures import clock, size

ROOT = Path(secateur.__file__).parent.parent


def linear(name, error=0.01, bits=4.3, layout="packed-int"):
    return LinearReport(name, (8, 8), layout, 0.0, bits, 34, error, "output")


def walk(blocks, linears=2):
    for block in range(blocks):
        for i in range(linears):
            name = f"model.layers.{block}.l{i}"
            yield Progress("compressing", block, blocks, linear(name, (block + 1) * 1e-3), 9.0, 10**8)


@pytest.fixture
def told(monkeypatch):
    """The consoles of the commands, as one that writes to memory; `told(terminal)` makes it, and its text is returned."""

    def make(terminal, width=100):
        console = Console(file=io.StringIO(), force_terminal=terminal, width=width, highlight=False, emoji=False)
        for module in (screen, display, compress_summary):
            monkeypatch.setattr(module, "err", console)
        return console.file

    return make


@pytest.mark.parametrize(("blocks", "lines"), [(1, 1), (2, 2), (20, 20), (21, 11), (30, 15), (80, 20), (126, 18)])
def test_plain_lines_are_few(blocks, lines, told):
    text = told(False)
    with display.Display(False) as shown:
        for progress in walk(blocks):
            shown(progress)
        shown(Progress("writing"))
    *said, last = text.getvalue().splitlines()
    assert last == "writing"
    assert len(said) == lines
    assert said[-1].startswith(f"block {blocks} of {blocks}: ")
    # Nothing is left out of what is told.
    assert sum(int(re.search(r"(\d+) linears", line)[1]) for line in said) == 2 * blocks
    assert f"largest error {blocks * 1e-3:.2e} in model.layers.{blocks - 1}." in said[-1]


def test_a_stage_that_counts_up_is_told_now_and_then(told, monkeypatch):
    text, now = told(False), 100.0
    monkeypatch.setattr(display.time, "monotonic", lambda: now)
    shown = display.Display(False)
    for done in range(1, 1001):
        now += 1
        shown(Progress(f"computing gradients: {done} of 1000 windows"))
    assert len(text.getvalue().splitlines()) in (10, 11)
    shown(Progress("searching: block 1 of 3"))
    assert text.getvalue().splitlines()[-1] == "searching: block 1 of 3"


def test_nothing_when_quiet(told):
    text = told(True)
    with display.Display(True) as shown:
        for progress in walk(3):
            shown(progress)
    screen.counter(True)(1, 2)
    assert text.getvalue() == ""


def test_the_bar_says_how_far_how_fast_and_how_long(told):
    text = told(True)
    with display.Display(False) as shown:
        for progress in walk(12):
            shown(progress)
        shown.bar.refresh()
        assert shown.bar.tasks[0].completed == pytest.approx(12)
        blocks = shown.bar.tasks[0]
        assert blocks.description == "block 12 of 12"
        assert re.fullmatch(r"[\d.e+]+ linears/s, 0:09 left, memory 100\.0 MB", blocks.fields["state"])
        shown(Progress("computing gradients: 1 of 8 windows"))
        shown(Progress("computing gradients: 3 of 8 windows"))
        assert (blocks.completed, blocks.total) == (3, 8)
        assert re.fullmatch(r"[\d.e+]+ windows/s, 0:00 left", blocks.fields["state"])
        shown(Progress("writing [bold]"))
        assert blocks.total is None
    assert "block 12 of 12" in text.getvalue()
    assert "writing [bold]" in text.getvalue()


@pytest.mark.parametrize("width", [100, 40, 12])
def test_windows_are_counted_in_one_line(width, told):
    text = told(True, width)
    tell = screen.counter(False)
    for _ in range(2):
        for done in range(1, 5):
            tell(done, 4)
    lines = text.getvalue().split("\r")
    assert all(len(line) < width and "\n" not in line for line in lines)
    assert lines[3].strip() == lines[7].strip() == ""
    if width == 100:
        assert re.match(r"━+─+ window 2 of 4, [\d.e+]+/s, 0:00 left", lines[1])


def test_where_there_is_no_terminal_windows_are_told_seldom(told, monkeypatch):
    """None of what is done soon; of what takes long at most ten lines, each with the time left."""
    for seconds, lines in ((0.05, 0), (1.0, 9), (60.0, 9)):
        text, clock = told(False), iter(seconds * i for i in range(1, 101))
        with monkeypatch.context() as patch:
            patch.setattr(screen.time, "monotonic", lambda clock=clock: next(clock))
            tell = screen.counter(False)
            for done in range(1, 101):
                tell(done, 100)
        said = text.getvalue().splitlines()
        assert len(said) in (lines, lines - 1)
        assert all(re.fullmatch(r"window \d+ of 100, [\d.e+-]+/s, [\d:]+ left", line) for line in said)


def test_colours_are_left_out_where_nobody_wants_them():
    code = """
from secateur.terminal.display import Display
from secateur.terminal.screen import err
from secateur.pipeline.outcome import Progress
with Display(False) as shown:
    shown(Progress("computing gradients: 1 of 8 windows"))
    shown.bar.refresh()
"""
    for no_color, coloured in (("", True), ("1", False)):
        env = {**os.environ, "FORCE_COLOR": "1", "TERM": "xterm-256color", "NO_COLOR": no_color}
        found = processes.script(code, env=env)
        assert found.returncode == 0, found.stderr
        assert "computing gradients: 1 of 8 windows" in found.stderr
        assert bool(re.search(r"\x1b\[[\d;]*(3[0-7]|38;)[\d;]*m", found.stderr)) == coloured


def report(**given):
    linears = [linear(f"model.layers.0.l{i}", i * 1e-3) for i in range(5)]
    given = {"bytes": 50, "source_bytes": 100, "parameters": 400, "seconds": 3.0, "peak_bytes": 10**9, **given}
    return Report(Path("out dir"), linears, given.pop("notes", []), {}, **given)


def test_the_summary(told):
    text = told(False)
    compress_summary.tell_summary(report(), "some model", True, False)
    said = text.getvalue()
    table = " ".join(re.sub("[│┃]", " ", said).split())
    assert "size of the weight files 100 B 50 B (50%)" in table
    assert "bits per weight, whole model 2.00 1.00" in table
    assert "bits per weight, 5 compressed linears 4.30" in table
    assert "weights removed" not in table
    assert re.findall(r"error, (\S+)", table) == [f"model.layers.0.l{i}" for i in (4, 3, 2)]
    assert "LARGER" not in said
    assert said.splitlines()[-3:] == [
        "  secateur eval 'out dir' --reference 'some model' --trust-remote-code",
        "  secateur generate 'out dir' 'The capital of France is' --trust-remote-code",
        "  secateur export 'out dir' 'out dir-dense' --to dense --trust-remote-code",
    ]


def test_a_result_that_is_larger_says_so(told):
    text = told(False)
    compress_summary.tell_summary(report(bytes=150), "demo", False, False)
    assert "the result is LARGER than demo, 150 B and not 100 B: " in text.getvalue()


def test_notes_of_one_kind_are_one():
    notes = [
        f"model.layers.{i}.q_proj, model.layers.{i}.k_proj: {i + 3} of 32 inputs are always zero" for i in range(30)
    ]
    alone = "model.layers.0.up_proj: damping raised from 0.01 to 0.1 of the mean diagonal: singular"
    assert grouped([*notes[:1], "demo was quantized before: lost", alone, *notes[1:], "demo has no card"]) == [
        "3–32 of 32 inputs are always zero (60 linears: model.layers.0.q_proj, model.layers.0.k_proj, "
        "model.layers.1.q_proj and 57 more, see secateur.json)",
        "demo was quantized before: lost",
        alone,
        "demo has no card",
    ]
    assert grouped([]) == []
    assert grouped(["a.b: 1e-3 x", "a.c: 0.5 x"]) == ["1e-3–0.5 x (2 linears: a.b, a.c)"]


def test_figures():
    assert [clock(s) for s in (0.4, 59.6, 75, 3729)] == ["0:00", "1:00", "1:15", "1:02:09"]
    assert [size(n) for n in (999, 1500, 2.5e6, 3e9)] == ["999 B", "1.5 kB", "2.5 MB", "3.00 GB"]


def test_what_is_not_known_is_not_in_the_summary(told):
    """Weights that experts took along are in no count; weights that are as they were have no error."""
    text = told(False)
    compress_summary.tell_summary(report(recipe={"drop_experts": 0.5}), "demo", False, False)
    table = " ".join(re.sub("[│┃]", " ", text.getvalue()).split())
    assert "bits per weight, whole model 1.00" in table
    assert re.findall(r"error, (\S+)", table) == [f"model.layers.0.l{i}" for i in (4, 3, 2)]
    text = told(False)
    unchanged = Report(Path("out"), [linear("model.layers.0.l0", 0.0), linear("model.layers.0.l1", 1e-3)], [], {})
    compress_summary.tell_summary(unchanged, "demo", False, False)
    assert re.findall(r"error, (\S+)", text.getvalue()) == ["model.layers.0.l1"]
