"""What a checkpoint says of activation sparsity, in a section of its config: thresholds for every level that was calibrated.

L: levels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from secateur.core.histogram import FIRST
from secateur.errors import CheckpointError, UsageError
from secateur.formats.layouts.packed_weight import BESIDE

#: Where our section of a config says it.
SECTION = "activations"
#: How inputs are chosen: over a threshold; as many largest for every token; by a prompt, those often among the largest, or of
#: the greatest norm.
RULES = THRESHOLD, LARGEST, OFTEN, NORM = "threshold", "largest", "often", "norm"
#: What the tensors are called, among the parts of a linear's weight, that a rule needs: factors of inputs; two matrices whose
#: product stands for inputs that are not read.
SCALE, LEFT, RIGHT = BESIDE
#: Levels that are calibrated whatever is asked for, and the highest that may be.
LEVELS, MOST = (0.25, 0.4, 0.5, 0.65), 0.95


@dataclass(frozen=True)
class GatedInput:
    """An input for which one choice is made, and the linears that read it.

    Attributes:
        linears: their names.
        shares_L: the share of inputs that is not read, by level.
        thresholds_L: that inputs are to exceed, by level; empty where the rule has none.
    """

    linears: tuple[str, ...]
    shares_L: tuple[float, ...]
    thresholds_L: tuple[float, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As a config has it."""
        found = {"linears": list(self.linears), "shares": list(self.shares_L)}
        return {**found, "thresholds": list(self.thresholds_L)} if self.thresholds_L else found


@dataclass(frozen=True)
class Section:
    """The section.

    Attributes:
        method: name of the method, for people.
        rule: one of `RULES`.
        levels: rising: which share of their weights the linears together do not read.
        level: that a model is loaded with; 0: all is read.
        inputs: all that have a gate.
    """

    method: str
    rule: str
    levels: tuple[float, ...]
    level: float
    inputs: tuple[GatedInput, ...]

    def to_dict(self) -> dict[str, Any]:
        """As a config has it."""
        return {
            "method": self.method,
            "rule": self.rule,
            "levels": list(self.levels),
            "level": self.level,
            "dense_tokens": FIRST,
            "inputs": [each.to_dict() for each in self.inputs],
        }

    def number(self, level: float) -> int | None:
        """Which of the levels one is; None: 0, at which nothing is left out. Raises UsageError where it was not calibrated."""
        check_level(level)
        if not level:
            return None
        near = [i for i, each in enumerate(self.levels) if math.isclose(each, level, abs_tol=1e-6)]
        if not near:
            known = ", ".join(f"{each:g}" for each in self.levels)
            raise UsageError(f"level {level:g} was not calibrated: it can be {known}, or 0, which reads all")
        return near[0]


def check_level(level: Any) -> None:
    """Raise UsageError unless it is a share that may be left unread."""
    if isinstance(level, bool) or not isinstance(level, int | float) or not 0 <= level <= MOST:
        raise UsageError(f"`activation_sparsity` {level} is not possible: give a share from 0 to {MOST:.0%}")


def levels_for(asked: float) -> tuple[float, ...]:
    """The levels that are calibrated where one is asked for."""
    return tuple(sorted({*LEVELS, asked} - {0.0}))


def parse_section(said: Any) -> Section | None:
    """What our part of a config says there; None where it says nothing. Raises CheckpointError when it makes no sense."""
    if said is None:
        return None
    try:
        return _parsed(said)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"'{SECTION}' of the checkpoint's quantization_config makes no sense: {error}") from error


def _parsed(said: Mapping[str, Any]) -> Section:
    levels, level = _numbers(said["levels"], 0, MOST), _numbers([said["level"]], 0, MOST)[0]
    if list(levels) != sorted(set(levels)) or (level and level not in levels):
        raise ValueError("its levels do not rise, or that to load with is none of them")
    if said["rule"] not in RULES or said["dense_tokens"] != FIRST:
        raise ValueError(
            f"rule {said['rule']!r} with {said['dense_tokens']!r} dense tokens is not known to this version"
        )
    if not isinstance(said["inputs"], list):
        raise ValueError("its inputs are no list")
    inputs = tuple(_parsed_input(each, said["rule"], len(levels)) for each in said["inputs"])
    names = [name for each in inputs for name in each.linears]
    if len(set(names)) != len(names):
        raise ValueError("a linear is in it twice")
    return Section(str(said["method"]), said["rule"], levels, level, inputs)


def _parsed_input(said: Mapping[str, Any], rule: str, levels: int) -> GatedInput:
    linears = said["linears"]
    if not isinstance(linears, list) or not linears or not all(isinstance(name, str) for name in linears):
        raise ValueError("an input of it has no names of linears")
    shares, thresholds = _numbers(said["shares"], 0, 1), _numbers(said.get("thresholds", []), 0, math.inf)
    if len(shares) != levels or len(thresholds) != (levels if rule == THRESHOLD else 0):
        raise ValueError(f"{linears[0]} has not a share and a threshold for each level")
    return GatedInput(tuple(linears), shares, thresholds)


def _numbers(said: Sequence[Any], low: float, high: float) -> tuple[float, ...]:
    if not isinstance(said, list) or not all(type(each) in (int, float) and low <= each <= high for each in said):
        raise ValueError(f"it should hold numbers from {low:g} to {high:g}")
    if not all(map(math.isfinite, said)):
        raise ValueError("a number is not finite")
    return tuple(map(float, said))
