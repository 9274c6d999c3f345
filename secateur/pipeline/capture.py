"""What the decoder blocks are called with, and which of their linears read the same input.

T: tokens, N: windows, S: tokens of a window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import SecateurError, UsageError, one_line
from secateur.pipeline.structure import Linear


@dataclass
class BlockCall:
    """One call of a block: its hidden states, and everything else it is given."""

    hidden: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> BlockCall:
        if args:
            return cls(args[0], args[1:], kwargs)
        rest = dict(kwargs)
        return cls(rest.pop("hidden_states"), (), rest)

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """The block's output hidden states for other hidden states of the same shape."""
        out = block(hidden, *self.args, **self.kwargs)
        return out[0] if isinstance(out, tuple | list) else out


class _Stop(Exception):  # noqa: N818 - not an error: it ends a forward pass that has served its purpose
    pass


@contextmanager
def _replaced(blocks: nn.ModuleList, forward: Callable[[int, nn.Module], Callable[..., Any]]) -> Iterator[None]:
    """Within the context, block i answers calls with `forward(i, block)`."""
    try:
        for i, block in enumerate(blocks):
            block.forward = forward(i, block)
        yield
    finally:
        for block in blocks:
            del block.forward


class BlockCalls:
    """Catches the calls of all blocks without computing any: each block stands in for itself and passes its input on.

    Blocks may be called with different arguments (a sliding window here, full attention there), so each one's are kept.
    What is equal from call to call is kept once.

    Args:
        model: the skeleton with everything outside its blocks in place, and block 0 too.
        blocks: its blocks.
        probe_1S: a few token ids, to see what a block returns.
    """

    def __init__(self, model: nn.Module, blocks: nn.ModuleList, probe_1S: Tensor) -> None:
        # The body alone: the head's logits are not needed, and they would be the largest tensor of all.
        self._body = getattr(model, getattr(model, "base_model_prefix", ""), model)
        self._blocks = blocks
        self._extra = self._find_extra_outputs(probe_1S)
        self._seen: dict[tuple[Any, ...], Tensor] = {}
        self.probe = self.catch(probe_1S)

    def _find_extra_outputs(self, probe_1S: Tensor) -> int | None:
        """How many values a block returns after its hidden states; None if it returns them bare."""
        returned: list[Any] = []

        def forward(i: int, block: nn.Module) -> Callable[..., Any]:
            def first(*args: Any, **kwargs: Any) -> Any:
                returned.append(type(block).forward(block, *args, **kwargs))
                raise _Stop

            return first

        with _replaced(self._blocks, forward):
            self._run_body(probe_1S)
        if not returned:
            raise UsageError("the blocks that were found are not what the hidden states pass through: not supported")
        return len(returned[0]) - 1 if isinstance(returned[0], tuple | list) else None

    def _run_body(self, ids_NS: Tensor) -> None:
        try:
            self._body(input_ids=ids_NS, use_cache=False)
        except _Stop:
            pass
        except (SecateurError, MemoryError):
            raise
        except Exception as error:
            raise SecateurError(
                f"{type(self._body).__name__} cannot be run on calibration tokens: {one_line(error)}"
            ) from error

    def catch(self, ids_NS: Tensor) -> list[BlockCall]:
        """The calls of all blocks for a batch of windows; the hidden states of all of them are block 0's input."""
        calls: list[BlockCall | None] = [None] * len(self._blocks)

        def forward(i: int, block: nn.Module) -> Callable[..., Any]:
            def pass_on(*args: Any, **kwargs: Any) -> Any:
                call = BlockCall.of(args, kwargs)
                before = calls[i - 1] if i else None
                if before is not None and call.hidden.data_ptr() != before.hidden.data_ptr():
                    raise UsageError(
                        f"block {i} is not given what block {i - 1} returned: a model that computes between its blocks "
                        "is not supported"
                    )
                shared = BlockCall(call.hidden, *self._share((i,), (call.args, call.kwargs)))
                calls[i] = shared
                return call.hidden if self._extra is None else (call.hidden, *[None] * self._extra)

            return pass_on

        with _replaced(self._blocks, forward):
            self._run_body(ids_NS)
        caught = [call for call in calls if call is not None]
        if len(caught) != len(self._blocks):
            raise UsageError(
                f"only {len(caught)} of the model's {len(self._blocks)} blocks are run for a text: not supported"
            )
        return caught

    def _share(self, place: tuple[Any, ...], value: Any) -> Any:
        """`value` with every tensor replaced by an equal one that stood in the same place of an earlier call or block."""
        if isinstance(value, Tensor):
            # The block's number, first in `place`, does not matter: most arguments are the same for all blocks.
            key = (*place[1:], value.shape, value.dtype)
            known = self._seen.setdefault(key, value)
            return known if known is value or torch.equal(known, value) else value
        if isinstance(value, dict):
            return {k: self._share((*place, k), v) for k, v in value.items()}
        if isinstance(value, tuple) and type(value) is tuple:
            return tuple(self._share((*place, i), v) for i, v in enumerate(value))
        return value


def group_by_input(block: nn.Module, call: BlockCall, linears: dict[str, Linear]) -> list[list[str]]:
    """The linears of a block that read the same input tensor, in the order in which they are reached.

    Found by running the block on a few tokens and looking at which tensor each linear is given.

    Raises:
        UsageError: a linear is not reached, or more than once, so that it has no one input.
    """
    groups: dict[tuple[Any, ...], list[str]] = {}
    reached: dict[str, int] = dict.fromkeys(linears, 0)
    alive: list[Tensor] = []  # no tensor may be freed and its address be used again

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0]
            alive.append(x)
            reached[name] += 1
            groups.setdefault((x.data_ptr(), x.shape, x.stride(), x._version), []).append(name)

        return hook

    handles = [linear.register_forward_pre_hook(watch(name)) for name, linear in linears.items()]
    try:
        call.run(block, call.hidden)
    finally:
        for handle in handles:
            handle.remove()
    for name, times in reached.items():
        if times != 1:
            how = "not reached by ordinary text" if times == 0 else f"used {times} times in one pass"
            raise UsageError(f"{name} is {how}, so it cannot be calibrated: leave it alone with --ignore '{name}'")
    return list(groups.values())
