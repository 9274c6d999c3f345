"""Figures that `eval` and `gate` measured, read from their files for a model card."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.errors import UsageError
from secateur.folder.reader import read_json

_NAMES = {
    "perplexity": "Perplexity",
    "bits_per_byte": "Bits per byte",
    "kl": "KL divergence from the dense model, nats per token",
    "agreement": "Share of predictions with the dense model's likeliest token",
}


@dataclass(frozen=True)
class Figure:
    """One figure.

    Attributes:
        kind: what the hub calls it.
        name: in words.
        value: of it.
        data: what it was measured on.
        how: windows, tokens, samples.
    """

    kind: str
    name: str
    value: float
    data: str
    how: str


def read_figures(file: str | Path, folder: Path) -> list[Figure]:
    """The figures in a file that `eval --json`, `gate --json` or `gate --write` wrote of a folder.

    Raises:
        UsageError: it is no such file, or of another model.
        CheckpointError: it is no JSON.
    """
    file = Path(file)
    if not file.is_file():
        raise UsageError(f"there is no file {file} with figures: write one by `secateur eval {folder} --json {file}`")
    content = read_json(file)
    inner = content.get("evaluation")
    found = inner if isinstance(inner, Mapping) else content
    text = found.get("text")
    if not isinstance(text, Mapping) or not isinstance(found.get("model"), str):
        raise UsageError(
            f"{file} holds no figures of `eval` or `gate`: write some by `secateur eval {folder} --json FILE`"
        )
    if Path(found["model"]).resolve().name != folder.resolve().name:
        raise UsageError(f"{file} holds figures of {found['model']}, and not of {folder}: measure that")
    data = str(text.get("data"))
    data = Path(data).name if Path(data).is_absolute() else data
    how = f"{text.get('windows')} windows of {text.get('seq_len')} tokens"
    quality, metrics = found.get("quality"), found.get("metrics")
    figures = []
    for kind, name in _NAMES.items():
        value = _value(metrics, kind) if isinstance(metrics, Mapping) else None
        if value is None and isinstance(quality, Mapping):
            value = quality.get(kind, found.get(kind))
        if value is not None and _is_number(value):
            figures.append(Figure(kind, name, float(value), data, how))
    tasks = found.get("tasks")
    for score in tasks if isinstance(tasks, Sequence) and not isinstance(tasks, str) else ():
        if isinstance(score, Mapping) and _is_number(score.get("value")):
            name = f"{score.get('metric')} of {score.get('task')}"
            shots = score.get("few_shot")
            how = f"{score.get('samples')} samples" + (f", {shots} examples" if shots else "")
            figures.append(Figure(str(score.get("metric")), name, float(score["value"]), str(score.get("task")), how))
    if not figures:
        raise UsageError(f"{file} holds no figure that is a number: measure {folder} again")
    return figures


def _value(metrics: Mapping[str, Any], kind: str) -> Any:
    found = metrics.get(kind)
    return found.get("value") if isinstance(found, Mapping) else None


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def model_index(title: str, figures: Sequence[Figure]) -> list[dict[str, Any]]:
    """Figures as the hub takes them: those of one text or task together."""
    by_data: dict[str, list[Figure]] = {}
    for figure in figures:
        by_data.setdefault(figure.data, []).append(figure)
    results = [
        {
            "task": {"type": "text-generation"},
            "dataset": {"name": data, "type": data},
            "metrics": [
                {"type": each.kind, "value": round(each.value, 6), "name": f"{each.name} ({each.how})"}
                for each in together
            ],
        }
        for data, together in by_data.items()
    ]
    return [{"name": title, "results": results}] if results else []


def table(figures: Sequence[Figure]) -> str:
    """Figures as people read them."""
    rows = [f"| {each.name} | {each.value:.5g} | {each.data}, {each.how} |" for each in figures]
    return "\n".join(["| figure | value | measured on |", "|---|---|---|", *rows])
