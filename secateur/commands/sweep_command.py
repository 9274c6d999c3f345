"""`secateur sweep`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from secateur.commands.command import command
from secateur.commands.result_files import check_files, takes_stdout, write_json
from secateur.commands.shared_options import (
    TEXT_HELP,
    CacheTokens,
    Data,
    Debug,
    Device,
    Dtype,
    JsonFile,
    MaxMemory,
    Model,
    Overwrite,
    Quiet,
    Revision,
    SeqLen,
    TextField,
    Trust,
    Windows,
    WindowTokens,
)
from secateur.commands.spelling import as_flags
from secateur.terminal.display import Display
from secateur.terminal.figures import size
from secateur.terminal.screen import say, screen
from secateur.terminal.tables import Column, print_table


@command("sweep")
@dataclasses.dataclass(frozen=True)
class Sweep:
    """Compress MODEL by many recipes, measure each, and write a report on size against quality."""

    model: Model
    recipes: Annotated[
        str,
        typer.Option(help="Recipes, comma-separated: 'wanda:0.3..0.7, sparsegpt:2:4, spqr:3'; see docs/recipes.md."),
    ]
    out: Annotated[Path, typer.Option(help="Folder to make, with the report in it.")]
    source: Annotated[
        str | None, typer.Option("--calibration", help=f"Calibration text of all recipes: self, {TEXT_HELP}")
    ] = None
    samples: Annotated[int | None, typer.Option(help="Number of calibration windows.")] = None
    calibration_seq_len: Annotated[int | None, typer.Option(help="Tokens in a calibration window.")] = None
    data: Data = "docs"
    text_field: TextField = "text"
    seq_len: SeqLen = 1024
    windows: Windows = 12
    stride: Annotated[int | None, typer.Option(help="Tokens from one window to the next.", min=1)] = None
    bos: Annotated[
        bool | None,
        typer.Option(
            "--bos/--no-bos",
            help="BOS at the start of each window, if the tokenizer adds one, for calibration (default: as the recipes) and "
            "measurement (default: --bos).",
        ),
    ] = None
    cache_tokens: CacheTokens = 1024
    batch_tokens: WindowTokens = None
    dtype: Dtype = "float32"
    device: Device = "cpu"
    max_memory: MaxMemory = None
    keep_models: Annotated[bool, typer.Option("--keep-models", help="Checkpoints kept in OUT/models.")] = False
    resume: Annotated[
        bool, typer.Option("--resume", help="Continuation of an interrupted sweep, from OUT.partial.")
    ] = False
    overwrite: Overwrite = False
    json_file: JsonFile = None
    revision: Revision = None
    trust_remote_code: Trust = False
    quiet: Quiet = False
    debug: Debug = False

    def run(self) -> None:
        from secateur.evaluation.eval_text import Text
        from secateur.evaluation.quality import Runner
        from secateur.recipes.strings import parse_recipes
        from secateur.runs.sweep import Sweep, sweep

        check_files({"--json": self.json_file}, self.out)
        asked = Sweep(
            self.model,
            [(name, self._calibrated(recipe)) for name, recipe in parse_recipes(self.recipes)],
            Text(self.data, self.seq_len, self.windows, self.stride, self.text_field, self.bos is not False),
            Runner(self.dtype, self.device, self.batch_tokens, self.trust_remote_code, self.max_memory),
            self.cache_tokens or None,
            self.max_memory,
            self.keep_models,
            self.revision,
        )
        with Display(self.quiet) as display:
            result = sweep(asked, self.out, resume=self.resume, overwrite=self.overwrite, progress=display)
        failed = [point for point in result.points if point.failure is not None]
        if not self.quiet and not takes_stdout(self.json_file):
            _print(result)
        for point in failed:
            say(as_flags(f"failed: {point.name}: {point.failure}", "sweep"))
        if not self.quiet:
            say(f"the report is {self.out / 'index.html'}")
        write_json(dataclasses.asdict(result), self.json_file)
        if failed:
            raise typer.Exit(1)

    def _calibrated(self, recipe: Any) -> Any:
        """A recipe with what was given for the calibration of all."""
        given = {"source": self.source, "samples": self.samples, "seq_len": self.calibration_seq_len, "bos": self.bos}
        given = {name: value for name, value in given.items() if value is not None}
        return dataclasses.replace(recipe, calibration=dataclasses.replace(recipe.calibration, **given))


def _print(result: Any) -> None:
    columns = [Column("recipe", right=False), Column("size"), Column("bits per weight", spare=1), Column("perplexity")]
    columns += [Column("KL"), Column("agreement", spare=2), Column("seconds", spare=3)]
    points = [("dense", result.dense, 0.0), *((point.name, point.measured, point.seconds) for point in result.points)]
    rows = []
    for name, found, seconds in points:
        if found is not None:
            cells = [size(found.bytes), f"{found.bits_per_weight:.2f}", f"{found.perplexity:.3f}"]
            cells.append(f"{found.kl:.4f}" if found.kl is not None else "")
            cells.append(f"{found.agreement:.2%}" if found.agreement is not None else "")
            rows.append([name, *cells, f"{seconds + found.seconds:.1f}"])
    print_table(screen, columns, rows)
