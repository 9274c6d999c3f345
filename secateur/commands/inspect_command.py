"""`secateur inspect`."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from secateur.commands.command import command
from secateur.commands.result_files import check_files, takes_stdout, write_json
from secateur.commands.shared_options import Debug, JsonFile, Model, Revision, Trust
from secateur.model.block_names import without_expert
from secateur.terminal.screen import screen
from secateur.terminal.tables import Column, print_table

# Experts that are named.
_NAMED = 8


@command("inspect")
@dataclasses.dataclass(frozen=True)
class Inspect:
    """Show the layout, sparsity, bits, bytes and error of every linear of MODEL, of its embeddings and its head."""

    model: Model
    json_file: JsonFile = None
    revision: Revision = None
    trust_remote_code: Trust = False
    debug: Debug = False

    def run(self) -> None:
        from secateur.checkpoint.inspect import inspect

        check_files({"--json": self.json_file})
        found = inspect(self.model, self.trust_remote_code, revision=self.revision)
        if not takes_stdout(self.json_file):
            _print(found)
        totals = {name: getattr(found, name) for name in ("sparsity", "linear_weights", "linear_bytes")}
        write_json({**dataclasses.asdict(found), **totals}, self.json_file)


def _print(found: Any) -> None:
    some_outliers = any(linear.outliers for linear in [*found.linears, *found.tables])
    columns = [Column("linear", right=False), Column("shape", spare=5), Column("layout", right=False, spare=1)]
    columns += [Column("sparsity"), *([Column("outliers", spare=3)] if some_outliers else []), Column("bits")]
    columns += [Column("bytes", spare=4), Column("error", spare=2)]
    rows: list[list[str] | None] = []
    kinds: dict[str, list[Any]] = {}
    for linear in found.linears:
        kinds.setdefault(without_expert(linear.name), []).append(linear)
    some_experts = len(kinds) < len(found.linears)
    if some_experts:
        columns.append(Column("tokens", spare=2))
    for name, linears in kinds.items():
        row = _row(name, linears, some_outliers)
        rows.append([*row, *([_tokens(linears)] if some_experts else [])])
    rows.append(None)
    gap = [""] if some_outliers else []
    bits = 8 * found.linear_bytes / found.linear_weights
    end = ["", ""] if some_experts else [""]
    rows.append(["all linears", "", "", f"{found.sparsity:.2%}", *gap, f"{bits:.2f}", str(found.linear_bytes), *end])
    for table in found.tables:
        rows.append([*_row(table.name, [table], some_outliers), *([_tokens([table])] if some_experts else [])])
    bits = 8 * found.weight_bytes / found.parameters
    rows.append(["whole model, files", "", "", "", *gap, f"{bits:.2f}", str(found.weight_bytes), *end])
    print_table(screen, columns, rows, dotted=True)
    for line in starved(found.linears):
        screen.print(line, markup=False, soft_wrap=True)


def _row(name: str, linears: list[Any], some_outliers: bool) -> list[str]:
    """A linear, or all experts' of one kind: means by the number of weights, bytes of all together, the largest error."""
    sizes = [linear.shape[0] * linear.shape[1] for linear in linears]

    def mean(values: list[float]) -> float:
        return sum(size * value for size, value in zip(sizes, values, strict=True)) / max(sum(sizes), 1)

    O, I = linears[0].shape
    many = f"{len(linears)} of " if len(linears) > 1 else ""
    layouts = ", ".join(dict.fromkeys(linear.layout for linear in linears))
    outliers = [f"{mean([linear.outliers for linear in linears]):.2%}"] if some_outliers else []
    errors = [linear.error for linear in linears if not math.isnan(linear.error)]
    return [
        name,
        f"{many}{O}×{I}",
        layouts,
        f"{mean([linear.sparsity for linear in linears]):.2%}",
        *outliers,
        f"{mean([linear.bits for linear in linears]):.2f}",
        str(sum(linear.bytes for linear in linears)),
        f"{max(errors):.2e}" if errors else "–",
    ]


def _tokens(linears: list[Any]) -> str:
    """How many tokens of the calibration text reached a linear, or the least and the most of several."""
    seen = [linear.tokens for linear in linears if linear.tokens is not None]
    if not seen:
        return "–"
    return f"{min(seen)}" if min(seen) == max(seen) else f"{min(seen)}–{max(seen)}"


def starved(linears: list[Any]) -> list[str]:
    """What is to be said of experts that calibration text hardly reached: they saw more borrowed tokens than of their own."""
    experts: dict[str, Any] = {}
    for linear in linears:
        if without_expert(linear.name) != linear.name and linear.tokens is not None:
            experts.setdefault(linear.name.rpartition(".")[0], linear)
    none = [name for name, linear in experts.items() if not linear.tokens and not linear.borrowed]
    few = [name for name, linear in experts.items() if linear.tokens < linear.borrowed]
    said = []
    if none:
        said.append(f"experts that no calibration token reached, compressed by their weights alone: {_named(none)}")
    if few:
        said.append(f"experts that saw fewer tokens of their own than borrowed ones: {_named(few)}")
    return said


def _named(names: list[str]) -> str:
    shown = ", ".join(names[:_NAMED])
    return shown if len(names) <= _NAMED else f"{shown} and {len(names) - _NAMED} more, see `inspect --json -`"
