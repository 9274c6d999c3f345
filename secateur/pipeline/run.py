"""One run over a model's blocks, from its stages: prepared model, windows, recorder, team, walker.

N: windows, S: tokens of a window.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor

from secateur._version import __version__
from secateur.calibration.tokens import hash_of
from secateur.core.stats import Level
from secateur.errors import UsageError
from secateur.memory.footprint import Footprint, Settings
from secateur.model.weights import release
from secateur.pipeline.calibrate import Windows, calibrate
from secateur.pipeline.choose_settings import choose_settings
from secateur.pipeline.gradients import KeptFisher
from secateur.pipeline.job import Job
from secateur.pipeline.measure import measure, measure_without_inputs
from secateur.pipeline.outcome import Report
from secateur.pipeline.prepared import Prepared, prepare
from secateur.pipeline.recorder import Recorder
from secateur.pipeline.shared_dictionaries import ready_dictionaries, recall_dictionaries
from secateur.pipeline.solve import Solution
from secateur.pipeline.solve_tables import share_solution
from secateur.pipeline.team import Team
from secateur.unfinished.partial import Partial
from secateur.walking.capture import BlockCalls, BodyCalls
from secateur.walking.clock import Clock
from secateur.walking.walk import Gathered
from secateur.walking.walker import Catcher, Journey, Walker


@dataclass(frozen=True)
class Run:
    """A run that has begun: all that its blocks need.

    Attributes:
        job: what is to be done, its recipe with all numbers filled in.
        prepared: the model.
        partial: the folder of what is done.
        recorder, team, walker: write, solve, and take windows through blocks.
        windows: None where methods look at no text.
        clock: what each phase has taken.
    """

    job: Job
    prepared: Prepared
    partial: Partial
    recorder: Recorder
    team: Team
    walker: Walker
    windows: Windows | None
    clock: Clock

    @property
    def fisher(self) -> KeptFisher | None:
        return self.team.fisher

    def report(self) -> Report:
        """What came of it; only `bytes` of the new checkpoint are not known yet."""
        calibration: dict[str, Any] = {"level": self.job.plan.level.name.lower()}
        if self.windows is not None:
            calibration |= self.windows.record(self.job.plan.needs_fisher)
        place = {name: i for i, name in enumerate(self.prepared.names)}
        return Report(
            out=self.partial.out,
            # Not in the order of solving, which hangs on how many experts were visited together.
            linears=sorted(self.recorder.reports, key=lambda linear: place[linear.name]),
            tables=sorted(self.recorder.tables, key=lambda table: list(self.prepared.tables).index(table.name)),
            notes=self.recorder.notes,
            calibration=calibration,
            source_bytes=sum(f.stat().st_size for f in self.job.source.files),
            parameters=self.prepared.parameters_left,
            structure=self.prepared.structure.told() if self.prepared.structure is not None else None,
            phases=dict(self.clock.seconds),
            recipe=self.job.recipe.to_dict(),
        )


def run(job: Job, partial: Partial, clock: Clock) -> Run:
    """Do all that is not done yet, up to the last block."""
    started = begin(job, partial, clock)
    if partial.complete or done_blocks(started) == len(started.prepared.blocks):
        return started
    if started.windows is not None:
        gather_fisher(started, started.windows.ids_NS)
    if started.windows is None or job.plan.level == Level.NONE:
        _solve_without_inputs(started)
    else:
        _solve_with_inputs(started, job.ranks.mine(started.windows.ids_NS))
    return started


def begin(job: Job, partial: Partial, clock: Clock) -> Run:
    """Prepare the model, find the windows, and go on where an earlier run stopped.

    Raises:
        UsageError: the recipe does not fit the model, or the earlier run was another one.
        CheckpointError: the model is damaged.
    """
    with clock("opening"):
        prepared = prepare(job.source, job.recipe, job.plan, job.device)
        if job.plan.expert_skip is not None and not prepared.experts:
            raise UsageError(f"`expert_skip` is for mixtures of experts, and {job.source.name} is none: leave it out")
        if job.ranks.first and not partial.records:
            prepared.check_values(job.progress)
        # With the methods' own defaults filled in, so that the manifest repeats the run in later versions, too.
        job = replace(job, recipe=replace(job.recipe, **job.plan.options()))
        windows = None
        if not partial.complete:
            job, windows = calibrate(job, prepared)
            partial.begin(job.ranks.share(_identity(job, windows) if job.ranks.first else None))
        fisher = None
        if job.plan.needs_fisher and windows is not None:
            file, ids_NS, bos = partial.fisher_file, windows.ids_NS, windows.bos_ids
            if job.shared is not None:
                file = job.shared.fisher_file(ids_NS, bos, prepared.chosen, job.recipe.to_dict()["experts"])
            fisher = KeptFisher(file, job.ranks)
        recorder = Recorder(prepared, partial, clock, job.progress)
        for note in job.notes:
            recorder.note(note)
        team = Team(prepared, job.ranks, clock, fisher)
        return Run(job, prepared, partial, recorder, team, Walker(job, prepared, clock), windows, clock)


def _identity(job: Job, windows: Windows | None) -> dict[str, Any]:
    """What a run that is resumed must have in common with the one before."""
    return {
        "model": job.source.hashes,
        "recipe": job.recipe.to_dict(),
        "calibration text": hash_of(windows.ids_NS) if windows is not None else None,
        "versions": versions(),
        "device": torch.cuda.get_device_name(job.device) if job.device.type == "cuda" else "cpu",
        "number of threads": torch.get_num_threads(),
        "instruction set": torch.backends.cpu.get_cpu_capability(),
        "number of processes": job.ranks.size,
    }


def versions() -> dict[str, str]:
    """Of what a result may depend on."""
    return {
        "secateur": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def done_blocks(run: Run) -> int:
    """How many blocks are done, as all processes know it."""
    return int(run.job.ranks.share(run.partial.blocks))


def gather_fisher(run: Run, ids_NS: Tensor) -> None:
    """Compute squared gradients on windows, where the method needs them and no earlier run did."""
    if run.fisher is None or run.fisher.there:
        return
    assert run.windows is not None
    run.job.say("computing gradients")
    with run.clock("opening"):
        model = run.prepared.load_whole()
    with run.clock("gradients"):
        run.fisher.gather(model, ids_NS, sorted(run.prepared.chosen), run.job.say, run.windows.bos_ids)


def _settle(run: Run, measure: Callable[[bool], Footprint]) -> Settings:
    """Choose how the run is carried out, as the first process can; one that goes on keeps its batches."""
    job, before = run.job, run.partial.settings
    if before is not None and job.batch_tokens not in (None, before["batch_tokens"]):
        raise UsageError(
            f"{run.partial.folder} was begun with `batch_tokens` {before['batch_tokens']}: give the same, or leave it out"
        )
    tokens = before["batch_tokens"] if before is not None else job.batch_tokens
    chosen = choose_settings(measure, job.limit, job.device, tokens).to_dict() if job.ranks.first else None
    settings = Settings(**job.ranks.share(chosen))
    run.partial.settle(settings.to_dict())
    return settings


def solve_stage(run: Run, gathered: list[Gathered]) -> None:
    """Solve linears whose inputs are known, and put their new weights in place."""
    _record(run, *run.team.solve(gathered), in_place=True)


def _record(run: Run, solutions: list[Solution], notes: list[str], in_place: bool) -> None:
    for solution in solutions:
        run.recorder.put(solution, in_place)
    for note in notes:
        run.recorder.note(note)


def _solve_without_inputs(run: Run) -> None:
    _settle(run, lambda exact: measure_without_inputs(run.prepared, exact))
    solve_tables(run, run.prepared.tables)
    run.prepared.solved.clear()
    run.recorder.write_outside()
    run.recorder.start()
    for number in range(done_blocks(run), len(run.prepared.blocks)):
        solve_block_without_inputs(run, number)


def solve_block_without_inputs(run: Run, number: int) -> None:
    """Compress a block, one linear in memory at a time, and record it."""
    names = list(run.prepared.chosen_in(number))
    if names:
        _record(run, *run.team.solve([(names, None)]), in_place=False)
    release(run.prepared.blocks[number])
    run.recorder.end_block(number)


def _solve_with_inputs(run: Run, own_NS: Tensor) -> None:
    done, walker = done_blocks(run), run.walker
    catcher = enter(run, own_NS)
    settings = _settle(run, lambda exact: measure(walker, catcher, own_NS, exact))
    run.recorder.write_outside()
    journey = walker.catch(catcher, own_NS, settings, run.partial.hidden_file, beside=run.job.recipe.match_dense)
    if isinstance(catcher, BodyCalls):
        for number in range(done):
            run.recorder.take_solved(number)
        _go_on(run, done, done)
        solve_body(run, journey, range(done, len(run.prepared.blocks)))
        return
    walker.leave()
    begin = 0
    if done and (kept := run.recorder.inputs.go_on(journey.inputs)) is not None:
        begin, inputs = kept
        journey.put(inputs)
        release(run.prepared.blocks[0])
    _go_on(run, begin, done)
    for number in range(begin, len(run.prepared.blocks)):
        walker.read(number)
        if number < done:
            run_again(run, journey, number)
        else:
            ready_dictionaries(journey, run.recorder, number)
            solve_block(run, journey, number)


def solve_tables(run: Run, names: Iterable[str]) -> None:
    """Round tables, and have blocks see what they have become, unless an earlier run did."""
    names = list(names)
    if not run.partial.records:
        for name in names:
            run.job.say(f"rounding {name}")
            with run.clock("solving"):
                solution = run.prepared.solve_table(name) if run.job.ranks.first else None
            with run.clock("exchange"):
                solution = share_solution(run.job.ranks, solution)
            run.recorder.put_table(solution)
            run.prepared.solved[name] = partial(solution.as_module_weight, False)
    else:
        done = [name for name in names if any(each.name == name for each in run.recorder.tables)]
        for name in done:
            run.prepared.solved[name] = partial(run.recorder.take_table(name).as_module_weight, False)


def enter(run: Run, own_NS: Tensor) -> Catcher:
    """Put the first block in place, and what comes before it, tables as they are written; a head that no inputs are gathered
    for is rounded, too."""
    head = run.prepared.head
    solve_tables(run, [name for name in run.prepared.tables if name != head])
    catcher = run.walker.enter(own_NS)
    if run.prepared.sharing and isinstance(catcher, BodyCalls):
        raise UsageError(
            f"blocks of {run.job.source.name} do not run one after the other, as `dictionary_blocks` "
            f"{run.job.plan.dictionary_blocks} needs it: give 1"
        )
    if head is not None and not by_inputs(run, catcher):
        solve_tables(run, [head])
    run.prepared.solved.clear()
    return catcher


def by_inputs(run: Run, catcher: Catcher) -> bool:
    """Whether a head is solved by its inputs, once the last block is."""
    return run.job.plan.level >= Level.GRAM and isinstance(catcher, BlockCalls)


def solve_head(run: Run, journey: Journey) -> None:
    """Solve the head by what comes out of the last block."""
    head, ranks = run.prepared.head, run.job.ranks
    assert head is not None
    run.job.say(f"solving {head}")
    stats = run.walker.stats_of_head(journey, head)
    with run.clock("exchange"):
        ranks.add_up(stats)
    with run.clock("solving"):
        solution = run.prepared.solve_table(head, stats) if ranks.first else None
    with run.clock("exchange"):
        record = ranks.share(solution.record() if solution is not None else None)
    run.recorder.put_table(solution or Solution.of_record(record, {}))


def _go_on(run: Run, begin: int, done: int) -> None:
    """Say where a run that is resumed goes on, and have random numbers go on there, too."""
    if done:
        run.partial.restore_random_state()
        blocks = len(run.prepared.blocks)
        again = f", running blocks {begin + 1} to {done} again first" if begin < done else ""
        run.job.say(f"resuming at block {done + 1} of {blocks}{again}")
    run.recorder.start()


def run_again(run: Run, journey: Journey, number: int) -> None:
    """Run a block that is in place and was compressed by an earlier run."""
    journey.pass_beside(number)
    recall_dictionaries(run.recorder, number)
    run.recorder.take_solved(number)
    journey.pass_unsolved(number)
    release(run.prepared.blocks[number])


def solve_block(run: Run, journey: Journey, number: int) -> None:
    """Compress a block that is in place, run its inputs through it, and record it; with the last one, a head that reads it."""
    last = number + 1 == len(run.prepared.blocks)
    to_head = last and run.prepared.head is not None and by_inputs(run, journey.catcher)
    outputs = None if last and not to_head else journey.waiting(number + 1)
    level = run.job.plan.level
    journey.pass_block(number, outputs, level, lambda gathered: solve_stage(run, gathered))
    release(run.prepared.blocks[number])
    if to_head:
        solve_head(run, journey)
    run.recorder.end_block(number, journey.inputs if outputs is not None and not last else ())


def solve_body(run: Run, journey: Journey, numbers: range) -> None:
    """The same for some blocks, all in place, of a model that does not run them in turn."""
    journey.pass_body(
        numbers,
        run.job.plan.level,
        lambda gathered: solve_stage(run, gathered),
        ended=run.recorder.end_block,
    )
