"""What is in a checkpoint: the layout, sparsity, bits, bytes and error of every linear of its blocks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from secateur.folder.manifest import MANIFEST_NAME
from secateur.folder.reader import read_json
from secateur.model.source import Source, open_source, with_revision
from secateur.model.structure import build_skeleton, find_blocks, weight_matrix
from secateur.model.weights import ModelWeights
from secateur.pipeline.outcome import LinearReport


@dataclass(frozen=True)
class Inspection:
    """A checkpoint by its linears.

    Attributes:
        linears: those of the blocks; their `error` is what the manifest says, NaN without one.
        parameters: of the whole model.
        weight_bytes: of all weight files.
    """

    linears: list[LinearReport]
    parameters: int
    weight_bytes: int

    @property
    def linear_weights(self) -> int:
        return sum(linear.shape[0] * linear.shape[1] for linear in self.linears)

    @property
    def linear_bytes(self) -> int:
        return sum(linear.bytes for linear in self.linears)

    @property
    def sparsity(self) -> float:
        zeros = sum(linear.sparsity * linear.shape[0] * linear.shape[1] for linear in self.linears)
        return zeros / self.linear_weights


def inspect(model: str | Path | Source, trust_remote_code: bool = False, *, revision: str | None = None) -> Inspection:
    """Read every linear of a checkpoint once and report on it.

    Args:
        model: whatever `compress` takes as MODEL, or one that is open already.
        trust_remote_code: whether code that comes with the model may run.
        revision: branch, tag or commit of a model of the hub, as `id@revision` says it too.

    Raises:
        CheckpointError: files are damaged.
    """
    if isinstance(model, Source):
        return _inspect(model)
    return _inspect(open_source(with_revision(model, revision), trust_remote_code, codes=True))


def _inspect(source: Source) -> Inspection:
    model = build_skeleton(source, torch.float32)
    weights = ModelWeights(source, model)
    recorded = _recorded(source)
    linears = []
    for name, linear in find_blocks(model).linears.items():
        key = f"{name}.weight"
        if key not in weights:
            continue  # tied to one that is listed
        found = weights.describe(key)
        said = recorded.get(name, {})
        O, I = weight_matrix(linear).shape
        count = O * I
        linears.append(
            LinearReport(
                name=name,
                shape=(O, I),
                layout=found.layout,
                sparsity=1 - found.count / count,
                outliers=found.outliers / count,
                bits=8 * found.bytes / count,
                bytes=found.bytes,
                error=float(said.get("error", "nan")),
                error_kind=str(said.get("error_kind")) if said else "not recorded",
                tokens=said.get("tokens") if isinstance(said.get("tokens"), int) else None,
                borrowed=said["borrowed"] if isinstance(said.get("borrowed"), int) else 0,
            )
        )
    parameters = sum(p.numel() for p in model.parameters())
    return Inspection(linears, parameters, sum(file.stat().st_size for file in source.files))


def _recorded(source: Source) -> dict[str, dict[str, Any]]:
    """What the manifest says of linears, as far as it has the form that it should have."""
    if source.folder is None or not (source.folder / MANIFEST_NAME).exists():
        return {}
    linears = read_json(source.folder / MANIFEST_NAME).get("linears")
    if not isinstance(linears, dict):
        return {}
    entries = {name: entry for name, entry in linears.items() if isinstance(entry, dict)}
    return {name: entry for name, entry in entries.items() if isinstance(entry.get("error"), int | float)}
