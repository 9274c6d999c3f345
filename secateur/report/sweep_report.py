"""The report of a sweep: a page to look at and choose from, its figures for a spreadsheet, and its plot as a picture."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from secateur.errors import SecateurError
from secateur.report.report_page import page
from secateur.report.report_plot import draw
from secateur.report.report_points import DENSE, family
from secateur.report.sweep_result import Measured, Point, SweepResult


def write_report(result: SweepResult, folder: Path) -> None:
    """Write `index.html`, `points.csv` and `frontier.png`, in that order, over what has these names.

    The page is one file that needs no network. The table has a row for the dense model and one for each point, fields are empty
    where nothing was measured.

    Args:
        result: may be of a sweep that is not finished, or have no points.
        folder: exists.

    Raises:
        UsageError: matplotlib is missing, without which there is no `frontier.png`. The other files are written.
        SecateurError: a file cannot be written.
    """
    try:
        for name, text in (("index.html", page(result)), ("points.csv", _table(result))):
            # A path may hold bytes that are no text, and such a name must not cost the report.
            (folder / name).write_text(text, encoding="utf-8", errors="replace", newline="")
        draw(result, folder / "frontier.png")
    except OSError as error:
        raise SecateurError(
            f"the report in {folder} cannot be written: {error.filename}: {error.strerror or error}"
        ) from error


def _table(result: SweepResult) -> str:
    rows = [{"name": DENSE, "method": "dense", **_measured(result.dense)}, *map(_row, result.points)]
    text = io.StringIO()
    # A failed point has no figures, hence the columns of the dense model and of a point together.
    writer = csv.DictWriter(text, fieldnames=[*rows[0], *_POINT_COLUMNS], restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


_POINT_COLUMNS = ("sparsity", "linear_bits", "linears", "compression_seconds", "peak_bytes", "command", "failure")


def _row(point: Point) -> dict[str, Any]:
    row = {"name": point.name, "method": family(point.recipe), "command": point.command}
    if point.measured is None:
        return {**row, "failure": point.failure}
    return {
        **row,
        **_measured(point.measured),
        "sparsity": point.sparsity,
        "linear_bits": point.bits,
        "linears": len(point.linears),
        "compression_seconds": point.seconds,
        "peak_bytes": point.peak_bytes,
    }


def _measured(measured: Measured) -> dict[str, Any]:
    no_interval = (None, None)
    row: dict[str, Any] = {
        "bytes": measured.bytes,
        "bits_per_weight": measured.bits_per_weight,
        "perplexity": measured.perplexity,
    }
    row["perplexity_low"], row["perplexity_high"] = measured.perplexity_interval or no_interval
    row["bits_per_byte"] = measured.bits_per_byte
    row["kl"] = measured.kl
    row["kl_low"], row["kl_high"] = measured.kl_interval or no_interval
    row["agreement"] = measured.agreement
    row["agreement_low"], row["agreement_high"] = measured.agreement_interval or no_interval
    row["evaluation_seconds"] = measured.seconds
    return row
