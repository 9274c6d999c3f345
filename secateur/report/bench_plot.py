"""The figures of `bench` as a bar chart."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from secateur.errors import UsageError
from secateur.folder.paths import check_file
from secateur.speed.bench_result import Bench, describe

_SUFFIXES = (".png", ".svg")
_DENSE_COLOUR, _PACKED_COLOUR = "#b0b0b0", "#3a7d44"


def check_matplotlib(what: str, extra: str) -> None:
    """Raise UsageError when `what` cannot be drawn, since matplotlib is missing, which an extra of the package brings."""
    if find_spec("matplotlib") is None:
        raise UsageError(f"{what} needs matplotlib, which is not installed: pip install 'secateur[{extra}]'")


def check_plot(file: Path, out: Path | None = None) -> None:
    """Raise UsageError when a chart cannot be written to such a file, or not without matplotlib; `out`: see `check_file`."""
    if file.suffix not in _SUFFIXES:
        raise UsageError(f"`plot` {file}: the file must end in {' or '.join(_SUFFIXES)}")
    check_file("`plot`", file, out)
    check_matplotlib("`plot`", "plots")


def plot(bench: Bench, file: Path) -> None:
    """Write a chart: for each number of tokens a panel, in it a bar each for packed and dense of every layout and shape.

    Raises:
        UsageError: the file cannot be written, see also `check_plot`.
    """
    check_plot(file)
    # Not pyplot, which would keep figures for the whole process and may look for a screen.
    from matplotlib.figure import Figure

    panels = [total.tokens for total in bench.totals]
    rows = len(bench.cases) // len(panels)
    figure = Figure(figsize=(9, 1.5 + len(panels) * (1 + 0.6 * rows)), layout="constrained")
    figure.suptitle(
        f"Time of the packed linears of {bench.model} against dense ones\n"
        f"{bench.dtype} on {bench.device}, {bench.threads} thread{'' if bench.threads == 1 else 's'}; "
        f"a copy of memory moves {bench.copy_bandwidth / 1e9:.1f} GB/s",
        fontsize="medium",
        parse_math=False,  # of a path
    )
    for T, axes in zip(panels, figure.subplots(len(panels), squeeze=False)[:, 0], strict=True):
        cases = [case for case in bench.cases if case.tokens == T]
        packed = axes.barh(
            [i - 0.2 for i in range(rows)],
            [1e3 * case.seconds for case in cases],
            height=0.4,
            color=_PACKED_COLOUR,
            label="packed",
        )
        axes.barh(
            [i + 0.2 for i in range(rows)],
            [1e3 * case.dense_seconds for case in cases],
            height=0.4,
            color=_DENSE_COLOUR,
            label="dense",
        )
        notes = [
            f" {case.speed_up:.2f}× as fast, {bench.utilization(case):.0%} of a copy's bandwidth" for case in cases
        ]
        axes.bar_label(packed, notes, fontsize="small")
        axes.set_yticks(range(rows), [f"{describe(case.layout)}\n{case.shape[0]}×{case.shape[1]}" for case in cases])
        axes.invert_yaxis()
        axes.margins(x=0.6)  # room for the notes
        axes.set_xlabel(f"time of a call with {T} token{'' if T == 1 else 's'}, ms")
        axes.set_ylabel("layout and shape of the linears")
        axes.legend()
    save_plot(figure, file)


def save_plot(figure: Any, file: Path) -> None:
    """Write a chart of matplotlib. Raises UsageError when the file cannot be written."""
    try:
        figure.savefig(file)
    except OSError as error:
        raise UsageError(f"`plot` {file} cannot be written: {error.strerror or error}") from error
