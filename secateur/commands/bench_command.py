"""`secateur bench`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from secateur.commands.command import command
from secateur.commands.result_files import check_files, takes_stdout, write_json
from secateur.commands.shared_options import (
    Backend,
    Debug,
    Device,
    Dtype,
    JsonFile,
    MaxMemory,
    OurFolder,
    Quiet,
    Revision,
    Trust,
)
from secateur.errors import UsageError
from secateur.terminal.bench_tables import print_bench
from secateur.terminal.screen import counter


@command("bench")
@dataclass(frozen=True)
class Bench:
    """Time the packed linears of MODEL against dense ones and against memory bandwidth."""

    model: OurFolder
    backend: Backend = "auto"
    device: Device = "cpu"
    dtype: Dtype = "auto"
    tokens: Annotated[str, typer.Option(help="Input tokens per call, comma-separated.")] = "1"
    threads: Annotated[int | None, typer.Option(help="CPU threads (default: as torch chooses).", min=1)] = None
    max_memory: MaxMemory = None
    json_file: JsonFile = None
    plot: Annotated[Path | None, typer.Option(help="Bar chart, a .png or .svg file.")] = None
    revision: Revision = None
    trust_remote_code: Trust = False
    quiet: Quiet = False
    debug: Debug = False

    def run(self) -> None:
        from secateur.report.bench_plot import check_plot, plot
        from secateur.speed.bench import bench

        counts = self.tokens.split(",")
        if not all(count.isdecimal() for count in counts):
            raise UsageError(f"--tokens {self.tokens!r} is not understood: give whole numbers, such as 1,16")
        if self.plot is not None and self.max_memory is not None:
            raise UsageError("--plot shows linears in memory: leave it or --max-memory out")
        if self.plot is not None:
            check_plot(self.plot)
        check_files({"--json": self.json_file})
        found = bench(
            self.model,
            self.backend,
            device=self.device,
            dtype=self.dtype,
            tokens=[int(count) for count in counts],
            threads=self.threads,
            max_memory=self.max_memory,
            revision=self.revision,
            trust_remote_code=self.trust_remote_code,
            progress=counter(self.quiet, ""),
        )
        if not self.quiet and not takes_stdout(self.json_file):
            print_bench(found)
        write_json(found.to_dict(), self.json_file)
        if self.plot is not None:
            plot(found, self.plot)
