"""The size–quality plot of a sweep as a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from secateur.report.bench_plot import check_matplotlib
from secateur.report.report_points import QUALITIES, SIZES, Entry, entries, frontier_of, perplexity_limit, size_unit
from secateur.report.sweep_result import Measured, SweepResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind people can tell apart, and a shape each for those who see none.
_STYLES = {
    "dense": ("dense model", "#333333", "D"),
    "prune": ("pruned", "#d55e00", "^"),
    "quantize": ("quantized", "#0072b2", "o"),
    "both": ("pruned and quantized", "#009e73", "s"),
    "factorize": ("factorized", "#cc79a7", "v"),
}
# Perplexities further apart than this are drawn on a log scale.
_WIDE = 4
# Letters that fit above the plot.
_TITLE = 50
# Where a label may stand: pixels from its point to its nearer end. Not further, where it would seem another point's.
_OFFSETS = tuple((side * right, up) for right, up in ((14, 16), (20, 0), (14, -18)) for side in (1, -1))


def draw(result: SweepResult, file: Path) -> None:
    """Write the plot of size on disk and perplexity, with its frontier, as PNG.

    Raises:
        UsageError: matplotlib is missing.
        OSError: the file cannot be written.
    """
    check_matplotlib("frontier.png", "sweep")
    # Not pyplot, which would keep figures for the whole process and may look for a screen.
    from matplotlib.figure import Figure

    found = entries(result)
    drawn = {i: e.measured for i, e in enumerate(found) if e.measured and not math.isnan(e.measured.perplexity)}
    low, edge, log = _range(list(drawn.values()), perplexity_limit(found))
    unit, unit_bytes = size_unit(found)
    x = {i: measured.bytes / unit_bytes for i, measured in drawn.items()}
    y = {i: min(measured.perplexity, edge) for i, measured in drawn.items()}
    bars = {
        i: [min(bound, edge) for bound in m.perplexity_interval or (m.perplexity, m.perplexity)]
        for i, m in drawn.items()
    }
    line = frontier_of(found, SIZES[0], QUALITIES[0])

    figure = Figure(figsize=(8.5, 5.5), layout="constrained", dpi=160)
    axes = figure.subplots()
    model = result.model.encode(errors="replace").decode()  # a path may hold bytes that are no text
    # The end of a path tells more than its beginning.
    title = model if len(model) <= _TITLE else "…" + model[-_TITLE:]
    axes.set_title(f"Size and perplexity of {title}", loc="left", fontweight="bold", pad=14, parse_math=False)
    axes.set_xlabel(f"size on disk, {unit}")
    axes.set_ylabel(f"perplexity{', log scale' if log else ''} (lower is better; bars: 95 % intervals)")
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}" if edge < 10 * low else "")
    axes.set_ylim(low, edge)
    axes.margins(x=0.08)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e8e8e8", linewidth=0.6)
    axes.set_axisbelow(True)

    axes.plot([x[i] for i in line], [y[i] for i in line], color="#888888", linewidth=1.2, zorder=1, label="frontier")
    for family, (label, colour, marker) in _STYLES.items():
        members = [i for i in drawn if found[i].family == family]
        if not members:
            continue
        xs, lows, highs = [x[i] for i in members], [bars[i][0] for i in members], [bars[i][1] for i in members]
        axes.vlines(xs, lows, highs, color=colour, alpha=0.6, linewidth=1.2, zorder=2)
        # Hollow at the upper edge, beyond which they belong.
        faces = [colour if drawn[i].perplexity <= edge else "white" for i in members]
        dots = axes.scatter(xs, [y[i] for i in members], s=44, c=faces, edgecolor=colour, marker=marker, zorder=3)
        dots.set(label=label, clip_on=False)
    if 0 in drawn:
        axes.axhline(y[0], color="#333333", linewidth=0.8, linestyle=(0, (2, 3)), zorder=1)
    axes.legend(frameon=False, fontsize="small")
    order = dict.fromkeys([*line, *drawn])  # those on the frontier have the first choice
    labels = [(x[i], y[i], _label(found[i], drawn[i].perplexity, edge)) for i in order]
    write_labels(figure, axes, labels, [(x[i], *bars[i]) for i in drawn])
    figure.savefig(file, format="png")


def _range(drawn: Sequence[Measured], limit: float) -> tuple[float, float, bool]:
    """Where the perplexities' axis begins and ends, and whether it is logarithmic: from what is within the limit."""
    values = [
        value
        for measured in drawn
        if measured.perplexity <= limit
        for value in (measured.perplexity, *(measured.perplexity_interval or ()))
        if math.isfinite(value) and value <= limit
    ]
    least, most = min(values, default=1), max(values, default=10)
    if most > _WIDE * least:
        margin = (most / least) ** 0.08
        return least / margin, most * margin, True
    margin = 0.08 * (most - least) or 0.1 * most
    return least - margin, most + margin, False


def _label(entry: Entry, perplexity: float, edge: float) -> str:
    if perplexity <= edge:
        return entry.name
    return f"{entry.name} ({perplexity:,.0f} ↑)" if math.isfinite(perplexity) else f"{entry.name} (∞)"


def write_labels(
    figure: Figure,
    axes: Axes,
    labels: Sequence[tuple[float, float, str]],
    bars: Sequence[tuple[float, ...]] = (),
    ink: str = "black",
    ground: str | None = "white",
) -> None:
    """Write labels beside their points. One that would cover a point, a bar or a label wherever it stood is left out.

    Args:
        figure, axes: everything else is drawn.
        labels: x and y of the point, and the text.
        bars: (x, low, high).
        ink, ground: colours of the letters, and of what is drawn around them, if anything is.
    """
    from matplotlib.patheffects import withStroke
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()  # settles the layout, and with it what overlaps
    room = axes.get_window_extent().padded(0, 10)
    pixels = axes.transData.transform
    points = [pixels(label[:2]) for label in labels]
    taken = [Bbox.from_bounds(x - 8, y - 8, 16, 16) for x, y in points]
    taken += [Bbox([pixels((x, low)) - 3, pixels((x, high)) + 3]) for x, low, high in bars]
    legend = axes.get_legend()
    taken += [legend.get_window_extent()] if legend else []
    for label, (x, y) in zip(labels, points, strict=True):
        note = axes.annotate(
            label[2],
            label[:2],
            (0, 0),
            textcoords="offset pixels",
            fontsize=7.5,
            va="center",
            parse_math=False,
            color=ink,
        )
        if ground is not None:
            note.set_path_effects([withStroke(linewidth=2.5, foreground=ground)])
        size = note.get_window_extent()
        for right, up in _OFFSETS:
            left = x + right - (size.width if right < 0 else 0)
            box = Bbox.from_bounds(left, y + up - size.height / 2, size.width, size.height)
            inside = room.contains(box.x0, box.y0) and room.contains(box.x1, box.y1)
            if inside and not box.count_overlaps(taken):
                note.set_position((left - x, up))
                taken.append(box)
                break
        else:
            note.remove()
