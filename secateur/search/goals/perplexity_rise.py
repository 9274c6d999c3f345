"""The smallest model whose perplexity rises by so much at most.

N: windows, S: tokens of a window, K: windows of which losses are known.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from secateur.calibration.kept_windows import calibration_ids
from secateur.errors import UsageError
from secateur.evaluation.perplexity import measure
from secateur.evaluation.uncertainty import Paired
from secateur.model.load import load_source
from secateur.model.source import open_source
from secateur.pipeline.calibrate import Windows
from secateur.recipes.recipe import Calibration, Choice, Recipe
from secateur.search.candidates import Library, bytes_of, cheapest, divergence_of
from secateur.search.goal import goal
from secateur.search.searcher import Searcher
from secateur.search.target import check_target, with_dense
from secateur.shares import parse_share

# What share of the rise allowed is enough, and what share is aimed at.
_ENOUGH, _AIM = 0.8, 0.9
# Windows of each text, and the fewest of one that has no more; half of them suffice where a model's side of the limit is clear.
_UNSEEN, _LEAST_UNSEEN = 32, 8
# Of the interval whose upper end is held against the limit.
_CONFIDENCE = 0.95
#: Measured on besides the calibration text: what a model loses it loses more of on text that it was not calibrated on.
_OTHER_TEXT = "docs"


@goal
@dataclass(frozen=True)
class PerplexityRise:
    """A limit on what perplexity rises by, on windows of the calibration text that nothing else saw, and on another text.

    The divergences of all linears together are not quite their sum. So models are made and measured, each allowed so much more
    or less as the one before says. Windows differ, and the last of several models that come near a limit is the luckiest: so
    not the rise itself is held against it, but the upper end of its interval over the choice of windows, on either text.

    Attributes:
        text: as the user wrote it.
        rise: as a share of the dense model's perplexity.
    """

    text: str
    rise: float
    name: ClassVar[str] = "max_perplexity_rise"
    models: ClassVar[int] = 4

    @classmethod
    def of(cls, recipe: Recipe) -> PerplexityRise:
        text = recipe.max_perplexity_rise or ""
        rise = parse_rise(text)
        check_target(recipe, cls.name)
        return cls(text, rise)

    def check(self, searcher: Searcher) -> None:
        searcher.check_memory()

    def tried(self, searcher: Searcher) -> list[Choice]:
        return searcher.for_a_target

    def result_bytes(self, searcher: Searcher) -> int | None:
        return searcher.prepared.dense_bytes()

    def choose(self, searcher: Searcher, windows: Windows) -> dict[str, Choice]:
        # Whether there are any is to be known before the search.
        texts_NS = _unseen(searcher, windows.ids_NS)
        library = searcher.shared.library(with_dense(searcher, searcher.library(windows, self.tried(searcher))))
        limit = math.log1p(self.rise)
        model = searcher.prepared.load_whole()
        texts = [_Text.of(model, ids_NS, windows.bos_ids, limit) for ids_NS in texts_NS]
        del model
        best, least, allowed = None, math.inf, limit
        made: list[dict[str, Choice]] = []
        good: tuple[float, float] | None = None
        bad: tuple[float, float] | None = None
        for number in range(1, self.models + 1):
            linears = searcher.shared.spread(_smallest(library, allowed))
            if linears in made or all(choice == Choice() for choice in linears.values()):
                break
            made.append(linears)
            searcher.job.say(f"making model {number} to measure its perplexity")
            risen, most = _rise_of(searcher, linears, texts)
            said = f"perplexity {math.expm1(risen):+.2%}, at most {math.expm1(most):+.2%}"
            searcher.job.say(f"model {number}: {said}, on text that it was not made with")
            least = min(least, most)
            if most <= limit:
                best, good = linears, (allowed, most)
                if most > _ENOUGH * limit:
                    break
            else:
                bad = (allowed, most)
            allowed = next_allowed(_AIM * limit, good, bad)
        if best is None:
            raise self._out_of_reach(least)
        return best

    def _out_of_reach(self, least: float) -> UsageError:
        found = (
            f"the least that is sure of those measured is {math.expm1(least):.2%}"
            if least < math.inf
            else "more is expected of each that they do to any linear"
        )
        return UsageError(
            f"`max_perplexity_rise` {self.text} cannot be kept with these methods: {found}; give more, or other methods"
        )


def parse_rise(text: str) -> float:
    """The share behind `3%` or `0.03`. Raises UsageError when it is none, or not positive."""
    rise = parse_share(text, "`max_perplexity_rise`")
    if rise <= 0:
        raise UsageError(f"`max_perplexity_rise` {text!r} is not a rise: write it like 3% or 0.03")
    return rise


def _smallest(library: Library, allowed: float) -> dict[str, Choice]:
    """The fewest bytes within a total divergence."""
    return cheapest(library, bytes_of, divergence_of, allowed)


@dataclass(frozen=True)
class _Text:
    """Windows that the dense model was measured on.

    Attributes:
        ids_NS: the windows.
        bos: what each begins with.
        limit: the rise that is allowed, in nats a token.
        loss_K, count_K: of the dense model, the mean over each window, and of how many predictions.
    """

    ids_NS: Tensor
    bos: list[int]
    limit: float
    loss_K: Tensor
    count_K: Tensor

    @classmethod
    def of(cls, dense: Any, ids_NS: Tensor, bos: list[int], limit: float) -> _Text:
        return cls(ids_NS, bos, limit, *_losses(dense, ids_NS, bos))

    def rise(self, model: Any) -> tuple[float, float]:
        """By how much a model's loss is higher, in nats a token, and at most: on all windows where half leave it open."""
        half = (len(self.ids_NS) + 1) // 2
        loss_K, _ = _losses(model, self.ids_NS[:half], self.bos)
        risen, most = self._rise(loss_K)
        if risen <= self.limit < most and half < len(self.ids_NS):
            rest_K, _ = _losses(model, self.ids_NS[half:], self.bos)
            risen, most = self._rise(torch.cat([loss_K, rest_K]))
        return risen, most

    def _rise(self, loss_K: Tensor) -> tuple[float, float]:
        K = len(loss_K)
        found = Paired.of(loss_K, self.loss_K[:K], self.count_K[:K], _CONFIDENCE)
        return found.change, found.change if found.interval is None else found.interval[1]


def _losses(model: Any, ids_NS: Tensor, bos: list[int]) -> tuple[Tensor, Tensor]:
    scores = measure(model, ids_NS, bos=bos).scores
    return scores.loss_KP.double().nanmean(1), scores.count_K


def _rise_of(searcher: Searcher, linears: dict[str, Choice], texts: list[_Text]) -> tuple[float, float]:
    """What the model that choices make loses on the text where most is possible: see `_Text.rise`."""
    assert searcher.attempt is not None
    folder = searcher.folder / "attempt"
    searcher.attempt(searcher.recipe_with(linears), folder)
    model = load_source(open_source(str(folder)), torch.float32, searcher.job.device)
    found = [text.rise(model) for text in texts]
    del model
    shutil.rmtree(folder)
    return max(found, key=lambda rise: rise[1])


def next_allowed(aim: float, good: tuple[float, float] | None, bad: tuple[float, float] | None) -> float:
    """What to allow for a rise that is aimed at: in proportion to what one model has shown, or between what two have.

    Args:
        good, bad: what was allowed and how much the loss rose then: the most that was kept to, and the least that was too much.
    """
    if good is not None and bad is not None:
        return good[0] + (aim - good[1]) / (bad[1] - good[1]) * (bad[0] - good[0])
    allowed, risen = good or bad or (aim, aim)
    return allowed * min(max(aim / max(risen, 1e-9), 0.1), 4.0)


def _unseen(searcher: Searcher, ids_NS: Tensor) -> list[Tensor]:
    """Windows of the calibration text that are not among those for calibration, and as many of another."""
    job = searcher.job
    wanted = job.recipe.calibration
    count = max(_UNSEEN, len(ids_NS) // 4)

    def purpose(count: int) -> str:
        return f"`max_perplexity_rise` measures on {count} windows besides those of `samples`"

    def drawn(wanted: Calibration, windows: int) -> Tensor:
        wanted = replace(wanted, samples=windows)
        return calibration_ids(job.source, wanted, job.device, job.say, job.limit is not None)[0]

    try:
        more_NS = drawn(wanted, len(ids_NS) + count)
    except UsageError:
        count = _LEAST_UNSEEN
        try:
            more_NS = drawn(wanted, len(ids_NS) + count)
        except UsageError as error:
            raise UsageError(f"{purpose(count)}: {error}") from error
    seen = {tuple(row) for row in ids_NS.tolist()}
    unseen = [row for row in more_NS.tolist() if tuple(row) not in seen]
    if not unseen:
        raise UsageError(f"{purpose(count)}, and the text only repeats them: give other text")
    found = [torch.tensor(unseen)]
    if wanted.source != _OTHER_TEXT:
        found.append(drawn(replace(wanted, source=_OTHER_TEXT), count))
    return found
