"""`secateur generate`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from secateur.commands.command import command
from secateur.commands.shared_options import (
    Backend,
    Debug,
    Device,
    Dtype,
    MaxMemory,
    Model,
    Revision,
    TextField,
    Trust,
    Verify,
)
from secateur.errors import UsageError
from secateur.terminal.figures import duration, size
from secateur.terminal.screen import counter, say


@command("generate")
@dataclass(frozen=True)
class Generate:
    """Continue a prompt with MODEL."""

    model: Model
    prompt: Annotated[str | None, typer.Argument(help="Beginning of the text.")] = None
    prompts: Annotated[
        Path | None, typer.Option(help="File of prompts, one a line or row; each gives a line of JSON.")
    ] = None
    text_field: TextField = "prompt"
    batch_size: Annotated[int, typer.Option(help="Prompts continued at a time.", min=1)] = 16
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens to write.", min=1)] = 64
    temperature: Annotated[
        float, typer.Option(help="Sampling temperature; 0 always takes the likeliest token.", min=0.0)
    ] = 0.0
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0
    chat: Annotated[bool, typer.Option("--chat", help="Prompt as a user's message, by the chat template.")] = False
    dtype: Dtype = "auto"
    device: Device = "auto"
    backend: Backend = "auto"
    max_memory: MaxMemory = None
    verify: Verify = False
    revision: Revision = None
    trust_remote_code: Trust = False
    debug: Debug = False

    def run(self) -> None:
        from secateur.runs.generate import generate

        if (self.prompt is None) == (self.prompts is None):
            raise UsageError("give one of two: a prompt, or --prompts FILE")
        if self.prompt is not None:
            print(generate(self.model, self.prompt, **self._options()))
        else:
            self._run_batch()

    def _run_batch(self) -> None:
        from secateur.runs.generate import write_texts
        from secateur.runs.prompts import read_prompts

        assert self.prompts is not None
        prompts = read_prompts(self.prompts, self.text_field)
        found = write_texts(self.model, prompts, batch_size=self.batch_size, **self._options())
        for prompt, text in zip(prompts, found.texts, strict=True):
            print(json.dumps({"prompt": prompt, "text": text}, ensure_ascii=False))
        read = f", {size(found.bytes_read)} read" if found.bytes_read else ""
        say(
            f"{len(prompts)} texts, {found.tokens} tokens in {duration(found.seconds)}: "
            f"{found.tokens / found.seconds:.3g} tokens/s{read}"
        )

    def _options(self) -> dict[str, Any]:
        return {
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "seed": self.seed,
            "chat": self.chat,
            "dtype": self.dtype,
            "device": self.device,
            "backend": self.backend,
            "max_memory": self.max_memory,
            "verify": self.verify,
            "revision": self.revision,
            "trust_remote_code": self.trust_remote_code,
            "progress": counter(False, "token "),
        }
