"""Names of modules in numbered blocks: what many of them have in common, as one pattern."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase, translate
from typing import Any

# The number of an expert, whose module is one of `experts`.
_EXPERT = re.compile(r"((?:^|\.)\w*experts\.)\d+(\.|$)")


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


def without_expert(name: str) -> str:
    """The name of a module of an expert with `*` in place of the expert's number; any other as it is."""
    return _EXPERT.sub(r"\1*\2", name)


def _by_pattern(names: Iterable[str], lists: Iterable[str], blocks: bool = True) -> dict[str, list[str]]:
    """Names by what they are with `*` in place of the numbers of an expert and, if that is asked for, of a block."""
    patterns: dict[str, list[str]] = {}
    for name in names:
        block, rest = split_name(name, lists)
        short = f"{block.rpartition('.')[0]}.*.{rest}" if rest and blocks else name
        patterns.setdefault(without_expert(short), []).append(name)
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
    """Entries for modules of numbered blocks as few entries with `*` in place of the numbers of blocks and experts.

    A pattern stands only where every module it matches has the same entry; others are named one by one, those of a block's
    experts by a pattern of their own if they are alike.

    Args:
        entries: module name → entry.
        lists: names of the lists of blocks.
        absent: linears without an entry, which no pattern may match.
    """
    result: dict[str, dict[str, Any]] = {}
    lists = list(lists)
    for pattern, names in _by_pattern(entries, lists).items():
        if _alike(pattern, names, entries, absent):
            result[pattern] = entries[names[0]]
            continue
        for narrower, members in _by_pattern(names, lists, blocks=False).items():
            if narrower not in entries and _alike(narrower, members, entries, absent):
                result[narrower] = entries[members[0]]
            else:
                result.update({name: entries[name] for name in members})
    return result


def _alike(pattern: str, names: list[str], entries: Mapping[str, dict[str, Any]], absent: Iterable[str]) -> bool:
    """Whether a pattern matches just these modules, and they all have the same entry."""
    if any(entries[name] != entries[names[0]] for name in names):
        return False
    matched = re.compile(translate(pattern)).match
    return sum(1 for name in entries if matched(name)) == len(names) and not any(map(matched, absent))
