"""`secateur export`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from secateur.commands.command import command
from secateur.commands.notes import tell_notes
from secateur.commands.screen import say
from secateur.commands.shared_options import Card, Debug, Model, Out, Overwrite, Quiet, Revision, Trust


@command("export")
@dataclass(frozen=True)
class Export:
    """Write the weights of MODEL in another form to the folder OUT."""

    model: Model
    out: Out
    to: Annotated[
        str, typer.Option(help="Form: dense (for any tool), secateur, compressed-tensors, gptq, gptq-v1 or spqr.")
    ]
    overwrite: Overwrite = False
    card: Card = True
    revision: Revision = None
    trust_remote_code: Trust = False
    quiet: Quiet = False
    debug: Debug = False

    def run(self) -> None:
        from secateur.checkpoint.export import export

        notes = export(
            self.model,
            self.out,
            self.to,
            overwrite=self.overwrite,
            card=self.card,
            revision=self.revision,
            trust_remote_code=self.trust_remote_code,
        )
        if not self.quiet:
            tell_notes(notes, "export")
            say(f"{self.model} is written as {self.to} to {self.out}")
