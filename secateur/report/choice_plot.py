"""What became of every linear, drawn as a heat map: a row for each block, a column for each linear of a block.

The experts of a mixture have one column for each of their projections.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from secateur.model.block_names import without_expert
from secateur.pipeline.outcome import LinearReport
from secateur.report.bench_plot import check_plot, save_plot

# Dark where much is left, light where little is; figures stand in the cells of models of so few blocks.
_COLOURS = "viridis_r"
_MOST_LABELLED = 40


def plot_choices(linears: Sequence[LinearReport], file: Path, model: str) -> None:
    """Write a heat map of the sparsity and one of the bits per weight of every linear of a model, which the title names.

    Raises:
        UsageError: the file has another ending than .png or .svg, cannot be written, or matplotlib is missing.
    """
    check_plot(file)
    # Not pyplot, which would keep figures for the whole process and may look for a screen.
    from matplotlib.figure import Figure

    rows, columns, cells = by_block(linears)
    height = 0.42 if any(len(each) > 1 for each in cells.values()) else 0.28
    figure = Figure(figsize=(2 + 1.7 * len(columns), 2.2 + height * len(rows)), layout="constrained", dpi=130)
    figure.suptitle(f"What is left of the linears of {model}", parse_math=False)
    panels = figure.subplots(1, 2)
    for axes, (title, value, digits) in zip(
        panels,
        (
            ("share of weights removed", lambda linear: linear.sparsity, 2),
            ("bits per weight", lambda linear: linear.bits, 1),
        ),
        strict=True,
    ):
        values = [[mean(cells[r, c], value) if (r, c) in cells else float("nan") for c in columns] for r in rows]
        image = axes.imshow(values, aspect="auto", cmap=_COLOURS if title.startswith("share") else "viridis")
        figure.colorbar(image, ax=axes, label=title)
        axes.set_xticks(range(len(columns)), columns, rotation=45, ha="right", fontsize="small", parse_math=False)
        axes.set_yticks(range(len(rows)), rows, fontsize="small", parse_math=False)
        axes.set_title(title[0].upper() + title[1:], fontsize="medium")
        axes.set_xlabel("linear of a block")
        axes.set_ylabel("number of the block")
        if len(rows) > _MOST_LABELLED:
            continue
        for y, r in enumerate(rows):
            for x, c in enumerate(columns):
                said, ink = "–", "#808080"
                if (r, c) in cells:
                    said = said_of([value(linear) for linear in cells[r, c]], f".{digits}f")
                    ink = _ink(image.cmap(image.norm(values[y][x])))
                axes.text(x, y, said, ha="center", va="center", fontsize="x-small", color=ink)
    save_plot(figure, file)


def _ink(ground: Sequence[float]) -> str:
    """Black or white, whichever stands out more on a colour: by its relative luminance, as WCAG 2 has it."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in ground[:3]]
    luminance = sum(share * c for share, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
    # The contrast with white is 1.05 / (L + 0.05), and with black (L + 0.05) / 0.05.
    return "black" if (luminance + 0.05) ** 2 > 1.05 * 0.05 else "white"


def by_block(
    linears: Sequence[LinearReport],
) -> tuple[list[str], list[str], dict[tuple[str, str], list[LinearReport]]]:
    """Names of blocks and of linears in a block, in order, and which linears stand where: one, or those of all experts."""
    cells: dict[tuple[str, str], list[LinearReport]] = {}
    for linear in linears:
        number = re.search(r"\.(\d+)\.", linear.name)
        block, rest = (number[1], linear.name[number.end() :]) if number else ("", linear.name)
        cells.setdefault((block, without_expert(rest)), []).append(linear)
    return list(dict.fromkeys(r for r, _ in cells)), list(dict.fromkeys(c for _, c in cells)), cells


def mean(linears: Sequence[LinearReport], value: Callable[[LinearReport], float]) -> float:
    """Of linears of one shape."""
    return sum(map(value, linears)) / len(linears)


def said_of(values: Sequence[float], form: str) -> str:
    """A figure; of several that differ their mean, and the least and the greatest in the next line."""
    ends = [f"{end:{form}}" for end in (min(values), max(values))]
    said = f"{sum(values) / len(values):{form}}"
    return said if ends[0] == ends[1] else f"{said}\n{'–'.join(ends)}"
