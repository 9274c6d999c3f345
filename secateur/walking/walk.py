"""The walk through one block: statistics, solving and propagation in one forward pass.

Every batch runs up to the first linear of a stage and hands its input over. When all have arrived the stage is solved, its new
weights are put in place, and the batches go on: every later linear sees what the earlier ones have become. Experts announce
what some of them are about to read, which is one stage.

T: tokens, I: input features, N: windows, S: tokens of a window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

import greenlet
import torch
from torch import Tensor, nn

from secateur.core.ranks import Ranks
from secateur.core.stats import InputStats, Level
from secateur.errors import RepeatedError
from secateur.mixture.experts import Rows
from secateur.model.structure import Linear
from secateur.unfinished.hidden import HiddenStates
from secateur.walking.capture import BlockCall, Stage
from secateur.walking.clock import Clock
from secateur.walking.experts_in_turn import ExpertsInTurn

#: Linears that read the same input, and the statistics of it over the batches of all processes.
Gathered = tuple[list[str], InputStats]
#: What is done with the linears of a stage.
Solve = Callable[[list[Gathered]], object]


class Way(Enum):
    """How batches pass a block. The same sums in the same order, and so the same result, unless linears are used again."""

    #: A batch stands where it is until its stage is solved, so that nothing is computed twice. It keeps what the rest of
    #: the block needs of it.
    PAUSE = auto()
    #: A batch begins again for every stage: where memory does not hold all batches half way.
    RESTART = auto()
    #: A batch runs through the whole block for every stage: where linears are used more than once. A linear's later inputs
    #: depend on what follows it; those solved before are in place then, and those to come are as they were.
    REPEAT = auto()


@dataclass(frozen=True)
class Passage:
    """A block and what passes it.

    Attributes:
        block: with its weights in place.
        calls: for each batch, how the block is called.
        hiddens: the block's inputs; their memory is let go of when they are taken for the last time.
        outputs: takes the block's outputs; None where nobody reads them.
        ranks: the processes that have a part of the batches each.
        clock: measures the phases.
    """

    block: nn.Module
    calls: Sequence[BlockCall]
    hiddens: HiddenStates
    outputs: HiddenStates | None
    ranks: Ranks
    clock: Clock

    def run(self) -> None:
        """Run all batches through the block as it is."""
        assert self.outputs is not None
        for i, call in enumerate(self.calls):
            with self.clock("forward"):
                self.outputs.append(call.run(self.block, self.hiddens.take(i)))


@dataclass(frozen=True)
class Target:
    """The linears of a block that are looked at.

    Attributes:
        stages: in the order in which they are reached.
        linears: by name.
        again: whether one of them is used more than once.
        level: what is gathered of their inputs.
        solve: puts new weights in place.
        experts: how those of the block are visited.
    """

    stages: list[Stage]
    linears: Mapping[str, Linear]
    again: bool
    level: Level
    solve: Solve
    experts: ExpertsInTurn

    def way(self, pause: bool) -> Way:
        """How batches pass, where they may pause or not."""
        return Way.REPEAT if self.again else Way.PAUSE if pause else Way.RESTART


@dataclass(frozen=True)
class _Arrival:
    """A batch has come to a stage, with these inputs of its groups."""

    stage: int
    rows: Sequence[Rows]


def walk(passage: Passage, target: Target, way: Way) -> None:
    """Run all batches through a block, solving each stage of linears when its inputs are known.

    Without outputs the pass ends once all stages are solved.

    Raises:
        RepeatedError: an input of a linear is not finite, or linears are not reached in the same order by every batch.
    """
    batches = _Batches(passage, target, way)
    first = _first_window(passage) if target.level >= Level.HALVES else 0
    try:
        for number, stage in enumerate(target.stages):
            batches.stage = number
            gathered = _gather(passage, target, batches, stage, first)
            with passage.clock("exchange"):
                for _, stats in gathered:
                    passage.ranks.add_up(stats)
            if gathered:
                target.solve(gathered)
            target.experts.enter(stage)
        batches.stage = len(target.stages)
        if passage.outputs is not None:
            for i in range(len(passage.calls)):
                with passage.clock("forward"):
                    passage.outputs.append(batches.end(i))
    finally:
        batches.close()
        target.experts.leave()


def _first_window(passage: Passage) -> int:
    """The number of this process's first window among those of all."""
    own = sum(passage.hiddens.shapes[i][0] for i in range(len(passage.calls)))
    return sum(passage.ranks.gather(own)[: passage.ranks.rank])


def _gather(passage: Passage, target: Target, batches: _Batches, stage: Stage, first: int) -> list[Gathered]:
    """The statistics of a stage's inputs over the batches of this process, whose first window has this number."""
    found: dict[str, InputStats] = {}
    windows = 0
    for i in range(len(passage.calls)):
        for rows in batches.inputs(i):
            with passage.clock("statistics"):
                for names, (x_TI, weight_T, borrowed) in _by_group(stage, rows):
                    stats = found.setdefault(names[0], InputStats.empty(x_TI.shape[-1], target.level, x_TI.device))
                    stats.add_windows(x_TI, first + windows, weight_T, borrowed)
                    if not stats.finite:
                        raise RepeatedError(_where_not_finite(names, x_TI, windows, passage.ranks))
            del rows
        windows += passage.hiddens.shapes[i][0]
    for names in stage.groups:
        if names[0] not in found:
            raise RepeatedError(f"{names[0]} is not reached by calibration text: not supported")
    for stats in found.values():
        stats.join()
    return [(names, found[names[0]]) for names in stage.groups]


def _by_group(stage: Stage, rows: Sequence[Rows]) -> Iterator[tuple[list[str], tuple[Tensor, Tensor | None, int]]]:
    """The input of each group of a stage, how much its rows count, and how many are borrowed."""
    if stage.chunk is None:
        yield stage.groups[0], (rows[0].x_TI, None, 0)
        return
    given = {f"{stage.chunk[0]}.{name}": each for each in rows for name in each.linears}
    for names in stage.groups:
        each = given[names[0]]
        yield names, (each.x_TI, each.weight_T, each.borrowed)


class _Batches:
    """The batches on their way through a block. Each is a greenlet: a stack of its own in this thread.

    Attributes:
        stage: whose inputs are wanted: those before it are solved.
    """

    def __init__(self, passage: Passage, target: Target, way: Way) -> None:
        self._passage, self._target, self._way = passage, target, way
        self._home = greenlet.getcurrent()
        self._standing: dict[int, greenlet.greenlet] = {}
        self.stage = 0
        self._number_of = {stage.called: number for number, stage in enumerate(target.stages) if stage.called}
        self._left = ExitStack()
        for number, stage in enumerate(target.stages):
            if stage.chunk is None:
                for name in stage.groups[0][:1] if way is Way.REPEAT else stage.groups[0]:
                    handle = target.linears[name].register_forward_pre_hook(self._hook(number))
                    self._left.callback(handle.remove)
        self._left.enter_context(target.experts.visited(passage.block, self._announce))

    def close(self) -> None:
        """Leave the block as it was, and let go of what stands in it."""
        while self._standing:
            self._standing.popitem()[1].throw()
        self._left.close()

    def _hook(self, number: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def stop(_: nn.Module, args: tuple[Any, ...]) -> None:
            self._arrive(number, [Rows(0, (), args[0])])

        return stop

    def _announce(self, called: tuple[str, ...], rows: Sequence[Rows]) -> bool:
        number = self._number_of.get(called)
        if number is None:  # of a block that is not looked at
            return True
        self._arrive(number, rows)
        if not self._computes(number):
            return False
        self._target.experts.enter(self._target.stages[number])
        return True

    def _arrive(self, number: int, rows: Sequence[Rows]) -> None:
        if number == self.stage or (number > self.stage and self._way is not Way.REPEAT):
            self._home.switch(_Arrival(number, rows))

    def _computes(self, number: int) -> bool:
        """Whether a batch that begins again computes the experts of a stage: what the wanted experts read does not depend on
        others of the same module.
        """
        if self._way is not Way.RESTART or self.stage == len(self._target.stages):
            return True
        wanted, here = self._target.stages[self.stage].chunk, self._target.stages[number].chunk
        return wanted is None or here is None or wanted[0] != here[0] or wanted == here

    def inputs(self, i: int) -> Iterator[Sequence[Rows]]:
        """What the stage reads of batch i: one input, or all where linears are used again."""
        batch = self._standing.pop(i, None) or self._start(i, last=self._way is Way.PAUSE)
        if self._way is Way.REPEAT:
            while isinstance(arrival := self._go_on(batch), _Arrival):
                yield arrival.rows
                del arrival
            return
        arrival = self._go_on(batch)
        if not isinstance(arrival, _Arrival) or arrival.stage != self.stage:
            name = [*self._target.stages[self.stage].groups, *self._target.stages[self.stage].called][0]
            raise RepeatedError(f"{name} is not reached in the same order for every text: not supported")
        if self._way is Way.PAUSE:
            self._standing[i] = batch
        else:
            batch.throw()
        yield arrival.rows

    def end(self, i: int) -> Tensor:
        """The block's output for batch i."""
        output: Tensor = (self._standing.pop(i, None) or self._start(i, last=True)).switch()
        return output

    def _start(self, i: int, last: bool) -> greenlet.greenlet:
        passage = self._passage

        def run() -> Tensor:
            hidden = passage.hiddens.take(i) if last else passage.hiddens.read(i)
            return passage.calls[i].run(passage.block, hidden)

        return greenlet.greenlet(run)

    def _go_on(self, batch: greenlet.greenlet) -> Any:
        with self._passage.clock("forward"):
            return batch.switch()


def _where_not_finite(names: list[str], x: Tensor, windows_before: int, ranks: Ranks) -> str:
    bad_N = (~torch.isfinite(x)).reshape(len(x), -1).any(1).nonzero()
    if len(bad_N) and x.ndim == 2:  # the tokens of an expert
        return f"the input of {names[0]} is not finite: the model overflows on this text, or its weights are damaged"
    if len(bad_N):
        whose = f" of process {ranks.rank}" if ranks.size > 1 else ""
        return (
            f"the input of {names[0]} is not finite in calibration sample {windows_before + int(bad_N[0])}{whose}: "
            "the model overflows on this text, or its weights are damaged"
        )
    return (
        f"the inputs of {names[0]} are so large that the sum of their squares overflows float32: the model is damaged"
    )


def in_batches(ids_NS: Tensor, tokens: int) -> Iterator[Tensor]:
    """Whole windows, about `tokens` of them at a time, at least one."""
    return iter(ids_NS.split(max(1, tokens // ids_NS.shape[1])))
