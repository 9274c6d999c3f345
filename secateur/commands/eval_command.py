"""`secateur eval`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from secateur.commands.command import command
from secateur.commands.result_files import check_files, takes_stdout, write_json
from secateur.commands.shared_options import (
    Bos,
    Cache,
    CacheTokens,
    Data,
    Debug,
    Device,
    Dtype,
    JsonFile,
    MaxMemory,
    Model,
    Quiet,
    Reference,
    Revision,
    SeqLen,
    TextField,
    Trust,
    Verify,
    Windows,
    WindowTokens,
)
from secateur.terminal.eval_tables import print_evaluation
from secateur.terminal.screen import counter


@command("eval")
@dataclass(frozen=True)
class Eval:
    """Measure the perplexity of MODEL, its distance from a reference, and its scores in tasks."""

    model: Model
    reference: Reference = None
    data: Data = "docs"
    text_field: TextField = "text"
    seq_len: SeqLen = 1024
    windows: Windows = 12
    stride: Annotated[
        int | None, typer.Option(help="Tokens from one window to the next (default: --seq-len).", min=1)
    ] = None
    bos: Bos = None
    by_block: Annotated[
        bool, typer.Option("--by-block", help="Error of each block's output against the reference.")
    ] = False
    tasks: Annotated[str | None, typer.Option(help="Tasks of lm-eval or .yaml files, comma-separated.")] = None
    few_shot: Annotated[
        int | None, typer.Option(help="Examples in a task's prompt (default: as the task says).", min=0)
    ] = None
    limit: Annotated[int | None, typer.Option(help="Samples per task (default: all).", min=1)] = None
    activation_sparsity: Annotated[
        float | None, typer.Option(help="Level of a model that leaves inputs unread; 0 reads all (default: its own).")
    ] = None
    cache: Cache = None
    cache_tokens: CacheTokens = 1024
    expert_skip: Annotated[
        str | None, typer.Option(help="Share of weaker experts left out (default: as compressed; 0: none).")
    ] = None
    batch_tokens: WindowTokens = None
    max_memory: MaxMemory = None
    dtype: Dtype = "float32"
    device: Device = "cpu"
    json_file: JsonFile = None
    verify: Verify = False
    revision: Revision = None
    trust_remote_code: Trust = False
    quiet: Quiet = False
    debug: Debug = False

    def run(self) -> None:
        check_files({"--json": self.json_file})
        from secateur.evaluation.eval_text import Text
        from secateur.evaluation.quality import Runner, evaluate
        from secateur.shares import parse_share

        skip = None if self.expert_skip is None else parse_share(self.expert_skip, "`expert_skip`")
        result = evaluate(
            self.model,
            self.reference,
            Text(self.data, self.seq_len, self.windows, self.stride, self.text_field, self.bos is not False),
            runner=Runner(self.dtype, self.device, self.batch_tokens, self.trust_remote_code, self.max_memory, skip),
            cache=self.cache,
            cache_tokens=self.cache_tokens or None,
            by_block=self.by_block,
            tasks=self.tasks.split(",") if self.tasks is not None else (),
            few_shot=self.few_shot,
            limit=self.limit,
            activation_sparsity=self.activation_sparsity,
            verify=self.verify,
            revision=self.revision,
            progress=counter(self.quiet),
            task_progress=counter(self.quiet, "task request "),
        )
        if not self.quiet and not takes_stdout(self.json_file):
            overlap = "" if self.stride is None else f", {self.stride} apart"
            text = f"{self.windows} windows of {self.seq_len} tokens of {self.data}{overlap}"
            print_evaluation(result, result.model, self.reference, text)
        write_json(result.to_dict(), self.json_file)
