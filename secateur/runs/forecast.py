"""What a run will take, before it is started: memory by measuring small pieces, time and disk from its first block.

N: windows, S: tokens of a window.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from secateur.checkpoint.verify import verify
from secateur.core.stats import Level
from secateur.errors import UsageError
from secateur.folder.paths import check_named
from secateur.folder.writer import SHARD_BYTES
from secateur.model.free_memory import free_memory
from secateur.model.load import open_device
from secateur.model.source import open_source
from secateur.model.structure import weight_matrix
from secateur.pipeline.capture import BodyCalls
from secateur.pipeline.hidden import HiddenStates
from secateur.pipeline.memory.footprint import Footprint, Settings, limit_memory
from secateur.pipeline.outcome import Progress
from secateur.pipeline.partial import Partial
from secateur.pipeline.ranks import Ranks
from secateur.pipeline.run import Run
from secateur.recipes.built_in import as_recipe
from secateur.recipes.goals import is_open, parse_target
from secateur.recipes.plan import plan
from secateur.recipes.recipe import Recipe
from secateur.runs.compress import put_together
from secateur.search.effects import LABELS
from secateur.search.library import NEAR, TOKENS, Search, is_both
from secateur.search.search import ATTEMPTS, bare, candidates, check_memory, check_target, dense_bytes

# Batches that the first block is measured with; and how long it may take, in seconds, to be measured again with all warm.
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


def forecast(
    model: str,
    recipe: Recipe | Mapping[str, Any] | str | Path,
    *,
    out: str | Path = ".",
    device: str = "cpu",
    batch_tokens: int | None = None,
    max_memory: str | int | None = None,
    trust_remote_code: bool = False,
    progress: Callable[[Progress], None] = lambda _: None,
) -> Forecast:
    """Tell what `compress` would take in one process, by compressing the first block on a part of the text.

    Args:
        model, recipe, device, batch_tokens, max_memory, trust_remote_code, progress: see `compress`.
        out: a folder on the disk that the checkpoint would be written to; what is measured is written there, and removed.

    Raises:
        SecateurError: as `compress`; `UsageError` where nothing keeps to `max_memory`, too.
    """
    recipe = as_recipe(recipe)
    resolved = plan(recipe)
    limit = limit_memory(max_memory)
    check_named(out, "--out")
    ranks = Ranks(open_device(device))
    place = Path(out).absolute()
    while not os.path.isdir(place):
        place = place.parent
    try:
        scratch_folder = tempfile.TemporaryDirectory(prefix=".secateur-plan-", dir=place)
    except OSError as error:
        raise UsageError(f"{place} cannot be written: {error.strerror or error}") from error

    def say(step: Progress) -> None:
        if step.linear is None:  # linears are nobody's concern here
            progress(step)

    with torch.no_grad(), scratch_folder as folder:
        progress(Progress("opening the model"))
        began = time.perf_counter()
        source = open_source(model, trust_remote_code, dtype=resolved.dtype)
        _ = source.hashes  # kept with it: the runs below do not take the time again
        opened = time.perf_counter() - began
        known = None
        for attempt in range(2):
            progress(Progress("measuring the first block"))
            source.sound.clear()  # a run would check them
            partial = Partial(Path(folder) / f"out-{attempt}", ranks)
            partial.open(overwrite=False, resume=False)
            run = Run(source, recipe, resolved, ranks, partial, batch_tokens, limit, say)
            began = time.perf_counter()
            share, known = _first_block(run, known)
            if time.perf_counter() - began > _SOON:
                break
        assert known is not None
        need, settings = known
        seconds, disk = _extrapolate(run, share)
        seconds["opening"] += opened
        host, on_device = need.peaks(settings)
        if run.device.type != "cuda":
            host = max(host, run.whole_bytes())
        scratch = 0
        if is_open(recipe):
            apart = Partial(Path(folder) / "search", ranks)
            apart.open(overwrite=False, resume=False)
            simple = bare(recipe)
            run_alone = Run(source, simple, plan(simple), ranks, apart, batch_tokens, limit, say)
            searching, whole, scratch = _search(run_alone, recipe)
            if recipe.max_perplexity_rise is not None:
                searching += ATTEMPTS * sum(seconds.values())
            seconds = {"searching": searching, **seconds}
            host = max(host, whole)
            if recipe.target_size is not None:
                disk = parse_target(recipe.target_size).of(dense_bytes(run_alone))
            elif recipe.max_perplexity_rise is not None:
                disk = dense_bytes(run_alone)  # at most
        waiting = (3 if settings.hidden == "file" else 2) * need.tokens * need.hidden
        fisher = run.partial.fisher_file.stat().st_size if run.fisher is not None else 0
        return Forecast(
            settings=settings if run.plan.level else None,
            host=host,
            device=on_device,
            disk=disk,
            scratch=max(scratch, waiting + fisher + min(disk, SHARD_BYTES)),
            seconds=seconds,
            blocks=len(run.blocks),
            free_memory=free_memory(),
            free_disk=shutil.disk_usage(place).free,
        )


def _first_block(run: Run, known: tuple[Footprint, Settings] | None) -> tuple[float, tuple[Footprint, Settings]]:
    """Compress the first block on some of the windows; the share of them, and how the run would be carried out."""
    with run.clock("opening"):
        run.prepare()
        ids_NS = run.calibrate()
        run.begin(ids_NS)
    if ids_NS is not None:
        run.gather_fisher(ids_NS[:_GRADIENTS])
    if ids_NS is None or run.plan.level == Level.NONE:
        if known is None:
            need = run.measure_without_inputs(exact=True)
            known = need, run.choose(lambda _: need, run.batch_tokens)
        run.write_outside()
        run.solve_block_without_inputs(0)
        return 1.0, known
    catcher = run.enter_blocks(ids_NS)
    if known is None:
        need = run.measure(catcher, ids_NS, exact=True)
        known = need, run.choose(lambda _: need, run.batch_tokens)
    settings = known[1]
    run.write_outside()
    few_NS = ids_NS[: _BATCHES * max(1, settings.batch_tokens // ids_NS.shape[1])]
    calls, hiddens = run.catch(catcher, few_NS, settings, run.hidden_file(settings, 0))
    if isinstance(catcher, BodyCalls):
        run.solve_body(
            catcher, calls, hiddens, settings.pause, end=1, ended=lambda _: run.end_block(0, None, keep=True)
        )
        return len(few_NS) / len(ids_NS), known
    outputs = HiddenStates(hiddens.keep_on, run.hidden_file(settings, 1))
    run.solve_block(0, catcher, calls, hiddens, outputs, settings.pause)
    run.end_block(0, outputs)
    return len(few_NS) / len(ids_NS), known


def _search(run: Run, recipe: Recipe) -> tuple[float, int, int]:
    """Seconds of the search of a recipe, and the most bytes that it has in memory and on the disk.

    Args:
        run: by the recipe that it solves candidates by.
    """
    run.prepare()
    check_memory(run, recipe)
    check_target(run, recipe)
    ids_NS, _ = run.calibration_windows()
    few_NS = ids_NS[:_SEARCHED]
    dense = recipe.allocation == "owl"  # it only looks at the dense model
    tried = [] if dense else candidates(recipe, run.plan.quantizer)
    if recipe.target_size is not None:
        both = [choice for choice in tried if is_both(choice)]
        tried = [choice for choice in tried if choice not in both[2 * NEAR :]]
    Search(run, run.partial.folder).rehearse(few_NS, tried)
    spent = {phase: seconds * len(run.blocks) / len(few_NS) for phase, seconds in run.clock.seconds.items()}
    if dense:
        return run.clock.seconds["opening"] + len(ids_NS) * (spent["forward"] + spent["statistics"]), 0, 0
    seconds = run.clock.seconds["opening"] + len(few_NS) * spent["solving"]
    seconds += len(ids_NS) / 2 * (spent["forward"] + spent["statistics"])
    shapes = [weight_matrix(run.linear(name)).shape for name in run.chosen]
    # On the tokens that effects are measured on: a forward pass through all parameters, backward passes that take twice as
    # long, and a product with the weights for each candidate.
    whole = run.parameters / sum(O * I for O, I in shapes)
    seconds += TOKENS / ids_NS.shape[1] * ((1 + 2 * LABELS) * whole + len(tried)) * spent["forward"]
    return seconds, run.dense_memory, 2 * TOKENS * sum(LABELS * O + I for O, I in shapes)


def _extrapolate(run: Run, share: float) -> tuple[dict[str, float], int]:
    """Seconds by phase and bytes of the checkpoint, from those of a run that has ended after its first block."""

    def weights(names: Iterable[str]) -> int:
        return sum(weight_matrix(run.linear(name)).numel() for name in names)

    measured = dict(run.clock.seconds)
    began = time.perf_counter()
    folder = put_together(run, run.report())
    verify(folder, trust_remote_code=run.source.trust_remote_code)  # it lacks blocks: what counts is the time
    ending = time.perf_counter() - began
    written = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    blocks = weights(run.chosen) / max(weights(run.chosen_in(0)), 1)
    block = sum(size for size, _ in run.partial.records[1]["files"].values())
    disk = int(written + (blocks - 1) * block)
    seconds = {"opening": measured.pop("opening")}
    if "gradients" in measured:
        seconds["gradients"] = measured.pop("gradients") * max(1, run.calibration["samples"] / _GRADIENTS)
    for phase, spent in measured.items():
        seconds[phase] = spent * blocks / (share if phase in ("forward", "statistics") else 1)
    seconds["ending"] = ending * disk / written
    return seconds, disk
