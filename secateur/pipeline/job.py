"""What a run is given to do, and by what means."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from secateur.core.ranks import Ranks
from secateur.memory.room import Room
from secateur.model.source import Source
from secateur.pipeline.outcome import Progress
from secateur.pipeline.shared import Shared
from secateur.recipes.plan import Plan, plan
from secateur.recipes.recipe import Recipe

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """A run before it starts.

    Attributes:
        source: the model.
        recipe, plan: what is to be done, in words and resolved.
        ranks: the processes that do it.
        batch_tokens: how many tokens are run at a time; None: what the memory allows.
        limit: the most memory of the host, in bytes; None: most of what is free.
        progress: told of every step.
        shared: what other runs on the same model have found.
        text: where windows come from, if `source` is less than the model that is given: from that one.
        notes: what a user should know of the job itself.
    """

    source: Source
    recipe: Recipe
    plan: Plan
    ranks: Ranks
    batch_tokens: int | None = None
    limit: int | None = None
    progress: Callable[[Progress], None] = lambda _: None
    shared: Shared | None = None
    text: Shared | None = None
    notes: tuple[str, ...] = ()

    @property
    def given(self) -> Source:
        """The model that was given, whole."""
        return self.source if self.text is None else self.text.source

    @property
    def device(self) -> torch.device:
        return self.ranks.device

    @property
    def room(self) -> Room:
        """The memory of the host that there is."""
        return Room(self.limit, self.device.type)

    def say(self, stage: str) -> None:
        """Tell of a step that has no linears."""
        _LOG.info(stage)
        self.progress(Progress(stage))

    def with_recipe(self, recipe: Recipe) -> Job:
        """The same for another recipe."""
        return replace(self, recipe=recipe, plan=plan(recipe))

    def alone(self) -> Job:
        """The same in this process alone."""
        return replace(self, ranks=Ranks(self.device))
