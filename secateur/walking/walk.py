"""The walk through one block: statistics, solving and propagation in one forward pass.

Every batch runs up to the first linear of a stage and hands its input over. When all have arrived the stage is solved, its new
weights are put in place, and the batches go on: every later linear sees what the earlier ones have become, but for methods that
look first. Experts announce what some of them are about to read, which is one stage.

T: tokens, I: input features, N: windows, S: tokens of a window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import Any

import greenlet
import torch
from torch import Tensor, nn

from secateur.core.histogram import Histogram
from secateur.core.ranks import Ranks
from secateur.core.stats import InputStats, Level
from secateur.errors import RepeatedError
from secateur.mixture.experts import Rows
from secateur.model.structure import Linear
from secateur.unfinished.hidden import HiddenStates
from secateur.walking.capture import BlockCall, Stage
from secateur.walking.clock import Clock
from secateur.walking.experts_in_turn import ExpertsInTurn
from secateur.walking.forward import forward, products
from secateur.walking.gathering import Gathering
from secateur.walking.twin import Twin

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
        dtype: see `precision`.
        first: the number of the first window, among those of all processes.
    """

    block: nn.Module
    calls: Sequence[BlockCall]
    hiddens: HiddenStates
    outputs: HiddenStates | None
    ranks: Ranks
    clock: Clock
    dtype: torch.dtype
    first: int = 0

    def run(self) -> None:
        """Run all batches through the block as it is."""
        assert self.outputs is not None
        for i, call in enumerate(self.calls):
            with forward(self.clock, self.dtype):
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
        halves: whether statistics of even and of odd windows are kept apart.
        sizes: begins counting how large the inputs of some linears are, by their names; None where nobody asks.
        looks_first: whether the inputs of all stages are looked at before any of them is solved, which takes a second pass.
    """

    stages: list[Stage]
    linears: Mapping[str, Linear]
    again: bool
    level: Level
    solve: Solve
    experts: ExpertsInTurn
    halves: bool = False
    sizes: Callable[[Sequence[str]], Histogram | None] | None = None
    looks_first: bool = False

    def way(self, pause: bool) -> Way:
        """How batches pass, where they may pause or not."""
        return Way.REPEAT if self.again else Way.PAUSE if pause else Way.RESTART


@dataclass(frozen=True)
class _Arrival:
    """A batch has come to a stage, with these inputs of its groups."""

    stage: int
    rows: Sequence[Rows]


@dataclass(frozen=True)
class Beside:
    """The same batches on their way through the dense model's block.

    Attributes:
        twin: the block.
        passage: of the other one, whose `hiddens` and `outputs` are those of the dense model.
        experts: how its experts are visited.
    """

    twin: Twin
    passage: Passage
    experts: ExpertsInTurn

    def batches(self, target: Target, way: Way) -> _Batches:
        """Batches that stop at the stages of a target."""
        linears = {name: self.twin.of(linear) for name, linear in target.linears.items()}
        passage = replace(self.passage, block=self.twin.block)
        return _Batches(passage, replace(target, linears=linears, experts=self.experts), way)


def walk(passage: Passage, target: Target, way: Way, beside: Beside | None = None) -> None:
    """Run all batches through a block, solving each stage of linears when its inputs are known.

    Without outputs the pass ends once all stages are solved.

    Args:
        beside: the dense model's, where statistics are to tell how far inputs are from its own.

    Raises:
        RepeatedError: an input of a linear is not finite, or linears are not reached in the same order by every batch.
    """
    experts, outputs = [target.experts], [passage.outputs]
    if beside is not None:
        experts.append(beside.experts)
        outputs.append(beside.passage.outputs)
    with ExitStack() as left:
        for one in experts:
            left.callback(one.leave)
        batches = [left.enter_context(closing(_Batches(passage, target, way)))]
        if beside is not None:
            batches.append(left.enter_context(closing(beside.batches(target, way))))
        seen: list[list[Gathered]] = []
        for number, stage in enumerate(target.stages):
            for each in batches:
                each.stage = number
            gathered = _gather(passage, target, batches, stage)
            if target.looks_first:
                seen.append(gathered)
            elif gathered:
                target.solve(gathered)
            for one in experts:
                one.enter(stage)
        if target.looks_first:
            left.close()
            for gathered in filter(None, seen):
                target.solve(gathered)
            if passage.outputs is not None:
                passage.run()
            return
        for each, out in zip(batches, outputs, strict=True):
            each.stage = len(target.stages)
            for i in range(len(passage.calls) if out is not None else 0):
                assert out is not None
                with forward(passage.clock, passage.dtype):
                    out.append(each.end(i))


def _gather(passage: Passage, target: Target, batches: Sequence[_Batches], stage: Stage) -> list[Gathered]:
    """The statistics of a stage's inputs over the batches of all processes.

    Args:
        batches: of this process, and the same in the dense model, if they are.
    """
    found: dict[str, Gathering] = {}
    windows = passage.first
    for i in range(len(passage.calls)):
        of_batch = passage.hiddens.shapes[i][0]
        for rows, *dense in zip(*(each.inputs(i) for each in batches), strict=True):
            with passage.clock("statistics"):
                known = dict(_by_group(stage, dense[0])) if dense else {}
                for name, given in _by_group(stage, rows):
                    dense_TI = _in_dense(given, known[name]) if known else None
                    features, device = given.x_TI.shape[-1], given.x_TI.device
                    if name not in found:
                        drift = dense_TI is not None
                        sizes = target.sizes(_group_of(stage, name)) if target.sizes is not None else None
                        found[name] = Gathering(
                            features, target.level, target.halves, drift, device, sizes, products(passage.dtype)
                        )
                    found[name].add(given, dense_TI, windows, of_batch)
                    if not found[name].finite:
                        raise RepeatedError(_where_not_finite(name, given.x_TI, windows - passage.first, passage.ranks))
            del rows, dense
        windows += of_batch
    for names in stage.groups:
        if names[0] not in found:
            raise RepeatedError(f"{names[0]} is not reached by calibration text: not supported")
    with passage.clock("exchange"):
        return [(names, found[names[0]].total(passage.ranks)) for names in stage.groups]


def _by_group(stage: Stage, rows: Sequence[Rows]) -> Iterator[tuple[str, Rows]]:
    """The input of each group of a stage, by the name of its first linear."""
    if stage.chunk is None:
        yield stage.groups[0][0], rows[0]
        return
    given = {f"{stage.chunk[0]}.{name}": each for each in rows for name in each.linears}
    for names in stage.groups:
        yield names[0], given[names[0]]


def _group_of(stage: Stage, name: str) -> Sequence[str]:
    """The linears that read the same input as the one of that name, which is the first of them."""
    return next(names for names in stage.groups if names[0] == name)


def _in_dense(rows: Rows, dense: Rows) -> Tensor | None:
    """What the dense model's linears read of the tokens of some rows; None where that has no meaning.

    The routers of both may send a token to different experts: what counts is what the dense model's would make of those that
    this one is sent.
    """
    if rows.token_T is None:
        return dense.x_TI
    return None if dense.read is None else dense.read(rows.token_T)


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
        last = self._way is Way.PAUSE and not self._target.looks_first
        batch = self._standing.pop(i, None) or self._start(i, last)
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
        with forward(self._passage.clock, self._passage.dtype):
            return batch.switch()


def _where_not_finite(name: str, x: Tensor, windows_before: int, ranks: Ranks) -> str:
    bad_N = (~torch.isfinite(x)).reshape(len(x), -1).any(1).nonzero()
    if len(bad_N) and x.ndim == 2:  # the tokens of an expert
        return f"the input of {name} is not finite: the model overflows on this text, or its weights are damaged"
    if len(bad_N):
        whose = f" of process {ranks.rank}" if ranks.size > 1 else ""
        return (
            f"the input of {name} is not finite in calibration sample {windows_before + int(bad_N[0])}{whose}: "
            "the model overflows on this text, or its weights are damaged"
        )
    return f"the inputs of {name} are so large that the sum of their squares overflows float32: the model is damaged"


def in_batches(ids_NS: Tensor, tokens: int) -> Iterator[Tensor]:
    """Whole windows, about `tokens` of them at a time, at least one."""
    return iter(ids_NS.split(max(1, tokens // ids_NS.shape[1])))
