"""Tables: whole where nobody looks at a screen, and as much as the screen holds where somebody does."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.box import HEAVY_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

_ANY_WIDTH = 1 << 20


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        heading: above it.
        right: whether its cells stand to the right, as figures do.
        spare: 0 where it always has to be there; else the columns with the highest number go first where room is short.
    """

    heading: str
    right: bool = True
    spare: int = 0


def print_table(
    console: Console,
    columns: Sequence[Column],
    rows: Iterable[Sequence[str] | None],
    *,
    title: str = "",
    lines: bool = True,
    dotted: bool = False,
) -> None:
    """Print a table: no cell is ever cut.

    A screen that is too narrow gets the names of the first column without what all begin with, if they are `dotted`, then no
    columns that can be spared; at last cells go on in the next line.

    Args:
        rows: cells; None where a line separates what follows.
        title: of the table, on lines of its own.
        lines: whether to draw lines.
    """
    columns, rows = list(columns), list(rows)
    room = console.width if console.file.isatty() else _ANY_WIDTH
    prefix = ""
    if dotted and _width(console, _table(columns, rows, lines)) > room:
        prefix, rows = _without_prefix(rows)
    while (width := _width(console, _table(columns, rows, lines))) > room and any(c.spare for c in columns):
        at = max(range(len(columns)), key=lambda i: columns[i].spare)
        columns = _without(columns, at)
        rows = [None if row is None else _without(row, at) for row in rows]
    if title:
        console.print(_text(title, style="italic"), soft_wrap=True)
    if prefix:
        console.print(_text(f"all names begin with {prefix}"), soft_wrap=True)
    # A console of its own, since what is printed is never wider than a console.
    wide = Console(file=console.file, emoji=False, highlight=False, width=min(width, room))
    wide.print(_table(columns, rows, lines))


def _table(columns: Sequence[Column], rows: Sequence[Sequence[str] | None], lines: bool) -> Table:
    table = Table(box=HEAVY_HEAD) if lines else Table(box=None, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(_text(column.heading), justify="right" if column.right else "left", overflow="fold")
    for row in rows:
        if row is None:
            table.add_section()
        else:
            table.add_row(*map(_text, row))
    return table


def _text(cell: str, style: str = "") -> Text:
    """Without control characters: what a file calls its tensors reaches the terminal as text."""
    return Text("".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in cell), style)


def _width(console: Console, table: Table) -> int:
    return console.measure(table, options=console.options.update(width=_ANY_WIDTH)).maximum


def _without(cells: Sequence[object], at: int) -> list[Any]:
    return [*cells[:at], *cells[at + 1 :]]


def _without_prefix(rows: Sequence[Sequence[str] | None]) -> tuple[str, list[Sequence[str] | None]]:
    """What the dotted names of the first column begin with, up to the first line between rows, and rows without it."""
    end = rows.index(None) if None in rows else len(rows)
    names = [row[0] for row in rows[:end] if row is not None]
    low, high = min(names, default="").split("."), max(names, default="").split(".")
    # Each keeps its last part at least.
    same = next(
        (i for i, (a, b) in enumerate(zip(low[:-1], high[:-1], strict=False)) if a != b), min(len(low), len(high)) - 1
    )
    prefix = "".join(f"{part}." for part in low[: max(same, 0)])
    return prefix, [
        [row[0].removeprefix(prefix), *row[1:]] if row is not None and i < end else row for i, row in enumerate(rows)
    ]
