"""A command of one file: `pip install .` here, and `secateur largest MODEL` lists the linears that take most bytes."""

from dataclasses import dataclass
from typing import Annotated

import typer

from secateur.commands.command import command
from secateur.commands.shared_options import Debug, Model, Trust
from secateur.errors import UsageError
from secateur.terminal.figures import size
from secateur.terminal.screen import screen
from secateur.terminal.tables import Column, print_table


@command("largest")
@dataclass(frozen=True)
class Largest:
    """List the linears of MODEL that take most bytes."""

    model: Model
    count: Annotated[int, typer.Option(help="Number of linears.")] = 5
    trust_remote_code: Trust = False
    debug: Debug = False

    def run(self) -> None:
        from secateur.checkpoint.inspect import inspect
        from secateur.model.source import open_source

        if self.count < 1:
            raise UsageError(f"`count` {self.count} lists nothing: give 1 or more")
        linears = inspect(open_source(self.model, self.trust_remote_code)).linears
        largest = sorted(linears, key=lambda linear: linear.bytes, reverse=True)[: self.count]
        rows = [[linear.name, size(linear.bytes)] for linear in largest]
        print_table(screen, [Column("linear", right=False), Column("size")], rows)
