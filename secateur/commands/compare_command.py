"""`secateur compare`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from secateur.commands.command import command
from secateur.commands.result_files import check_files, takes_stdout, write_json
from secateur.commands.shared_options import (
    Bos,
    Data,
    Debug,
    Device,
    Dtype,
    JsonFile,
    MaxMemory,
    Quiet,
    SeqLen,
    TextField,
    Trust,
    Windows,
    WindowTokens,
)
from secateur.terminal.figures import between, size
from secateur.terminal.screen import counter, say, screen
from secateur.terminal.tables import Column, print_table


@command("compare")
@dataclasses.dataclass(frozen=True)
class Compare:
    """Compare the perplexity of models with the first one's, window by window, with a test of chance."""

    models: Annotated[list[str], typer.Argument(help="Two models or more; the others are compared with the first.")]
    data: Data = "docs"
    text_field: TextField = "text"
    seq_len: SeqLen = 512
    windows: Windows = 16
    bos: Bos = None
    batch_tokens: WindowTokens = None
    max_memory: MaxMemory = None
    dtype: Dtype = "float32"
    device: Device = "auto"
    json_file: JsonFile = None
    trust_remote_code: Trust = False
    quiet: Quiet = False
    debug: Debug = False

    def run(self) -> None:
        check_files({"--json": self.json_file})
        from secateur.evaluation.compare import CONFIDENCE, compare
        from secateur.evaluation.eval_text import Text
        from secateur.evaluation.quality import Runner

        text = Text(self.data, self.seq_len, self.windows, None, self.text_field, self.bos is not False)
        runner = Runner(self.dtype, self.device, self.batch_tokens, self.trust_remote_code, self.max_memory)
        found = compare(self.models, text, runner=runner, progress=counter(self.quiet))
        if not self.quiet and not takes_stdout(self.json_file):
            self._print(found)
        about = {"text": found[0].evaluation.text, "device": self.device, "dtype": self.dtype, "confidence": CONFIDENCE}
        write_json({**about, "models": [each.to_dict() for each in found]}, self.json_file)

    def _print(self, found: Sequence[Any]) -> None:
        columns = [Column("model", right=False), Column("size"), Column("bits per weight", spare=3)]
        columns += [Column("perplexity"), Column("change"), Column("95% interval", spare=1)]
        columns += [Column("p", spare=2), Column("", right=False)]
        rows = []
        for each in found:
            about, perplexity = each.evaluation.size, each.evaluation.quality.perplexity
            change = "" if each.change is None else f"{each.change:+.2%}"
            ends = between(each.interval, "+.2%").strip(" ()")
            p = "" if each.p is None else f"{each.p:.2g}"
            sizes = [size(about.bytes), f"{about.bits_per_weight:.2f}"]
            rows.append([each.evaluation.model, *sizes, f"{perplexity:.3f}", change, ends, p, each.verdict])
        title = f"{self.windows} windows of {self.seq_len} tokens of {self.data}, against {self.models[0]}"
        print_table(screen, columns, rows, title=title)
        if any(each.verdict == "unclear" for each in found):
            say("unclear: it may be chance; more --windows would tell")
