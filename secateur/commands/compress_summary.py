"""What `secateur compress` says at the end: notes, a table of what came of it, and what to do next."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from secateur.commands.figures import duration, size
from secateur.commands.notes import tell_notes
from secateur.commands.screen import err, say
from secateur.commands.tables import Column, print_table

_WORST = 3


def tell_summary(report: Any, model: str, trusted: bool, searched: bool) -> None:
    """Print all that is to be said of a run to standard error.

    Args:
        report: of the run.
        model: as the user named it.
        trusted: whether code that comes with the model may run, which the next commands need, too.
        searched: whether a choice was made for each linear.
    """
    if searched:
        print_choices(report.linears)
    tell_notes(report.notes, "compress")
    _print_figures(report)
    if report.bytes > report.source_bytes:
        say(
            f"the result is LARGER than {model}, {size(report.bytes)} and not {size(report.source_bytes)}: "
            "fewer bits make it smaller, such as --recipe spqr-3bit-small"
        )
    say("next:")
    for command in next_commands(report, model, trusted):
        say(f"  {command}")


def _print_figures(report: Any) -> None:
    linears, parameters = report.linears, max(report.parameters, 1)
    smaller = f"{size(report.bytes)} ({report.bytes / max(report.source_bytes, 1):.0%})"
    rows: list[list[str] | None] = [
        ["size of the weight files", size(report.source_bytes), smaller],
        [
            "bits per weight, whole model",
            f"{8 * report.source_bytes / parameters:.2f}",
            f"{8 * report.bytes / parameters:.2f}",
        ],
        [f"bits per weight, {len(linears)} compressed linears", "", f"{report.bits:.2f}"],
    ]
    if report.sparsity > 0:
        rows.append([f"weights removed, {len(linears)} compressed linears", "", f"{report.sparsity:.2%}"])
    rows += [["perplexity", "", "not measured"], None]
    for linear in sorted(linears, key=lambda each: -each.error)[:_WORST]:
        rows.append([f"error, {linear.name}", "", f"{linear.error:.2e}"])
    rows += [None, ["time", "", duration(report.seconds)], ["peak memory", "", size(report.peak_bytes)]]
    columns = [Column("", right=False), Column("before"), Column("after")]
    print_table(err, columns, rows, title=str(report.out))


def next_commands(report: Any, model: str, trusted: bool) -> list[str]:
    """What one is likely to do with the result, as commands to copy."""
    out = str(report.out)
    trust = ["--trust-remote-code"] if trusted else []
    commands = [["eval", out, "--reference", model], ["generate", out, "The capital of France is"]]
    if any(linear.layout != "dense" for linear in report.linears):
        commands.append(["export", out, f"{out.rstrip('/')}-dense", "--to", "dense"])
    return [shlex.join(["secateur", *command, *trust]) for command in commands]


def print_choices(linears: Sequence[Any]) -> None:
    """Show what was chosen: a row for each block, a column for each linear of a block."""
    from secateur.report.choice_plot import by_block

    blocks, names, cells = by_block(linears)
    rows = []
    for block in blocks:
        found = [cells.get((block, name)) for name in names]
        rows.append([block, *("–" if each is None else f"{each.sparsity:.0%} {each.bits:.1f}" for each in found)])
    columns = [Column("block"), *(Column(name.rpartition(".")[2]) for name in names)]
    print_table(err, columns, rows, title="removed, and bits per weight, of each linear", lines=False)
