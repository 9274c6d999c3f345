"""`secateur run`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from secateur.commands.command import command


@command("run", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@dataclass(frozen=True)
class Run:
    """Run another tool so that it opens secateur's checkpoints: `secateur run -- lm_eval --model hf …`."""

    command: Annotated[
        list[str],
        typer.Argument(help="Command of an installed package, Python file, or -m and a module; then its arguments."),
    ]

    def run(self) -> None:
        from secateur.runs.run_tool import run_tool

        run_tool(self.command)
