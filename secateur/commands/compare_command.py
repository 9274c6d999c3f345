"""`secateur compare`."""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated, Any

import typer

from secateur.commands.command import command
from secateur.commands.figures import between, size
from secateur.commands.result_files import check_files, write_json
from secateur.commands.screen import counter, say, screen
from secateur.commands.shared_options import (
    Bos,
    Data,
    Debug,
    Device,
    Dtype,
    JsonFile,
    Quiet,
    SeqLen,
    TextField,
    Trust,
    Windows,
    WindowTokens,
)
from secateur.commands.tables import Column, print_table
from secateur.errors import UsageError

_CONFIDENCE = 0.95


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
    dtype: Dtype = "float32"
    device: Device = "auto"
    json_file: JsonFile = None
    trust_remote_code: Trust = False
    quiet: Quiet = False
    debug: Debug = False

    def run(self) -> None:
        if len(self.models) < 2:
            raise UsageError("one model alone compares with nothing: name two or more, or see `secateur eval`")
        check_files({"--json": self.json_file})
        found = self._measured()
        rows = [_compared(each, found[0]) for each in found]
        if not self.quiet and str(self.json_file) != "-":
            self._print(rows)
        content = {"text": found[0].text, "device": self.device, "dtype": self.dtype, "confidence": _CONFIDENCE}
        write_json({**content, "models": rows}, self.json_file)

    def _measured(self) -> list[Any]:
        from secateur.evaluation.eval_text import Text
        from secateur.evaluation.quality import Runner, evaluate

        text = Text(self.data, self.seq_len, self.windows, None, self.text_field, self.bos is not False)
        runner = Runner(self.dtype, self.device, self.batch_tokens, self.trust_remote_code)
        found: list[Any] = []
        for number, model in enumerate(self.models, 1):

            def same_text(sha256: str, model: str = model) -> None:
                if found and sha256 != found[0].text["sha256"]:
                    raise UsageError(
                        f"{model} has another tokenizer than {self.models[0]}, so that their windows are not the same text: "
                        "compare the bits per byte that `secateur eval` gives of each"
                    )

            progress = counter(self.quiet, f"model {number} of {len(self.models)}, window ")
            found.append(evaluate(model, None, text, runner=runner, accept=same_text, progress=progress))
        return found

    def _print(self, rows: list[dict[str, Any]]) -> None:
        columns = [Column("model", right=False), Column("size"), Column("bits per weight", spare=3)]
        columns += [Column("perplexity", right=True), Column("change"), Column("95% interval", spare=1)]
        columns += [Column("p", spare=2), Column("", right=False)]
        cells = []
        for row in rows:
            change = "" if row["change"] is None else f"{row['change']:+.2%}"
            ends = "" if row["change_interval"] is None else between(row["change_interval"], "+.2%").strip(" ()")
            p = "" if row["p"] is None else f"{row['p']:.2g}"
            perplexity = f"{row['perplexity']:.3f}"
            size_of = [size(row["bytes"]), f"{row['bits_per_weight']:.2f}"]
            cells.append([row["model"], *size_of, perplexity, change, ends, p, row["verdict"]])
        title = f"{self.windows} windows of {self.seq_len} tokens of {self.data}, against {rows[0]['model']}"
        print_table(screen, columns, cells, title=title)
        if any(row["verdict"] == "unclear" for row in rows):
            say("unclear: it may be chance; more --windows would tell")


def _compared(found: Any, first: Any) -> dict[str, Any]:
    """The figures of a model, and its rise of perplexity over the first's on the same windows, as the gate has it."""
    import numpy as np

    from secateur.evaluation.uncertainty import interval, p_of_rise

    quality = found.quality
    row: dict[str, Any] = {
        "model": found.model,
        "bytes": found.size.bytes,
        "bits_per_weight": found.size.bits_per_weight,
        "perplexity": quality.perplexity,
        "perplexity_interval": quality.perplexity_interval,
        "bits_per_byte": found.bits_per_byte,
        "per_window": quality.scores.windows(),
    }
    if found is first:
        return {**row, "change": None, "change_interval": None, "p": None, "verdict": ""}
    count_K = np.asarray(quality.scores.count_K, np.float64)
    now_K, then_K = (np.array(each.quality.scores.windows()["loss"]) for each in (found, first))
    rise_K = count_K * (now_K - then_K)
    ends = interval(rise_K, count_K, _CONFIDENCE)
    # Of both sides, since nobody has said which of them it would be.
    p = min(1.0, 2 * min(p_of_rise(rise_K), p_of_rise(-rise_K)))
    change = _risen(float(rise_K.sum() / count_K.sum()))
    sure = "worse" if change > 0 else "better"
    verdict = "the same" if not rise_K.any() else sure if p <= 1 - _CONFIDENCE else "unclear"
    between_ends = (_risen(ends[0]), _risen(ends[1])) if ends else None
    return {**row, "change": change, "change_interval": between_ends, "p": p, "verdict": verdict}


def _risen(loss: float) -> float:
    return math.expm1(min(loss, 700.0))
