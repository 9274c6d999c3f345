"""The options of a method: fields of its frozen dataclass that carry what they are, in a line, and which values they take.

The command line, recipe files, recipe strings, `plan`, the docs and every error about a value are made from these fields.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, get_type_hints

from secateur.errors import UsageError

_KEY = "secateur"


@dataclass(frozen=True)
class Option:
    """What a field of a method takes.

    Attributes:
        help: a noun phrase that stands alone, with the unit.
        low, high: the least and the greatest number; None: there is none.
        above, below: a number has to be greater than this, and less than that.
        choices: the only values.
        words: that may stand in the place of a number.
        share: a share, which may be written as `5%`.
        hint: what else to do where a value is refused.
        opposite: the flag that says no, where it is not `no-` and the name.
    """

    help: str
    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None
    choices: tuple[Any, ...] = ()
    words: tuple[str, ...] = ()
    share: bool = False
    hint: str = ""
    opposite: str = ""

    def problem(self, value: Any) -> str | None:
        """What to give instead of this value; None if it is right."""
        if value is None or (isinstance(value, str) and value in self.words):
            return None
        fits = not self.choices or value in self.choices
        if isinstance(value, int | float) and not isinstance(value, bool):
            fits = fits and math.isfinite(value)
            fits = fits and (self.low is None or value >= self.low) and (self.high is None or value <= self.high)
            fits = fits and (self.above is None or value > self.above) and (self.below is None or value < self.below)
        elif isinstance(value, str) and not self.choices:
            fits = False  # a word where a number is wanted
        return None if fits else f"{self.range}{f' ({self.hint})' if self.hint else ''}"

    @property
    def range(self) -> str:
        """The values that it takes, in words; "" where any will do."""
        if self.choices:
            return " or ".join(filter(None, (", ".join(map(str, self.choices[:-1])), str(self.choices[-1]))))
        ends = [
            f"more than {self.above:g}" if self.above is not None else "",
            f"at least {self.low:g}" if self.low is not None else "",
            f"at most {self.high:g}" if self.high is not None else "",
            f"less than {self.below:g}" if self.below is not None else "",
        ]
        return " or ".join(filter(None, (" and ".join(filter(None, ends)), *(f"'{word}'" for word in self.words))))


def option(default: Any, help: str, **limits: Any) -> Any:
    """A field of a method; `limits` are those of `Option`."""
    return dataclasses.field(default=default, metadata={_KEY: Option(help, **limits)})


def options_of(method: Any) -> dict[str, Option]:
    """The options of a method (its class or one of it), by name and in order."""
    return {field.name: field.metadata[_KEY] for field in dataclasses.fields(method) if _KEY in field.metadata}


def types_of(method: type) -> dict[str, Any]:
    """The annotated type of each option."""
    hints = get_type_hints(method)
    return {name: hints[name] for name in options_of(method)}


def check_options(method: Any) -> None:
    """Raise UsageError, naming the option, its value and what it may be, where a value of a method makes no sense."""
    for name, each in options_of(method).items():
        value = getattr(method, name)
        instead = each.problem(value)
        if instead is not None:
            raise UsageError(f"`{name}` {_written(value)} is not possible with {method.name}: give {instead}")


def given_options(method: Any) -> dict[str, Any]:
    """The values of a method's options as a recipe holds them: all but those that it does without."""
    return {name: getattr(method, name) for name in options_of(method) if getattr(method, name) is not None}


def _written(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
