"""Plain values of a recipe, as YAML and JSON hold them: what differs from the defaults, and whether each is of its type."""

from __future__ import annotations

import reprlib
from typing import Any, get_type_hints

from secateur.errors import UsageError, did_you_mean
from secateur.recipes.methods import OPTIONS_KEY
from secateur.shares import parse_share

#: Numbers that may also be given as text, such as 50%.
SHARES = ("sparsity", "activation_sparsity", "drop_experts", "expert_skip", "low_rank")


def differing(content: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in content.items():
        if key in ("linears", "experts"):
            found |= {key: value} if value else {}
        elif isinstance(value, dict):
            value = differing(value, defaults.get(key, {}))
            if value:
                found[key] = value
        elif key not in defaults or value != defaults[key]:
            found[key] = value
    return found


def checked(cls: type, content: Any, what: str) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise UsageError(f"the {what} must be a mapping of options to values")
    hints = get_type_hints(cls)
    found = {}
    for key, value in content.items():
        if key not in hints:
            raise UsageError(f"the {what} has an unknown key {reprlib.repr(key)}: {did_you_mean(str(key), hints)}")
        if hints[key] == tuple[str, ...]:
            if not isinstance(value, list | tuple) or not all(isinstance(v, str) for v in value):
                raise UsageError(f"{key!r} of the {what} must be a list of patterns")
            value = tuple(value)
        elif hints[key] == tuple[float, ...] | None:
            if not isinstance(value, list | tuple) or not all(type(v) in (int, float) and 0 <= v <= 1 for v in value):
                raise UsageError(f"{key!r} of the {what} must be a list of shares")
            value = tuple(map(float, value))
        elif key in OPTIONS_KEY.values():
            if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
                raise UsageError(f"{key!r} of the {what} must be a mapping of options to values")
        elif key not in ("calibration", "linears", "experts"):
            if hints[key] == float | None and type(value) is int:
                value = float(value)
            if key in SHARES and isinstance(value, str):
                value = parse_share(value, f"{key!r} of the {what}:")
            taken = hints[key]
            if key == "max_perplexity_rise":
                taken = taken | float | int
            if (type(value) is bool and taken not in (bool, bool | None)) or not isinstance(value, taken):
                raise UsageError(f"{key!r} of the {what} is {_shown(value)}, which is not a {_plain(hints[key])}")
        found[key] = value
    return found


def _shown(value: Any) -> str:
    # A few lines of YAML can stand for lists of lists beyond any memory.
    if isinstance(value, list | dict):
        return "[…]" if isinstance(value, list) else "{…}"
    return reprlib.repr(value)


def _plain(hint: Any) -> str:
    name = getattr(hint, "__name__", None) or str(hint)
    names = {"str": "text", "int": "whole number", "float": "number", "bool": "true or false"}
    return " or ".join(names.get(part.strip(), part.strip()) for part in name.split("|") if part.strip() != "None")
