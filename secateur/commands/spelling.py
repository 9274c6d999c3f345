"""How messages of the rooms below are spelled on the command line: a parameter is a flag there."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterable, Iterator
from typing import Any

from secateur.commands.command import build
from secateur.commands.find_commands import find, names

_NAMED = re.compile(r"`(\w+)(?:=([^`]+))?`")


def as_flags(text: str, command: str | None = None) -> str:
    """A message with `group_size` as --group-size, `bos=False` as --no-bos, and `out`, where it is an argument, as OUT.

    Args:
        text: the message, which names parameters as Python and recipe files do.
        command: the name of the one that was called, which is asked first: others may have other options of the same names.
    """

    def flag(match: re.Match[str]) -> str:
        name, value = match.groups()
        mine = [] if command is None else build(command).params
        found = _called(name, mine) or _called(name, _options_of_all())
        return match[0] if found is None else _spelled(found, value)

    return _NAMED.sub(flag, text)


def _called(name: str, parameters: Iterable[Any]) -> Any:
    """The parameter of that name, else the one whose flag it gives, if there is one."""
    listed = list(parameters)
    flag = f"--{name.replace('_', '-')}"
    return next(
        (each for each in listed if each.name == name), next((each for each in listed if flag in each.opts), None)
    )


def _options_of_all() -> Iterator[Any]:
    for name in names():
        if find(name) is not None:
            yield from (each for each in build(name).params if each.param_type_name == "option")


def _spelled(parameter: Any, text: str | None) -> str:
    """A parameter, with its value where one is given as Python writes it."""
    if parameter.param_type_name == "argument":
        return str(parameter.name).upper()
    flag = str(parameter.opts[0])
    try:
        value = True if text is None else ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    if value is True:
        return flag
    if value is False:
        return str(next(iter(parameter.secondary_opts), flag))
    values = value if isinstance(value, list | tuple) else [value]
    return " ".join(f"{flag} {shlex.quote(str(each))}" for each in values)
