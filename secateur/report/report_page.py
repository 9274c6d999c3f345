"""The page of a sweep's report: one HTML file with its style, scripts and data inside.

Numbers, recipes and failures are in the HTML, for readers without JavaScript; scripts add plot, heat maps, sorting and copying.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

from secateur.evaluation.eval_text import with_bos
from secateur.recipes.recipe import Recipe
from secateur.report.report_data import script_data
from secateur.report.report_points import QUALITIES, SIZES, Entry, entries, frontier_of, size_unit
from secateur.report.sweep_result import Measured, Point, SweepResult

# In the order in which they are joined.
_SCRIPTS = ("shared.js", "plot.js", "heatmap.js", "page.js")
_FAMILIES = {
    "dense": "as it is",
    "prune": "pruned",
    "quantize": "quantized",
    "both": "pruned and quantized",
    "factorize": "factorized",
    "neither": "no method",
}


def page(result: SweepResult) -> str:
    """The whole page."""
    found = entries(result)
    unit = size_unit(found)
    on_frontier = frontier_of(found, SIZES[0], QUALITIES[0])
    headings = list(_figures(result.dense, None, unit))
    style = _static("page.css")
    script = "".join(map(_static, _SCRIPTS))
    # By their hashes: should a text ever get into the page as markup, nothing in it runs.
    policy = (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    return Template(_static("page.html")).substitute(
        policy=policy,
        style=style,
        script=script,
        data=script_data(found, unit),
        model=escape(result.model),
        date=escape(result.date),
        summary=_summary(found, on_frontier, unit),
        facts=_facts(result),
        recipes="\n".join(_recipe(i, entry, i in on_frontier, unit) for i, entry in enumerate(found)),
        headings="".join(f'<th scope="col">{heading}</th>' for heading in ("Recipe", *headings)),
        rows="\n".join(_row(i, entry, i in on_frontier, unit, len(headings)) for i, entry in enumerate(found)),
        version=escape(result.secateur),
    )


def _static(name: str) -> str:
    return (files("secateur.report") / "page" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


# --- numbers as text


def _size(size: float, unit: tuple[str, int]) -> str:
    return f"{size / unit[1]:,.{2 if unit[0] == 'GB' else 1}f} {unit[0]}"


def _number(value: float, digits: int = 2) -> str:
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "∞" if value > 0 else "−∞"
    if abs(value) >= 1e9:
        return f"{value:.3g}"
    return f"{value:,.{digits if abs(value) < 1e4 else 0}f}"


def _percent(value: float) -> str:
    return f"{_number(100 * value)} %"


def _sortable(value: float) -> str:
    """As JavaScript reads it."""
    return repr(value).replace("inf", "Infinity")


# --- parts of the page


@dataclass(frozen=True)
class _Figure:
    """A figure as text, as a number to sort by, and the interval around it as text, if it has one."""

    text: str
    value: float
    interval: str


def _figures(measured: Measured, point: Point | None, unit: tuple[str, int]) -> dict[str, _Figure | None]:
    """By their headings, None where there is no such figure."""

    def figure(show: Callable[[float], str], value: float | None, interval: Any = None) -> _Figure | None:
        if value is None:
            return None
        low, high = map(show, interval or (value, value))
        # The unit once is enough. Around what is infinite there is nothing.
        return _Figure(show(value), value, f"{low.removesuffix(' %')} – {high}" if low != high else "")

    def of_point(show: Callable[[float], str], key: str) -> _Figure | None:
        return figure(show, getattr(point, key)) if point else None

    return {
        "Size": figure(lambda v: _size(v, unit), measured.bytes),
        "Bits per weight": figure(_number, measured.bits_per_weight),
        "Perplexity": figure(_number, measured.perplexity, measured.perplexity_interval),
        "Bits per byte": figure(lambda v: _number(v, 4), measured.bits_per_byte),
        "KL divergence": figure(lambda v: _number(v, 4), measured.kl, measured.kl_interval),
        "Same token": figure(_percent, measured.agreement, measured.agreement_interval),
        "Sparsity": of_point(_percent, "sparsity"),
        "Bits, linears": of_point(_number, "bits"),
        "Compressed in": of_point(lambda v: f"{_number(v, 1)} s", "seconds"),
        "Peak memory": of_point(lambda v: f"{_number(v / 1e9)} GB", "peak_bytes"),
        "Evaluated in": figure(lambda v: f"{_number(v, 1)} s", measured.seconds),
    }


def _summary(found: Sequence[Entry], on_frontier: Sequence[int], unit: tuple[str, int]) -> str:
    """One sentence on what came out, as HTML."""
    recipes = [entry for entry in found if entry.point]
    best = [found[i] for i in on_frontier if found[i].point]
    failed = sum(entry.measured is None for entry in recipes)

    def tell(entry: Entry) -> str:
        assert entry.measured is not None
        return f"perplexity {_number(entry.measured.perplexity)} at {_size(entry.measured.bytes, unit)}"

    def tell_recipe(entry: Entry) -> str:
        return f"<b>{escape(entry.name)}</b> ({tell(entry)})"

    dense = f"the dense model has {tell(found[0])}"
    if not recipes:
        return f"No recipe was run yet; {dense}."
    if failed == len(recipes):
        which = "The one recipe" if failed == 1 else f"All {failed} recipes"
        return f"{which} failed; {dense}."
    if not best:
        text = f"No recipe lies on the frontier of size and perplexity: none has less of both than the dense model; {dense}"
    elif len(best) == 1:
        which = "The one recipe lies" if len(recipes) == 1 else f"Of {len(recipes)} recipes one lies"
        text = f"{which} on the frontier of size and perplexity, {tell_recipe(best[0])}; {dense}"
    else:
        text = (
            f"{len(best)} of {len(recipes)} recipes lie on the frontier of size and perplexity, from {tell_recipe(best[0])} to "
            f"{tell_recipe(best[-1])}; {dense}"
        )
    return f"{text}; {failed} failed." if failed else f"{text}."


def _facts(result: SweepResult) -> str:
    text = result.text
    facts = {
        "Parameters": f"{result.parameters:,}",
        "Text": f"{text['data']}: {text['windows']} windows × {text['seq_len']} tokens, stride {text['stride']}, "
        f"{with_bos(text.get('bos', False))}, {text['tokens']:,} tokens, SHA-256 {str(text['sha256'])[:12]}…",
        "Machine": ", ".join(f"{key} {value}" for key, value in result.machine.items()),
        "Version": f"secateur {result.secateur}",
    }
    return "".join(f"<div><dt>{key}</dt><dd>{escape(value)}</dd></div>" for key, value in facts.items())


def _mark(family: str) -> str:
    """The sign of a family, as in the plot."""
    return f'<svg class="mark {family}" aria-hidden="true"><use href="#mark-{family}"/></svg>'


def _recipe(index: int, entry: Entry, on_frontier: bool, unit: tuple[str, int]) -> str:
    """What is known of an entry, with its recipe to be copied."""
    tags = [
        _FAMILIES[entry.family],
        *(["on the frontier"] if on_frontier else []),
        *([] if entry.measured else ["failed"]),
    ]
    parts = [
        f'<article class="entry" id="entry-{index}">',
        f"<h3>{_mark(entry.family)}<span>{escape(entry.name)}</span></h3>",
        f'<p class="tags">{"".join(f"<span>{tag}</span>" for tag in tags)}</p>',
    ]
    if entry.measured:
        figures = _figures(entry.measured, entry.point, unit)
        shown = {heading: figure for heading, figure in figures.items() if figure}
        parts.append(
            "<dl>"
            + "".join(f"<div><dt>{heading}</dt><dd>{_cell(figure)}</dd></div>" for heading, figure in shown.items())
            + "</dl>"
        )
    if entry.point:
        if not entry.measured:
            parts.append(f'<p class="failure">{escape(_failure(entry.point))}</p>')
        parts += [
            _code("Command", entry.point.command),
            _code("Recipe", Recipe.from_dict(entry.point.recipe).to_yaml()),
        ]
    return "".join([*parts, "</article>"])


def _code(title: str, text: str) -> str:
    # The newline after <pre> is not part of the text.
    return f'<figure class="code"><figcaption>{title}</figcaption><pre tabindex="0">\n{escape(text)}</pre></figure>'


def _failure(point: Point) -> str:
    return point.failure or "not measured"


def _row(index: int, entry: Entry, on_frontier: bool, unit: tuple[str, int], columns: int) -> str:
    """A row of the table."""
    name = f'{_mark(entry.family)}<a href="#entry-{index}">{escape(entry.name)}</a>'
    tag = ' <span class="tag">frontier</span>' if on_frontier else ""
    cells = f'<th scope="row" data-v="{escape(entry.name)}">{name}{tag}</th>'
    if entry.measured:
        for figure in _figures(entry.measured, entry.point, unit).values():
            cells += (
                f'<td data-v="{_sortable(figure.value)}">{_cell(figure)}</td>' if figure else '<td class="none">–</td>'
            )
    else:
        assert entry.point is not None
        cells += f'<td class="failure" colspan="{columns}">failed: {escape(_failure(entry.point))}</td>'
    return f'<tr id="row-{index}">{cells}</tr>'


def _cell(figure: _Figure) -> str:
    interval = f"<small>{figure.interval}</small>" if figure.interval else ""
    return f"<span>{figure.text}</span>{interval}"
