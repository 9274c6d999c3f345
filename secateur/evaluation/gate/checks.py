"""What has become of the figures of a checkpoint, by the same windows of the same text.

K: windows.
"""

from __future__ import annotations

from dataclasses import dataclass

from secateur.evaluation.gate.baseline import Baseline
from secateur.evaluation.gate.tolerances import Tolerances
from secateur.evaluation.quality import Evaluation
from secateur.evaluation.uncertainty import Paired, p_of_rise

OK, FAILED, UNCLEAR = "ok", "failed", "unclear"


@dataclass(frozen=True)
class Check:
    """One figure of a checkpoint against its baseline.

    Attributes:
        name: of the figure.
        value, baseline: the figure now and then.
        change: from the baseline, as a share of it or, for KL and agreements, as a difference.
        interval: of the change, at the gate's confidence, over the choice of windows; None where nothing is drawn.
        p: how likely such a change for the worse is by chance, see `p_of_rise`; None where nothing is drawn.
        limit: of the change, or of the value for `kl` and agreements; None: it is told, not checked.
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
        if found.quality.routing_agreement is not None:
            limits["routing_agreement"] = tolerances.min_routing_agreement
        checks += [_limited(name, limit, found, baseline, tolerances) for name, limit in limits.items()]
    return tuple(checks)


def _paired(name: str, found: Evaluation, baseline: Baseline, tolerances: Tolerances) -> Paired | None:
    """How a figure has changed; None where the baseline has none to compare with."""
    then = baseline.per_window
    if name not in then:
        return None
    now_K = found.quality.scores.windows()[name]
    return Paired.of(now_K, then[name], then["predictions"], tolerances.confidence)


def _perplexity(found: Evaluation, baseline: Baseline, tolerances: Tolerances) -> Check:
    paired = _paired("loss", found, baseline, tolerances)
    assert paired is not None
    (rise, ends), p = paired.of_perplexity(), p_of_rise(paired.rise_K)
    verdict, limit = OK, tolerances.perplexity_rise
    if rise > limit:
        verdict = FAILED if p <= 1 - tolerances.confidence else UNCLEAR
    words = {
        OK: f"{rise:+.2%}, within {limit:.2%}",
        FAILED: f"{rise:+.2%}, more than {limit:.2%}, and not by chance (p = {p:.2g})",
        UNCLEAR: f"{rise:+.2%}, more than {limit:.2%}, but it may be chance (p = {p:.2g}): more windows would tell",
    }[verdict]
    then = baseline.content["metrics"]["perplexity"]["value"]
    return Check("perplexity", found.quality.perplexity, then, rise, ends, p, limit, verdict, words)


def _size(found: Evaluation, baseline: Baseline, tolerances: Tolerances) -> Check:
    rise, limit = found.size.bytes / baseline.size - 1, tolerances.size_rise
    verdict = OK if rise <= limit else FAILED
    words = f"{rise:+.2%}, {'within' if verdict == OK else 'more than'} {limit:.2%}"
    return Check("size", found.size.bytes, baseline.size, rise, None, None, limit, verdict, words)


def _limited(name: str, limit: float | None, found: Evaluation, baseline: Baseline, tolerances: Tolerances) -> Check:
    """KL or an agreement: the value itself has a limit, if any; its change is told beside."""
    value = getattr(found.quality, name)
    good = limit is None or (value <= limit if name == "kl" else value >= limit)
    form = "{:.4f} nats a token" if name == "kl" else "{:.2%}"
    words = form.format(value)
    if limit is not None:
        bound = (("more than", "within") if name == "kl" else ("less than", "at least"))[good]
        words += f", {bound} {form.format(limit)}"
    paired = _paired(name, found, baseline, tolerances)
    verdict = OK if good else FAILED
    if paired is None:
        return Check(name, value, None, None, None, None, limit, verdict, words)
    then = baseline.content["metrics"][name]["value"]
    p = p_of_rise(paired.rise_K if name == "kl" else -paired.rise_K)
    return Check(name, value, then, paired.change, paired.interval, p, limit, verdict, words)
