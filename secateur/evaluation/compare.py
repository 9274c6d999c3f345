"""Models against the first of them, on the same windows of the same text.

K: windows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from secateur.errors import UsageError
from secateur.evaluation.eval_text import Text
from secateur.evaluation.quality import Evaluation, Runner, evaluate
from secateur.evaluation.uncertainty import Paired, p_of_rise

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Compared:
    """A model and how its perplexity differs from the first one's.

    Attributes:
        evaluation: of the model.
        change: of perplexity, as a share of the first one's; None for the first.
        interval: of the change, over the choice of windows.
        p: how likely so large a change, for the better or the worse, is by chance: see `p_of_rise`.
        verdict: `better`, `worse`, `the same`, or `unclear` where it may be chance; "" for the first.
    """

    evaluation: Evaluation
    change: float | None = None
    interval: tuple[float, float] | None = None
    p: float | None = None
    verdict: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The figures, as JSON holds them."""
        found = self.evaluation
        return {
            "model": found.model,
            **found.size.to_dict(),
            "perplexity": found.quality.perplexity,
            "perplexity_interval": found.quality.perplexity_interval,
            "bits_per_byte": found.bits_per_byte,
            "change": self.change,
            "change_interval": self.interval,
            "p": self.p,
            "verdict": self.verdict,
            "per_window": found.quality.scores.windows(),
        }


def compare(
    models: Sequence[str],
    text: Text,
    *,
    runner: Runner = Runner(),  # noqa: B008 - it is frozen
    progress: Callable[[int, int], None] | None = None,
) -> list[Compared]:
    """Measure models one after the other, and each against the first.

    Raises:
        UsageError: there are fewer than two, or one has another tokenizer than the first.
        SecateurError: see `evaluate`.
    """
    if len(models) < 2:
        raise UsageError("one model alone compares with nothing: name two or more, or see `secateur eval`")
    found: list[Evaluation] = []
    for model in models:

        def same_text(sha256: str, model: str = model) -> None:
            if found and sha256 != found[0].text["sha256"]:
                raise UsageError(
                    f"{model} has another tokenizer than {models[0]}, so that their windows are not the same text: "
                    "compare the bits per byte that `secateur eval` gives of each"
                )

        found.append(evaluate(model, None, text, runner=runner, accept=same_text, progress=progress))
    return [Compared(found[0]), *(_against(found[0], each) for each in found[1:])]


def _against(first: Evaluation, found: Evaluation) -> Compared:
    now, then = (each.quality.scores for each in (found, first))
    paired = Paired.of(now.windows()["loss"], then.windows()["loss"], now.count_K, CONFIDENCE)
    # Of both sides, since nobody has said which of them it would be.
    p = min(1.0, 2 * min(p_of_rise(paired.rise_K), p_of_rise(-paired.rise_K)))
    change, ends = paired.of_perplexity()
    verdict = "unclear"
    if not paired.rise_K.any():
        verdict = "the same"
    elif p <= 1 - CONFIDENCE:
        verdict = "worse" if change > 0 else "better"
    return Compared(found, change, ends, p, verdict)
