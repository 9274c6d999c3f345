"""The benchmark that needs a GPU, as far as it goes without one: its lines fail alone, and its time is kept."""

import json
import math
import os
import subprocess
import sys
import time
from functools import partial

import pytest
import torch

from benchmarks import gpu_kernels
from benchmarks.gpu import lines
from benchmarks.gpu_budget import Line, run_lines
from secateur import kernels

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="lines run in forked processes")


def broken():
    raise RuntimeError("CUDA error: an illegal memory access\nand pages of advice")


def test_a_line_that_fails_costs_no_other(tmp_path):
    rows = []
    asked = [
        Line("first", 5, lambda: {"a": 1}),
        Line("breaks", 5, broken),
        Line("dies", 5, partial(os._exit, 3)),
        Line("hangs", 0.3, partial(time.sleep, 60)),
        Line("gives nonsense", 5, object),
        Line("last", 5, lambda: "all the same"),
    ]
    found = run_lines(asked, 60, tmp_path / "found.json", rows.append)
    assert json.loads((tmp_path / "found.json").read_text()) == found
    assert {name: {k: v for k, v in each.items() if k != "seconds"} for name, each in found.items()} == {
        "first": {"figure": {"a": 1}},
        "breaks": {"error": "RuntimeError: CUDA error: an illegal memory access"},
        "dies": {"error": "its process ended with code 3"},
        "hangs": {"error": "stopped after 0 s"},
        "gives nonsense": {"error": "TypeError: Object of type object is not JSON serializable"},
        "last": {"figure": "all the same"},
    }
    assert len(rows) == 6
    assert rows[0] == '| first | {"a": 1} |'
    assert rows[2] == "| dies | failed: its process ended with code 3 |"
    assert all(0 <= each["seconds"] < 5 for each in found.values())


def test_what_there_is_is_written_after_each_line(tmp_path):
    file = tmp_path / "found.json"
    asked = [Line("one", 5, lambda: 1), Line("two", 5, lambda: list(json.loads(file.read_text())))]
    assert run_lines(asked, 60, file, lambda _: None)["two"]["figure"] == ["one"]
    assert os.listdir(tmp_path) == ["found.json"]


def test_the_time_is_kept(tmp_path):
    began = time.monotonic()
    asked = [Line("long", 60, partial(time.sleep, 60)), Line("late", 60, lambda: 1), Line("later", 60, lambda: 1)]
    found = run_lines(asked, 1.5, tmp_path / "found.json", lambda _: None)
    assert time.monotonic() - began < 10
    assert found["long"]["error"].startswith("stopped after")
    assert found["late"]["error"] == found["later"]["error"] == "not begun: no time was left"


def test_what_a_line_has_started_ends_with_it(tmp_path):
    def starts():
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        (tmp_path / "child").write_text(str(child.pid))
        child.wait()

    run_lines([Line("starts", 1, starts)], 60, tmp_path / "found.json", lambda _: None)
    child = int((tmp_path / "child").read_text())
    for _ in range(100):
        try:
            with open(f"/proc/{child}/stat", encoding="utf-8") as file:
                if file.read().split()[2] == "Z":
                    return
        except OSError:
            return
        time.sleep(0.05)
    pytest.fail("it still runs")


def test_lines_have_names_of_their_own_and_the_kernels_come_first(tmp_path):
    names = [line.name for line in lines("cpu", tmp_path)]
    assert len(set(names)) == len(names)
    assert names[1 : 1 + len(gpu_kernels.CHECKS)] == [line.name for line in gpu_kernels.check_lines("cpu")]
    assert {case for case, _, _ in gpu_kernels.GOALS} < set(gpu_kernels.CASES) < set(names)
    assert any("nccl" in name for name in names)


@pytest.mark.parametrize("case", ["bitmap", "SpQR 3 bits", "columns-int", "trellis 3 bits"])
def test_kernels_are_right_or_not(case, monkeypatch):
    make, _ = gpu_kernels.CHECKS[case]
    assert gpu_kernels.checked(make, "torch", "cpu").startswith("errors are 0.")
    usual = kernels.linear

    def off(ready, x_TI, *args):
        """One weight of a row is wrong, by a hundredth."""
        more_TI = torch.zeros(x_TI.shape[1], dtype=x_TI.dtype)
        more_TI[3] = 0.01 * (x_TI.dtype == torch.float32)
        y_TO = usual(ready, x_TI, *args)
        return torch.cat([y_TO[:, :1] + (x_TI * more_TI).sum(1, keepdim=True), y_TO[:, 1:]], 1)

    monkeypatch.setattr(kernels, "linear", off)
    with pytest.raises(ValueError, match="times what roundings allow"):
        gpu_kernels.checked(make, "torch", "cpu")
    monkeypatch.setattr(kernels, "linear", lambda *args: usual(*args) * math.nan)
    with pytest.raises(ValueError, match="nan times what roundings allow"):
        gpu_kernels.checked(make, "torch", "cpu")


def test_goals_are_of_what_was_measured():
    def taken(**by_shape):
        return {"figure": {shape: {"µs by tokens": {"1": us, "4096": us}} for shape, us in by_shape.items()}}

    found = {
        "dense": taken(a="30.0", b="10.0"),
        "SpQR 3 bits, triton": taken(a="10.0 e", b="8.0"),
        "x": {"error": "no"},
    }
    rows = gpu_kernels.goals(found)
    assert len(rows) == len(gpu_kernels.GOALS)
    assert "| a: 3.00×, b: 1.25×; reached at 1 of 4 |" in rows[2]
    assert all("no figures; reached at 0 of 4" in row for i, row in enumerate(rows) if i != 2)
