"""`secateur export`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from secateur.commands.command import command
from secateur.commands.notes import tell_notes
from secateur.commands.shared_options import Card, Debug, Model, Overwrite, Quiet, Revision, Trust
from secateur.terminal.screen import say

_GGUF = "GGUF files"


@command("export")
@dataclass(frozen=True)
class Export:
    """Write the weights of MODEL in another form to the folder, or GGUF file, OUT."""

    model: Model
    out: Annotated[Path, typer.Argument(help="Folder to make, or file with --to gguf.")]
    to: Annotated[
        str,
        typer.Option(
            help="Form: dense (for any tool), secateur, compressed-tensors, gptq, gptq-v1, mlx, spqr, decilm or gguf."
        ),
    ]
    overwrite: Overwrite = False
    card: Card = True
    type: Annotated[
        str | None,
        typer.Option(help="Type of linears: auto (codes stay), Q4_0, Q4_K, Q6_K and others.", rich_help_panel=_GGUF),
    ] = None
    embeddings: Annotated[
        str | None, typer.Option(help="Type of embeddings and head, such as Q8_0.", rich_help_panel=_GGUF)
    ] = None
    converter: Annotated[
        Path | None, typer.Option(help="Folder of llama.cpp, or its converter.", rich_help_panel=_GGUF)
    ] = None
    like: Annotated[
        Path | None, typer.Option(help="GGUF file of the same model, in place of a converter.", rich_help_panel=_GGUF)
    ] = None
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
            type=self.type,
            embeddings=self.embeddings,
            converter=self.converter,
            like=self.like,
        )
        if not self.quiet:
            tell_notes(notes, "export")
            say(f"{self.model} is written as {self.to} to {self.out}")
