"""Arguments and options that several commands have, as annotations of their fields."""

from __future__ import annotations

from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any

import typer

from secateur.commands.command import Asked, Options


def _set_debug(ctx: typer.Context, value: bool) -> bool:
    if isinstance(ctx.obj, Asked):
        ctx.obj.debug = value
    return value


def _open_auto(value: str) -> str:
    """What stands in journals and baselines is the device itself."""
    if value != "auto":
        return value
    from secateur.model.load import best_device

    return best_device()


# What `recipe_options` imports needs torch.
def _parameters() -> list[Parameter]:
    from secateur.commands.recipe_options import parameters

    return parameters()


def _recipe(given: dict[str, Any]) -> Any:
    from secateur.commands.recipe_options import recipe_of

    return recipe_of(given)


TEXT_HELP = "docs, a file of text or rows, wikitext2, c4, hub-id[:config][:split]."

Model = Annotated[str, typer.Argument(help="Hugging Face folder, hub id, .gguf file, or 'demo'.")]
OurFolder = Annotated[str, typer.Argument(help="Folder made by secateur.")]
Out = Annotated[Path, typer.Argument(help="Folder to make.")]
RecipeOptions = Annotated[Any, Options(_parameters, _recipe)]

Device = Annotated[
    str, typer.Option(help="Device: cpu (default), cuda, cuda:1, or auto.", callback=_open_auto, show_default=False)
]
Dtype = Annotated[str, typer.Option(help="Precision to compute in: auto (the files'), float32, bfloat16, float16.")]
Backend = Annotated[str, typer.Option(help="Kernels for packed weights: auto, cpu, triton, cuda-2:4, torch or dense.")]
_MEMORY = "Scope, output and memory"
BatchTokens = Annotated[
    int | None,
    typer.Option(help="Tokens run at a time (default: as memory allows).", min=1, rich_help_panel=_MEMORY),
]
WindowTokens = Annotated[
    int | None,
    typer.Option("--batch-tokens", help="Tokens run at a time (default: one window on a CPU, else 8192).", min=1),
]
MaxMemory = Annotated[str | None, typer.Option(help="Limit on host memory, e.g. 8GB.", rich_help_panel=_MEMORY)]

Data = Annotated[str, typer.Option(help=f"Text to measure on: {TEXT_HELP}")]
TextField = Annotated[str, typer.Option(help="Field of a row that holds its text.")]
SeqLen = Annotated[int, typer.Option(help="Tokens in a window.", min=2)]
Windows = Annotated[int, typer.Option(help="Number of windows.", min=1)]
Bos = Annotated[
    bool | None,
    typer.Option("--bos/--no-bos", help="BOS at the start of each window, if the tokenizer adds one (default: --bos)."),
]
Reference = Annotated[str | None, typer.Option(help="Dense model to compare with.")]
Cache = Annotated[
    Path | None,
    typer.Option("--reference-cache", help="Folder that keeps the reference's predictions for the next time."),
]
CacheTokens = Annotated[
    int,
    typer.Option(
        help="Likeliest tokens of each prediction in the cache (0: the whole vocabulary, 4 bytes each).", min=0
    ),
]

Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replacement of a folder of secateur's.")]
Card = Annotated[bool, typer.Option("--card/--no-card", help="Model card of our own (default).", show_default=False)]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Permission to run the model's own code.")]
Verify = Annotated[
    bool, typer.Option("--verify", help="Comparison of all files with the manifest's SHA-256 before they are opened.")
]
JsonFile = Annotated[Path | None, typer.Option("--json", help="File for figures as JSON ('-': stdout).")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No output but errors.")]
Debug = Annotated[bool, typer.Option("--debug", help="Traceback of an error.", callback=_set_debug)]
