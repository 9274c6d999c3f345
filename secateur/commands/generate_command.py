"""`secateur generate`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from secateur.commands.command import command
from secateur.commands.shared_options import Backend, Debug, Device, Dtype, MaxMemory, Model, Revision, Trust, Verify


@command("generate")
@dataclass(frozen=True)
class Generate:
    """Continue a prompt with MODEL."""

    model: Model
    prompt: Annotated[str, typer.Argument(help="Beginning of the text.")]
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

        text = generate(
            self.model,
            self.prompt,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            seed=self.seed,
            chat=self.chat,
            dtype=self.dtype,
            device=self.device,
            backend=self.backend,
            max_memory=self.max_memory,
            verify=self.verify,
            revision=self.revision,
            trust_remote_code=self.trust_remote_code,
        )
        print(text)
