"""`secateur gate`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from secateur.commands.command import command
from secateur.commands.notes import tell_notes
from secateur.commands.result_files import check_files, takes_stdout, write_json, write_text
from secateur.commands.shared_options import (
    TEXT_HELP,
    Cache,
    Debug,
    Device,
    JsonFile,
    MaxMemory,
    Quiet,
    Reference,
    Revision,
    Trust,
    WindowTokens,
)
from secateur.errors import UsageError
from secateur.terminal.figures import between
from secateur.terminal.screen import counter, say, screen
from secateur.terminal.tables import Column, print_table

_TEXT = ("data", "text_field", "seq_len", "windows", "bos")
_LIMITS = ("perplexity_rise", "size_rise", "max_kl", "min_agreement", "min_routing_agreement", "confidence")


@command("gate")
@dataclasses.dataclass(frozen=True)
class Gate:
    """Compare MODEL with a baseline; exit code 1 if it is worse."""

    model: Annotated[str, typer.Argument(help="Checkpoint to measure.")]
    baseline: Annotated[Path, typer.Option(help="File of figures to compare with.")]
    write: Annotated[bool, typer.Option("--write", help="Measurement that becomes the baseline.")] = False
    reference: Reference = None
    data: Annotated[str | None, typer.Option(help=f"Text: {TEXT_HELP} (default: the baseline's; --write: docs)")] = None
    text_field: Annotated[str | None, typer.Option(help="Field of a row that holds its text.")] = None
    seq_len: Annotated[int | None, typer.Option(help="Tokens in a window (--write: 512).", min=2)] = None
    windows: Annotated[int | None, typer.Option(help="Number of windows (--write: 16).", min=1)] = None
    bos: Annotated[
        bool | None,
        typer.Option(
            "--bos/--no-bos",
            help="BOS at the start of each window, if the tokenizer adds one (default: as the baseline; --write: --bos).",
        ),
    ] = None
    perplexity_rise: Annotated[
        str | None, typer.Option("--max-perplexity-rise", help="Largest rise of perplexity (default: 1%).")
    ] = None
    size_rise: Annotated[
        str | None, typer.Option("--max-size-rise", help="Largest rise of size on disk (default: 0.5%).")
    ] = None
    max_kl: Annotated[float | None, typer.Option(help="Largest KL divergence from the reference, in nats.")] = None
    min_agreement: Annotated[
        str | None, typer.Option(help="Least share of predictions with the reference's likeliest token.")
    ] = None
    min_routing_agreement: Annotated[
        str | None, typer.Option(help="Least share of a token's experts that are the reference's (mixtures only).")
    ] = None
    confidence: Annotated[str | None, typer.Option(help="Confidence that a rise is no chance (default: 95%).")] = None
    cache: Cache = None
    batch_tokens: WindowTokens = None
    max_memory: MaxMemory = None
    dtype: Annotated[
        str | None, typer.Option(help="Precision to compute in (default: the baseline's; --write: float32).")
    ] = None
    device: Device = "cpu"
    json_file: JsonFile = None
    junit_file: Annotated[Path | None, typer.Option("--junit", help="File for JUnit XML.")] = None
    markdown_file: Annotated[
        Path | None,
        typer.Option("--markdown", help="File to append a Markdown summary to, e.g. $GITHUB_STEP_SUMMARY."),
    ] = None
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replacement of the baseline, with --write.")] = False
    revision: Revision = None
    trust_remote_code: Trust = False
    quiet: Quiet = False
    debug: Debug = False

    def run(self) -> None:
        if self.write and (self._given(_LIMITS) or self.json_file or self.junit_file or self.markdown_file):
            raise UsageError("--write compares with nothing: leave out the limits and --json, --junit and --markdown")
        if self.overwrite and not self.write:
            raise UsageError("--overwrite replaces a baseline, which only --write writes: leave it out")
        check_files({"--json": self.json_file, "--junit": self.junit_file, "--markdown": self.markdown_file})
        if self.write:
            self._write()
        else:
            self._compare()

    def _given(self, names: tuple[str, ...]) -> dict[str, Any]:
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def _options(self, dtype: str) -> dict[str, Any]:
        """What measuring takes, whether it is to write a baseline or to compare with one."""
        from secateur.evaluation.quality import Runner

        return {
            "reference": self.reference,
            "runner": Runner(dtype, self.device, self.batch_tokens, self.trust_remote_code, self.max_memory),
            "cache": self.cache,
            "revision": self.revision,
            "progress": counter(self.quiet),
        }

    def _write(self) -> None:
        from secateur.evaluation.eval_text import with_bos
        from secateur.evaluation.gate.baseline import TEXT, write_baseline

        text = dataclasses.replace(TEXT, **self._given(_TEXT))
        options = self._options(self.dtype or "float32")
        found = write_baseline(self.model, self.baseline, text, overwrite=self.overwrite, **options)
        if not self.quiet:
            interval = between(found.quality.perplexity_interval, ".3f")
            figure = f"perplexity {found.quality.perplexity:.3f}{interval}"
            say(f"{self.baseline}: {figure}, on windows {with_bos(found.text['bos'])}")

    def _compare(self) -> None:
        from secateur.evaluation.gate.baseline import Baseline
        from secateur.evaluation.gate.gate import gate
        from secateur.evaluation.gate.tolerances import Tolerances
        from secateur.report.gate_report import junit, markdown

        kept = Baseline.read(self.baseline)
        tolerances = Tolerances.of(**self._given(_LIMITS))
        result = gate(self.model, kept, tolerances, text=self._given(_TEXT), **self._options(self.dtype or kept.dtype))
        if not self.quiet and not takes_stdout(self.json_file):
            self._print(result)
        write_json(result.to_dict(), self.json_file)
        if self.junit_file is not None:
            write_text("--junit", junit(result), self.junit_file)
        if self.markdown_file is not None:
            write_text("--markdown", markdown(result) + "\n", self.markdown_file, append=True)
        if not result.passed:
            raise typer.Exit(1)

    def _print(self, result: Any) -> None:
        from secateur.evaluation.eval_text import with_bos
        from secateur.report.gate_report import figures

        title = f"{self.model} against {self.baseline}, {with_bos(result.evaluation.text['bos'])}"
        columns = [Column("", right=False), Column("now"), Column("baseline", spare=1), Column("change")]
        columns += [Column(f"{result.confidence:.0%} interval", spare=2), Column("verdict", right=False)]
        rows = [[check.name, *figures(check), check.verdict] for check in result.checks]
        print_table(screen, columns, rows, title=title)
        tell_notes(result.notes, "gate")
        for check in result.checks:
            if check.verdict != "ok":
                say(f"{check.verdict}: {check.name} {check.words}")
