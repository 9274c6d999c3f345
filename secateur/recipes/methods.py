"""All methods there are, ours and those of other packages, and making one of what a recipe says about it."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any

import secateur.experts
import secateur.factorize
import secateur.gates
import secateur.lowrank
import secateur.prune
import secateur.quant  # all register what is in them, but for gates
from secateur.core.discovery import import_all, import_others
from secateur.core.options import options_of, types_of
from secateur.core.registry import ROLES
from secateur.errors import UsageError, did_you_mean
from secateur.shares import parse_share

#: Entry points of this group are modules of other packages, which register methods as ours do.
GROUP = "secateur.methods"
#: What a recipe calls the options of the method of each role; and that method in words.
OPTIONS_KEY = {
    "prune": "pruning",
    "refine": "refining",
    "quantize": "quantization",
    "activations": "gating",
    "expert_score": "scoring",
    "factorize": "factorization",
}
_WORDS = {
    "prune": "pruning method",
    "refine": "refiner",
    "quantize": "quantization method",
    "activations": "method of activation sparsity",
    "expert_score": "score of experts",
    "factorize": "factorization method",
}
_TYPES = {int: "whole number", float: "number", bool: "true or false", str: "text"}


# Not by the package itself: a model that is loaded needs what a checkpoint says of gates, and none of the methods.
import_all("secateur.gates", secateur.gates.__path__)
import_others(GROUP, "methods")


def find(role: str, name: str) -> Any:
    """The class of a method. Raises UsageError when there is none of that name; the nearest one is offered."""
    table = ROLES[role]
    if name not in table:
        raise UsageError(f"{_WORDS[role]} {name!r} is not known: {did_you_mean(name, table)}")
    return table[name]


def make(role: str, name: str, given: Mapping[str, Any]) -> Any:
    """A method with the options that are given.

    Raises:
        UsageError: there is no such method, it has no such option, or a value has another type or makes no sense.
    """
    method = find(role, name)
    return method(**{option: checked(method, option, value) for option, value in given.items()})


def check_names(method: Any, names: Iterable[str]) -> None:
    """Raise UsageError where a method has no option of one of these names; the nearest one is offered."""
    options = options_of(method)
    for name in names:
        if name not in options:
            has = f"which has {', '.join(f'`{option}`' for option in options)}" if options else "which has none"
            close = difflib.get_close_matches(name, options, n=1)
            hint = f": did you mean `{close[0]}`?" if close else ""
            raise UsageError(f"`{name}` is not an option of {method.name}, {has}{hint}")


def checked(method: Any, name: str, value: Any) -> Any:
    """The value of one option in its type: shares may be text such as `5%`, and whole numbers stand for others.

    Raises:
        UsageError: the method has no such option, or takes values of another type.
    """
    options = options_of(method)
    check_names(method, [name])
    hint = types_of(method)[name]
    types: tuple[type, ...] = tuple(getattr(hint, "__args__", (hint,)))
    if options[name].share and isinstance(value, str):
        value = parse_share(value, f"`{name}`")
    if float in types and type(value) is int:
        value = float(value)
    if (type(value) is bool and bool not in types) or not isinstance(value, types):
        wanted = " or ".join(_TYPES[each] for each in types if each in _TYPES)
        raise UsageError(f"`{name}` of {method.name} is {reprlib.repr(value)}, which is not a {wanted}")
    return value


def with_shares(given: Mapping[str, Any]) -> dict[str, Any]:
    """Options of which shares that were given as text, such as `5%`, are numbers. Raises UsageError where one is no share."""
    named = options_by_name()

    def read(name: str, value: Any) -> Any:
        share = isinstance(value, str) and any(options_of(method)[name].share for method in named.get(name, ()))
        return parse_share(value, f"`{name}`") if share else value

    return {name: read(name, value) for name, value in given.items()}


def options_by_name(roles: Iterable[str] = tuple(ROLES)) -> dict[str, list[Any]]:
    """The classes of the methods that have an option of each name, in order of their roles."""
    found: dict[str, list[Any]] = {}
    for role in roles:
        for _, method in sorted(ROLES[role].items()):
            for name in options_of(method):
                found.setdefault(name, []).append(method)
    return found
