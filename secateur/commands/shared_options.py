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


# What `recipe_options` imports needs torch.
def _parameters() -> list[Parameter]:
    from secateur.commands.recipe_options import parameters

    return parameters()


def _recipe(given: dict[str, Any]) -> Any:
    from secateur.commands.recipe_options import recipe_of

    return recipe_of(given)


TEXT_HELP = "docs, a .txt/.jsonl/.parquet file, wikitext2, c4, hub-id[:config][:split]."

Model = Annotated[str, typer.Argument(help="A Hugging Face folder, a hub id, a .gguf file, or 'demo'.")]
OurFolder = Annotated[str, typer.Argument(help="A folder made by secateur.")]
Out = Annotated[Path, typer.Argument(help="The folder to make.")]
RecipeOptions = Annotated[Any, Options(_parameters, _recipe)]

Device = Annotated[str, typer.Option(help="Where to compute, such as cpu or cuda.")]
Dtype = Annotated[str, typer.Option(help="To compute in: auto (the files'), float32, bfloat16, float16.")]
Backend = Annotated[
    str, typer.Option(help="What computes with packed weights: auto, cpu, triton, cuda-2:4, torch or dense.")
]
BatchTokens = Annotated[int | None, typer.Option(help="Tokens run at a time (default: by the memory).", min=1)]
WindowTokens = Annotated[
    int | None,
    typer.Option(
        "--batch-tokens", help="Tokens of windows run at a time (default: a window on a CPU, else 8192).", min=1
    ),
]
MaxMemory = Annotated[str | None, typer.Option(help="Of the host that may be in use, such as 8GiB.")]

TextField = Annotated[str, typer.Option(help="Where the text of a row stands.")]
SeqLen = Annotated[int, typer.Option(help="Tokens of a window.", min=2)]
Windows = Annotated[int, typer.Option(help="How many windows.", min=1)]
Bos = Annotated[
    bool | None,
    typer.Option("--bos/--no-bos", help="Begin each window with BOS, where the tokenizer adds one (default: --bos)."),
]
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

Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace the output folder if it exists and secateur wrote it.")
]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Let code that comes with the model run.")]
Verify = Annotated[
    bool, typer.Option("--verify", help="Compare the files' SHA-256 with the manifest before they are opened.")
]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the figures to this file ('-': standard output).")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.", callback=_set_debug)]
