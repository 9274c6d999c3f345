"""What stands on pictures: a title, and labels that a reader understands who knows no name of the program's inside."""

import dataclasses
from pathlib import Path

import pytest

from secateur.pipeline.outcome import LinearReport
from secateur.report.bench_plot import plot
from secateur.report.choice_plot import plot_choices
from secateur.speed.bench_result import Bench, Case

pytest.importorskip("matplotlib")
LAYOUT = {"layout": "packed-int", "bits": 4, "group_size": 64, "symmetric": False, "dtype": "bfloat16"}
CASE = Case(LAYOUT, (64, 32), 2, "cpu", 1, 1e-3, 2e-3, 1000, 4096, False)


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were written."""
    found = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: found.append(figure))
    return found


def words(figure):
    """All text of a figure but numbers at its axes."""
    panels = [axes for axes in figure.axes if axes.get_title() or axes.get_xlabel()]
    said = [figure.get_suptitle()]
    for axes in panels:
        said += [
            axes.get_title(),
            axes.get_xlabel(),
            axes.get_ylabel(),
            *(t.get_text() for t in axes.get_yticklabels()),
        ]
    return said, panels


def test_times_of_linears(drawn, tmp_path):
    cases = (CASE, dataclasses.replace(CASE, tokens=16))
    plot(Bench("some/model", "auto", "cpu", "bfloat16", 2, 1e10, cases, None), tmp_path / "bars.png")
    said, panels = words(drawn[0])
    assert len(panels) == 2
    assert said[0].splitlines() == [
        "Time of the packed linears of some/model against dense ones",
        "bfloat16 on cpu, 2 threads; a copy of memory moves 10.0 GB/s",
    ]
    assert [axes.get_xlabel() for axes in panels] == [
        "time of a call with 1 token, ms",
        "time of a call with 16 tokens, ms",
    ]
    assert "packed-int, 4 bits, groups of 64\n64×32" in said
    assert not any("_" in text or "=" in text for text in said)


def test_what_is_left_of_linears(drawn):
    linears = [
        LinearReport(f"model.layers.{i}.self_attn.q_proj", (4, 4), "bitmap", 0.5, 0.0, 8.0, 16, 0.1, "output")
        for i in range(2)
    ]
    plot_choices(linears, Path("map.png"), "OUT")
    said, panels = words(drawn[0])
    assert said[0] == "What is left of the linears of OUT"
    assert [axes.get_title() for axes in panels] == ["Share of weights removed", "Bits per weight"]
    assert all(axes.get_xlabel() == "linear of a block" for axes in panels)
