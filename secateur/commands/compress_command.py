"""`secateur compress`."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Annotated

import typer

from secateur.commands.command import command
from secateur.commands.compress_summary import tell_summary
from secateur.commands.result_files import check_files, write_json
from secateur.commands.shared_options import (
    BatchTokens,
    Card,
    Debug,
    Device,
    JsonFile,
    MaxMemory,
    Model,
    Out,
    Overwrite,
    Quiet,
    RecipeOptions,
    Revision,
    Trust,
)
from secateur.terminal.display import Display


@command("compress")
@dataclasses.dataclass(frozen=True)
class Compress:
    """Prune MODEL, quantize it, or both, and write it to the folder OUT.

    To begin with: --recipe spqr-4bit. Under torchrun the work is shared by its processes.
    Options of a method, such as --bits, are given here, too: `secateur methods NAME` lists them.
    """

    model: Model
    out: Out
    recipe: RecipeOptions
    device: Device = "cpu"
    batch_tokens: BatchTokens = None
    max_memory: MaxMemory = None
    resume: Annotated[bool, typer.Option("--resume", help="Continuation of an interrupted run.")] = False
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Check of the new folder (default).", show_default=False)
    ] = True
    plot: Annotated[Path | None, typer.Option(help="Picture of sparsity and bits, .png or .svg.")] = None
    card: Card = True
    overwrite: Overwrite = False
    revision: Revision = None
    trust_remote_code: Trust = False
    quiet: Quiet = False
    json_file: JsonFile = None
    debug: Debug = False

    def run(self) -> None:
        from secateur.model.source import with_revision
        from secateur.recipes.goals import is_open
        from secateur.report.bench_plot import check_plot
        from secateur.report.choice_plot import plot_choices
        from secateur.runs.compress import compress

        first = os.environ.get("RANK", "0") == "0"
        if self.plot is not None and first:
            check_plot(self.plot, self.out)
        if first:
            check_files({"--json": self.json_file}, self.out)
        with Display(self.quiet or not first) as display:
            report = compress(
                self.model,
                self.out,
                self.recipe,
                device=self.device,
                batch_tokens=self.batch_tokens,
                max_memory=self.max_memory,
                resume=self.resume,
                card=self.card,
                verify=self.verify,
                overwrite=self.overwrite,
                revision=self.revision,
                trust_remote_code=self.trust_remote_code,
                progress=display,
            )
        if not first:
            return
        if not self.quiet:
            tell_summary(report, with_revision(self.model, self.revision), self.trust_remote_code, is_open(self.recipe))
        totals = {"out": str(report.out), "sparsity": report.sparsity, "bits": report.bits}
        write_json({**dataclasses.asdict(report), **totals}, self.json_file)
        if self.plot is not None:
            plot_choices(report.linears, self.plot, self.out.name)
