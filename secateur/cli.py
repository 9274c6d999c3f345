"""The command line: parse, call one function, print."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar
from typer.core import TyperCommand

from secateur._version import __version__
from secateur.commands.output import write_any_text
from secateur.commands.recipe_options import with_recipe
from secateur.commands.show_methods import methods
from secateur.commands.tables import Column, print_table
from secateur.errors import Interrupted, ReportedError, SecateurError, UsageError, one_line


class _Command(TyperCommand):
    """A command that refuses empty values, which a shell makes of variables that are not set."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        before = list(args)
        rest = super().parse_args(ctx, args)
        given = self.make_parser(ctx).parse_args(args=before)[0]
        for parameter in self.params:
            values = given.get(parameter.name)
            if parameter.name != "prompt" and "" in (values if isinstance(values, list | tuple) else [values]):
                name = parameter.opts[0] if parameter.param_type_name == "option" else parameter.opts[0].upper()
                raise UsageError(f"{name} is empty: give a value, or leave it out (the current folder is called '.')")
        return rest


class _App(typer.Typer):
    def command(self, name: str | None = None, **options: Any) -> Any:
        return super().command(name, **{"cls": _Command, **options})


app = _App(
    name="secateur",
    help="Prune and quantize Hugging Face causal language models without training, and write smaller checkpoints that load.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted by a signal.",
)
# No emoji: `:M:` in a message is not to become a picture.
err = Console(stderr=True, highlight=False, emoji=False)
screen = Console(highlight=False, emoji=False)
_debug = False


def _set_debug(value: bool) -> bool:
    global _debug
    _debug = _debug or value
    return value


Model = Annotated[str, typer.Argument(help="A Hugging Face folder, a hub id, a .gguf file, or 'demo'.")]
Device = Annotated[str, typer.Option(help="Where to compute, such as cpu or cuda.")]
BatchTokens = Annotated[int | None, typer.Option(help="Tokens run at a time (default: by the memory).", min=1)]
MaxMemory = Annotated[str | None, typer.Option(help="Of the host that may be in use, such as 8GiB.")]
Bos = Annotated[
    bool | None,
    typer.Option("--bos/--no-bos", help="Begin each window with BOS, where the tokenizer adds one (default: --bos)."),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace the output folder if it exists and secateur wrote it.")
]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Let code that comes with the model run.")]
Verify = Annotated[
    bool, typer.Option("--verify", help="Compare the files' SHA-256 with the manifest before they are opened.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.", callback=_set_debug)]


def _version(value: bool) -> None:
    if value:
        print(f"secateur {__version__}")
        raise typer.Exit


@app.callback()
def _app(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


@app.command()
@with_recipe
def compress(
    model: Model,
    out: Annotated[Path, typer.Argument(help="The folder to make.")],
    recipe: Any,
    device: Device = "cpu",
    batch_tokens: BatchTokens = None,
    max_memory: MaxMemory = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run that OUT.partial is left of, if there is one.")
    ] = False,
    verify: Annotated[bool, typer.Option("--verify/--no-verify", help="Check the new folder before it is OUT.")] = True,
    plot: Annotated[Path | None, typer.Option(help="Draw every linear's sparsity and bits: .png or .svg.")] = None,
    overwrite: Overwrite = False,
    trust_remote_code: Trust = False,
    quiet: Quiet = False,
    as_json: Annotated[bool, typer.Option("--json", help="Write the report as JSON to standard output.")] = False,
    debug: Debug = False,
) -> None:
    """Prune MODEL, quantize it, or both, and write it to the folder OUT.

    Under torchrun the work is shared by its processes.
    """
    from secateur.recipes.goals import is_open
    from secateur.report.bench_plot import check_plot
    from secateur.report.choice_plot import plot_choices
    from secateur.runs.compress import compress as run

    first = os.environ.get("RANK", "0") == "0"
    if plot is not None and first:
        check_plot(plot, out)
    with _Display(quiet or not first) as display:
        report = run(
            model,
            out,
            recipe,
            device=device,
            batch_tokens=batch_tokens,
            max_memory=max_memory,
            resume=resume,
            verify=verify,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            progress=display,
        )
    if not first:
        return
    if as_json:
        _print_json(
            {**dataclasses.asdict(report), "out": str(report.out), "sparsity": report.sparsity, "bits": report.bits}
        )
    if not quiet:
        _tell_report(report, out, is_open(recipe))
    if plot is not None:
        plot_choices(report.linears, plot)


def _tell_report(report: Any, out: Path, searched: bool) -> None:
    if searched:
        _print_choices(report.linears)
    for note in report.notes[:5]:
        _say(f"note: {note}")
    if len(report.notes) > 5:
        _say(f"note: {len(report.notes) - 5} more like these are in secateur.json")
    _say(
        f"{out}: {len(report.linears)} linears with {report.sparsity:.2%} of their weights removed and {report.bits:.2f} bits "
        f"per weight, {_size(report.source_bytes)} → {_size(report.bytes)} "
        f"({8 * report.bytes / report.parameters:.2f} bits per weight of the whole model), "
        f"{report.seconds:.1f} s, peak memory {_size(report.peak_bytes)}"
    )


def _print_choices(linears: Sequence[Any]) -> None:
    """Show what was chosen: a row for each block, a column for each linear of a block."""
    from secateur.report.choice_plot import by_block

    blocks, names, cells = by_block(linears)
    rows = []
    for block in blocks:
        found = [cells.get((block, name)) for name in names]
        rows.append([block, *("–" if each is None else f"{each.sparsity:.0%} {each.bits:.1f}" for each in found)])
    columns = [Column("block"), *(Column(name.rpartition(".")[2]) for name in names)]
    print_table(err, columns, rows, title="removed, and bits per weight, of each linear", lines=False)


@app.command("plan")
@with_recipe
def forecast(
    model: Model,
    recipe: Any,
    out: Annotated[Path, typer.Option(help="Where the checkpoint would go: its disk is measured.")] = Path(),
    device: Device = "cpu",
    batch_tokens: BatchTokens = None,
    max_memory: MaxMemory = None,
    trust_remote_code: Trust = False,
    quiet: Quiet = False,
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON to standard output.")] = False,
    debug: Debug = False,
) -> None:
    """Tell how much memory, disk and time `compress` would take, by compressing the first block."""
    from secateur.runs.forecast import forecast as run

    with _Display(quiet) as display:
        found = run(
            model,
            recipe,
            out=out,
            device=device,
            batch_tokens=batch_tokens,
            max_memory=max_memory,
            trust_remote_code=trust_remote_code,
            progress=display,
        )
    if as_json:
        _print_json({**dataclasses.asdict(found), "total_seconds": found.total_seconds})
        return
    rows: list[list[str] | None] = [["memory", _size(found.host), _size(found.free_memory)]]
    if found.device:
        rows.append([f"memory of {device}", _size(found.device), ""])
    rows.append(["disk, new checkpoint", _size(found.disk), _size(found.free_disk)])
    rows += [["disk, until the end", _size(found.scratch), ""], None]
    for phase, seconds in found.seconds.items():
        if seconds >= 0.01 * found.total_seconds:
            rows.append([f"time, {phase}", _duration(seconds), ""])
    rows.append(["time in all", _duration(found.total_seconds), ""])
    columns = [Column("", right=False), Column("needed"), Column("free now")]
    print_table(screen, columns, rows, title=f"{model}, {found.blocks} blocks", lines=False)
    if max_memory is None and not found.device:
        note = "memory is what has to be there; --max-memory holds a run to it, and without it freed memory is kept for later"
        screen.print(note, soft_wrap=True)
    settings = found.settings
    if settings is not None:
        waits = {"device": "in memory", "host": "in the host's memory", "file": "in a file"}[settings.hidden]
        again = "pause while a linear is solved" if settings.pause else "begin a block again for every group of linears"
        screen.print(f"batches of {settings.batch_tokens} tokens {again}; hidden states wait {waits}", soft_wrap=True)


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="Write this recipe as YAML, to be changed and used.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON to standard output.")] = False,
    debug: Debug = False,
) -> None:
    """List the built-in recipes, or write one of them: `secateur recipes NAME > my.yaml`."""
    from secateur.recipes.built_in import NAMES, built_in

    found = [built_in(each) for each in (NAMES if name is None else [name])]
    if as_json:
        about = [
            {"name": each.name, "good_for": each.good_for, "costs": each.costs, "recipe": each.recipe.to_dict()}
            for each in found
        ]
        _print_json(about if name is None else about[0])
        return
    if name is not None:
        print(found[0].text, end="")
        return
    columns = [Column("recipe", right=False), Column("good for, and what it costs", right=False)]
    rows = [[each.name, f"{each.good_for}\n{each.costs}\n"] for each in found]
    print_table(screen, columns, rows, lines=False)


app.command()(methods)


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds:02} s" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02} min"


def _override(base: Any, given: dict[str, Any]) -> Any:
    """A frozen dataclass with what was given in place of what it had."""
    return dataclasses.replace(base, **{name: value for name, value in given.items() if value is not None})


class _Display:
    """Shows progress: a live bar on a terminal, plain lines elsewhere, nothing when quiet."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet
        self.live = err.is_terminal and not quiet
        self.bar = Bar(TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[state]}"), console=err)
        self.task = self.bar.add_task("", total=None, state="")
        self.stage = ""
        self.block = 0
        self.seen: list[Any] = []
        self.said = 0.0

    def __enter__(self) -> _Display:
        if self.live:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.bar.stop()

    def __call__(self, progress: Any) -> None:
        if self.quiet:
            return
        linear = progress.linear
        if self.live:
            if linear is None:
                self.bar.update(self.task, description=escape(progress.stage), state="")
            else:
                state = (
                    f"{linear.name.split('.', 2)[-1]} error {linear.error:.2e}, "
                    f"{progress.seconds_left:.0f} s left, {_size(progress.peak_bytes)}"
                )
                done = progress.block + 1
                self.bar.update(
                    self.task,
                    description=f"block {done} of {progress.blocks}",
                    total=progress.blocks,
                    completed=done,
                    state=state,
                )
            return
        if linear is None or progress.block != self.block:
            self._tell_block()
        if linear is None:
            # A stage that counts up is told of now and then.
            name = progress.stage.partition(":")[0]
            if name != self.stage or time.monotonic() - self.said > 10:
                _say(progress.stage)
                self.stage, self.said = name, time.monotonic()
        else:
            self.block = progress.block
            self.seen.append(progress)

    def _tell_block(self) -> None:
        """One line on the block that is done."""
        if self.seen:
            last, worst = self.seen[-1], max((p.linear for p in self.seen), key=lambda linear: linear.error)
            _say(
                f"block {last.block + 1} of {last.blocks}: {len(self.seen)} linears, largest error {worst.error:.2e} in "
                f"{worst.name}, {last.seconds_left:.0f} s left, peak memory {_size(last.peak_bytes)}"
            )
            self.seen.clear()


def _say(line: str) -> None:
    # What a file calls its tensors is not to reach the terminal as anything but text.
    plain = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line)
    err.print(escape(plain), soft_wrap=True)


_TEXT_HELP = "docs, a .txt/.jsonl/.parquet file, wikitext2, c4, hub-id[:config][:split]."
Reference = Annotated[str | None, typer.Option(help="The dense model to compare with.")]
Cache = Annotated[
    Path | None,
    typer.Option("--reference-cache", help="Keep what the reference predicts in this folder, and take it from there."),
]
CacheTokens = Annotated[
    int,
    typer.Option(
        help="Likeliest tokens of each prediction in the cache (0: all, in 4 bytes for each of the vocabulary).", min=0
    ),
]
EvalBatch = Annotated[
    int | None,
    typer.Option(
        "--batch-tokens", help="Tokens of windows run at a time (default: a window on a CPU, else 8192).", min=1
    ),
]
EvalDtype = Annotated[str, typer.Option(help="To compute in: auto (the files'), float32, bfloat16, float16.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the figures to this file ('-': standard output).")]


@app.command("eval")
def evaluate(
    model: Model,
    reference: Reference = None,
    data: Annotated[str, typer.Option(help=_TEXT_HELP)] = "docs",
    text_field: Annotated[str, typer.Option(help="Where the text of a row stands.")] = "text",
    seq_len: Annotated[int, typer.Option(help="Tokens of a window.", min=2)] = 1024,
    windows: Annotated[int, typer.Option(help="How many windows.", min=1)] = 12,
    stride: Annotated[
        int | None, typer.Option(help="Tokens from one window to the next (default: --seq-len, no overlap).", min=1)
    ] = None,
    bos: Bos = None,
    by_block: Annotated[
        bool, typer.Option("--by-block", help="Compare the outputs of all blocks with the reference's.")
    ] = False,
    tasks: Annotated[
        str | None, typer.Option(help="Tasks of lm-eval, or .yaml files of your own; several with commas between.")
    ] = None,
    few_shot: Annotated[
        int | None, typer.Option(help="Examples in a task's prompt (default: the task's).", min=0)
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Samples of each task (default: all).", min=1)] = None,
    reference_cache: Cache = None,
    cache_tokens: CacheTokens = 1024,
    batch_tokens: EvalBatch = None,
    dtype: EvalDtype = "float32",
    device: Device = "cpu",
    json_file: JsonFile = None,
    verify: Verify = False,
    trust_remote_code: Trust = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure the perplexity of MODEL and its scores in tasks, and how far it is from a reference."""
    _check_files({"--json": json_file})
    from secateur.evaluation.eval_text import Text
    from secateur.evaluation.quality import Runner
    from secateur.evaluation.quality import evaluate as run

    result = run(
        model,
        reference,
        Text(data, seq_len, windows, stride, text_field, bos is not False),
        runner=Runner(dtype, device, batch_tokens, trust_remote_code),
        cache=reference_cache,
        cache_tokens=cache_tokens or None,
        by_block=by_block,
        tasks=tasks.split(",") if tasks is not None else (),
        few_shot=few_shot,
        limit=limit,
        verify=verify,
        progress=_counter(quiet),
        task_progress=_counter(quiet, "task request"),
    )
    if not quiet and str(json_file) != "-":
        _print_evaluation(result, model, reference, f"{windows} windows of {seq_len} tokens of {data}", stride)
    _write_json(result.to_dict(), json_file)


def _print_evaluation(result: Any, model: str, reference: str | None, text: str, stride: int | None) -> None:
    from secateur.evaluation.eval_text import with_bos

    quality, size, dense = result.quality, result.size, result.reference_size
    overlap = f", {stride} apart" if stride is not None else ""
    title = f"{text}{overlap}, {with_bos(result.text['bos'])}"
    columns = [Column("", right=False), Column(model)]
    rows: list[tuple[str, str, str]] = [
        (
            "perplexity",
            f"{quality.perplexity:.3f}{_between(quality.perplexity_interval, '.2f')}",
            f"{quality.reference_perplexity or math.nan:.3f}",
        ),
        ("bits per byte of text", f"{result.bits_per_byte:.4f}", ""),
        ("size on disk", _size(size.bytes), _size(dense.bytes) if dense else ""),
        ("bits per weight", f"{size.bits_per_weight:.2f}", f"{dense.bits_per_weight:.2f}" if dense else ""),
    ]
    if quality.kl is not None and quality.agreement is not None:
        columns.append(Column(reference or ""))
        rows.append(("KL divergence, nats per token", f"{quality.kl:.4f}{_between(quality.kl_interval, '.4f')}", ""))
        agreement = _between(quality.agreement_interval, ".2%")
        rows.append(("same most likely token", f"{quality.agreement:.2%}{agreement}", ""))
    print_table(screen, columns, [row[: len(columns)] for row in rows], title=title)
    if result.blocks is not None:
        _print_blocks(result.blocks)
    if result.tasks:
        _print_tasks(result.tasks, model, reference)


def _print_tasks(scores: Sequence[Any], model: str, reference: str | None) -> None:
    columns = [Column("task", right=False), Column("metric", right=False), Column(model)]
    if reference is not None:
        columns += [Column(reference), Column("difference")]
    rows, told = [], None
    for score in scores:
        shots = f", {score.few_shot}-shot" if score.few_shot else ""
        task = f"{score.task}{shots}, {score.samples} samples" if score.task != told else ""
        told = score.task
        better = {True: " ↑", False: " ↓", None: ""}[score.higher_is_better]
        figures = [f"{score.value:.4f}{_error(score.stderr)}"]
        if score.difference is not None:
            figures.append(f"{score.reference_value:.4f}{_error(score.reference_stderr)}")
            figures.append(f"{score.difference:+.4f}{_error(score.difference_stderr)}")
        rows.append([task, score.metric + better, *figures])
    print_table(screen, columns, rows, title="\ntasks, ± one standard error", lines=False)


def _error(stderr: float | None) -> str:
    return "" if stderr is None else f" ± {stderr:.4f}"


@app.command()
def gate(
    model: Annotated[str, typer.Argument(help="The checkpoint to be measured.")],
    baseline: Annotated[Path, typer.Option(help="The file of figures to compare with.")],
    write: Annotated[bool, typer.Option("--write", help="Measure and write the baseline instead.")] = False,
    reference: Reference = None,
    data: Annotated[str | None, typer.Option(help=f"{_TEXT_HELP} (default: the baseline's; --write: docs)")] = None,
    text_field: Annotated[str | None, typer.Option(help="Where the text of a row stands.")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens of a window (--write: 512).", min=2)] = None,
    windows: Annotated[int | None, typer.Option(help="How many windows (--write: 16).", min=1)] = None,
    bos: Annotated[
        bool | None,
        typer.Option(
            "--bos/--no-bos",
            help="Begin each window with BOS, where the tokenizer adds one (default: as the baseline; --write: --bos).",
        ),
    ] = None,
    max_perplexity_rise: Annotated[str | None, typer.Option(help="Over the baseline's (default: 1%).")] = None,
    max_size_rise: Annotated[
        str | None, typer.Option(help="Of the weight files, over the baseline's (default: 0.5%).")
    ] = None,
    max_kl: Annotated[float | None, typer.Option(help="KL divergence from the reference, nats a token.")] = None,
    min_agreement: Annotated[
        str | None, typer.Option(help="Share of predictions with the reference's most likely token.")
    ] = None,
    confidence: Annotated[
        str | None, typer.Option(help="With which a rise must be more than chance (default: 95%).")
    ] = None,
    reference_cache: Cache = None,
    batch_tokens: EvalBatch = None,
    dtype: Annotated[
        str | None, typer.Option(help="To compute in (default: the baseline's; --write: float32).")
    ] = None,
    device: Device = "cpu",
    json_file: JsonFile = None,
    junit_file: Annotated[Path | None, typer.Option("--junit", help="Write JUnit XML to this file.")] = None,
    markdown_file: Annotated[
        Path | None,
        typer.Option("--markdown", help="Append a Markdown summary to this file, such as $GITHUB_STEP_SUMMARY."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="With --write: replace the baseline.")] = False,
    trust_remote_code: Trust = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Say whether MODEL is as good as a baseline: the exit code is 1 if it is worse."""
    from secateur.evaluation.eval_text import with_bos
    from secateur.evaluation.gate.gate import TEXT, Baseline, Tolerances, write_baseline
    from secateur.evaluation.gate.gate import gate as run
    from secateur.evaluation.quality import Runner
    from secateur.report.gate_report import figures, junit, markdown

    named = {"data": data, "text_field": text_field, "seq_len": seq_len, "windows": windows, "bos": bos}
    text: dict[str, Any] = {name: value for name, value in named.items() if value is not None}
    limits: dict[str, Any] = {
        "perplexity_rise": max_perplexity_rise,
        "size_rise": max_size_rise,
        "max_kl": max_kl,
        "min_agreement": min_agreement,
        "confidence": confidence,
    }
    limits = {name: value for name, value in limits.items() if value is not None}
    if write and (limits or json_file or junit_file or markdown_file):
        raise UsageError("--write compares with nothing: leave out the limits and --json, --junit and --markdown")
    if overwrite and not write:
        raise UsageError("--overwrite replaces a baseline, which only --write writes: leave it out")
    _check_files({"--json": json_file, "--junit": junit_file, "--markdown": markdown_file})
    if write:
        found = write_baseline(
            model,
            baseline,
            dataclasses.replace(TEXT, **text),
            reference=reference,
            runner=Runner(dtype or "float32", device, batch_tokens, trust_remote_code),
            cache=reference_cache,
            overwrite=overwrite,
            progress=_counter(quiet),
        )
        if not quiet:
            quality = found.quality
            figure = f"perplexity {quality.perplexity:.3f}{_between(quality.perplexity_interval, '.3f')}"
            _say(f"{baseline}: {figure}, on windows {with_bos(found.text['bos'])}")
        return
    kept = Baseline.read(baseline)
    result = run(
        model,
        kept,
        Tolerances.of(**limits),
        reference=reference,
        text=text,
        runner=Runner(dtype or kept.dtype, device, batch_tokens, trust_remote_code),
        cache=reference_cache,
        progress=_counter(quiet),
    )
    if not quiet and str(json_file) != "-":
        title = f"{model} against {baseline}, {with_bos(result.evaluation.text['bos'])}"
        columns = [Column("", right=False), Column("now"), Column("baseline", spare=1), Column("change")]
        columns += [Column(f"{result.confidence:.0%} interval", spare=2), Column("verdict", right=False)]
        rows = [[check.name, *figures(check), check.verdict] for check in result.checks]
        print_table(screen, columns, rows, title=title)
        for note in result.notes:
            _say(f"note: {note}")
        for check in result.checks:
            if check.verdict != "ok":
                _say(f"{check.verdict}: {check.name} {check.words}")
    _write_json(result.to_dict(), json_file)
    if junit_file is not None:
        _write_text("--junit", junit(result), junit_file)
    if markdown_file is not None:
        _write_text("--markdown", markdown(result) + "\n", markdown_file, append=True)
    if not result.passed:
        raise typer.Exit(1)


@app.command()
def sweep(
    model: Model,
    recipes: Annotated[
        str,
        typer.Option(help="With commas between, such as 'wanda:0.3..0.7, sparsegpt:2:4, spqr:3'; see docs/recipes.md."),
    ],
    out: Annotated[Path, typer.Option(help="The folder to make, with the report in it.")],
    calibration: Annotated[str | None, typer.Option(help=f"Of all recipes: self, {_TEXT_HELP}")] = None,
    samples: Annotated[int | None, typer.Option(help="Calibration windows.")] = None,
    calibration_seq_len: Annotated[int | None, typer.Option(help="Tokens of a calibration window.")] = None,
    data: Annotated[str, typer.Option(help=f"To measure on: {_TEXT_HELP}")] = "docs",
    text_field: Annotated[str, typer.Option(help="Where the text of a row stands.")] = "text",
    seq_len: Annotated[int, typer.Option(help="Tokens of a window.", min=2)] = 1024,
    windows: Annotated[int, typer.Option(help="How many windows.", min=1)] = 12,
    stride: Annotated[int | None, typer.Option(help="Tokens from one window to the next.", min=1)] = None,
    bos: Annotated[
        bool | None,
        typer.Option(
            "--bos/--no-bos",
            help="Begin each window with BOS, where the tokenizer adds one, to calibrate (default: as the recipes) and to "
            "measure (default: --bos).",
        ),
    ] = None,
    cache_tokens: CacheTokens = 1024,
    batch_tokens: EvalBatch = None,
    dtype: EvalDtype = "float32",
    device: Device = "cpu",
    max_memory: MaxMemory = None,
    keep_models: Annotated[bool, typer.Option("--keep-models", help="Leave the checkpoints in OUT/models.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the sweep that OUT.partial is left of, if there is one.")
    ] = False,
    overwrite: Overwrite = False,
    json_file: JsonFile = None,
    trust_remote_code: Trust = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Compress MODEL by many recipes, measure each, and write a report with the frontier of size and quality."""
    from secateur.evaluation.eval_text import Text
    from secateur.evaluation.quality import Runner
    from secateur.recipes.strings import parse_recipes
    from secateur.runs.sweep import Sweep
    from secateur.runs.sweep import sweep as run

    _check_files({"--json": json_file}, out)
    text = {"source": calibration, "samples": samples, "seq_len": calibration_seq_len, "bos": bos}
    asked = [
        (name, _override(recipe, {"calibration": _override(recipe.calibration, text)}))
        for name, recipe in parse_recipes(recipes)
    ]
    with _Display(quiet) as display:
        result = run(
            Sweep(
                model,
                asked,
                Text(data, seq_len, windows, stride, text_field, bos is not False),
                Runner(dtype, device, batch_tokens, trust_remote_code),
                cache_tokens or None,
                max_memory,
                keep_models,
            ),
            out,
            resume=resume,
            overwrite=overwrite,
            progress=display,
        )
    failed = [point for point in result.points if point.failure is not None]
    if not quiet and str(json_file) != "-":
        columns = [
            Column("recipe", right=False),
            Column("size"),
            Column("bits per weight", spare=1),
            Column("perplexity"),
        ]
        columns += [Column("KL"), Column("agreement", spare=2), Column("seconds", spare=3)]
        rows = []
        for name, found, seconds in [
            ("dense", result.dense, 0.0),
            *((point.name, point.measured, point.seconds) for point in result.points),
        ]:
            if found is not None:
                cells = [_size(found.bytes), f"{found.bits_per_weight:.2f}", f"{found.perplexity:.3f}"]
                cells.append(f"{found.kl:.4f}" if found.kl is not None else "")
                cells.append(f"{found.agreement:.2%}" if found.agreement is not None else "")
                rows.append([name, *cells, f"{seconds + found.seconds:.1f}"])
        print_table(screen, columns, rows)
    for point in failed:
        _say(f"failed: {point.name}: {point.failure}")
    if not quiet:
        _say(f"the report is {out / 'index.html'}")
    _write_json(dataclasses.asdict(result), json_file)
    if failed:
        raise typer.Exit(1)


def _counter(quiet: bool, what: str = "window") -> Callable[[int, int], None]:
    def tell(done: int, total: int) -> None:
        if not quiet and err.is_terminal:
            err.print(f"{what} {done} of {total}".ljust(40), end="\r")

    return tell


def _between(ends: tuple[float, float] | None, form: str) -> str:
    """The interval of a figure, in brackets behind it."""
    return f" ({ends[0]:{form}} to {ends[1]:{form}})" if ends else ""


def _print_blocks(blocks: Any) -> None:
    columns = [Column("block", right=False), Column("its own"), Column("carried along")]
    rows = [[block.name, f"{block.own:.2e}", f"{block.carried:.2e}"] for block in blocks]
    title = "relative squared error of each block's output"
    print_table(screen, columns, rows, title=title, lines=False, dotted=True)


@app.command()
def inspect(
    model: Model,
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON to standard output.")] = False,
    trust_remote_code: Trust = False,
    debug: Debug = False,
) -> None:
    """Show the layout, sparsity, bits, bytes and error of every linear of MODEL."""
    from secateur.checkpoint.inspect import inspect as run
    from secateur.model.source import open_source

    found = run(open_source(model, trust_remote_code))
    if as_json:
        totals = {
            "sparsity": found.sparsity,
            "linear_weights": found.linear_weights,
            "linear_bytes": found.linear_bytes,
        }
        _print_json({**dataclasses.asdict(found), **totals})
        return
    some_outliers = any(linear.outliers for linear in found.linears)
    columns = [Column("linear", right=False), Column("shape", spare=5), Column("layout", right=False, spare=1)]
    columns += [Column("sparsity"), *([Column("outliers", spare=3)] if some_outliers else []), Column("bits")]
    columns += [Column("bytes", spare=4), Column("error", spare=2)]
    rows: list[list[str] | None] = []
    for linear in found.linears:
        error = "–" if math.isnan(linear.error) else f"{linear.error:.2e}"
        O, I = linear.shape
        outliers = [f"{linear.outliers:.2%}"] if some_outliers else []
        cells = [f"{O}×{I}", linear.layout, f"{linear.sparsity:.2%}", *outliers, f"{linear.bits:.2f}"]
        rows.append([linear.name, *cells, str(linear.bytes), error])
    rows.append(None)
    gap = [""] if some_outliers else []
    bits = 8 * found.linear_bytes / found.linear_weights
    rows.append(["all linears", "", "", f"{found.sparsity:.2%}", *gap, f"{bits:.2f}", str(found.linear_bytes), ""])
    bits = 8 * found.weight_bytes / found.parameters
    rows.append(["whole model, files", "", "", "", *gap, f"{bits:.2f}", str(found.weight_bytes), ""])
    print_table(screen, columns, rows, dotted=True)


@app.command()
def verify(
    out: Annotated[Path, typer.Argument(help="A folder made by secateur.")],
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the problems to this file ('-': standard output).")
    ] = None,
    trust_remote_code: Trust = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Say what is broken in the folder OUT, and where; the exit code is 1 if anything is."""
    from secateur.checkpoint.verify import examine

    _check_files({"--json": json_file})
    found = examine(out, trust_remote_code=trust_remote_code)
    if str(json_file) != "-":
        for problem in found.problems:
            _say(f"{problem}")
        if not found.problems and not quiet:
            _say(f"{out} is sound: {found.files} files, {found.linears} linears")
    _write_json({"folder": str(out), "sound": not found.problems, **dataclasses.asdict(found)}, json_file)
    if found.problems:
        raise typer.Exit(1)


@app.command()
def bench(
    model: Annotated[str, typer.Argument(help="A folder made by secateur.")],
    backend: Annotated[
        str, typer.Option(help="What computes with packed weights: auto, cpu, triton, cuda-2:4, torch or dense.")
    ] = "auto",
    device: Device = "cpu",
    dtype: Annotated[str, typer.Option(help="To compute in: auto (the files'), float32, bfloat16, float16.")] = "auto",
    tokens: Annotated[str, typer.Option(help="Inputs of a call; several with commas between.")] = "1",
    threads: Annotated[int | None, typer.Option(help="Of the CPU (default: torch's choice).", min=1)] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the figures to this file ('-': standard output).")
    ] = None,
    plot_file: Annotated[
        Path | None, typer.Option("--plot", help="Draw a bar chart to this .png or .svg file.")
    ] = None,
    trust_remote_code: Trust = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Time the packed linears of MODEL, against dense ones and against the machine's memory."""
    from secateur.evaluation.bench.bench import bench as run
    from secateur.report.bench_plot import check_plot, plot

    counts = tokens.split(",")
    if not all(count.isdecimal() for count in counts):
        raise UsageError(f"--tokens {tokens!r} is not understood: give whole numbers, such as 1,16")
    if plot_file is not None:
        check_plot(plot_file)
    _check_files({"--json": json_file})

    def tell(done: int, total: int) -> None:
        if not quiet and err.is_terminal:
            err.print(f"{done} of {total}", end="\r")

    found = run(
        model,
        backend,
        device=device,
        dtype=dtype,
        tokens=[int(count) for count in counts],
        threads=threads,
        trust_remote_code=trust_remote_code,
        progress=tell,
    )
    if not quiet and str(json_file) != "-":
        _print_bench(found, model)
    _write_json(found.to_dict(), json_file)
    if plot_file is not None:
        plot(found, plot_file)


def _print_bench(found: Any, model: str) -> None:
    from secateur.evaluation.bench.bench import describe

    screen.print(escape(f"{model} in {found.dtype} on {found.device}"), soft_wrap=True)
    # A table for each layout, and no lines: so the figures fit into eighty columns.
    columns = [
        Column("shape"),
        Column("linears", spare=3),
        Column("backend", right=False),
        Column("tokens"),
        Column("ms"),
    ]
    columns += [Column("dense"), Column("faster"), Column("MB", spare=2), Column("GB/s", spare=1), Column("of copy")]
    for layout in dict.fromkeys(describe(case.layout) for case in found.cases):
        rows = [
            [
                "{}×{}".format(*case.shape),
                str(case.linears),
                case.backend,
                str(case.tokens),
                f"{1e3 * case.seconds:.3f}",
                f"{1e3 * case.dense_seconds:.3f}",
                f"{case.speed_up:.2f}×",
                f"{case.bytes / 1e6:.2f}",
                f"{case.bandwidth / 1e9:.1f}",
                f"{found.utilization(case):.0%}{'*' if case.cached else ''}",
            ]
            for case in found.cases
            if describe(case.layout) == layout
        ]
        print_table(screen, columns, rows, title=f"\n{layout}", lines=False)
    screen.print()
    threads_used = f"{found.threads} thread{'' if found.threads == 1 else 's'}"
    lines = [f"a copy moves {found.copy_bandwidth / 1e9:.1f} GB/s, read and written, with {threads_used}"]
    if any(case.cached for case in found.cases):
        lines.append("* out of the cache: memory does not hold enough such weights to fill it")
    chosen = ", ".join(f"{name} for {count} linears" for name, count in found.chosen.items())
    lines.append(f"backend {found.backend} chose {chosen}" if found.backend == "auto" else f"backend {chosen}")
    lines += [found.fallback] if found.fallback is not None else []
    for total in found.totals:
        at_once = "" if total.tokens == 1 else f", {total.tokens} tokens at a time"
        lines.append(
            f"all linears{at_once}: {1e3 * total.seconds:.2f} ms a token, dense {1e3 * total.dense_seconds:.2f} ms "
            f"({total.speed_up:.2f}×)"
        )
    for line in lines:
        screen.print(escape(line), soft_wrap=True)


@app.command()
def export(
    model: Model,
    out: Annotated[Path, typer.Argument(help="The folder to make.")],
    to: Annotated[str, typer.Option(help="dense (every tool reads it), secateur, compressed-tensors or spqr.")],
    overwrite: Overwrite = False,
    trust_remote_code: Trust = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write the same weights in another form."""
    from secateur.checkpoint.export import export as run

    notes = run(model, out, to, overwrite=overwrite, trust_remote_code=trust_remote_code)
    for note in notes if not quiet else ():
        _say(f"note: {note}")
    if not quiet:
        _say(f"{model} is written as {to} to {out}")


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="What to go on from.")],
    max_new_tokens: Annotated[int, typer.Option(help="How much to write at most.", min=1)] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token each time.", min=0.0)] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put the prompt as a user's message, by the chat template.")
    ] = False,
    dtype: Annotated[str, typer.Option(help="To compute in: auto (the files'), float32, bfloat16, float16.")] = "auto",
    device: Device = "cpu",
    backend: Annotated[
        str, typer.Option(help="What computes with packed weights: auto, cpu, triton, cuda-2:4, torch or dense.")
    ] = "auto",
    verify: Verify = False,
    trust_remote_code: Trust = False,
    debug: Debug = False,
) -> None:
    """Let MODEL go on from a prompt."""
    from secateur.evaluation.quality import generate as run

    text = run(
        model,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        chat=chat,
        dtype=dtype,
        device=device,
        backend=backend,
        verify=verify,
        trust_remote_code=trust_remote_code,
    )
    print(text)


@app.command("run", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
def run_other(
    command: Annotated[
        list[str],
        typer.Argument(help="A command of an installed package, a Python file, or -m and a module; its arguments."),
    ],
) -> None:
    """Run another tool so that it opens secateur's checkpoints: `secateur run -- lm_eval --model hf …`."""
    from secateur.commands.run_tool import run_tool

    run_tool(command)


def _size(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"


def _plain_json(value: Any) -> str:
    """JSON without NaN or infinity, which other programs do not read: null instead."""

    def clean(v: Any) -> Any:
        if isinstance(v, float) and not math.isfinite(v):
            return None
        if isinstance(v, dict):
            return {k: clean(x) for k, x in v.items()}
        return [clean(x) for x in v] if isinstance(v, list | tuple) else v

    return json.dumps(clean(value), indent=2, default=str)


def _print_json(value: Any) -> None:
    print(_plain_json(value))


def _check_files(files: dict[str, Path | None], out: Path | None = None) -> None:
    """Raise UsageError when a file that an option names cannot be written, see `check_file`."""
    from secateur.folder.paths import check_file

    for option, file in files.items():
        if file is not None:
            check_file(option, file, out)


def _write_json(value: Any, file: Path | None) -> None:
    if file is None:
        return
    if str(file) == "-":
        _print_json(value)
    else:
        _write_text("--json", _plain_json(value) + "\n", file)


def _write_text(option: str, text: str, file: Path, append: bool = False) -> None:
    try:
        with file.open("a" if append else "w", encoding="utf-8") as stream:
            stream.write(text)
    except OSError as error:
        raise UsageError(f"{option} {file} cannot be written: {error.strerror or error}") from error


def _interrupt(*_: object) -> None:
    raise Interrupted


def _as_flags(text: str) -> str:
    """A message for the command line: what is called `group_size` in Python and in recipe files is --group-size there."""
    commands = typer.main.get_group(app).commands.values()
    options = {parameter.name for command in commands for parameter in command.params}
    return re.sub(r"`(\w+)`", lambda m: f"--{m[1].replace('_', '-')}" if m[1] in options else m[0], text)


def run(command: Callable[[], object]) -> int:
    """Run a command and return its exit code; what goes wrong is one line on standard error, unless --debug."""
    try:
        command()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except (KeyboardInterrupt, Interrupted) as stop:
        _say(f"interrupted: {getattr(stop, 'left', Interrupted.left)}")
        return 130
    except ReportedError as error:
        return error.exit_code
    except Exception as error:
        if _debug:
            err.print_exception()
        elif isinstance(error, SecateurError):
            _say(f"error: {_as_flags(str(error))}")
        else:
            _say(f"error: {type(error).__name__}: {one_line(error)} (run again with --debug for details)")
        return error.exit_code if isinstance(error, SecateurError) else 1
    return 0


def main() -> None:
    """The command `secateur`."""
    write_any_text()
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _interrupt)
    sys.exit(run(app))


if __name__ == "__main__":
    main()
