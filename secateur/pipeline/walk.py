"""The block-by-block walk: statistics, solving and propagation in one forward pass of each block.

O: output features, I: input features, T: tokens, N: windows, S: tokens of a window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import greenlet
import torch
from torch import Tensor, nn

from secateur.core.stats import InputStats, Level
from secateur.errors import RepeatedError
from secateur.model.structure import Linear
from secateur.pipeline.capture import BlockCall
from secateur.pipeline.clock import Clock
from secateur.pipeline.hidden import HiddenStates
from secateur.pipeline.ranks import Ranks

Solve = Callable[[list[str], InputStats], object]


@dataclass(frozen=True)
class _Arrival:
    """A batch has come to the first linear of a group, with this input."""

    group: int
    x: Tensor


class _Stopped(Exception):  # noqa: N818 - not an error: it ends a pass that has come as far as it should
    def __init__(self, arrival: _Arrival) -> None:
        self.arrival = arrival


def solve_in_pass(
    block: nn.Module,
    calls: list[BlockCall],
    hiddens: HiddenStates,
    groups: list[list[str]],
    linears: dict[str, Linear],
    level: Level,
    solve: Solve,
    *,
    outputs: HiddenStates | None,
    pause: bool,
    ranks: Ranks,
    clock: Clock,
) -> None:
    """Run all batches through a block, solving each group of linears when its input is known.

    Every batch runs up to the first linear of the group and hands its input over. When all have arrived the group is solved,
    its new weights are put in place, and the batches go on: every later linear sees what the earlier ones have become.

    A batch that pauses stands where it is until its group is solved, so that nothing is computed twice; it keeps only what the
    rest of the block needs of it, and is a greenlet, a stack of its own in this thread. Where memory does not hold all batches
    half way, each begins again for every group instead: the same sums in the same order, and so the same result.

    Args:
        block: with its weights in place.
        calls: for each batch, how the block is called.
        hiddens: the block's inputs; its memory is let go of.
        groups: names of linears that read the same input, in the order in which they are reached.
        linears: the linears by name.
        level: what is gathered.
        solve: given a group and its statistics, over the batches of all processes, puts new weights in place.
        outputs: takes the block's outputs; None, where nobody reads them, ends the pass once all groups are solved.
        pause: whether batches pause.
        ranks: the processes that have a part of the batches each.
        clock: measures the phases.

    Raises:
        RepeatedError: an input of a linear is not finite.
    """
    walk = greenlet.getcurrent()
    group_of = {name: i for i, names in enumerate(groups) for name in names}
    solved: set[int] = set()

    def stop_at(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            if group_of[name] in solved:
                return
            arrival = _Arrival(group_of[name], args[0])
            if not pause:
                raise _Stopped(arrival)
            walk.switch(arrival)

        return hook

    def start(i: int) -> Callable[[], Tensor]:
        return lambda: calls[i].run(block, hiddens.take(i))

    batches = [greenlet.greenlet(start(i)) for i in range(len(calls))] if pause else []

    def arrive(i: int) -> Any:
        """Run batch i up to the next group."""
        if pause:
            return batches[i].switch()
        try:
            return calls[i].run(block, hiddens.read(i))
        except _Stopped as stop:
            return stop.arrival

    handles = [linears[name].register_forward_pre_hook(stop_at(name)) for name in group_of]
    try:
        for expected, names in enumerate(groups):
            stats = None
            windows = 0
            for i in range(len(calls)):
                with clock("forward"):
                    arrival = arrive(i)
                if not isinstance(arrival, _Arrival) or arrival.group != expected:
                    raise RepeatedError(f"{names[0]} is not reached in the same order for every text: not supported")
                with clock("statistics"):
                    if stats is None:
                        stats = InputStats.empty(arrival.x.shape[-1], level, arrival.x.device)
                    stats.add(arrival.x.reshape(-1, arrival.x.shape[-1]))
                    if not stats.finite:
                        raise RepeatedError(_where_not_finite(names, arrival.x, windows, ranks))
                windows += len(arrival.x)
                del arrival
            assert stats is not None
            with clock("exchange"):
                ranks.add_up(stats)
            solve(names, stats)
            solved.add(expected)
        if outputs is not None:
            for i in range(len(calls)):
                with clock("forward"):
                    outputs.append(batches.pop(0).switch() if pause else calls[i].run(block, hiddens.take(i)))
    finally:
        for handle in handles:
            handle.remove()


def solve_in_passes(
    block: nn.Module,
    calls: list[BlockCall],
    hiddens: HiddenStates,
    groups: list[list[str]],
    linears: dict[str, Linear],
    level: Level,
    solve: Solve,
    *,
    outputs: HiddenStates | None,
    ranks: Ranks,
    clock: Clock,
) -> None:
    """The same for a block that uses linears more than once: each group's statistics are of all its inputs, in order.

    A linear's later inputs depend on what follows it, so that every batch runs through the whole block once for each group, in
    which the linears solved before are in place, and those to come are as they were.

    Args:
        block, calls, hiddens, groups, linears, level, solve, outputs, ranks, clock: see `solve_in_pass`.

    Raises:
        RepeatedError: an input of a linear is not finite.
    """
    for names in groups:
        stats = _stats_of_all_uses(names, block, calls, hiddens, linears[names[0]], level, ranks, clock)
        with clock("exchange"):
            ranks.add_up(stats)
        solve(names, stats)
    if outputs is not None:
        with clock("forward"):
            run_block(block, calls, hiddens, outputs)


def _stats_of_all_uses(
    names: list[str],
    block: nn.Module,
    calls: list[BlockCall],
    hiddens: HiddenStates,
    linear: Linear,
    level: Level,
    ranks: Ranks,
    clock: Clock,
) -> InputStats:
    """Statistics of a group's inputs, which are those of its first linear, over all batches."""
    found: list[InputStats] = []
    windows = 0

    def gather(_: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0]
        if not found:
            found.append(InputStats.empty(x.shape[-1], level, x.device))
        found[0].add(x.reshape(-1, x.shape[-1]))
        if not found[0].finite:
            raise RepeatedError(_where_not_finite(names, x, windows, ranks))

    handle = linear.register_forward_pre_hook(gather)
    try:
        for i, call in enumerate(calls):
            with clock("forward"):
                call.run(block, hiddens.read(i))
            windows += hiddens.shapes[i][0]
    finally:
        handle.remove()
    if not found:
        raise RepeatedError(f"{names[0]} is not reached by calibration text: not supported")
    return found[0]


def run_block(block: nn.Module, calls: list[BlockCall], hiddens: HiddenStates, outputs: HiddenStates) -> None:
    """Run all batches through a block as it is."""
    for i, call in enumerate(calls):
        outputs.append(call.run(block, hiddens.take(i)))


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
