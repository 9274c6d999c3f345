"""`secateur plan`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from secateur.commands.command import command
from secateur.commands.result_files import check_files, takes_stdout, write_json
from secateur.commands.shared_options import (
    BatchTokens,
    Debug,
    Device,
    JsonFile,
    MaxMemory,
    Model,
    Quiet,
    RecipeOptions,
    Revision,
    Trust,
)
from secateur.terminal.display import Display
from secateur.terminal.figures import duration, size
from secateur.terminal.screen import screen
from secateur.terminal.tables import Column, print_table

_WAITING = {"device": "in memory", "host": "in the host's memory", "file": "in a file"}


@command("plan")
@dataclasses.dataclass(frozen=True)
class Plan:
    """Forecast the memory, disk and time that `compress` would take, by compressing the first block.

    Options of a method, such as --bits, are given here, too: `secateur methods NAME` lists them.
    """

    model: Model
    recipe: RecipeOptions
    out: Annotated[Path, typer.Option(help="Place of the new folder, whose disk is looked at.")] = Path()
    device: Device = "cpu"
    batch_tokens: BatchTokens = None
    max_memory: MaxMemory = None
    revision: Revision = None
    trust_remote_code: Trust = False
    quiet: Quiet = False
    json_file: JsonFile = None
    debug: Debug = False

    def run(self) -> None:
        from secateur.runs.forecast import forecast

        check_files({"--json": self.json_file})
        with Display(self.quiet) as display:
            found = forecast(
                self.model,
                self.recipe,
                out=self.out,
                device=self.device,
                batch_tokens=self.batch_tokens,
                max_memory=self.max_memory,
                revision=self.revision,
                trust_remote_code=self.trust_remote_code,
                progress=display,
            )
        if not takes_stdout(self.json_file):
            self._print(found)
        write_json({**dataclasses.asdict(found), "total_seconds": found.total_seconds}, self.json_file)

    def _print(self, found: Any) -> None:
        rows: list[list[str] | None] = [["memory", size(found.host), size(found.free_memory)]]
        if found.device:
            rows.append([f"memory of {self.device}", size(found.device), ""])
        rows.append(["disk, new checkpoint", size(found.disk), size(found.free_disk)])
        rows += [["disk, until the end", size(found.scratch), ""], None]
        for phase, seconds in found.seconds.items():
            if seconds >= 0.01 * found.total_seconds:
                rows.append([f"time, {phase}", duration(seconds), ""])
        rows.append(["time in all", duration(found.total_seconds), ""])
        columns = [Column("", right=False), Column("needed"), Column("free now")]
        print_table(screen, columns, rows, title=f"{self.model}, {found.blocks} blocks", lines=False)
        if self.max_memory is None and not found.device:
            held = "--max-memory holds a run to it, and without it freed memory is kept for later"
            note = f"memory is what has to be there; {held}"
            screen.print(note, soft_wrap=True)
        settings = found.settings
        if settings is not None:
            again = (
                "pause while a linear is solved" if settings.pause else "begin a block again for every group of linears"
            )
            waits = _WAITING[settings.hidden]
            screen.print(
                f"batches of {settings.batch_tokens} tokens {again}; hidden states wait {waits}", soft_wrap=True
            )
