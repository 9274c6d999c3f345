"""What the scripts of the report's page draw from: places of points, frontiers, and the figures of all linears, compactly."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from secateur.report.report_points import SIZES, Entry, frontier_of, perplexity_limit, qualities
from secateur.report.sweep_result import Point

# The block of a linear that is in none.
NO_BLOCK = "–"


def script_data(found: Sequence[Entry], unit: tuple[str, int]) -> str:
    """JSON that may stand in a `<script>` element, whatever is in the names.

    Args:
        found: what `entries` gives.
        unit: of sizes: its name, and its bytes.
    """
    names = list(dict.fromkeys(name for entry in found if entry.point for name in entry.point.linears))
    axes = qualities(found)
    limit = perplexity_limit(found)
    content = {
        "unit": {"name": unit[0], "bytes": unit[1]},
        "sizes": [{"key": axis.key, "label": axis.label} for axis in SIZES],
        "qualities": [{"key": q.key, "label": q.label, "up": q.larger_is_better} for q in axes],
        "limit": limit if math.isfinite(limit) else None,
        "entries": [
            {
                "name": entry.name,
                "family": entry.family,
                "at": entry.measured and {axis.key: axis.values(entry.measured) for axis in (*SIZES, *axes)},
                "linears": entry.point and _linears(entry.point, names),
            }
            for entry in found
        ],
        "frontiers": {size.key: {q.key: frontier_of(found, size, q) for q in axes} for size in SIZES},
        "grid": grid(names),
    }
    text = json.dumps(_plain(content), separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _linears(point: Point, names: Sequence[str]) -> dict[str, list[Any]] | None:
    """By figure, one value for each name, None for a linear that the recipe leaves alone."""
    if not point.linears:
        return None
    found = [point.linears.get(name) for name in names]
    return {
        key: [linear and getattr(linear, key) for linear in found] for key in ("sparsity", "bits", "bytes", "error")
    }


def _plain(value: Any) -> Any:
    """The same with four significant digits, and with words for the numbers that JSON does not have."""
    if isinstance(value, float):
        # JavaScript's Number() reads these.
        if not math.isfinite(value):
            return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
        rounded = float(f"{value:.4g}")
        return int(rounded) if rounded.is_integer() and abs(rounded) < 1e15 else rounded
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def grid(names: Sequence[str]) -> dict[str, Any]:
    """Where each linear goes in a heat map: a row for each kind, a column for each block.

    The number of a block is the first part of a name that is a number, the kind is what follows (and what precedes, where there
    are several lists of blocks). A linear without a number is a kind of its own, in the column `NO_BLOCK`.

    Returns:
        `rows` and `columns`: their labels; `names`: of the linears; `row` and `column`: an index for each name.
    """
    places = [_place(name.split(".")) for name in names]
    kinds = list(dict.fromkeys(kind for kind, _ in places))
    numbers = sorted({number for _, number in places if number is not None})
    columns = [*map(str, numbers), *([NO_BLOCK] if any(number is None for _, number in places) else [])]
    row = {kind: i for i, kind in enumerate(kinds)}
    column = {number: i for i, number in enumerate([*numbers, None])}
    return {
        "rows": _short(kinds),
        "columns": columns,
        "names": list(names),
        "row": [row[kind] for kind, _ in places],
        "column": [column[number] for _, number in places],
    }


def _place(parts: list[str]) -> tuple[tuple[str, ...], int | None]:
    for i, part in enumerate(parts):
        if part.isascii() and part.isdigit():
            return (*parts[:i], "*", *parts[i + 1 :]), int(part)
    return tuple(parts), None


def _short(kinds: Sequence[tuple[str, ...]]) -> list[str]:
    """For each kind as many of its last parts as tell it from the others."""
    labels = []
    for kind in kinds:
        ends = (kind[-n:] for n in range(1, len(kind) + 1))
        label = next((end for end in ends if sum(other[-len(end) :] == end for other in kinds) == 1), kind)
        labels.append(".".join(label))
    return labels
