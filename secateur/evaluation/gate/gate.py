"""The regression gate: what a checkpoint measured once, and whether another is as good.

K: windows.
"""

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

import numpy as np
import torch
import transformers

from secateur._version import __version__
from secateur.errors import CheckpointError, SecateurError, UsageError
from secateur.evaluation.eval_text import Text, with_bos
from secateur.evaluation.quality import Evaluation, Runner, evaluate
from secateur.evaluation.uncertainty import fewest_windows, interval, p_of_rise
from secateur.folder.manifest import MANIFEST_NAME
from secateur.folder.paths import check_whole
from secateur.folder.reader import read_json
from secateur.folder.writer import write_whole
from secateur.shares import parse_share

LAYOUT = 1
#: What a baseline is measured on, unless somebody says otherwise.
TEXT = Text(seq_len=512, windows=16)
OK, FAILED, UNCLEAR = "ok", "failed", "unclear"
_SHARES = ("perplexity_rise", "size_rise", "min_agreement", "confidence")


@dataclass(frozen=True)
class Tolerances:
    """How much worse a checkpoint may be than its baseline.

    Attributes:
        perplexity_rise: as a share of the baseline's.
        size_rise: of the weight files, as a share of the baseline's.
        max_kl: the KL divergence from the dense model that is allowed, in nats a token; None: any.
        min_agreement: the share of predictions with the dense model's most likely token that there must be; None: any.
        confidence: with which a rise must be more than chance to count.
    """

    perplexity_rise: float = 0.01
    size_rise: float = 0.005
    max_kl: float | None = None
    min_agreement: float | None = None
    confidence: float = 0.95

    def __post_init__(self) -> None:
        for name, value in (("perplexity_rise", self.perplexity_rise), ("size_rise", self.size_rise)):
            if not 0 <= value < math.inf:
                raise UsageError(f"`{name}` {value} is not a rise: give 0 or more, such as 1%")
        if self.max_kl is not None and not self.max_kl >= 0:
            raise UsageError(f"`max_kl` {self.max_kl} is not a divergence: give 0 or more")
        if self.min_agreement is not None and not 0 <= self.min_agreement <= 1:
            raise UsageError(f"`min_agreement` {self.min_agreement} is not a share: give 0 to 1, or a percentage")
        # Of many windows only some signs are flipped: `p_of_rise` then never goes below 1.5e-5.
        if not 0.5 <= self.confidence <= 0.9999:
            raise UsageError(f"`confidence` {self.confidence} cannot be had: give 50% to 99.99%")

    @classmethod
    def of(cls, **limits: Any) -> Tolerances:
        """The tolerances that a person gave, shares as text (`1%` or `0.01`) or as numbers: see `parse_share`."""
        for name in _SHARES:
            if limits.get(name) is not None:
                limits[name] = parse_share(limits[name], f"`{name}`")
        return cls(**limits)

    @property
    def needs_reference(self) -> bool:
        return self.max_kl is not None or self.min_agreement is not None


@dataclass(frozen=True)
class Check:
    """One figure of a checkpoint against its baseline.

    Attributes:
        name: of the figure.
        value, baseline: the figure now and then.
        change: from the baseline, as a share of it or, for KL and agreement, as a difference.
        interval: of the change, at the gate's confidence, over the choice of windows; None where nothing is drawn.
        p: how likely such a change for the worse is by chance, see `p_of_rise`; None where nothing is drawn.
        limit: of the change, or of the value for `kl` and `agreement`; None: it is told, not checked.
        verdict: `ok`; `failed`; `unclear`: beyond the limit, but so small that it may be chance.
        words: what it says, for a person.
    """

    name: str
    value: float
    baseline: float | None
    change: float | None
    interval: tuple[float, float] | None
    p: float | None
    limit: float | None
    verdict: str
    words: str


@dataclass(frozen=True)
class GateResult:
    """What the gate found.

    Attributes:
        model, baseline: what was compared; the baseline's file.
        checks: figure by figure.
        notes: what else differs from when the baseline was written, such as versions.
        confidence: of intervals and tests.
        evaluation: of the checkpoint.
    """

    model: str
    baseline: str
    checks: tuple[Check, ...]
    notes: tuple[str, ...]
    confidence: float
    evaluation: Evaluation

    @property
    def passed(self) -> bool:
        return all(check.verdict != FAILED for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        content = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        checks = [dataclasses.asdict(check) for check in self.checks]
        return {**content, "passed": self.passed, "checks": checks, "evaluation": self.evaluation.to_dict()}


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
    def read(cls, file: Path) -> Baseline:
        """Read and check a baseline.

        Raises:
            UsageError: there is none.
            CheckpointError: it is damaged, or of a layout that this version does not know.
        """
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
        compared = ("perplexity", *({"kl", "agreement"} & windows.keys()))
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


def gate(
    model: str,
    baseline: Baseline,
    tolerances: Tolerances = Tolerances(),
    *,
    reference: str | None = None,
    text: dict[str, Any] | None = None,
    runner: Runner | None = None,
    cache: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> GateResult:
    """Measure a checkpoint as a baseline was measured, and compare.

    Args:
        model: whatever `eval` takes as MODEL.
        baseline: what to compare with, see `write_baseline`.
        tolerances: how much worse the checkpoint may be.
        reference: the dense model, where divergence from it is to be measured too.
        text: what the user said of the text, by the names of `Text`: it must be what the baseline was measured on.
        runner: how models are run; None: as the baseline's, on the CPU.
        cache: see `evaluate`.
        progress: called with (windows done, windows in total).

    Raises:
        UsageError: the baseline is of another text or dtype, or of too few windows for the confidence.
        SecateurError: the model cannot be measured.
    """
    file, wanted = baseline.file, baseline.text_here
    for name, given in (text or {}).items():
        # Where a text lies differs between machines, and what BOS is between tokenizers; whether it is the same tokens tell.
        if name in ("data", "text_field", "bos"):
            wanted = dataclasses.replace(wanted, **{name: given})
        elif given != getattr(wanted, name):
            raise UsageError(
                f"baseline {file} was measured with `{name}` {getattr(wanted, name)}, not {given}: "
                "leave the option out, or write another baseline"
            )
    runner = runner or Runner(dtype=baseline.dtype)
    if runner.dtype != baseline.dtype:
        raise UsageError(f"baseline {file} was measured in {baseline.dtype}, not in {runner.dtype}: write another")
    fewest = fewest_windows(tolerances.confidence)
    if wanted.windows < fewest:
        raise UsageError(
            f"baseline {file} has {wanted.windows} windows, which cannot tell a change from chance at "
            f"{tolerances.confidence:.4g} confidence: write one of {fewest} windows at least, better 16"
        )
    if tolerances.needs_reference and reference is None:
        raise UsageError(
            "`max_kl` and `min_agreement` measure the distance from the dense model: name it by `reference`"
        )

    def same_text(sha256: str) -> None:
        if sha256 != baseline.content["text"]["sha256"]:
            if wanted.bos != baseline.text.bos:
                raise UsageError(
                    f"baseline {file} was measured on windows {with_bos(baseline.text.bos)}: leave "
                    f"`bos={wanted.bos}` out, or write another baseline"
                )
            why = " (it comes with Python, and each version has its own)" if wanted.data == "docs" else ""
            raise UsageError(
                f"baseline {file} was measured on another text, or with another tokenizer, than `data` {wanted.data} gives "
                f"now{why}: it cannot be compared with; write another"
            )

    found = evaluate(model, reference, wanted, runner=runner, cache=cache, accept=same_text, progress=progress)
    notes = _notes(baseline, runner, model)
    if reference is not None and _name(reference) != baseline.content.get("reference"):
        notes.append(f"the baseline's reference was {baseline.content.get('reference') or 'none'}")
    if reference is not None and found.cache_tokens != baseline.content.get("cache_tokens"):
        notes.append(
            "KL was measured on another number of the reference's tokens: the change is not one of the model alone"
        )
    checks = compare(found, baseline, tolerances)
    return GateResult(model, str(file), checks, tuple(notes), tolerances.confidence, found)


def compare(found: Evaluation, baseline: Baseline, tolerances: Tolerances) -> tuple[Check, ...]:
    """What has become of each figure, on the same windows of the same text."""
    checks = [_perplexity(found, baseline, tolerances), _size(found, baseline, tolerances)]
    if found.reference is not None:
        limits = {"kl": tolerances.max_kl, "agreement": tolerances.min_agreement}
        checks += [_limited(name, limit, found, baseline, tolerances) for name, limit in limits.items()]
    return tuple(checks)


def write_baseline(
    model: str,
    file: Path,
    text: Text,
    *,
    reference: str | None = None,
    runner: Runner = Runner(),  # noqa: B008 - it is frozen
    cache: Path | None = None,
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
    found = evaluate(model, reference, text, runner=runner, cache=cache, progress=progress)
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
    }
    return {
        "layout": LAYOUT,
        "model": _name(found.model),
        "reference": _name(found.reference) if found.reference is not None else None,
        "recipe": _recipe(found.model),
        "text": found.text,
        "metrics": {name: {"value": v, "interval": ends} for name, (v, ends) in metrics.items() if _is_number(v)},
        "cache_tokens": found.cache_tokens,
        "size": found.size.to_dict(),
        "per_window": {"predictions": quality.scores.count_K.tolist(), **quality.scores.windows()},
        "versions": _versions(),
        "device": runner.device,
        "dtype": runner.dtype,
        "date": time.strftime("%Y-%m-%d"),
    }


def _name(model: str) -> str:
    """What a baseline calls a model: of a folder somewhere on this machine only the last part is of use on others."""
    return Path(model).name if Path(model).is_absolute() else model


def _is_number(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _versions() -> dict[str, str]:
    return {"secateur": __version__, "torch": torch.__version__, "transformers": transformers.__version__}


def _recipe(model: str) -> dict[str, Any] | None:
    """The recipe in a checkpoint's manifest, if it has one."""
    manifest = Path(model).expanduser() / MANIFEST_NAME
    return read_json(manifest).get("recipe") if manifest.is_file() else None


def _notes(baseline: Baseline, runner: Runner, model: str) -> list[str]:
    notes = [
        f"{name} was {baseline.versions.get(name, 'not named')}, and is {version}"
        for name, version in _versions().items()
        if baseline.versions.get(name) != version
    ]
    if baseline.content.get("device") != runner.device:
        notes.append(f"the baseline was measured on {baseline.content.get('device')}, this on {runner.device}")
    if baseline.content.get("recipe") != _recipe(model):
        notes.append("the recipe is not the baseline's")
    return notes


@dataclass(frozen=True)
class _Paired:
    """A figure's change over the same windows, for the worse where it is above zero."""

    change: float
    interval: tuple[float, float] | None
    p: float


def _paired(name: str, found: Evaluation, baseline: Baseline, tolerances: Tolerances) -> _Paired | None:
    """How a figure has changed; None where the baseline has none to compare with."""
    if name not in baseline.per_window:
        return None
    count_K = np.array(baseline.per_window["predictions"], np.float64)
    now_K, then_K = (np.array(values[name]) for values in (found.quality.scores.windows(), baseline.per_window))
    rise_K = count_K * (now_K - then_K)
    worse_K = -rise_K if name == "agreement" else rise_K
    ends = interval(rise_K, count_K, tolerances.confidence)
    return _Paired(rise_K.sum() / count_K.sum(), ends, p_of_rise(worse_K))


def _perplexity(found: Evaluation, baseline: Baseline, tolerances: Tolerances) -> Check:
    paired = _paired("loss", found, baseline, tolerances)
    assert paired is not None
    rise = math.expm1(min(paired.change, 700.0))
    ends = (
        (math.expm1(min(paired.interval[0], 700)), math.expm1(min(paired.interval[1], 700)))
        if paired.interval
        else None
    )
    verdict, limit = OK, tolerances.perplexity_rise
    if rise > limit:
        verdict = FAILED if paired.p <= 1 - tolerances.confidence else UNCLEAR
    words = {
        OK: f"{rise:+.2%}, within {limit:.2%}",
        FAILED: f"{rise:+.2%}, more than {limit:.2%}, and not by chance (p = {paired.p:.2g})",
        UNCLEAR: f"{rise:+.2%}, more than {limit:.2%}, but it may be chance (p = {paired.p:.2g}): more windows would tell",
    }[verdict]
    then = baseline.content["metrics"]["perplexity"]["value"]
    return Check("perplexity", found.quality.perplexity, then, rise, ends, paired.p, limit, verdict, words)


def _size(found: Evaluation, baseline: Baseline, tolerances: Tolerances) -> Check:
    rise, limit = found.size.bytes / baseline.size - 1, tolerances.size_rise
    verdict = OK if rise <= limit else FAILED
    words = f"{rise:+.2%}, {'within' if verdict == OK else 'more than'} {limit:.2%}"
    return Check("size", found.size.bytes, baseline.size, rise, None, None, limit, verdict, words)


def _limited(name: str, limit: float | None, found: Evaluation, baseline: Baseline, tolerances: Tolerances) -> Check:
    """KL or agreement: the value itself has a limit, if any; its change is told beside."""
    value = getattr(found.quality, name)
    good = limit is None or (value <= limit if name == "kl" else value >= limit)
    form = "{:.4f} nats a token" if name == "kl" else "{:.2%}"
    words = form.format(value)
    if limit is not None:
        bound = {"kl": ("more than", "within"), "agreement": ("less than", "at least")}[name][good]
        words += f", {bound} {form.format(limit)}"
    paired = _paired(name, found, baseline, tolerances)
    verdict = OK if good else FAILED
    if paired is None:
        return Check(name, value, None, None, None, None, limit, verdict, words)
    then = baseline.content["metrics"][name]["value"]
    return Check(name, value, then, paired.change, paired.interval, paired.p, limit, verdict, words)
