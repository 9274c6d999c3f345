"""`secateur compress`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from secateur.commands.command import command
from secateur.commands.display import Display
from secateur.commands.figures import size
from secateur.commands.result_files import print_json
from secateur.commands.screen import err, say
from secateur.commands.shared_options import (
    BatchTokens,
    Debug,
    Device,
    MaxMemory,
    Model,
    Out,
    Overwrite,
    Quiet,
    RecipeOptions,
    Trust,
)
from secateur.commands.spelling import as_flags
from secateur.commands.tables import Column, print_table


@command("compress")
@dataclasses.dataclass(frozen=True)
class Compress:
    """Prune MODEL, quantize it, or both, and write it to the folder OUT.

    Under torchrun the work is shared by its processes.
    """

    model: Model
    out: Out
    recipe: RecipeOptions
    device: Device = "cpu"
    batch_tokens: BatchTokens = None
    max_memory: MaxMemory = None
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run that OUT.partial is left of, if there is one.")
    ] = False
    verify: Annotated[bool, typer.Option("--verify/--no-verify", help="Check the new folder before it is OUT.")] = True
    plot: Annotated[Path | None, typer.Option(help="Draw every linear's sparsity and bits: .png or .svg.")] = None
    overwrite: Overwrite = False
    trust_remote_code: Trust = False
    quiet: Quiet = False
    as_json: Annotated[bool, typer.Option("--json", help="Write the report as JSON to standard output.")] = False
    debug: Debug = False

    def run(self) -> None:
        from secateur.report.bench_plot import check_plot
        from secateur.report.choice_plot import plot_choices
        from secateur.runs.compress import compress

        first = os.environ.get("RANK", "0") == "0"
        if self.plot is not None and first:
            check_plot(self.plot, self.out)
        with Display(self.quiet or not first) as display:
            report = compress(
                self.model,
                self.out,
                self.recipe,
                device=self.device,
                batch_tokens=self.batch_tokens,
                max_memory=self.max_memory,
                resume=self.resume,
                verify=self.verify,
                overwrite=self.overwrite,
                trust_remote_code=self.trust_remote_code,
                progress=display,
            )
        if not first:
            return
        if self.as_json:
            totals = {"out": str(report.out), "sparsity": report.sparsity, "bits": report.bits}
            print_json({**dataclasses.asdict(report), **totals})
        if not self.quiet:
            self._tell(report)
        if self.plot is not None:
            plot_choices(report.linears, self.plot)

    def _tell(self, report: Any) -> None:
        from secateur.recipes.goals import is_open

        if is_open(self.recipe):
            _print_choices(report.linears)
        for note in report.notes[:5]:
            say(as_flags(f"note: {note}", "compress"))
        if len(report.notes) > 5:
            say(f"note: {len(report.notes) - 5} more like these are in secateur.json")
        say(
            f"{self.out}: {len(report.linears)} linears with {report.sparsity:.2%} of their weights removed and "
            f"{report.bits:.2f} bits per weight, {size(report.source_bytes)} → {size(report.bytes)} "
            f"({8 * report.bytes / report.parameters:.2f} bits per weight of the whole model), "
            f"{report.seconds:.1f} s, peak memory {size(report.peak_bytes)}"
        )


def _print_choices(linears: Sequence[Any]) -> None:
    """Show what was chosen: a row for each block, a column for each linear of a block."""
    from secateur.report.choice_plot import by_block

    blocks, names, cells = by_block(linears)
    rows = []
    for block in blocks:
        found = [cells.get((block, name)) for name in names]
        rows.append([block, *("–" if each is None else f"{each.sparsity:.0%} {each.bits:.1f}" for each in found)])
    columns = [Column("block"), *(Column(name.rpartition(".")[2]) for name in names)]
    print_table(err, columns, rows, title="removed, and bits per weight, of each linear", lines=False)
