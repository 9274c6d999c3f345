"""The walk through one block: statistics, solving and propagation in one forward pass.

Every batch runs up to the first linear of a group and hands its input over. When all have arrived the group is solved, its new
weights are put in place, and the batches go on: every later linear sees what the earlier ones have become.

T: tokens, I: input features, N: windows, S: tokens of a window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

import greenlet
import torch
from torch import Tensor, nn

from secateur.core.ranks import Ranks
from secateur.core.stats import InputStats, Level
from secateur.errors import RepeatedError
from secateur.model.structure import Linear
from secateur.pipeline.capture import BlockCall
from secateur.pipeline.clock import Clock
from secateur.pipeline.hidden import HiddenStates

#: What is done with a group of linears, given the statistics of their input over the batches of all processes.
Solve = Callable[[list[str], InputStats], object]


class Way(Enum):
    """How batches pass a block. The same sums in the same order, and so the same result, unless linears are used again."""

    #: A batch stands where it is until its group is solved, so that nothing is computed twice. It keeps what the rest of
    #: the block needs of it.
    PAUSE = auto()
    #: A batch begins again for every group: where memory does not hold all batches half way.
    RESTART = auto()
    #: A batch runs through the whole block for every group: where linears are used more than once. A linear's later inputs
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
        groups: names of linears that read the same input, in the order in which they are reached.
        linears: by name.
        again: whether one of them is used more than once.
        level: what is gathered of their inputs.
        solve: puts new weights in place.
    """

    groups: list[list[str]]
    linears: dict[str, Linear]
    again: bool
    level: Level
    solve: Solve

    def way(self, pause: bool) -> Way:
        """How batches pass, where they may pause or not."""
        return Way.REPEAT if self.again else Way.PAUSE if pause else Way.RESTART


@dataclass(frozen=True)
class _Arrival:
    """A batch has come to a linear of a group, with this input."""

    group: int
    x: Tensor


def walk(passage: Passage, target: Target, way: Way) -> None:
    """Run all batches through a block, solving each group of linears when its input is known.

    Without outputs the pass ends once all groups are solved.

    Raises:
        RepeatedError: an input of a linear is not finite, or linears are not reached in the same order by every batch.
    """
    batches = _Batches(passage, target, way)
    try:
        for group, names in enumerate(target.groups):
            batches.group = group
            stats = _gather(passage, target, batches, names)
            with passage.clock("exchange"):
                passage.ranks.add_up(stats)
            target.solve(names, stats)
        batches.group = len(target.groups)
        if passage.outputs is not None:
            for i in range(len(passage.calls)):
                with passage.clock("forward"):
                    passage.outputs.append(batches.end(i))
    finally:
        batches.close()


def _gather(passage: Passage, target: Target, batches: _Batches, names: list[str]) -> InputStats:
    """The statistics of a group's input over the batches of this process."""
    stats: InputStats | None = None
    windows = 0
    for i in range(len(passage.calls)):
        for x in batches.inputs(i):
            with passage.clock("statistics"):
                if stats is None:
                    stats = InputStats.empty(x.shape[-1], target.level, x.device)
                stats.add(x.reshape(-1, x.shape[-1]))
                if not stats.finite:
                    raise RepeatedError(_where_not_finite(names, x, windows, passage.ranks))
            del x
        windows += passage.hiddens.shapes[i][0]
    if stats is None:
        raise RepeatedError(f"{names[0]} is not reached by calibration text: not supported")
    return stats


class _Batches:
    """The batches on their way through a block. Each is a greenlet: a stack of its own in this thread.

    Attributes:
        group: whose input is wanted: those before it are solved.
    """

    def __init__(self, passage: Passage, target: Target, way: Way) -> None:
        self._passage, self._target, self._way = passage, target, way
        self._home = greenlet.getcurrent()
        self._standing: dict[int, greenlet.greenlet] = {}
        self.group = 0
        self._handles = [
            target.linears[name].register_forward_pre_hook(self._hook(group))
            for group, names in enumerate(target.groups)
            for name in (names[:1] if way is Way.REPEAT else names)
        ]

    def close(self) -> None:
        """Leave the block as it was, and let go of what stands in it."""
        for handle in self._handles:
            handle.remove()
        while self._standing:
            self._standing.popitem()[1].throw()

    def _hook(self, group: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def stop(_: nn.Module, args: tuple[Any, ...]) -> None:
            if group == self.group or (group > self.group and self._way is not Way.REPEAT):
                self._home.switch(_Arrival(group, args[0]))

        return stop

    def inputs(self, i: int) -> Iterator[Tensor]:
        """What the group reads of batch i: one input, or all where linears are used again."""
        batch = self._standing.pop(i, None) or self._start(i, last=self._way is Way.PAUSE)
        if self._way is Way.REPEAT:
            while isinstance(arrival := self._go_on(batch), _Arrival):
                yield arrival.x
                del arrival
            return
        arrival = self._go_on(batch)
        if not isinstance(arrival, _Arrival) or arrival.group != self.group:
            name = self._target.groups[self.group][0]
            raise RepeatedError(f"{name} is not reached in the same order for every text: not supported")
        if self._way is Way.PAUSE:
            self._standing[i] = batch
        else:
            batch.throw()
        yield arrival.x

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
