"""What is in a checkpoint: layout, sparsity, bits, bytes and error of the linears of its blocks, and of the tables outside."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur.folder.manifest import MANIFEST_NAME
from secateur.folder.reader import read_json
from secateur.formats.layouts.layout import Stored
from secateur.model.source import Source, open_source, with_revision
from secateur.model.structure import build_skeleton, find_blocks, weight_matrix
from secateur.model.vocabulary import find_tables
from secateur.model.weights import ModelWeights
from secateur.pipeline.outcome import LinearReport


@dataclass(frozen=True)
class Inspection:
    """A checkpoint by its linears.

    Attributes:
        linears: those of the blocks; their `error` is what the manifest says, NaN without one.
        tables: the table of embeddings, and the head where that is another matrix.
        parameters: of the whole model.
        weight_bytes: of all weight files.
    """

    linears: list[LinearReport]
    tables: list[LinearReport]
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

    def reports(modules: Mapping[str, nn.Module]) -> list[LinearReport]:
        return [
            # Some are tied to one that is listed.
            _report(name, module, weights.describe(f"{name}.weight"), recorded.get(name, {}))
            for name, module in modules.items()
            if f"{name}.weight" in weights
        ]

    linears = reports(find_blocks(model).linears)
    tables = reports({table.name: model.get_submodule(table.name) for table in find_tables(model).values()})
    parameters = sum(p.numel() for p in model.parameters())
    return Inspection(linears, tables, parameters, sum(file.stat().st_size for file in source.files))


def _report(name: str, module: nn.Module, found: Stored, said: Mapping[str, Any]) -> LinearReport:
    """What is stored of a module, and what the manifest says besides."""
    O, I = weight_matrix(module).shape
    count = O * I
    return LinearReport(
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
        **{key: said[key] for key in LinearReport.CHOSEN if isinstance(said.get(key), float)},
    )


def _recorded(source: Source) -> dict[str, dict[str, Any]]:
    """What the manifest says of linears and tables, as far as it has the form that it should have."""
    if source.folder is None or not (source.folder / MANIFEST_NAME).exists():
        return {}
    manifest = read_json(source.folder / MANIFEST_NAME)
    found = [said for key in ("linears", "tables") if isinstance(said := manifest.get(key), dict)]
    entries = {name: entry for said in found for name, entry in said.items() if isinstance(entry, dict)}
    return {name: entry for name, entry in entries.items() if isinstance(entry.get("error"), int | float)}
