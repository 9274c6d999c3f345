"""All commands there are: a file `NAME_command.py` here for each, and those of other packages."""

from __future__ import annotations

import importlib
import pkgutil
import warnings
from importlib.metadata import EntryPoint, entry_points

import secateur.commands
from secateur.commands.command import COMMANDS, Summary, summary
from secateur.errors import SecateurError, one_line

#: Entry points of this group bear the name of a command, and are the module of another package that registers it.
GROUP = "secateur.commands"
_SUFFIX = "_command"
# As one comes to need them; the help lists others behind these, by name.
_ORDER = [
    "compress",
    "plan",
    "recipes",
    "methods",
    "eval",
    "gate",
    "sweep",
    "inspect",
    "probe",
    "experts",
    "verify",
    "bench",
]
_ORDER += ["export", "card", "push", "generate", "run", "compare", "cache", "doctor"]


def _own() -> dict[str, str]:
    """The modules here that hold a command, by its name."""
    found = [module.name for module in pkgutil.iter_modules(secateur.commands.__path__)]
    commands = [name for name in found if name.endswith(_SUFFIX)]
    return {name.removesuffix(_SUFFIX).replace("_", "-"): f"{secateur.commands.__name__}.{name}" for name in commands}


def _others() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=GROUP)}


def names() -> list[str]:
    """Of all commands that can be loaded; others are told in a warning."""
    found = [*_own()]
    for name, entry in _others().items():
        try:
            _load(entry)
        except SecateurError as error:
            warnings.warn(str(error), stacklevel=2)
        else:
            found.append(name)
    return sorted(set(found), key=lambda name: (_ORDER.index(name) if name in _ORDER else len(_ORDER), name))


def find(name: str) -> Summary | None:
    """The command of that name; None if there is none.

    Raises:
        SecateurError: another package has it, and it cannot be loaded.
    """
    if name not in COMMANDS:
        own = _own()
        if name in own:
            importlib.import_module(own[name])
        elif (entry := _others().get(name)) is not None:
            _load(entry)
        else:
            return None
    return summary(name)


def _load(entry: EntryPoint) -> None:
    try:
        entry.load()
    except Exception as error:
        raise SecateurError(f"command {entry.name!r} of {entry.value} cannot be loaded: {one_line(error)}") from error
    if entry.name not in COMMANDS:
        raise SecateurError(f"{entry.value} registers no command {entry.name!r}, as its entry point says")
