"""`secateur probe`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from secateur.commands.command import command
from secateur.commands.result_files import check_files, takes_stdout, write_json, write_text
from secateur.commands.shared_options import Data, Debug, Device, JsonFile, Model, Quiet, Revision, TextField, Trust
from secateur.terminal.screen import counter, screen
from secateur.terminal.tables import Column, print_table

# Columns of heads are for the page.
_IN_TABLE = ("head ",)


@command("probe")
@dataclasses.dataclass(frozen=True)
class Probe:
    """Show what could go of MODEL: each block's cosine, the loss without it, and the shares of neurons and heads."""

    model: Model
    data: Data = "docs"
    text_field: TextField = "text"
    seq_len: Annotated[int, typer.Option(help="Tokens in a window.", min=2)] = 256
    windows: Annotated[int, typer.Option(help="Number of windows; each block is left out once.", min=1)] = 4
    device: Device = "cpu"
    json_file: JsonFile = None
    html_file: Annotated[Path | None, typer.Option("--html", help="File for a heat map, a page of HTML.")] = None
    revision: Revision = None
    trust_remote_code: Trust = False
    quiet: Quiet = False
    debug: Debug = False

    def run(self) -> None:
        from secateur.recipes.recipe import Calibration
        from secateur.report.probe_page import probe_page
        from secateur.search.probe import probe

        check_files({"--json": self.json_file, "--html": self.html_file})
        text = Calibration(self.data, self.windows, self.seq_len, text_field=self.text_field)
        found = probe(
            self.model,
            text,
            device=self.device,
            revision=self.revision,
            trust_remote_code=self.trust_remote_code,
            progress=counter(self.quiet, "block "),
        )
        if not takes_stdout(self.json_file):
            _print(found)
        write_json(dataclasses.asdict(found), self.json_file)
        if self.html_file is not None:
            write_text("--html", probe_page(found), self.html_file)


def _print(found: Any) -> None:
    from secateur.report.probe_page import columns_of, say_figure

    shown = {
        heading: values for heading, values in columns_of(found.blocks).items() if not heading.startswith(_IN_TABLE)
    }
    heads = any(block.heads for block in found.blocks)
    columns = [
        Column("block", right=False),
        *map(Column, shown),
        *([Column("least and most of a head")] if heads else []),
    ]
    rows: list[list[str] | None] = []
    for i, block in enumerate(found.blocks):
        figures = [values[i] for values in shown.values()]
        said = ["–" if v is None else say_figure(h, v) for h, v in zip(shown, figures, strict=True)]
        if heads:
            said.append(f"{min(block.heads):.1%} to {max(block.heads):.1%}" if block.heads else "–")
        rows.append([block.name, *said])
    title = f"what could go of {found.model}: loss {found.loss:.4f} nats a token"
    print_table(screen, columns, rows, title=title, lines=False)
