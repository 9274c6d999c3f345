"""Notes of a run: those of one kind are one note, with a count and the first names."""

from __future__ import annotations

import re
from collections.abc import Iterable

from secateur.commands.spelling import as_flags
from secateur.terminal.screen import say

_NAMED = 3
# `a.b.c, a.b.d: what is to be known of them`, see `pipeline.solve`.
_OF_LINEARS = re.compile(r"((?:[\w.]+\.\w+)(?:, [\w.]+\.\w+)*): (.+)", re.DOTALL)
_NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e[+-]?\d+)?")


def tell_notes(notes: Iterable[str], command: str) -> None:
    """Print the notes of a command to standard error, each on a line."""
    for note in grouped(notes):
        say(as_flags(f"note: {note}", command))


def grouped(notes: Iterable[str]) -> list[str]:
    """Notes on linears that say the same, but for numbers, as one; all others as they are, in the order of the first."""
    kinds: dict[str, list[tuple[str, str]]] = {}
    for note in notes:
        of_linears = _OF_LINEARS.fullmatch(note)
        names, text = of_linears.groups() if of_linears else ("", note)
        kinds.setdefault(_NUMBER.sub("0", text) if names else note, []).append((names, text))
    return [_together(each) for each in kinds.values()]


def _together(notes: list[tuple[str, str]]) -> str:
    if len(notes) == 1:
        names, text = notes[0]
        return f"{names}: {text}" if names else text
    linears = list(dict.fromkeys(name for names, _ in notes for name in names.split(", ")))
    more = len(linears) - _NAMED
    others = f" and {more} more, see secateur.json" if more > 0 else ""
    return (
        f"{_with_ranges([text for _, text in notes])} ({len(linears)} linears: {', '.join(linears[:_NAMED])}{others})"
    )


def _with_ranges(texts: list[str]) -> str:
    """Texts that differ in numbers only as one, with the least and the largest of each."""
    columns = zip(*(_NUMBER.findall(text) for text in texts), strict=True)
    ends = iter([(min(column, key=float), max(column, key=float)) for column in columns])

    def ranged(_: re.Match[str]) -> str:
        low, high = next(ends)
        return low if low == high else f"{low}–{high}"

    return _NUMBER.sub(ranged, texts[0])
