"""`secateur experts`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from secateur.commands.command import command
from secateur.commands.result_files import check_files, takes_stdout, write_json, write_text
from secateur.commands.shared_options import (
    Data,
    Debug,
    Device,
    JsonFile,
    MaxMemory,
    Model,
    Quiet,
    Revision,
    TextField,
    Trust,
)
from secateur.terminal.screen import screen
from secateur.terminal.tables import Column, print_table


@command("experts")
@dataclasses.dataclass(frozen=True)
class ExpertsCommand:
    """Show how MODEL uses its experts: their use, scores, similarity, and super experts."""

    model: Model
    data: Data = "docs"
    text_field: TextField = "text"
    seq_len: Annotated[int, typer.Option(help="Tokens in a window.", min=2)] = 512
    windows: Annotated[int, typer.Option(help="Number of windows.", min=1)] = 16
    seed: Annotated[int, typer.Option(help="Random seed.", min=0)] = 0
    scores: Annotated[
        str | None, typer.Option(help="Scores of experts, comma-separated (default: all of one pass).")
    ] = None
    plot: Annotated[Path | None, typer.Option(help="Heat map of use, or of the first of --scores, .png or .svg.")] = (
        None
    )
    recipe: Annotated[
        Path | None, typer.Option(help="Recipe file to write: bits of experts by QuantMoE-Bench's rules.")
    ] = None
    bits: Annotated[float, typer.Option(help="Mean bits of experts in --recipe.", min=2, max=4)] = 2.5
    max_memory: MaxMemory = None
    device: Device = "cpu"
    json_file: JsonFile = None
    revision: Revision = None
    trust_remote_code: Trust = False
    quiet: Quiet = False
    debug: Debug = False

    def run(self) -> None:
        from secateur.recipes.recipe import Calibration
        from secateur.report.bench_plot import check_plot
        from secateur.report.experts_plot import USE, plot_experts
        from secateur.runs.expert_use import expert_use, recipe_of_rules
        from secateur.terminal.display import Display

        check_files({"--json": self.json_file, "--recipe": self.recipe})
        if self.plot is not None:
            check_plot(self.plot)
        wanted = None if self.scores is None else [name.strip() for name in self.scores.split(",")]
        text = Calibration(self.data, self.windows, self.seq_len, self.seed, self.text_field)
        with Display(self.quiet) as display:
            found = expert_use(
                self.model,
                text,
                scores=wanted,
                device=self.device,
                max_memory=self.max_memory,
                revision=self.revision,
                trust_remote_code=self.trust_remote_code,
                progress=display,
            )
        if not takes_stdout(self.json_file) and not self.quiet:
            _print(found)
        write_json(dataclasses.asdict(found), self.json_file)
        if self.recipe is not None:
            write_text("--recipe", recipe_of_rules(found, self.bits).to_yaml(), self.recipe)
        if self.plot is not None:
            plot_experts(found, self.plot, USE if wanted is None else wanted[0])


def _print(found: Any) -> None:
    names = list(found.layers[0].scores)
    columns = [
        Column("layer", right=False),
        Column("use, least to most"),
        Column("evenness"),
        Column("unused", spare=3),
        Column("most alike", spare=2),
        Column("super", right=False, spare=1),
        Column("importance", spare=5),
        Column("outliers", spare=6),
        *(Column(f"least by {name}", spare=4) for name in names),
    ]
    rows: list[list[str] | None] = []
    for layer in found.layers:
        pair = layer.most_alike
        rows.append(
            [
                layer.name,
                f"{min(layer.share):.1%} to {max(layer.share):.1%}",
                f"{layer.evenness:.2f}",
                str(sum(share == 0 for share in layer.share)),
                "–" if pair is None else f"{pair[0]} and {pair[1]}: {pair[2]:.2f}",
                ", ".join(map(str, layer.supers)) or "–",
                f"{layer.importance:.2f}",
                f"{min(layer.outliers):.1f} to {max(layer.outliers):.1f}",
                *(_least(layer.scores[name]) for name in names),
            ]
        )
    experts = len(found.layers[0].share)
    title = f"{experts} experts in a layer of {found.model}, {found.of_a_token} for each of {found.tokens:,} tokens"
    print_table(screen, columns, rows, title=title, lines=False, dotted=True)


def _least(scores: list[float]) -> str:
    """The numbers of the experts of least score, a quarter of them, three at most."""
    order = sorted(range(len(scores)), key=scores.__getitem__)
    return " ".join(map(str, order[: max(1, min(3, len(scores) // 4))]))
