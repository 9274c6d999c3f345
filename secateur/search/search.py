"""Finding what becomes of each linear of a recipe that leaves it open."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from secateur.calibration.tokens import hash_of
from secateur.errors import UsageError
from secateur.folder.manifest import hash_of_values
from secateur.folder.writer import write_whole
from secateur.pipeline.calibrate import windows_of
from secateur.pipeline.job import Job
from secateur.pipeline.run import versions
from secateur.recipes.recipe import Recipe
from secateur.search.goal import Goal
from secateur.search.searcher import Attempt, Searcher


def search(job: Job, goal: Goal, folder: Path, attempt: Attempt) -> Recipe:
    """The recipe of a job with what is best for each linear filled in.

    Args:
        job: the first of its processes searches, and tells the others.
        goal: of its recipe.
        folder: of the unfinished run. What was found is kept there, for one that is resumed.
        attempt: compresses the model by a recipe to a folder, for a perplexity to be measured.

    Raises:
        UsageError: the goal cannot be reached (how near one comes is said), or the model does not fit the memory.
    """
    if goal.models and job.ranks.size > 1:
        raise UsageError(
            f"`{goal.name}` makes whole models on the way, which one process does: run it without torchrun, and repeat the run "
            "anywhere with `recipe` OUT/secateur.json"
        )
    said = None
    if job.ranks.first:
        said = _search(job.alone(), goal, folder, attempt)
    return Recipe.from_dict(job.ranks.share(said))


def _search(job: Job, goal: Goal, folder: Path, attempt: Attempt) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="search-", dir=folder) as scratch:
        searcher = Searcher.of(job, Path(scratch), attempt)
        goal.check(searcher)
        windows = windows_of(searcher.job)
        recipe = replace(searcher.asked, calibration=windows.settings)
        identity = [recipe.to_dict(), job.source.hashes, hash_of(windows.ids_NS), versions(), torch.get_num_threads()]
        key = hash_of_values(identity)
        file = folder / "search.json"
        if file.exists():
            kept = json.loads(file.read_text(encoding="utf-8"))
            if kept["key"] == key:
                found: dict[str, Any] = kept["recipe"]
                return found
        searcher = replace(searcher, asked=recipe)
        chosen = searcher.recipe_with(goal.choose(searcher, windows)).to_dict()
    content = json.dumps({"key": key, "recipe": chosen})
    write_whole(file, lambda new: new.write_text(content, encoding="utf-8"))
    return chosen
