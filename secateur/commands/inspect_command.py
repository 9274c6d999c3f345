"""`secateur inspect`."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from secateur.commands.command import command
from secateur.commands.result_files import check_files, takes_stdout, write_json
from secateur.commands.screen import screen
from secateur.commands.shared_options import Debug, JsonFile, Model, Revision, Trust
from secateur.commands.tables import Column, print_table


@command("inspect")
@dataclasses.dataclass(frozen=True)
class Inspect:
    """Show the layout, sparsity, bits, bytes and error of every linear of MODEL."""

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
    some_outliers = any(linear.outliers for linear in found.linears)
    columns = [Column("linear", right=False), Column("shape", spare=5), Column("layout", right=False, spare=1)]
    columns += [Column("sparsity"), *([Column("outliers", spare=3)] if some_outliers else []), Column("bits")]
    columns += [Column("bytes", spare=4), Column("error", spare=2)]
    rows: list[list[str] | None] = []
    for linear in found.linears:
        error = "–" if math.isnan(linear.error) else f"{linear.error:.2e}"
        O, I = linear.shape
        outliers = [f"{linear.outliers:.2%}"] if some_outliers else []
        cells = [f"{O}×{I}", linear.layout, f"{linear.sparsity:.2%}", *outliers, f"{linear.bits:.2f}"]
        rows.append([linear.name, *cells, str(linear.bytes), error])
    rows.append(None)
    gap = [""] if some_outliers else []
    bits = 8 * found.linear_bytes / found.linear_weights
    rows.append(["all linears", "", "", f"{found.sparsity:.2%}", *gap, f"{bits:.2f}", str(found.linear_bytes), ""])
    bits = 8 * found.weight_bytes / found.parameters
    rows.append(["whole model, files", "", "", "", *gap, f"{bits:.2f}", str(found.weight_bytes), ""])
    print_table(screen, columns, rows, dotted=True)
