"""What `secateur compress` says at the end: notes, a table of what came of it, and what to do next."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from secateur.commands.notes import tell_notes
from secateur.terminal.figures import duration, size
from secateur.terminal.screen import err, say
from secateur.terminal.tables import Column, print_table

_WORST = 3
_STRUCTURE = {
    "weights": "weights of the blocks' linears",
    "blocks": "blocks",
    "heads": "heads of a block",
    "kv_heads": "heads of a block for keys and values",
    "neurons": "neurons of a block",
    "heads_in_all": "heads of all blocks",
    "neurons_in_all": "neurons of all blocks",
}


def tell_summary(report: Any, model: str, trusted: bool, searched: bool) -> None:
    """Print all that is to be said of a run to standard error.

    Args:
        report: of the run.
        model: as the user named it.
        trusted: whether code that comes with the model may run, which the next commands need, too.
        searched: whether a choice was made for each linear.
    """
    unread = report.recipe.get("activations")
    if searched and report.linears and report.structure is None and not unread:
        print_choices(report.linears)
    tell_notes(report.notes, "compress")
    _print_figures(report)
    if report.bytes > report.source_bytes and not unread:
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
    ]
    if report.structure is not None:
        rows += [[_STRUCTURE[what], f"{was:,}", f"{now:,}"] for what, (was, now) in report.structure.items()]
    else:
        # Where experts went, the source had more weights than are counted here.
        before = "" if report.recipe.get("drop_experts") else f"{8 * report.source_bytes / parameters:.2f}"
        rows.append(["bits per weight, whole model", before, f"{8 * report.bytes / parameters:.2f}"])
        if linears:
            rows.append([f"bits per weight, {len(linears)} compressed linears", "", f"{report.bits:.2f}"])
    rows += [[f"bits per weight, {table.name}", "", f"{table.bits:.2f}"] for table in report.tables]
    if report.sparsity > 0 and report.structure is None:
        rows.append([f"weights removed, {len(linears)} compressed linears", "", f"{report.sparsity:.2%}"])
    if report.recipe.get("activations"):
        level = report.recipe["activation_sparsity"]
        rows.append([f"weights not read for a token, {report.recipe['activations']}", "", f"{level:.0%}"])
    rows += [["perplexity", "", "not measured"], None]
    worst = sorted([*linears, *report.tables], key=lambda each: -each.error)[:_WORST]
    for linear in (each for each in worst if each.error > 0):
        rows.append([f"error, {linear.name}", "", f"{linear.error:.2e}"])
    rows += [None, ["time", "", duration(report.seconds)], ["peak memory", "", size(report.peak_bytes)]]
    columns = [Column("", right=False), Column("before"), Column("after")]
    print_table(err, columns, rows, title=str(report.out))


def next_commands(report: Any, model: str, trusted: bool) -> list[str]:
    """What one is likely to do with the result, as commands to copy."""
    out = str(report.out)
    trust = ["--trust-remote-code"] if trusted else []
    commands = [["eval", out, "--reference", model], ["generate", out, "The capital of France is"]]
    layouts = {linear.layout for linear in [*report.linears, *report.tables]}
    if "blocks" in layouts:
        commands.append(["export", out, f"{out.rstrip('/')}.gguf", "--to", "gguf"])
    elif layouts - {"dense"}:
        commands.append(["export", out, f"{out.rstrip('/')}-dense", "--to", "dense"])
    return [shlex.join(["secateur", *command, *trust]) for command in commands]


def print_choices(linears: Sequence[Any]) -> None:
    """Show what was chosen: a row for each block, a column for each linear of a block or for each projection of experts."""
    from secateur.report.choice_plot import by_block

    blocks, names, cells = by_block(linears)
    rows = [[block, *(_choice(cells.get((block, name), ())) for name in names)] for block in blocks]
    of_experts = [name.rpartition("*.")[1] + name.rpartition(".")[2] for name in names]
    columns = [Column("block"), *map(Column, of_experts)]
    spread = ", of experts the mean and the range" if any(len(each) > 1 for each in cells.values()) else ""
    print_table(err, columns, rows, title=f"removed, and bits per weight, of each linear{spread}", lines=False)


def _choice(linears: Sequence[Any]) -> str:
    """What became of a linear; of those of several experts the mean, and in the next line what lies between them."""
    from secateur.report.choice_plot import said_of

    if not linears:
        return "–"
    removed = said_of([linear.sparsity for linear in linears], ".0%").splitlines()
    bits = said_of([linear.bits for linear in linears], ".1f").splitlines()
    ranges = " ".join([*removed[1:], *bits[1:]])
    return f"{removed[0]} {bits[0]}" + (f"\n{ranges}" if ranges else "")
