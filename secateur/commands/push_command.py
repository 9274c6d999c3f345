"""`secateur push`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from secateur.commands.command import command
from secateur.commands.shared_options import Debug, OurFolder, Quiet
from secateur.terminal.screen import say
from secateur.units import words


@command("push")
@dataclass(frozen=True)
class Push:
    """Upload the folder OUT to the Hugging Face hub.

    With the token of `hf auth login`, or of HF_TOKEN. Every file is compared with the manifest before.
    """

    out: OurFolder
    name: Annotated[str, typer.Argument(help="Name on the hub: user/name.")]
    private: Annotated[
        bool, typer.Option("--private", help="Repository that only its owner sees, if it is a new one.")
    ] = False
    branch: Annotated[str | None, typer.Option(help="Branch to upload to (default: main).")] = None
    message: Annotated[str | None, typer.Option(help="Message of the commit.")] = None
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List of what would be uploaded, and nothing else.")] = (
        False
    )
    quiet: Quiet = False
    debug: Debug = False

    def run(self) -> None:
        from secateur.checkpoint.push import push, to_upload

        files = to_upload(self.out, self.name)
        if not self.quiet:
            for name, size in files.items():
                say(f"{words(size):>9}  {name}")
            verb = "would be uploaded" if self.dry_run else "are being uploaded"
            say(f"{len(files)} files, {words(sum(files.values()))}, {verb} to {self.name}")
        if not self.dry_run:
            address = push(self.out, self.name, private=self.private, branch=self.branch, message=self.message)
            if not self.quiet:
                say(f"uploaded: {address}")
