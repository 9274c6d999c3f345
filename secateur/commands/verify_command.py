"""`secateur verify`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from secateur.commands.command import command
from secateur.commands.result_files import check_files, takes_stdout, write_json
from secateur.commands.shared_options import Debug, Quiet, Trust
from secateur.terminal.screen import say


@command("verify")
@dataclasses.dataclass(frozen=True)
class Verify:
    """Check the folder OUT, and say what is broken and where; exit code 1 if anything is."""

    out: Annotated[Path, typer.Argument(help="Folder made by secateur.")]
    json_file: Annotated[
        Path | None, typer.Option("--json", help="File for the problems as JSON ('-': standard output).")
    ] = None
    trust_remote_code: Trust = False
    quiet: Quiet = False
    debug: Debug = False

    def run(self) -> None:
        from secateur.checkpoint.verify import examine

        check_files({"--json": self.json_file})
        found = examine(self.out, trust_remote_code=self.trust_remote_code)
        if not takes_stdout(self.json_file):
            for problem in found.problems:
                say(f"{problem}")
            if not found.problems and not self.quiet:
                say(f"{self.out} is sound: {found.files} files, {found.linears} linears")
        sound = not found.problems
        write_json({"folder": str(self.out), "sound": sound, **dataclasses.asdict(found)}, self.json_file)
        if not sound:
            raise typer.Exit(1)
