"""`secateur card`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from secateur.commands.command import command
from secateur.commands.shared_options import Debug, OurFolder, Quiet
from secateur.terminal.screen import say


@command("card")
@dataclass(frozen=True)
class Card:
    """Write the model card of the folder OUT anew, with figures that eval and gate measured."""

    out: OurFolder
    results: Annotated[
        list[Path] | None,
        typer.Option(help="File of figures, by eval --json, gate --json or gate --write (repeatable)."),
    ] = None
    quiet: Quiet = False
    debug: Debug = False

    def run(self) -> None:
        from secateur.checkpoint.renew_card import renew_card

        count = renew_card(self.out, self.results or ())
        if not self.quiet:
            say(f"{self.out}/README.md is written anew, with {count} figures")
