"""Many recipes on one model: compress by each, measure, and write what came of them beside each other."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from filelock import FileLock

from secateur._version import __version__
from secateur.calibration.text import inputs_of
from secateur.calibration.tokens import hash_of
from secateur.errors import CheckpointError, Interrupted, SecateurError, UsageError, one_line
from secateur.evaluation.eval_text import Text, scored_bytes
from secateur.evaluation.perplexity import Quality
from secateur.evaluation.quality import Runner, Size, bits_per_byte, size_of
from secateur.evaluation.reference import KEPT_TOKENS, KeptReference
from secateur.folder.paths import (
    SWEEP_FILES,
    SWEEP_MODELS,
    SWEEP_RESULT,
    Inputs,
    check_apart,
    check_free,
    drop_empty,
    make_parents,
    place_of,
)
from secateur.folder.writer import put_in_place, write_whole
from secateur.memory.peak import forget_peak
from secateur.memory.room import limit_memory
from secateur.model.load import open_device
from secateur.model.source import open_source, with_revision
from secateur.pipeline.outcome import Progress
from secateur.pipeline.shared import Shared
from secateur.recipes.command_line import command_of
from secateur.recipes.plan import plan
from secateur.recipes.recipe import Recipe
from secateur.report.bench_plot import check_matplotlib
from secateur.report.sweep_report import write_report
from secateur.report.sweep_result import LinearPoint, Measured, Point, SweepResult
from secateur.runs.compress import compress
from secateur.search.goal import goal_of
from secateur.unfinished.partial import LOCK_NAME, check_partial, first_difference, lock_folder, unlock

_SHARED = "shared"
# What a sweep puts into its folder; what is not quite written yet has the number of a process in its name.
_OWN = re.compile(rf"{LOCK_NAME}|{_SHARED}|{SWEEP_MODELS}|(?:{'|'.join(map(re.escape, SWEEP_FILES))})(?:\.\d+\.part)?")


@dataclass(frozen=True)
class Sweep:
    """What a sweep goes through.

    Attributes:
        model: whatever `compress` takes as MODEL.
        recipes: by name, in the order in which they are gone through.
        text, runner: what is measured on, and how.
        cache_tokens: of the dense model's predictions, see `keep_reference`.
        max_memory: of each compression, see `compress`.
        keep_models: whether the checkpoints stay, in `OUT/models`.
        revision: of the model, see `compress`.
    """

    model: str
    recipes: Sequence[tuple[str, Recipe]]
    text: Text = Text()  # noqa: RUF009 - it is frozen
    runner: Runner = Runner()  # noqa: RUF009
    cache_tokens: int | None = KEPT_TOKENS
    max_memory: str | int | None = None
    keep_models: bool = False
    revision: str | None = None


def sweep(
    asked: Sweep,
    out: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: Callable[[Progress], None] = lambda _: None,
) -> SweepResult:
    """Compress a model by each recipe, measure what comes of it, and write a report to the folder `out`.

    The recipes go one after the other, on the same calibration windows and squared gradients, and the dense model is measured
    once. A recipe that fails is recorded, and the others go on. Nothing stands under the name `out` until all is done; until
    then `OUT.partial` keeps the points that are.

    Args:
        asked: what to go through.
        out: the folder to make.
        resume: whether to go on with a sweep that was interrupted, if there is one: its points are taken over if they are asked
            for again.
        overwrite: whether `out` may be replaced, if secateur wrote it or it is empty, and an unfinished sweep be begun again.
        progress: told of every step.

    Raises:
        UsageError: a recipe cannot be carried out, `out` stands in the way, or the sweep to go on with was another.
        SecateurError: the model cannot be measured.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("a sweep runs in one process: leave torchrun out")
    check_matplotlib("the report of a sweep", "sweep")
    for name, recipe in asked.recipes:
        plan(recipe)
        try:
            goal_of(recipe)
        except UsageError as error:
            raise UsageError(f"recipe {name!r}: {error}") from error
    named = with_revision(asked.model, asked.revision)
    asked = dataclasses.replace(asked, model=named, max_memory=limit_memory(asked.max_memory))
    out, inputs = place_of(out), _inputs(asked)
    check_free(out, overwrite, inputs)
    with _partial(out, resume, overwrite, inputs) as (folder, lock):
        result = _SweepRun(asked, folder, progress).run()
        progress(Progress("writing the report"))
        write_report(result, folder)
        shutil.rmtree(folder / _SHARED, ignore_errors=True)
        unlock(lock)  # first: Windows removes no open file
        (folder / LOCK_NAME).unlink(missing_ok=True)
        check_free(out, overwrite, inputs)  # another run may have made it meanwhile
        put_in_place(folder, out)
    return result


def _inputs(asked: Sweep) -> Inputs:
    """What a sweep reads."""
    found = {"MODEL": asked.model, **inputs_of("the text of `data`", asked.text.data)}
    for name, recipe in asked.recipes:
        found |= inputs_of(f"the calibration text of {name}", recipe.calibration.source)
    return found


@contextmanager
def _partial(out: Path, resume: bool, overwrite: bool, inputs: Inputs) -> Iterator[tuple[Path, FileLock]]:
    """The folder of an unfinished sweep, for this process alone. Where the block fails it stays, if the sweep had begun.

    Raises:
        UsageError: the folder holds an unfinished sweep, or something else, and what is to become of that was not said.
        SecateurError: it cannot be written.
    """
    folder = out.with_name(f"{out.name}.partial")
    result = folder / SWEEP_RESULT
    if os.path.lexists(folder):
        check_partial(folder, _OWN, (LOCK_NAME, SWEEP_RESULT), "sweep")
        check_apart(folder, inputs)
        if result.exists() and not overwrite and not resume:
            raise UsageError(
                f"{folder} holds a sweep that was interrupted: give `resume` to go on with it, or `overwrite` to begin again"
            )
    parents = make_parents(folder)
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        drop_empty(parents)
        raise UsageError(f"{folder} cannot be created: {error.strerror or error}") from error
    lock = lock_folder(folder)
    try:
        if not (resume and result.exists()):
            for path in folder.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.name != LOCK_NAME:
                    path.unlink()
        yield folder, lock
    except BaseException as error:
        left = f"what is done is kept in {folder}: run again with `resume` to go on"
        if not result.exists():
            left = "nothing is left behind"
            shutil.rmtree(folder, ignore_errors=True)
            drop_empty(parents)
        if isinstance(error, Interrupted):
            error.left = left
        if isinstance(error, OSError):
            raise SecateurError(f"{folder} cannot be written: {error.strerror or error}; {left}") from error
        if isinstance(error, SecateurError) and not isinstance(error, UsageError | CheckpointError):
            raise SecateurError(f"{error}; {left}") from error
        raise
    finally:
        unlock(lock)


class _SweepRun:
    """A sweep that is going on: what its steps share."""

    def __init__(self, asked: Sweep, folder: Path, progress: Callable[[Progress], None]) -> None:
        self.asked, self.folder, self.progress = asked, folder, progress
        progress(Progress("opening the model"))
        self.source = asked.runner.open(asked.model)
        self.size = size_of(self.source)
        tokenizer = self.source.tokenizer()
        self.cut = asked.text.cut(tokenizer)
        self.bytes = scored_bytes(tokenizer, self.cut.ids_KS, self.cut.stride, self.cut.bos)
        self._open: dict[torch.dtype | None, Shared] = {}

    def run(self) -> SweepResult:
        before = self._before()
        self._read_calibration()
        self.reference, dense = self._dense(before)
        result = SweepResult(
            **self._identity(),
            model=self.asked.model,
            parameters=self.size.parameters,
            date=before.date if before else time.strftime("%Y-%m-%d"),
            dense=dense,
            points=(),
        )
        # What failed is tried again: the reason may be gone.
        waiting = {_key(p.name, p.asked): p for p in before.points if p.failure is None} if before else {}
        self._keep(result, waiting)
        folders = set()
        for number, (name, recipe) in enumerate(self.asked.recipes, 1):
            key = _key(name, recipe.to_dict())
            folder = self.folder / SWEEP_MODELS / f"{_plain(name)}-{key}"
            folders.add(folder)
            point = waiting.pop(key, None)
            if point is None or (self.asked.keep_models and not folder.exists()):
                self.progress(Progress(f"recipe {number} of {len(self.asked.recipes)}: {name}"))
                point = self._point(folder, name, recipe)
            result = dataclasses.replace(result, points=(*result.points, point))
            self._keep(result, waiting)
        self._keep(result, {})
        # Of recipes that were asked for in an earlier run and no more, too.
        for folder in set((self.folder / SWEEP_MODELS).glob("*")) - folders:
            shutil.rmtree(folder)
        if not self.asked.keep_models:
            shutil.rmtree(self.folder / SWEEP_MODELS, ignore_errors=True)
        return result

    def shared(self, recipe: Recipe) -> Shared:
        """What a recipe's run has in common with others: all of them, but on a GGUF file those that write another dtype."""
        dtype = plan(recipe).dtype if self.source.folder is None else None
        if dtype not in self._open:
            source, folder = self.source, self.folder / _SHARED
            if source.folder is None:
                source = open_source(self.asked.model, dtype=dtype)
                folder = folder / str(dtype or source.dtype).removeprefix("torch.")
            folder.mkdir(parents=True, exist_ok=True)
            self._open[dtype] = Shared(source, folder)
        return self._open[dtype]

    def _read_calibration(self) -> None:
        """Find out before anything is run whether the text of all recipes can be had."""
        device, frugal = open_device(self.asked.runner.device), self.asked.max_memory is not None

        def say(stage: str) -> None:
            self.progress(Progress(stage))

        for _, recipe in self.asked.recipes:
            if plan(recipe).needs_text:
                self.shared(recipe).calibration_ids(recipe.calibration, device, say, frugal)

    def _identity(self) -> dict[str, Any]:
        """What a sweep has to have in common with one that it goes on with."""
        runner, text = self.asked.runner, dataclasses.asdict(self.asked.text)
        return {
            "secateur": __version__,
            "source": self.source.hashes,
            "text": {
                **text,
                "bos": bool(self.cut.bos),
                "sha256": hash_of(self.cut.ids_KS),
                "tokens": self.cut.ids_KS.numel(),
                "bytes": self.bytes,
            },
            "machine": {
                "device": runner.device,
                "dtype": runner.dtype,
                "threads": torch.get_num_threads(),
                "cache_tokens": self.asked.cache_tokens,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        }

    def _before(self) -> SweepResult | None:
        """What the sweep to go on with has found, if there is one."""
        file = self.folder / SWEEP_RESULT
        if not file.exists():
            return None
        before, same = SweepResult.read(file), self._identity()
        difference = first_difference({name: getattr(before, name) for name in same}, same)
        if difference is not None:
            where, then, now = difference
            raise UsageError(
                f"{self.folder} was begun with another {where}, {then} and not {now}: give what it was begun with, or "
                "`overwrite` to begin again"
            )
        return before

    def _dense(self, before: SweepResult | None) -> tuple[KeptReference, Measured]:
        """What the dense model predicts, and how it measures, unless that is known from before."""
        began = time.monotonic()
        self.progress(Progress("measuring the dense model"))
        folder = self.folder / _SHARED / "reference"
        kept = self.asked.runner.keep(self.source, self.cut, folder, self.asked.cache_tokens)
        if before is not None:
            return kept, before.dense
        return kept, self._measured(self.size, kept.quality(), time.monotonic() - began)

    def _measured(self, size: Size, quality: Quality, seconds: float) -> Measured:
        return Measured(
            bytes=size.bytes,
            bits_per_weight=size.bits_per_weight,
            perplexity=quality.perplexity,
            perplexity_interval=quality.perplexity_interval,
            bits_per_byte=bits_per_byte(quality.loss, quality.tokens, self.bytes),
            seconds=seconds,
            kl=quality.kl,
            kl_interval=quality.kl_interval,
            agreement=quality.agreement,
            agreement_interval=quality.agreement_interval,
        )

    def _point(self, folder: Path, name: str, recipe: Recipe) -> Point:
        """Compress by a recipe and measure."""
        asked = recipe.to_dict()
        try:
            forget_peak()
            report = compress(
                self.asked.model,
                folder,
                recipe,
                device=self.asked.runner.device,
                max_memory=self.asked.max_memory,
                resume=True,
                overwrite=True,
                progress=self.progress,
                shared=self.shared(recipe),
            )
            self.progress(Progress(f"measuring {name}"))
            began = time.monotonic()
            source = self.asked.runner.open(str(folder))
            runner = self.asked.runner
            quality = runner.measure(runner.load(source), self.cut, self.reference)
            measured = self._measured(size_of(source), quality, time.monotonic() - began)
        except (SecateurError, torch.OutOfMemoryError, torch.linalg.LinAlgError) as error:
            for left in (folder, folder.with_name(f"{folder.name}.partial")):
                shutil.rmtree(left, ignore_errors=True)
            # Not with what `compress` says of the folder that has just gone.
            cause = error.__cause__ if isinstance(error.__cause__, SecateurError) else error
            return Point(name, asked, self._command(recipe), failure=one_line(cause), asked=asked)
        if not self.asked.keep_models:
            shutil.rmtree(folder)
        return Point(
            name=name,
            recipe=report.recipe,
            command=self._command(Recipe.from_dict(report.recipe)),
            measured=measured,
            sparsity=report.sparsity,
            bits=report.bits,
            seconds=report.seconds,
            peak_bytes=report.peak_bytes,
            linears={x.name: LinearPoint(x.sparsity, x.bits, x.bytes, x.error) for x in report.linears},
            asked=asked,
        )

    def _command(self, recipe: Recipe) -> str:
        runner = self.asked.runner
        return command_of(recipe, self.asked.model, runner.device, runner.trust_remote_code)

    def _keep(self, result: SweepResult, waiting: dict[str, Point]) -> None:
        """Have on disk what is done, and what an earlier run has done and nobody has asked for again so far."""
        text = dataclasses.replace(result, points=(*result.points, *waiting.values())).to_json()
        write_whole(self.folder / SWEEP_RESULT, lambda part: part.write_text(text, encoding="utf-8"))


def _key(name: str, asked: dict[str, Any]) -> str:
    """Tells a recipe from others."""
    return hashlib.sha256(json.dumps([name, asked]).encode()).hexdigest()[:8]


def _plain(name: str) -> str:
    """A name that any file system takes."""
    return re.sub(r"[^\w.=]+", "-", name).strip("-")[:60]
