"""Finding what registers itself: files of ours, each with one thing that has a name, and modules of other packages."""

from __future__ import annotations

import importlib
import pkgutil
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from functools import cache
from importlib.metadata import entry_points
from typing import Any, TypeVar

from secateur.errors import one_line

_V = TypeVar("_V")


class Table(MutableMapping[str, _V]):
    """What is registered by name, each thing by a file of its own, which is imported when its name is asked for.

    All files are imported when the table is gone through, or is asked for a name whose file is not known. To import a file of
    a few dataclasses takes a millisecond, and a model of one layout needs no other's.

    Args:
        packages: the folders of files that register themselves here.
        group: entry points of other packages whose modules do.
        what: those are, in words.
        files: names of things, and the modules that they are in. One that is not among them is found all the same.
    """

    def __init__(self, packages: Iterable[str], group: str, what: str, files: Mapping[str, str]) -> None:
        self._packages, self._group, self._what, self._files = tuple(packages), group, what, files
        self._known: dict[str, _V] = {}

    def __getitem__(self, name: str) -> _V:
        if name not in self._known:
            if name in self._files:
                importlib.import_module(self._files[name])
            else:
                self._import_all()
        return self._known[name]

    def __setitem__(self, name: str, thing: _V) -> None:
        self._known[name] = thing

    def __delitem__(self, name: str) -> None:
        del self._known[name]

    def __iter__(self) -> Iterator[str]:
        self._import_all()
        return iter(sorted(self._known))

    def __len__(self) -> int:
        self._import_all()
        return len(self._known)

    def _import_all(self) -> None:
        for package in self._packages:
            import_all(package, importlib.import_module(package).__path__)
        import_others(self._group, self._what)


def import_all(package: str, path: Iterable[str], ending: str = "") -> None:
    """Import every file of a package, at any depth, whose name ends so: what is in it registers itself."""
    for module in pkgutil.walk_packages(path, f"{package}."):
        if not module.ispkg and module.name.endswith(ending):
            importlib.import_module(module.name)


@cache
def import_others(group: str, what: str) -> None:
    """Import the modules of other packages that the entry points of a group name: what is in them registers itself.

    One that cannot be imported is told, and left out.
    """
    for entry in _entry_points(tuple(sys.path)).select(group=group):
        try:
            entry.load()
        except Exception as error:
            warnings.warn(f"the {what} of {entry.value} cannot be loaded: {one_line(error)}", stacklevel=2)


@cache
def _entry_points(_: tuple[str, ...]) -> Any:
    """All that packages in these places name: to look through hundreds of packages takes longer than to read a small model."""
    return entry_points()
