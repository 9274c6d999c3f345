"""What a sweep found: the dense model, and one point for each recipe, as values that JSON holds."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from secateur.errors import CheckpointError

LAYOUT = 1


@dataclass(frozen=True)
class Measured:
    """What an evaluation gave. An interval is of 95 % confidence, over the choice of windows; None of a single window.

    Attributes:
        bytes: of the weight files.
        bits_per_weight: of the whole model, files counted.
        perplexity, bits_per_byte: of the text.
        kl: mean KL divergence from the dense model, nats a token; None for the dense model itself.
        agreement: share of predictions whose most likely token is the dense model's.
        seconds: the evaluation took.
    """

    bytes: int
    bits_per_weight: float
    perplexity: float
    perplexity_interval: tuple[float, float] | None
    bits_per_byte: float
    seconds: float
    kl: float | None = None
    kl_interval: tuple[float, float] | None = None
    agreement: float | None = None
    agreement_interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class LinearPoint:
    """One linear of a compressed model. `error` is the relative squared error of its output, see `LinearReport`."""

    sparsity: float
    bits: float
    bytes: int
    error: float


@dataclass(frozen=True)
class Point:
    """One recipe and what came of it.

    Attributes:
        name: short, of the recipe, and no other point's.
        recipe: as `Recipe.to_dict` gives it, with the numbers of the run filled in.
        command: what compresses the model alone by this recipe.
        measured: None where the recipe failed, and `failure` says why.
        sparsity, bits: over the compressed linears.
        seconds: the compression took, and `peak_bytes` of memory.
        linears: by name, in the order of the model.
        asked: the recipe as it was asked for, before numbers were filled in.
    """

    name: str
    recipe: dict[str, Any]
    command: str
    measured: Measured | None = None
    failure: str | None = None
    sparsity: float = 0.0
    bits: float = 0.0
    seconds: float = 0.0
    peak_bytes: int = 0
    linears: dict[str, LinearPoint] = field(default_factory=dict)
    asked: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SweepResult:
    """A sweep, finished or not.

    Attributes:
        secateur: the version.
        model: what was compressed, as the user named it.
        parameters: of the model.
        text: what it was evaluated on: `data`, `text_field`, `seq_len`, `stride`, `windows`, `bos` (whether windows begin
            with it), `sha256` (of the tokens), `tokens`, and `bytes` that the scored ones stand for.
        machine: `device`, `threads`, `dtype`, and the versions of torch and transformers.
        date: it began, as YYYY-MM-DD.
        dense: the model as it is.
        points: in the order in which they were asked for.
        source: SHA-256 of the model's files, by name.
    """

    secateur: str
    model: str
    parameters: int
    text: dict[str, Any]
    machine: dict[str, Any]
    date: str
    dense: Measured
    points: tuple[Point, ...]
    source: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """As JSON, in which what is beyond a float is null."""
        return json.dumps(_plain({"layout": LAYOUT, **dataclasses.asdict(self)}), indent=1, allow_nan=False)

    @classmethod
    def read(cls, file: Path) -> SweepResult:
        """What `to_json` wrote. Raises CheckpointError when the file does not hold it."""
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            if content.pop("layout") != LAYOUT:
                raise CheckpointError(
                    f"{file} was written by another version of secateur: give `overwrite=True` to begin again"
                )
            points = tuple(
                Point(
                    **{
                        **point,
                        "measured": None if point["measured"] is None else _measured(point["measured"]),
                        "linears": {name: _linear(linear) for name, linear in point["linears"].items()},
                    }
                )
                for point in content.pop("points")
            )
            return cls(**{**content, "dense": _measured(content["dense"])}, points=points)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(
                f"{file} does not hold the results of a sweep: give `overwrite=True` to begin it again"
            ) from error


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _measured(content: dict[str, Any]) -> Measured:
    def number(value: float | None) -> float:
        return math.inf if value is None else value

    pairs = {key: tuple(map(number, value)) for key, value in content.items() if isinstance(value, list)}
    beyond = {key: number(content[key]) for key in ("perplexity", "bits_per_byte")}
    return Measured(**{**content, **pairs, **beyond})


def _linear(content: dict[str, Any]) -> LinearPoint:
    return LinearPoint(**{**content, "error": math.nan if content["error"] is None else content["error"]})
