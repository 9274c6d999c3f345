"""Finding what becomes of each linear, from a library of what it may become.

N: windows, S: tokens of a window.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.calibration.kept_windows import calibration_ids
from secateur.calibration.tokens import hash_of
from secateur.core.patterns import parse_pattern
from secateur.core.registry import Quantizer
from secateur.errors import UsageError
from secateur.evaluation.perplexity import measure
from secateur.folder.manifest import hash_of_values
from secateur.folder.writer import entry_bytes, write_whole
from secateur.model.block_names import split_name
from secateur.model.load import load_source
from secateur.model.source import open_source
from secateur.model.structure import weight_matrix
from secateur.pipeline.outcome import Progress
from secateur.pipeline.ranks import Ranks
from secateur.pipeline.run import Run, versions
from secateur.recipes.goals import has_target, parse_rise, parse_target, placeholder, with_methods
from secateur.recipes.plan import plan
from secateur.recipes.recipe import Choice, Recipe
from secateur.search.budget import between, share_sparsity
from secateur.search.library import Candidate, Library, Search
from secateur.search.owl import owl
from secateur.solvers.knapsack import choose
from secateur.units import words

# Sparsities that are tried, as shares of the way from the total down to nothing, and up to everything.
_BELOW, _ABOVE = (1 / 3, 2 / 3, 1.0), (0.25, 0.5, 0.75)
# What a target is reached with besides bits alone: sparsity with bits, and sparsity.
_BOTH = ((0.5, 4), (0.5, 3), (0.75, 4), (0.75, 3), (0.75, 2), (0.9, 3))
_PRUNED = tuple((sparsity, None) for sparsity in (0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9))
# Models that are made to find how much a perplexity may be expected to rise; what share of the rise allowed is enough, and
# what share is aimed at.
ATTEMPTS, _ENOUGH, _AIM = 4, 0.8, 0.9
_LEAST_UNSEEN = 8
# A pruner that takes many times as long stands back for this one in the library: what is compared is how linears differ.
_STANDS_IN = {"alps": "sparsegpt"}


Attempt = Callable[[Recipe, Path], object]


def bare(recipe: Recipe) -> Recipe:
    """The recipe by which candidates are solved: without what takes many times as long, where linears are only compared."""
    recipe = with_methods(recipe)
    found = replace(
        placeholder(recipe),
        prune=_STANDS_IN.get(recipe.prune, recipe.prune),
        pruning={} if recipe.prune in _STANDS_IN else recipe.pruning,
        allocation="uniform",
        target_size=None,
        max_perplexity_rise=None,
        reconstruct=False,
        refine=None,
        refining={},
    )
    if plan(found).needs_fisher:
        found = replace(found, quantization={**found.quantization, "sensitivity": "hessian"})
    return found


def candidates(recipe: Recipe, quantizer: Quantizer | None) -> list[Choice]:
    """What a search tries for every linear, besides leaving it alone."""
    recipe = with_methods(recipe)
    bits_alone = [] if quantizer is None else [Choice(None, bits) for bits in quantizer.all_bits]
    if not recipe.prune:
        return bits_alone
    if has_target(recipe):
        return bits_alone + [Choice(*each) for each in (_PRUNED if quantizer is None else _BOTH)]
    total = parse_pattern(recipe.pattern, recipe.sparsity).sparsity
    levels = [total * x for x in _BELOW] + [total + (1 - total) * x for x in _ABOVE]
    return [Choice(level, None if quantizer is None else quantizer.bits) for level in levels]


def search(make_run: Callable[[Recipe], Run], recipe: Recipe, ranks: Ranks, folder: Path, attempt: Attempt) -> Recipe:
    """A recipe with what is best for each linear filled in.

    Args:
        make_run: a run of this process alone for a recipe.
        recipe: one that `is_open`.
        ranks: the processes; the first searches, and tells the others.
        folder: of the unfinished run. What was found is kept there, for one that is resumed.
        attempt: compresses the model by a recipe to a folder, for a perplexity to be measured.

    Raises:
        UsageError: the target cannot be met (the smallest size that can be is said), or the model does not fit the memory.
    """
    if recipe.max_perplexity_rise is not None and ranks.size > 1:
        raise UsageError(
            "--max-perplexity-rise makes whole models on the way, which one process does: run it without torchrun, and repeat "
            "the run anywhere with --recipe OUT/secateur.json"
        )
    recipe = with_methods(recipe)
    said = None
    if ranks.first:
        run = make_run(bare(recipe))
        said = _search(run, recipe, folder, attempt)
    return Recipe.from_dict(ranks.share(said))


def check_memory(run: Run, recipe: Recipe) -> None:
    """Raise UsageError where a search needs the model in memory as a whole, and there is a limit that is less."""
    if recipe.allocation != "owl":
        instead = "search without a limit and repeat the run with --recipe OUT/secateur.json"
        run.check_room(run.dense_memory, "a search", instead)


def check_target(run: Run, recipe: Recipe) -> None:
    """Raise UsageError where what is not compressed is larger than the size to reach, which headers tell before any work."""
    if recipe.target_size is None:
        return
    dense, outside = dense_bytes(run), run.bytes_outside()
    target = parse_target(recipe.target_size).of(dense)
    if target <= outside:
        raise UsageError(
            f"--target-size {recipe.target_size} is {words(target)}, but {words(outside)} ({outside / dense:.3f}x) are not "
            "compressed (embeddings, norms and the head): give more"
        )


def _search(run: Run, recipe: Recipe, folder: Path, attempt: Attempt) -> dict[str, Any]:
    run.prepare()
    check_memory(run, recipe)
    check_target(run, recipe)
    ids_NS, settings = run.calibration_windows()
    recipe = replace(recipe, calibration=settings)
    identity = [recipe.to_dict(), run.source.hashes, hash_of(ids_NS), versions(), torch.get_num_threads()]
    key = hash_of_values(identity)
    file = folder / "search.json"
    if file.exists():
        kept = json.loads(file.read_text(encoding="utf-8"))
        if kept["key"] == key:
            return kept["recipe"]
    with tempfile.TemporaryDirectory(prefix="search-", dir=folder) as scratch:
        found = _choices(Search(run, Path(scratch)), ids_NS, recipe, attempt)
    chosen = replace(recipe, linears=found).to_dict()
    content = json.dumps({"key": key, "recipe": chosen})
    write_whole(file, lambda new: new.write_text(content, encoding="utf-8"))
    return chosen


def _choices(search: Search, ids_NS: Tensor, recipe: Recipe, attempt: Attempt) -> dict[str, Choice]:
    run = search.run
    names = [name for name in run.names if name in run.chosen]
    weights = {name: weight_matrix(run.linear(name)).numel() for name in names}
    bits = None if has_target(recipe) or run.plan.quantizer is None else run.plan.quantizer.bits
    if recipe.allocation == "owl":
        return _owl(search, ids_NS, recipe, weights, bits)
    if has_target(recipe):
        return _within(search, ids_NS, recipe, weights, attempt)
    tried = candidates(recipe, run.plan.quantizer)
    library = search.library(ids_NS, tried)
    if not recipe.prune:
        budget = sum(c.bytes for each in library.values() for c in each if c.choice.bits == bits)
        return _chosen(library, lambda c: c.divergence, lambda c: c.bytes, budget)
    total = parse_pattern(recipe.pattern, recipe.sparsity).sparsity
    levels = [choice.sparsity or 0.0 for choice in tried]
    costs = [[candidate.divergence for candidate in library[name]] for name in names]
    shares = share_sparsity(levels, costs, [weights[name] for name in names], total)
    return {name: Choice(share, bits) for name, share in zip(names, shares, strict=True)}


def dense_bytes(run: Run) -> int:
    """The size of the files of the dense model in the dtype that a run writes."""
    return run.bytes_outside() + sum(map(run.dense_bytes, run.chosen))


def _owl(
    search: Search, ids_NS: Tensor, recipe: Recipe, weights: Mapping[str, int], bits: int | None
) -> dict[str, Choice]:
    outliers = search.outliers(ids_NS)
    blocks: dict[str, list[str]] = {}
    for name in weights:
        blocks.setdefault(split_name(name, search.run.lists)[0], []).append(name)
    counts = [sum(weights[name] for name in names) for names in blocks.values()]
    # The mean of a block's linears, as the authors' code takes all weights of a block together.
    shares = [
        sum(outliers[name] * weights[name] for name in names) / count
        for names, count in zip(blocks.values(), counts, strict=True)
    ]
    total = parse_pattern(recipe.pattern, recipe.sparsity).sparsity
    found = owl(shares, counts, total)
    return {name: Choice(share, bits) for names, share in zip(blocks.values(), found, strict=True) for name in names}


def _within(
    search: Search, ids_NS: Tensor, recipe: Recipe, weights: Mapping[str, int], attempt: Attempt
) -> dict[str, Choice]:
    """What reaches the target of a recipe."""
    run = search.run
    dense = dense_bytes(run)
    outside = run.bytes_outside()
    target = None if recipe.target_size is None else parse_target(recipe.target_size).of(dense)
    if target is not None and target >= dense:
        raise UsageError(
            f"--target-size {recipe.target_size} is {words(target)}, which the dense model of {words(dense)} does not exceed"
        )
    room = None if target is None else target - outside
    # Whether there are any is to be known before the search.
    held_NS = _unseen(run, ids_NS) if target is None else None
    library = search.library(ids_NS, candidates(recipe, run.plan.quantizer), room)
    library = {
        name: [*each, Candidate(Choice(), run.dense_bytes(name) + entry_bytes(f"{name}.weight"), 0.0)]
        for name, each in library.items()
    }
    if not recipe.quantize:
        library = {name: _finer(each) for name, each in library.items()}
    if held_NS is not None:
        return _within_rise(search, held_NS, recipe, library, attempt)
    assert room is not None
    assert target is not None
    least = sum(min(c.bytes for c in each) for each in library.values())
    if least > room:
        smallest = outside + least
        raise UsageError(
            f"--target-size {recipe.target_size} is {words(target)}: the smallest that these methods reach is "
            f"{words(smallest)} ({smallest / dense:.3f}x), of which {words(outside)} is not compressed"
        )
    return _chosen(library, lambda c: c.divergence, lambda c: c.bytes, room)


def _within_rise(
    search: Search, held_NS: Tensor, recipe: Recipe, library: Library, attempt: Attempt
) -> dict[str, Choice]:
    """The smallest that was found with perplexity risen by so much at most, on windows of the same text that nothing else saw.

    The divergences of all linears together are not quite their sum. So models are made and measured, each allowed so much more
    or less as the one before says.
    """
    run = search.run
    assert recipe.max_perplexity_rise is not None
    limit = math.log1p(parse_rise(recipe.max_perplexity_rise))
    model = run.load_whole()
    dense_loss = measure(model, held_NS, bos=run.bos_ids).loss
    del model
    best, least, allowed = None, math.inf, limit
    made: list[dict[str, Choice]] = []
    good: tuple[float, float] | None = None
    bad: tuple[float, float] | None = None
    for number in range(1, ATTEMPTS + 1):
        linears = _chosen(library, lambda c: c.bytes, lambda c: c.divergence, allowed)
        if linears in made or all(choice == Choice() for choice in linears.values()):
            break
        made.append(linears)
        run.progress(Progress(f"making model {number} to measure its perplexity"))
        folder = search.folder / "attempt"
        attempt(replace(recipe, linears=linears), folder)
        model = load_source(open_source(str(folder)), torch.float32, run.device)
        risen = measure(model, held_NS, bos=run.bos_ids).loss - dense_loss
        del model
        shutil.rmtree(folder)
        run.progress(Progress(f"model {number}: perplexity {math.expm1(risen):+.2%} on text that it was not made with"))
        least = min(least, risen)
        if risen <= limit:
            best, good = linears, (allowed, risen)
            if risen > _ENOUGH * limit:
                break
        else:
            bad = (allowed, risen)
        allowed = _next(_AIM * limit, good, bad)
    if best is None:
        found = (
            f"the least that was measured is {math.expm1(least):.2%}"
            if least < math.inf
            else "more is expected of each that they do to any linear"
        )
        raise UsageError(
            f"--max-perplexity-rise {recipe.max_perplexity_rise} cannot be kept with these methods: {found}; "
            "give more, or other methods"
        )
    return best


def _next(aim: float, good: tuple[float, float] | None, bad: tuple[float, float] | None) -> float:
    """What to allow for a rise that is aimed at: in proportion to what one model has shown, or between what two have.

    Args:
        good, bad: what was allowed and how much the loss rose then: the most that was kept to, and the least that was too much.
    """
    if good is not None and bad is not None:
        return good[0] + (aim - good[1]) / (bad[1] - good[1]) * (bad[0] - good[0])
    allowed, risen = good or bad or (aim, aim)
    return allowed * min(max(aim / max(risen, 1e-9), 0.1), 4.0)


def _unseen(run: Run, ids_NS: Tensor) -> Tensor:
    """Windows of the calibration text that are not among those for calibration."""
    count = max(_LEAST_UNSEEN, len(ids_NS) // 4)
    wanted = replace(run.recipe.calibration, samples=len(ids_NS) + count)
    purpose = f"--max-perplexity-rise measures on {count} windows besides those of --samples"
    try:
        more_NS, *_ = calibration_ids(run.source, wanted, run.device, lambda step: run.progress(Progress(step)))
    except UsageError as error:
        raise UsageError(f"{purpose}: {error}") from error
    seen = {tuple(row) for row in ids_NS.tolist()}
    unseen = [row for row in more_NS.tolist() if tuple(row) not in seen]
    if not unseen:
        raise UsageError(f"{purpose}, and the text only repeats them: give other text")
    return torch.tensor(unseen)


def _chosen(
    library: Library, cost: Callable[[Candidate], float], size: Callable[[Candidate], float], most: float
) -> dict[str, Choice]:
    """What costs least within a total size, where either may be bytes and the other the divergence."""
    costs = [[cost(c) for c in each] for each in library.values()]
    sizes = [[size(c) for c in each] for each in library.values()]
    chosen = choose(costs, sizes, most)
    return {name: each[i].choice for (name, each), i in zip(library.items(), chosen, strict=True)}


def _finer(candidates: list[Candidate]) -> list[Candidate]:
    """Sparsities between those that were solved, with what they would cost: see `share_sparsity`."""
    solved = [c for c in candidates if c.choice.sparsity is not None]
    found = list(candidates)
    for low, high in pairwise(solved):
        assert low.choice.sparsity is not None
        assert high.choice.sparsity is not None
        for step in range(1, 20):
            x = step / 20
            cost = float(between((0, 1), (low.divergence, high.divergence), x))
            sparsity = low.choice.sparsity + x * (high.choice.sparsity - low.choice.sparsity)
            found.append(Candidate(Choice(sparsity), round(low.bytes + x * (high.bytes - low.bytes)), cost))
    return found
