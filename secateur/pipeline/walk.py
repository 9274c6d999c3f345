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

from secateur.calibration.stats import InputStats, Level
from secateur.errors import SecateurError
from secateur.pipeline.capture import BlockCall
from secateur.pipeline.structure import Linear

Solve = Callable[[list[str], InputStats], None]


@dataclass(frozen=True)
class _Arrival:
    """A batch has come to the first linear of a group, with this input."""

    group: int
    x: Tensor


def solve_in_pass(
    block: nn.Module,
    calls: list[BlockCall],
    hiddens: list[Tensor],
    groups: list[list[str]],
    linears: dict[str, Linear],
    level: Level,
    solve: Solve,
    *,
    last: bool,
) -> list[Tensor]:
    """Run all batches through a block once, solving each group of linears when its input is known.

    Every batch runs up to the first linear of the group, hands its input over and stops there. When all have arrived the group
    is solved, its new weights are put in place, and the batches go on from where they stood: nothing is computed twice, and
    every later linear sees what the earlier ones have become. A batch that stands keeps only what the rest of the block needs
    of it; it is a greenlet, a stack of its own in this thread.

    Args:
        block: with its weights in place.
        calls: for each batch, how the block is called.
        hiddens: for each batch its input `[N, S, features]`; emptied, so that inputs can leave memory.
        groups: names of linears that read the same input, in the order in which they are reached.
        linears: the linears by name.
        level: what is gathered.
        solve: given a group and its statistics, puts new weights in place.
        last: the output is not needed, so the pass ends once all groups are solved.

    Returns:
        For each batch the block's output; none if `last`.

    Raises:
        SecateurError: an input of a linear is not finite.
    """
    walk = greenlet.getcurrent()
    group_of = {name: i for i, names in enumerate(groups) for name in names}
    solved: set[int] = set()

    def stop_at(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            if group_of[name] not in solved:
                walk.switch(_Arrival(group_of[name], args[0]))

        return hook

    def start(call: BlockCall, hidden: Tensor) -> Callable[[], Tensor]:
        return lambda: call.run(block, hidden)

    handles = [linears[name].register_forward_pre_hook(stop_at(name)) for name in group_of]
    try:
        batches = [greenlet.greenlet(start(call, hidden)) for call, hidden in zip(calls, hiddens, strict=True)]
        hiddens.clear()
        for expected, names in enumerate(groups):
            stats = None
            windows = 0
            for batch in batches:
                arrival = batch.switch()
                if not isinstance(arrival, _Arrival) or arrival.group != expected:
                    raise SecateurError(f"{names[0]} is not reached in the same order for every text: not supported")
                if stats is None:
                    stats = InputStats.empty(arrival.x.shape[-1], level, arrival.x.device)
                stats.add(arrival.x.reshape(-1, arrival.x.shape[-1]))
                if not stats.finite:
                    raise SecateurError(_where_not_finite(names, arrival.x, windows))
                windows += len(arrival.x)
                del arrival
            assert stats is not None
            solve(names, stats)
            solved.add(expected)
        outputs: list[Tensor] = []
        while batches and not last:
            outputs.append(batches.pop(0).switch())
        return outputs
    finally:
        for handle in handles:
            handle.remove()


def _where_not_finite(names: list[str], x: Tensor, windows_before: int) -> str:
    bad_N = (~torch.isfinite(x)).reshape(len(x), -1).any(1).nonzero()
    if len(bad_N):
        return (
            f"the input of {names[0]} is not finite in calibration sample {windows_before + int(bad_N[0])}: "
            "the model overflows on this text, or its weights are damaged"
        )
    return (
        f"the inputs of {names[0]} are so large that the sum of their squares overflows float32: the model is damaged"
    )


def in_batches(ids_NS: Tensor, tokens: int) -> Iterator[Tensor]:
    """Whole windows, about `tokens` of them at a time, at least one."""
    return iter(ids_NS.split(max(1, tokens // ids_NS.shape[1])))
