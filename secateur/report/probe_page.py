"""What a probe found as a page: a heat map, a row for each block, in one HTML file without scripts."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from secateur.search.probe import LOWEST, BlockProbe, ProbeResult

# Of the least to the greatest value of a column.
_COLOURS = ("#f7fcf5", "#e0f3db", "#c7e9c0", "#a1d99b", "#74c476", "#41ab5d", "#238b45", "#005a32")
_STYLE = """body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:75rem;padding:0 1rem;color:#222;background:#fff}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}th,td{padding:.15rem .5rem;text-align:right}
th:first-child{text-align:left}td{border:1px solid #fff}caption{text-align:left;padding:.5rem 0}
"""


def columns_of(blocks: Sequence[BlockProbe]) -> dict[str, list[float | None]]:
    """The figures of all blocks by their headings; None where a block has none."""
    heads = max((len(block.heads) for block in blocks), default=0)
    found: dict[str, list[float | None]] = {
        "cosine": [block.cosine for block in blocks],
        "loss without it": [block.loss_rise for block in blocks],
    }
    if any(block.neurons for block in blocks):
        found |= {f"lowest {share:.1%} of neurons": [block.lowest(share) for block in blocks] for share in LOWEST}
    for head in range(heads):
        found[f"head {head}"] = [block.heads[head] if head < len(block.heads) else None for block in blocks]
    return found


def probe_page(result: ProbeResult) -> str:
    """The whole page."""
    columns = columns_of(result.blocks)
    colours = "".join(
        f".c{i}{{background:{colour};color:{'#fff' if i > 4 else '#222'}}}" for i, colour in enumerate(_COLOURS)
    )
    steps = {heading: _steps(values) for heading, values in columns.items()}
    rows = "\n".join(
        f'<tr><th scope="row">{escape(block.name)}</th>'
        + "".join(_cell(heading, values[i], steps[heading][i]) for heading, values in columns.items())
        + "</tr>"
        for i, block in enumerate(result.blocks)
    )
    headings = "".join(f'<th scope="col">{escape(heading)}</th>' for heading in ("block", *columns))
    title = f"What could go of {escape(result.model)}"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
        '<meta name="viewport" content="width=device-width">\n'
        f"<style>{_STYLE}{colours}</style></head>\n<body><h1>{title}</h1>\n"
        f"<p>Loss {result.loss:.4f} nats a token on {result.tokens:,} tokens. A block with a cosine near 1 changes little; "
        "what the loss rises by without it is in nats a token. Of neurons and heads: the part that they have in the scores "
        "of their block, the sum of |weight| × norm of its input.</p>\n"
        f"<table><caption>Light is the least of a column, dark the most.</caption><thead><tr>{headings}</tr></thead>\n"
        f"<tbody>{rows}</tbody></table></body></html>\n"
    )


def _steps(values: Sequence[float | None]) -> list[int]:
    """Which colour each value has."""
    known = [value for value in values if value is not None]
    low, spread = min(known, default=0.0), (max(known, default=0.0) - min(known, default=0.0)) or 1.0
    last = len(_COLOURS) - 1
    return [0 if value is None else round((value - low) / spread * last) for value in values]


def _cell(heading: str, value: float | None, step: int) -> str:
    return "<td>–</td>" if value is None else f'<td class="c{step}">{say_figure(heading, value)}</td>'


def say_figure(heading: str, value: float) -> str:
    """A figure as text."""
    return f"{value:.1%}" if "neurons" in heading or "head" in heading else f"{value:.4f}"
