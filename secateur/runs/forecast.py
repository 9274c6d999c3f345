"""What a run will take, before it is started: memory by measuring small pieces, time and disk from one block of each kind.

N: windows, S: tokens of a window.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from secateur.calibration.effects import LABELS
from secateur.checkpoint.verify import verify
from secateur.core.ranks import Ranks
from secateur.core.stats import Level
from secateur.folder.paths import check_named, scratch_folder
from secateur.folder.writer import SHARD_BYTES, entry_bytes
from secateur.memory.footprint import Footprint, Settings
from secateur.memory.free_memory import free_memory
from secateur.memory.room import limit_memory
from secateur.model.load import open_device
from secateur.model.source import open_source, with_revision
from secateur.model.structure import weight_matrix
from secateur.pipeline.calibrate import whole_memory, windows_of
from secateur.pipeline.choose_settings import choose_settings
from secateur.pipeline.job import Job
from secateur.pipeline.measure import measure, measure_without_inputs
from secateur.pipeline.outcome import Progress
from secateur.pipeline.prepared import Prepared
from secateur.pipeline.run import (
    Run,
    begin,
    enter,
    gather_fisher,
    solve_block,
    solve_block_without_inputs,
    solve_body,
    solve_tables,
)
from secateur.pipeline.shared_dictionaries import all_dictionaries, ready_dictionaries
from secateur.recipes.built_in import as_recipe
from secateur.recipes.plan import plan
from secateur.recipes.recipe import Recipe
from secateur.runs.compress import put_together
from secateur.runs.drop_experts import provisionally
from secateur.search.goal import Goal, goal_of
from secateur.search.searcher import TOKENS, Searcher
from secateur.search.table_candidates import BITS as TABLE_BITS
from secateur.search.table_candidates import TOKENS as TABLE_TOKENS
from secateur.unfinished.partial import Partial
from secateur.walking.capture import BodyCalls
from secateur.walking.clock import Clock
from secateur.walking.walk import Gathered

# Batches that a block is measured with; and how long that may take, in seconds, to be done again with all warm.
_BATCHES = 2
# Windows that gradients are measured on.
_GRADIENTS = 2
_SOON = 20.0
# Windows that the candidates of a search are solved on.
_SEARCHED = 4


@dataclass(frozen=True)
class Forecast:
    """What a run on this machine is expected to take.

    Attributes:
        settings: how it would be carried out; None where no text is looked at.
        host, device: the most memory of each in use, in bytes; `device` is 0 on a CPU.
        disk: the new checkpoint, in bytes.
        scratch: the most that lies on the disk besides until the run ends, in bytes.
        seconds: by phase, as in `Report.phases`.
        blocks: how many there are.
        free_memory, free_disk: in bytes, now.
    """

    settings: Settings | None
    host: int
    device: int
    disk: int
    scratch: int
    seconds: dict[str, float]
    blocks: int
    free_memory: int
    free_disk: int

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())


def forecast(  # noqa: PLR0913 - users name them
    model: str,
    recipe: Recipe | Mapping[str, Any] | str | Path,
    *,
    out: str | Path = ".",
    device: str = "cpu",
    batch_tokens: int | None = None,
    max_memory: str | int | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Callable[[Progress], None] = lambda _: None,
) -> Forecast:
    """Tell what `compress` would take in one process, by compressing a block of each kind on a part of the text.

    Blocks whose linears have the same names are of one kind.

    Args:
        model, recipe, device, batch_tokens, max_memory, revision, trust_remote_code, progress: see `compress`.
        out: a folder on the disk that the checkpoint would be written to; what is measured is written there, and removed.

    Raises:
        SecateurError: as `compress`; `UsageError` where nothing keeps to `max_memory`, too.
    """
    model, recipe = with_revision(model, revision), as_recipe(recipe)
    resolved, goal = plan(recipe), goal_of(recipe)
    limit = limit_memory(max_memory)
    check_named(out, "`out`")
    ranks = Ranks(open_device(device))

    def say(step: Progress) -> None:
        if step.linear is None:  # linears are nobody's concern here
            progress(step)

    with torch.no_grad(), scratch_folder(out, ".secateur-plan-") as folder:
        progress(Progress("opening the model"))
        began = time.perf_counter()
        source = open_source(model, trust_remote_code, dtype=resolved.dtype)
        _ = source.hashes  # kept with it: the runs below do not take the time again
        opened = time.perf_counter() - began
        job, scoring = provisionally(Job(source, recipe, resolved, ranks, batch_tokens, limit, say), folder)
        found = _forecast(job, goal, folder, opened)
        if scoring:
            seconds = {**found.seconds, "searching": found.seconds.get("searching", 0.0) + scoring}
            found = replace(found, seconds=seconds)
        return found


def _forecast(job: Job, goal: Goal | None, folder: Path, opened: float) -> Forecast:
    """What a job would take, found out in a folder for what is written on the way; its model took `opened` seconds to open."""
    begun = _measured(job, folder)
    seconds, disk = _extrapolate(begun)
    seconds["opening"] += opened
    host, on_device = begun.need.peaks(begun.settings)
    if job.device.type != "cuda":
        host = max(host, whole_memory(begun.run.job, begun.run.prepared))
    searched = _Searched(0.0, 0, 0, None)
    if goal is not None:
        searched = _searched(job, goal, folder)
        seconds = {"searching": searched.seconds + goal.models * sum(seconds.values()), **seconds}
        disk = disk if searched.result is None else searched.result
    return Forecast(
        settings=begun.settings if job.plan.level else None,
        host=max(host, searched.host),
        device=on_device,
        disk=disk,
        scratch=max(searched.scratch, begun.scratch + min(disk, SHARD_BYTES)),
        seconds=seconds,
        blocks=len(begun.run.prepared.blocks),
        free_memory=free_memory(),
        free_disk=shutil.disk_usage(folder).free,
    )


@dataclass(frozen=True)
class _Measured:
    """A run that has compressed a block of each kind and no more.

    Attributes:
        run: that has.
        share: of the windows that went through them.
        need, settings: what the whole run holds in memory, and how it would be carried out.
        seconds: of each block that was compressed, in the order of the records, by phase; the first one's are all from the
            beginning.
        learning: of dictionaries that blocks share, by phase, which is not in `seconds`.
    """

    run: Run
    share: float
    need: Footprint
    settings: Settings
    seconds: dict[int, dict[str, float]]
    learning: dict[str, float] = field(default_factory=dict)

    @property
    def scratch(self) -> int:
        """Bytes on the disk besides the checkpoint: inputs of blocks and squared gradients."""
        waiting = (3 if self.settings.hidden == "file" else 2) * self.need.waiting
        fisher = self.run.fisher
        return waiting + (fisher.file.stat().st_size if fisher is not None else 0)


def _measured(job: Job, folder: Path) -> _Measured:
    """Compress a block of each kind; twice, where it takes no time: then all is warm."""
    known: _Measured | None = None
    for attempt in range(2):
        job.say("measuring a block of each kind")
        job.source.sound.clear()  # a run would check them
        partial = Partial(folder / f"out-{attempt}", job.ranks)
        partial.open(overwrite=False, resume=False)
        began = time.perf_counter()
        known = _compressed(begin(job, partial, Clock(job.device)), known)
        if time.perf_counter() - began > _SOON:
            break
    assert known is not None
    return known


def _compressed(run: Run, known: _Measured | None) -> _Measured:
    """Compress a block of each kind on some of the windows; `known`: from an earlier time."""

    def settle(measure: Callable[[bool], Footprint]) -> tuple[Footprint, Settings]:
        if known is not None:
            return known.need, known.settings
        need = measure(True)
        return need, choose_settings(lambda _: need, run.job.limit, run.job.device, run.job.batch_tokens)

    windows, walker, kinds = run.windows, run.walker, run.prepared.first_of_kinds
    if windows is not None:
        gather_fisher(run, windows.ids_NS[:_GRADIENTS])
    if windows is None or run.job.plan.level == Level.NONE:
        need, settings = settle(lambda exact: measure_without_inputs(run.prepared, exact))
        solve_tables(run, run.prepared.tables)
        run.recorder.write_outside()
        seconds = _timed(run, kinds, lambda number: solve_block_without_inputs(run, number))
        return _Measured(run, 1.0, need, settings, seconds)
    ids_NS = windows.ids_NS
    catcher = enter(run, ids_NS)
    need, settings = settle(lambda exact: measure(walker, catcher, ids_NS, exact))
    run.recorder.write_outside()
    few_NS = ids_NS[: _BATCHES * max(1, settings.batch_tokens // ids_NS.shape[1])]
    beside = run.job.recipe.match_dense
    journey = walker.catch(catcher, few_NS, settings, run.partial.hidden_file, len(ids_NS), beside)
    learning: defaultdict[str, float] = defaultdict(float)

    def compress(number: int) -> None:
        if isinstance(catcher, BodyCalls):
            solve_body(run, journey, range(number, number + 1))
        else:
            walker.read(number)
            before = dict(run.clock.seconds)
            ready_dictionaries(journey, run.recorder, number)
            for phase, spent in run.clock.seconds.items():
                learning[phase] += spent - before.get(phase, 0.0)
                run.clock.seconds[phase] = before.get(phase, 0.0)
            # One that is not the first sees what the first made, for what comes between.
            solve_block(run, journey, number)

    seconds = _timed(run, [0] if isinstance(catcher, BodyCalls) else kinds, compress)
    return _Measured(run, len(few_NS) / len(ids_NS), need, settings, seconds, dict(learning))


def _timed(run: Run, numbers: list[int], compress: Callable[[int], None]) -> dict[int, dict[str, float]]:
    """Compress blocks; what each took by phase, the first with all before it."""
    seconds: dict[int, dict[str, float]] = {}
    for number in numbers:
        before = dict(run.clock.seconds) if seconds else {}
        compress(number)
        seconds[number] = {phase: spent - before.get(phase, 0.0) for phase, spent in run.clock.seconds.items()}
    return seconds


@dataclass(frozen=True)
class _Searched:
    """What a search takes.

    Attributes:
        seconds: of it, without the models that it makes.
        host, scratch: the most bytes that it has in memory and on the disk.
        result: bytes of the checkpoint, at most; None: it has those of any other.
    """

    seconds: float
    host: int
    scratch: int
    result: int | None


def _searched(job: Job, goal: Goal, folder: Path) -> _Searched:
    """Solve the first block's linears on a few windows, for everything that a search tries."""
    searcher = Searcher.of(job, folder, None)
    prepared, clock = searcher.prepared, searcher.clock
    goal.check(searcher)
    windows = windows_of(searcher.job)
    ids_NS = windows.ids_NS
    few_NS = ids_NS[:_SEARCHED]
    tried, result = goal.tried(searcher), goal.result_bytes(searcher)

    def solve(gathered: list[Gathered]) -> None:
        for names, stats in gathered:
            searcher.solve(names, stats, searcher.fitting(names, tried))

    searcher.walk(few_NS, solve, searcher.level, blocks=1)
    spent = {phase: seconds * len(prepared.blocks) / len(few_NS) for phase, seconds in clock.seconds.items()}
    opening = clock.seconds["opening"]
    if not tried:  # it only looks at the dense model
        return _Searched(opening + len(ids_NS) * (spent["forward"] + spent["statistics"]), 0, 0, result)
    # Blocks of a mixture of experts may follow some without, so that weights tell more than their number.
    weights = searcher.weights
    ratio = sum(weights.values()) / max(sum(weights[name] for name in prepared.chosen_in(0)), 1)
    seconds = ratio * clock.seconds["solving"] + len(ids_NS) / 2 * (spent["forward"] + spent["statistics"])
    shapes = {name: weight_matrix(prepared.linear(name)).shape for name in prepared.chosen}
    # On the tokens that effects are measured on: a forward pass through all parameters, backward passes that take twice as
    # long, and a product with the weights for each candidate.
    whole = prepared.parameters / sum(O * I for O, I in shapes.values())
    seconds += TOKENS / ids_NS.shape[1] * ((1 + 2 * LABELS) * whole + len(tried)) * spent["forward"]
    measured = TABLE_TOKENS / ids_NS.shape[1] * (1 + len(searcher.tables) * len(TABLE_BITS))
    seconds += measured * whole * spent["forward"] if searcher.tables else 0.0
    rows = TOKENS * sum(searcher.reached_share(name) * (LABELS * O + I) for name, (O, I) in shapes.items())
    seconds = opening + getattr(goal, "rounds", 1) * seconds
    return _Searched(seconds, prepared.whole_memory, int(2 * rows), result)


def _extrapolate(measured: _Measured) -> tuple[dict[str, float], int]:
    """Seconds by phase and bytes of the checkpoint, from those of a run that has compressed a block of each kind."""
    run, prepared = measured.run, measured.run.prepared
    first, *_ = begun = [dict(seconds) for seconds in measured.seconds.values()]
    seconds = defaultdict(float, opening=first.pop("opening"))
    gradients = first.pop("gradients", 0.0)
    if gradients:
        assert run.windows is not None
        seconds["gradients"] = gradients * max(1, len(run.windows.ids_NS) / _GRADIENTS)
    times = _times(prepared, list(measured.seconds))
    for spent, more in zip(begun, times, strict=True):
        for phase in spent:
            seconds[phase] += spent[phase] * more / (measured.share if phase in ("forward", "statistics") else 1)
    blocks = dict(zip(measured.seconds, times, strict=True))
    dictionaries, more_bytes = all_dictionaries(run.recorder, blocks)
    for phase, took in measured.learning.items():
        seconds[phase] += took * dictionaries / (measured.share if phase in ("forward", "statistics") else 1)
    began = time.perf_counter()
    folder = put_together(run, run.report())
    verify(folder, trust_remote_code=run.job.source.trust_remote_code)  # it lacks blocks: what counts is the time
    ending = time.perf_counter() - began
    written = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    sizes = [sum(size for size, _ in record["files"].values()) for record in run.partial.records[1:]]
    disk = int(written + sum((more - 1) * size for more, size in zip(times, sizes, strict=True)) + more_bytes)
    head = prepared.head
    if head is not None and all(table.name != head for table in run.recorder.tables):  # solved with the last block
        disk += prepared.table_bytes(head)
        linears = sum(weight_matrix(prepared.linear(name)).numel() for name in prepared.chosen)
        seconds["solving"] *= 1 + weight_matrix(prepared.linear(head)).numel() / max(linears, 1)
    exact = _left_bytes(prepared)
    disk = disk if exact is None else exact
    seconds["ending"] = ending * disk / written
    return dict(seconds), disk


def _left_bytes(prepared: Prepared) -> int | None:
    """Of the files of what a structured pattern leaves; None where there is none, or transformers makes other tensors."""
    structure, weights = prepared.structure, prepared.weights
    if structure is None or weights.converted:
        return None
    tensors = {name: tensor for name, tensor in prepared.model.state_dict(keep_vars=True).items() if name in weights}
    total = sum(weights.bytes_as(name, None) + entry_bytes(name) for name in weights.unused)
    for name, shape in structure.shapes(tensors).items():
        written = weights.name_to_write(name)
        size = weights.bytes_as(written, prepared.dtype_of(name)) * math.prod(shape) // max(tensors[name].numel(), 1)
        offsets = [total, total + size]
        entry = {written: {"dtype": "BF16", "shape": shape, "data_offsets": offsets}}
        total += size + len(json.dumps(entry, separators=(",", ":"))) - 1
    return total


def _times(prepared: Prepared, numbers: list[int]) -> list[float]:
    """How many times the weights of each of some blocks all the blocks of its kind have."""

    def weights(number: int) -> int:
        if not prepared.chosen:  # blocks are written as they are
            return sum(parameter.numel() for parameter in prepared.blocks[number].parameters())
        return sum(weight_matrix(linear).numel() for linear in prepared.chosen_in(number).values())

    all_of: defaultdict[frozenset[str], int] = defaultdict(int)
    for number, kind in enumerate(prepared.kinds):
        all_of[kind if len(numbers) > 1 else prepared.kinds[0]] += weights(number)
    return [all_of[prepared.kinds[number]] / max(weights(number), 1) for number in numbers]
