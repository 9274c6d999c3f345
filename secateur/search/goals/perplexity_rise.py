"""The smallest model whose perplexity rises by so much at most.

N: windows, S: tokens of a window.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from secateur.calibration.kept_windows import calibration_ids
from secateur.errors import UsageError
from secateur.evaluation.perplexity import measure
from secateur.model.load import load_source
from secateur.model.source import open_source
from secateur.pipeline.calibrate import Windows
from secateur.recipes.recipe import Choice, Recipe
from secateur.search.candidates import Library, bytes_of, cheapest, divergence_of
from secateur.search.goal import goal
from secateur.search.searcher import Searcher
from secateur.search.target import check_target, with_dense
from secateur.shares import parse_share

# What share of the rise allowed is enough, and what share is aimed at.
_ENOUGH, _AIM = 0.8, 0.9
_LEAST_UNSEEN = 8


@goal
@dataclass(frozen=True)
class PerplexityRise:
    """A limit on what perplexity rises by, on windows of the calibration text that nothing else saw.

    The divergences of all linears together are not quite their sum. So models are made and measured, each allowed so much more
    or less as the one before says.

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
        unseen_NS = _unseen(searcher, windows.ids_NS)
        library = searcher.shared.library(with_dense(searcher, searcher.library(windows, self.tried(searcher))))
        model = searcher.prepared.load_whole()
        dense_loss = measure(model, unseen_NS, bos=windows.bos_ids).loss
        del model
        limit = math.log1p(self.rise)
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
            risen = _loss_of(searcher, linears, unseen_NS, windows.bos_ids) - dense_loss
            searcher.job.say(f"model {number}: perplexity {math.expm1(risen):+.2%} on text that it was not made with")
            least = min(least, risen)
            if risen <= limit:
                best, good = linears, (allowed, risen)
                if risen > _ENOUGH * limit:
                    break
            else:
                bad = (allowed, risen)
            allowed = next_allowed(_AIM * limit, good, bad)
        if best is None:
            raise self._out_of_reach(least)
        return best

    def _out_of_reach(self, least: float) -> UsageError:
        found = (
            f"the least that was measured is {math.expm1(least):.2%}"
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


def _loss_of(searcher: Searcher, linears: dict[str, Choice], ids_NS: Tensor, bos: list[int]) -> float:
    """The loss on windows of the model that choices make, in nats a token."""
    assert searcher.attempt is not None
    folder = searcher.folder / "attempt"
    searcher.attempt(searcher.recipe_with(linears), folder)
    model = load_source(open_source(str(folder)), torch.float32, searcher.job.device)
    loss = measure(model, ids_NS, bos=bos).loss
    del model
    shutil.rmtree(folder)
    return loss


def next_allowed(aim: float, good: tuple[float, float] | None, bad: tuple[float, float] | None) -> float:
    """What to allow for a rise that is aimed at: in proportion to what one model has shown, or between what two have.

    Args:
        good, bad: what was allowed and how much the loss rose then: the most that was kept to, and the least that was too much.
    """
    if good is not None and bad is not None:
        return good[0] + (aim - good[1]) / (bad[1] - good[1]) * (bad[0] - good[0])
    allowed, risen = good or bad or (aim, aim)
    return allowed * min(max(aim / max(risen, 1e-9), 0.1), 4.0)


def _unseen(searcher: Searcher, ids_NS: Tensor) -> Tensor:
    """Windows of the calibration text that are not among those for calibration."""
    job = searcher.job
    count = max(_LEAST_UNSEEN, len(ids_NS) // 4)
    wanted = replace(job.recipe.calibration, samples=len(ids_NS) + count)
    purpose = f"`max_perplexity_rise` measures on {count} windows besides those of `samples`"
    try:
        more_NS, *_ = calibration_ids(job.source, wanted, job.device, job.say)
    except UsageError as error:
        raise UsageError(f"{purpose}: {error}") from error
    seen = {tuple(row) for row in ids_NS.tolist()}
    unseen = [row for row in more_NS.tolist() if tuple(row) not in seen]
    if not unseen:
        raise UsageError(f"{purpose}, and the text only repeats them: give other text")
    return torch.tensor(unseen)
