"""Names of modules in numbered blocks: what many of them have in common, as one pattern."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any


def lists_of(blocks: Iterable[str]) -> list[str]:
    """The names of the lists that blocks of such names are in."""
    return list(dict.fromkeys(name.rpartition(".")[0] for name in blocks))


def split_name(name: str, lists: Iterable[str]) -> tuple[str, str]:
    """The name of a module of a numbered block as that of the block and the rest; the latter is empty for any other."""
    for prefix in lists:
        number, _, rest = name.removeprefix(f"{prefix}.").partition(".")
        if name.startswith(f"{prefix}.") and number.isdigit() and rest:
            return f"{prefix}.{number}", rest
    return name, ""


def _by_pattern(names: Iterable[str], lists: Iterable[str]) -> dict[str, list[str]]:
    """Names by what they are with `*` in place of a block's number."""
    patterns: dict[str, list[str]] = {}
    for name in names:
        block, rest = split_name(name, lists)
        patterns.setdefault(f"{block.rpartition('.')[0]}.*.{rest}" if rest else name, []).append(name)
    return patterns


def patterns_of(names: Iterable[str], lists: Iterable[str]) -> list[str]:
    """The names of linears with `*` in place of the number of a block, each once."""
    return list(_by_pattern(names, list(lists)))


def how_to_ignore(names: Iterable[str], others: Iterable[str], lists: Iterable[str]) -> str:
    """The option that leaves linears alone, and how many these are; patterns that match any of the `others` are not used."""
    names, others = list(names), set(others)
    found = []
    for pattern, members in _by_pattern(names, list(lists)).items():
        matches_others = any(fnmatchcase(name, pattern) for name in others)
        found += members if matches_others else [pattern]
    return f"`ignore={found!r}` ({len(names)} linear{'s' if len(names) > 1 else ''})"


def generalise(entries: dict[str, dict[str, Any]], lists: Iterable[str], absent: set[str]) -> dict[str, dict[str, Any]]:
    """Entries for modules of numbered blocks as few entries with `*` in place of the number.

    A pattern stands only where every module it matches has the same entry; others are named one by one.

    Args:
        entries: module name → entry.
        lists: names of the lists of blocks.
        absent: linears without an entry, which no pattern may match.
    """
    result: dict[str, dict[str, Any]] = {}
    for pattern, names in _by_pattern(entries, list(lists)).items():
        matched = {name for name in [*entries, *absent] if fnmatchcase(name, pattern)}
        if matched == set(names) and all(entries[name] == entries[names[0]] for name in names):
            result[pattern] = entries[names[0]]
        else:
            result.update({name: entries[name] for name in names})
    return result
