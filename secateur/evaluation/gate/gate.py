"""The regression gate: whether a checkpoint is as good as another was once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.errors import UsageError
from secateur.evaluation.eval_text import Text, with_bos
from secateur.evaluation.gate.baseline import Baseline, name_of, recipe_of, versions
from secateur.evaluation.gate.checks import FAILED, Check, compare
from secateur.evaluation.gate.tolerances import Tolerances
from secateur.evaluation.quality import Evaluation, Runner, evaluate
from secateur.evaluation.uncertainty import fewest_windows


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


def gate(  # noqa: PLR0913 - users name them
    model: str,
    baseline: Baseline,
    tolerances: Tolerances = Tolerances(),  # noqa: B008 - it is frozen
    *,
    reference: str | None = None,
    text: dict[str, Any] | None = None,
    runner: Runner | None = None,
    cache: Path | None = None,
    revision: str | None = None,
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
        cache, revision: see `evaluate`.
        progress: called with (windows done, windows in total).

    Raises:
        UsageError: the baseline is of another text or dtype, or of too few windows for the confidence.
        SecateurError: the model cannot be measured.
    """
    wanted = _text_to_measure(baseline, text or {})
    runner = runner or Runner(dtype=baseline.dtype)
    if runner.dtype != baseline.dtype:
        raise UsageError(
            f"baseline {baseline.file} was measured in {baseline.dtype}, not in {runner.dtype}: write another"
        )
    fewest = fewest_windows(tolerances.confidence)
    if wanted.windows < fewest:
        raise UsageError(
            f"baseline {baseline.file} has {wanted.windows} windows, which cannot tell a change from chance at "
            f"{tolerances.confidence:.4g} confidence: write one of {fewest} windows at least, better 16"
        )
    if tolerances.needs_reference and reference is None:
        raise UsageError(
            "`max_kl` and `min_agreement` measure the distance from the dense model: name it by `reference`"
        )
    if tolerances.min_routing_agreement is not None and reference is None:
        raise UsageError(
            "`min_routing_agreement` compares routing with that of the dense model: name it by `reference`"
        )

    def accept(sha256: str) -> None:
        _check_same_text(sha256, wanted, baseline)

    more: dict[str, Any] = {"cache": cache, "revision": revision, "accept": accept, "progress": progress}
    found = evaluate(model, reference, wanted, runner=runner, **more)
    if tolerances.min_routing_agreement is not None and found.quality.routing_agreement is None:
        raise UsageError(
            f"`min_routing_agreement` is for mixtures of experts, and {found.model} and {found.reference} have no experts in "
            "common whose routing secateur can compare: leave it out"
        )
    checks = compare(found, baseline, tolerances)
    notes = tuple(_notes(baseline, runner, found))
    return GateResult(model, str(baseline.file), checks, notes, tolerances.confidence, found)


def _text_to_measure(baseline: Baseline, said: dict[str, Any]) -> Text:
    """The baseline's text, by where it lies here. Raises UsageError where something else was said of it."""
    wanted = baseline.text_here
    for name, given in said.items():
        # Where a text lies differs between machines, and what BOS is between tokenizers; whether it is the same tokens tell.
        if name in ("data", "text_field", "bos"):
            wanted = dataclasses.replace(wanted, **{name: given})
        elif given != getattr(wanted, name):
            raise UsageError(
                f"baseline {baseline.file} was measured with `{name}` {getattr(wanted, name)}, not {given}: "
                "leave the option out, or write another baseline"
            )
    return wanted


def _check_same_text(sha256: str, wanted: Text, baseline: Baseline) -> None:
    """Raise UsageError where the tokens, of which this is the hash, are not the baseline's."""
    if sha256 == baseline.content["text"]["sha256"]:
        return
    if wanted.bos != baseline.text.bos:
        raise UsageError(
            f"baseline {baseline.file} was measured on windows {with_bos(baseline.text.bos)}: leave "
            f"`bos={wanted.bos}` out, or write another baseline"
        )
    why = " (it comes with Python, and each version has its own)" if wanted.data == "docs" else ""
    raise UsageError(
        f"baseline {baseline.file} was measured on another text, or with another tokenizer, than `data` {wanted.data} "
        f"gives now{why}: it cannot be compared with; write another"
    )


def _notes(baseline: Baseline, runner: Runner, found: Evaluation) -> list[str]:
    """What differs from when the baseline was written, besides the figures."""
    notes = [
        f"{name} was {baseline.versions.get(name, 'not named')}, and is {version}"
        for name, version in versions().items()
        if baseline.versions.get(name) != version
    ]
    if baseline.content.get("device") != runner.device:
        notes.append(f"the baseline was measured on {baseline.content.get('device')}, this on {runner.device}")
    if baseline.content.get("recipe") != recipe_of(found.model):
        notes.append("the recipe is not the baseline's")
    if found.reference is not None and name_of(found.reference) != baseline.content.get("reference"):
        notes.append(f"the baseline's reference was {baseline.content.get('reference') or 'none'}")
    if found.reference is not None and found.cache_tokens != baseline.content.get("cache_tokens"):
        notes.append(
            "KL was measured on another number of the reference's tokens: the change is not one of the model alone"
        )
    return notes
