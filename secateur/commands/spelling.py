"""How messages of the rooms below are spelled on the command line: a parameter is a flag there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from typer.core import TyperCommand

from secateur.commands.command import build
from secateur.commands.find_commands import find, names

_NAMED = re.compile(r"`(\w+)(?:=([^\s`]+))?`")


def as_flags(text: str, command: TyperCommand | None) -> str:
    """A message with `group_size` as --group-size, `bos=False` as --no-bos, and `out`, an argument, as OUT.

    Args:
        text: the message, which names parameters as Python and recipe files do.
        command: that was called, which is asked first: others have options of their own under the same names.
    """

    def flag(match: re.Match[str]) -> str:
        name, value = match.groups()
        mine = [] if command is None else command.params
        found = next(_called(name, mine), None) or next(_called(name, _options_of_all()), None)
        return match[0] if found is None else _spelled(found, value)

    return _NAMED.sub(flag, text)


def _called(name: str, parameters: Any) -> Iterator[Any]:
    """The parameter of that name, else the one whose flag it gives."""
    listed = list(parameters)
    yield from (each for each in listed if each.name == name)
    yield from (each for each in listed if f"--{name.replace('_', '-')}" in each.opts)


def _options_of_all() -> Iterator[Any]:
    for name in names():
        if find(name) is not None:
            yield from (each for each in build(name).params if each.param_type_name == "option")


def _spelled(parameter: Any, value: str | None) -> str:
    if parameter.param_type_name == "argument":
        return str(parameter.name).upper()
    if value == "False" and parameter.secondary_opts:
        return str(parameter.secondary_opts[0])
    flag = str(parameter.opts[0])
    return flag if value in (None, "True") else f"{flag} {value}"
