"""What a checkpoint measured once: a file of figures, written and read."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from secateur._version import __version__
from secateur.errors import CheckpointError, SecateurError, UsageError
from secateur.evaluation.eval_text import Text
from secateur.evaluation.gate.tolerances import Tolerances
from secateur.evaluation.perplexity import ROUTING
from secateur.evaluation.quality import Evaluation, Runner, evaluate
from secateur.evaluation.uncertainty import fewest_windows
from secateur.folder.manifest import MANIFEST_NAME
from secateur.folder.paths import check_whole
from secateur.folder.reader import read_json
from secateur.folder.writer import write_whole

LAYOUT = 1
#: What a baseline is measured on, unless somebody says otherwise.
TEXT = Text(seq_len=512, windows=16)


@dataclass(frozen=True)
class Baseline:
    """What a checkpoint measured.

    Attributes:
        file: where it is kept.
        content: see `write_baseline`.
    """

    file: Path
    content: dict[str, Any]

    @classmethod
    def read(cls, file: str | Path) -> Baseline:
        """Read and check a baseline.

        Raises:
            UsageError: there is none.
            CheckpointError: it is damaged, or of a layout that this version does not know.
        """
        file = Path(file)
        if os.path.isdir(file):
            raise UsageError(f"there is no baseline {file}, which is a folder: name the file of figures")
        if not os.path.isfile(file):
            raise UsageError(
                f"there is no baseline {file}: make one by `secateur gate MODEL --write --baseline {file}`"
            )
        content = read_json(file)
        if content.get("layout") != LAYOUT:
            raise CheckpointError(
                f"baseline {file} has layout {content.get('layout')!r} and this version reads {LAYOUT}: write it again"
            )
        baseline = cls(file, content)
        try:
            complete = baseline._is_complete()
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError, UsageError):
            complete = False
        if not complete:
            raise CheckpointError(f"baseline {file} is damaged: write it again")
        return baseline

    def _is_complete(self) -> bool:
        windows, text = self.per_window, self.content["text"]
        texts = (text["sha256"], text["data"], text["text_field"], self.dtype, self.content["model"])
        counts = (text["seq_len"], text["windows"], text["stride"] or 1)
        compared = ("perplexity", *({"kl", "agreement", *ROUTING} & windows.keys()))
        numbers = [self.size, *(self.content["metrics"][name]["value"] for name in compared)]
        numbers += [number for values in windows.values() for number in values]
        return (
            all(isinstance(value, str) for value in texts)
            and all(type(count) is int for count in counts)
            and type(self.text.bos) is bool
            and self.text.stride in (None, self.text.seq_len)
            and {"loss", "predictions"} <= windows.keys()
            and all(len(values) == self.text.windows for values in windows.values())
            and all(type(number) in (int, float) and math.isfinite(number) for number in numbers)
            and min(windows["predictions"]) > 0
            and self.size > 0
            and isinstance(self.versions, dict)
        )

    @property
    def text(self) -> Text:
        """Which windows of which text it was measured on."""
        # Before there was `bos`, windows did not begin with it.
        said = {"bos": False, **self.content["text"]}
        return Text(**{field.name: said[field.name] for field in dataclasses.fields(Text)})

    @property
    def text_here(self) -> Text:
        """The same by where its file lies: a relative path is that of a file beside the baseline, if there is one.

        Else it is looked up in the working folder, which is another one wherever tests are started from.
        """
        beside = self.file.parent / self.text.data
        found = not os.path.isabs(self.text.data) and os.path.isfile(beside)
        return dataclasses.replace(self.text, data=str(beside)) if found else self.text

    @property
    def per_window(self) -> dict[str, list[float]]:
        return self.content["per_window"]

    @property
    def size(self) -> int:
        return self.content["size"]["bytes"]

    @property
    def dtype(self) -> str:
        return self.content["dtype"]

    @property
    def versions(self) -> dict[str, str]:
        return self.content["versions"]


def write_baseline(  # noqa: PLR0913 - users name them
    model: str,
    file: str | Path,
    text: Text = TEXT,
    *,
    reference: str | None = None,
    runner: Runner = Runner(),  # noqa: B008 - it is frozen
    cache: Path | None = None,
    revision: str | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Measure a checkpoint, and write what `gate` compares others with.

    The file is JSON: `text` (which windows, and the hash of their tokens), `metrics` (each with its interval of 95 %
    confidence), `per_window` (number of predictions and mean of each figure over each window, for the paired test), `size`,
    `recipe`, `versions`, `device`, `dtype`, `date`.

    Raises:
        UsageError: there is such a file already, and it is none of ours or not to be replaced; it cannot be written; or the
            text has too few windows.
        SecateurError: see `evaluate`; or the perplexity is beyond a float.
    """
    file = Path(file)
    check_whole("`baseline`", file)
    if file.exists() and not _looks_written(file):
        raise UsageError(f"{file} exists already and is no baseline, which would be lost: choose another name")
    if file.exists() and not overwrite:
        raise UsageError(f"{file} exists already: choose another name, or give `overwrite=True`")
    if text.stride not in (None, text.seq_len):
        raise UsageError(
            f"windows that overlap (`stride` {text.stride}) hang together, which no test of chance allows for: leave it out"
        )
    fewest = fewest_windows(Tolerances().confidence)
    if text.windows < fewest:
        raise UsageError(
            f"{text.windows} windows cannot tell a change from chance: give `windows` {fewest} at least, better 16"
        )
    found = evaluate(model, reference, text, runner=runner, cache=cache, revision=revision, progress=progress)
    content = figures_of(found, runner)
    text_of_file = json.dumps(content, indent=1) + "\n"
    try:
        write_whole(file, lambda part: part.write_text(text_of_file, encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"`baseline` {file} cannot be written: {error.strerror or error}") from error
    return found


def _looks_written(file: Path) -> bool:
    """Whether a file is a baseline, maybe a damaged one, or empty."""
    with file.open("rb") as stream:
        return re.match(rb'\s*\Z|\s*\{\s*"layout"', stream.read(100)) is not None


def figures_of(found: Evaluation, runner: Runner) -> dict[str, Any]:
    """What a baseline keeps of an evaluation, see `write_baseline`."""
    quality = found.quality
    if not all(map(math.isfinite, (quality.perplexity, *(quality.perplexity_interval or ())))):
        raise SecateurError(f"{found.model} has a loss of {quality.loss:.0f} nats a token: no baseline to compare with")
    metrics = {
        "perplexity": (quality.perplexity, quality.perplexity_interval),
        "bits_per_byte": (found.bits_per_byte, None),
        "kl": (quality.kl, quality.kl_interval),
        "agreement": (quality.agreement, quality.agreement_interval),
        **{name: (getattr(quality, name), getattr(quality, f"{name}_interval")) for name in ROUTING},
    }
    return {
        "layout": LAYOUT,
        "model": name_of(found.model),
        "reference": name_of(found.reference) if found.reference is not None else None,
        "recipe": recipe_of(found.model),
        "text": found.text,
        "metrics": {name: {"value": v, "interval": ends} for name, (v, ends) in metrics.items() if _is_number(v)},
        "cache_tokens": found.cache_tokens,
        "size": found.size.to_dict(),
        "per_window": {"predictions": quality.scores.count_K.tolist(), **quality.scores.windows()},
        "versions": versions(),
        "device": runner.device,
        "dtype": runner.dtype,
        "date": time.strftime("%Y-%m-%d"),
    }


def name_of(model: str) -> str:
    """What a baseline calls a model: of a folder somewhere on this machine only the last part is of use on others."""
    return Path(model).name if Path(model).is_absolute() else model


def _is_number(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def versions() -> dict[str, str]:
    return {"secateur": __version__, "torch": torch.__version__, "transformers": transformers.__version__}


def recipe_of(model: str) -> dict[str, Any] | None:
    """The recipe in a checkpoint's manifest, if it has one."""
    manifest = Path(model).expanduser() / MANIFEST_NAME
    return read_json(manifest).get("recipe") if manifest.is_file() else None
