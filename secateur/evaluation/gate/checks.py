"""What has become of the figures of a checkpoint, by the same windows of the same text.

K: windows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from secateur.evaluation.gate.baseline import Baseline
from secateur.evaluation.gate.tolerances import Tolerances
from secateur.evaluation.quality import Evaluation
from secateur.evaluation.uncertainty import interval, p_of_rise

OK, FAILED, UNCLEAR = "ok", "failed", "unclear"


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


def compare(found: Evaluation, baseline: Baseline, tolerances: Tolerances) -> tuple[Check, ...]:
    """What has become of each figure, on the same windows of the same text."""
    checks = [_perplexity(found, baseline, tolerances), _size(found, baseline, tolerances)]
    if found.reference is not None:
        limits = {"kl": tolerances.max_kl, "agreement": tolerances.min_agreement}
        checks += [_limited(name, limit, found, baseline, tolerances) for name, limit in limits.items()]
    return tuple(checks)


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
