"""The points of a sweep's report: the dense model and each recipe, where they lie on each axis, and which are the frontier."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from secateur.report.sweep_result import Measured, Point, SweepResult

DENSE = "dense model"
# How much worse than the dense model's a perplexity may be before it is drawn at the edge of the plot.
_FAR = 10


@dataclass(frozen=True)
class Entry:
    """A line of the report.

    Attributes:
        family: `dense`, `prune`, `quantize`, `both`, `factorize`, or `neither` (which no recipe that works is).
        point: None for the dense model.
    """

    name: str
    family: str
    measured: Measured | None
    point: Point | None = None


def entries(result: SweepResult) -> list[Entry]:
    """The dense model, then the points in their order."""
    # By definition: so the dense model has its place on these axes, too.
    dense = dataclasses.replace(
        result.dense, kl=0.0, kl_interval=(0.0, 0.0), agreement=1.0, agreement_interval=(1.0, 1.0)
    )
    return [
        Entry(DENSE, "dense", dense),
        *(Entry(point.name, family(point.recipe), point.measured, point) for point in result.points),
    ]


def family(recipe: dict[str, Any]) -> str:
    """What kind of method a recipe has: `prune`, `quantize`, `both`, `factorize` or `neither`."""
    given = [key for key in ("prune", "quantize", "factorize") if recipe.get(key)]
    return "both" if len(given) == 2 else given[0] if given else "neither"


@dataclass(frozen=True)
class Axis:
    """A quantity that points are drawn by.

    Attributes:
        values: (value, low, high) of what was measured, or None where that was not.
        larger_is_better: else smaller.
    """

    key: str
    label: str
    values: Callable[[Measured], tuple[float, float, float] | None]
    larger_is_better: bool = False

    def loss(self, entry: Entry) -> float:
        """The value, so turned that less is better; NaN where there is none."""
        values = self.values(entry.measured) if entry.measured else None
        return math.nan if values is None else -values[0] if self.larger_is_better else values[0]


def _with_interval(value: float | None, interval: tuple[float, float] | None) -> tuple[float, float, float] | None:
    return None if value is None else (value, *(interval or (value, value)))


SIZES = (
    Axis("bytes", "size on disk", lambda m: (m.bytes, m.bytes, m.bytes)),
    Axis("bits_per_weight", "bits per weight", lambda m: (m.bits_per_weight,) * 3),
)
QUALITIES = (
    Axis("perplexity", "perplexity", lambda m: _with_interval(m.perplexity, m.perplexity_interval)),
    Axis("kl", "KL divergence, nats per token", lambda m: _with_interval(m.kl, m.kl_interval)),
    Axis("agreement", "same most likely token", lambda m: _with_interval(m.agreement, m.agreement_interval), True),
)


def qualities(found: Sequence[Entry]) -> list[Axis]:
    """The axes of quality that some recipe was measured on; all of them where no recipe could be measured."""
    measured = [entry for entry in found if entry.point and entry.measured]
    return [q for q in QUALITIES if not measured or any(not math.isnan(q.loss(entry)) for entry in measured)]


def frontier(places: Sequence[tuple[float, float]]) -> list[int]:
    """Which places (size, loss) are not dominated: no other is at most as large and at most as bad, and better in one of both.

    Returns:
        Their indices in order of size. Places that are not finite are never among them, equal ones are all or none.
    """
    kept: list[int] = []
    finite = [i for i, place in enumerate(places) if all(map(math.isfinite, place))]
    for i in sorted(finite, key=lambda i: places[i]):
        if not kept or places[i][1] < places[kept[-1]][1] or places[i] == places[kept[-1]]:
            kept.append(i)
    return kept


def frontier_of(found: Sequence[Entry], size: Axis, quality: Axis) -> list[int]:
    """The frontier of entries, the dense model included, as `frontier` gives it."""
    return frontier([(size.loss(entry), quality.loss(entry)) for entry in found])


def perplexity_limit(found: Sequence[Entry]) -> float:
    """What perplexity a plot should end at, so that a few recipes that ruin the model leave the others apart; or infinity."""
    perplexities = [entry.measured.perplexity for entry in found if entry.measured]
    limit = _FAR * perplexities[0]
    near = sum(perplexity <= limit for perplexity in perplexities[1:])
    return limit if near < len(perplexities) - 1 <= 2 * near else math.inf


def size_unit(found: Sequence[Entry]) -> tuple[str, int]:
    """One unit for all sizes on disk, so that they compare at a glance: its name, and its bytes."""
    largest = max(entry.measured.bytes for entry in found if entry.measured)
    return next(((name, size) for name, size in (("GB", 10**9), ("MB", 10**6)) if largest >= size), ("kB", 1000))
