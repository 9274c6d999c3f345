"""What the decoder blocks are called with, and which of their linears read the same input.

T: tokens, N: windows, S: tokens of a window.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import SecateurError, UsageError, one_line
from secateur.mixture.experts import Experts, Rows, Visit, visited
from secateur.model.structure import Linear, body_of


class NotInTurn(UsageError):  # noqa: N818 - named for what it says
    """Text does not pass the blocks once each, one right after another."""


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
        if "hidden_states" not in rest:
            raise NotInTurn("a block is not called with hidden states: not supported")
        return cls(rest.pop("hidden_states"), (), rest)

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """The block's output hidden states for other hidden states of the same shape."""
        out = block(hidden, *self.args, **self.kwargs)
        return out[0] if isinstance(out, tuple | list) else out


class _Stop(Exception):  # noqa: N818 - not an error: it ends a forward pass that has served its purpose
    pass


@contextmanager
def _replaced(blocks: Iterable[nn.Module], forward: Callable[[int, nn.Module], Callable[..., Any]]) -> Iterator[None]:
    """Within the context, block i answers calls with `forward(i, block)`."""
    try:
        for i, block in enumerate(blocks):
            block.forward = forward(i, block)
        yield
    finally:
        for block in blocks:
            del block.forward


def _run_body(body: nn.Module, ids_NS: Tensor) -> None:
    try:
        body(input_ids=ids_NS, use_cache=False)
    except _Stop:
        pass
    except (SecateurError, MemoryError):
        raise
    except Exception as error:
        raise SecateurError(f"{type(body).__name__} cannot be run on calibration tokens: {one_line(error)}") from error


class BlockCalls:
    """Catches the calls of all blocks without computing any: each block stands in for itself and passes its input on.

    Blocks may be called with different arguments (a sliding window here, full attention there), so each one's are kept.
    What is equal from call to call is kept once.

    Args:
        model: the skeleton with everything outside its blocks in place, and block 0 too.
        blocks: its blocks, in the order in which they are run.
        probe_1S: a few token ids, to see what a block returns.

    Raises:
        NotInTurn: the blocks are run more than once, or something is computed between them.
        SecateurError: the model cannot be run on tokens.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module], probe_1S: Tensor) -> None:
        self._body = body_of(model)
        self._blocks = blocks
        self._extra = self._find_extra_outputs(probe_1S)
        self._seen: dict[tuple[Any, ...], Tensor] = {}
        try:
            self.probe = self.catch(probe_1S)
        except UsageError:
            raise
        except SecateurError as error:  # a model that does more with its blocks than to call them
            raise NotInTurn("the blocks do not just pass hidden states on") from error

    def _find_extra_outputs(self, probe_1S: Tensor) -> int | None:
        """How many values a block returns after its hidden states; None if it returns them bare."""
        returned: list[Any] = []

        def forward(i: int, block: nn.Module) -> Callable[..., Any]:
            def first(*args: Any, **kwargs: Any) -> Any:
                # Only what it returns counts, and the weights of experts may not be there.
                with visited(block, lambda _: Visit(lambda *_: False)):
                    returned.append(type(block).forward(block, *args, **kwargs))
                raise _Stop

            return first

        with _replaced(self._blocks, forward):
            _run_body(self._body, probe_1S)
        if not returned:
            raise UsageError("the blocks that were found are not what the hidden states pass through: not supported")
        return len(returned[0]) - 1 if isinstance(returned[0], tuple | list) else None

    def catch(self, ids_NS: Tensor) -> list[BlockCall]:
        """The calls of all blocks for a batch of windows; the hidden states of all of them are block 0's input."""
        calls: list[BlockCall | None] = [None] * len(self._blocks)

        def forward(i: int, block: nn.Module) -> Callable[..., Any]:
            def pass_on(*args: Any, **kwargs: Any) -> Any:
                call = BlockCall.of(args, kwargs)
                if calls[i] is not None:
                    raise NotInTurn(f"block {i} is run more than once for a text")
                before = calls[i - 1] if i else None
                if before is not None and call.hidden.data_ptr() != before.hidden.data_ptr():
                    raise NotInTurn(f"block {i} is not given what block {i - 1} returned")
                shared = BlockCall(call.hidden, *self._share((i,), (call.args, call.kwargs)))
                calls[i] = shared
                return call.hidden if self._extra is None else (call.hidden, *[None] * self._extra)

            return pass_on

        with _replaced(self._blocks, forward):
            _run_body(self._body, ids_NS)
        caught = [call for call in calls if call is not None]
        if len(caught) != len(self._blocks):
            raise UsageError(
                f"only {len(caught)} of the model's {len(self._blocks)} blocks are run for a text: not supported"
            )
        return caught

    def finish(self, model: nn.Module, x_NSH: Tensor) -> Any:
        """What a model makes of the outputs of its last block: norm, head, and whatever else comes after the blocks."""
        ids_NS = torch.zeros(x_NSH.shape[:2], dtype=torch.int64, device=x_NSH.device)
        with self._bypassed(x_NSH):
            return model(input_ids=ids_NS, use_cache=False)

    def before_head(self, model: nn.Module, head: nn.Module, ids_NS: Tensor, hidden: Tensor) -> Tensor:
        """What the head reads of a batch of windows that the last block makes `hidden` of.

        Args:
            model: with its head, and with everything outside its blocks in place but for the head.
        """
        seen: list[Tensor] = []

        def stop(_: nn.Module, args: tuple[Any, ...]) -> None:
            seen.append(args[0])
            raise _Stop

        handle = head.register_forward_pre_hook(stop)
        try:
            with self._bypassed(hidden):
                _run_body(model, ids_NS)
        finally:
            handle.remove()
        if not seen:
            raise UsageError("the head that was found reads nothing of what the blocks return: leave `head` out")
        return seen[0]

    def _bypassed(self, hidden: Tensor) -> AbstractContextManager[None]:
        """Within the context, blocks pass on what they are given, and the last one returns `hidden`."""

        def forward(i: int, block: nn.Module) -> Callable[..., Any]:
            def pass_on(*args: Any, **kwargs: Any) -> Any:
                given = hidden if i + 1 == len(self._blocks) else BlockCall.of(args, kwargs).hidden
                return given if self._extra is None else (given, *[None] * self._extra)

            return pass_on

        return _replaced(self._blocks, forward)

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


class BodyCalls:
    """The same for a model whose blocks are not run in turn: its body is taken for one block, and token ids for its input.

    Args:
        model: with everything but its head in place.
        probe_1S: a few token ids.

    Raises:
        SecateurError: it cannot be run on them.
    """

    def __init__(self, model: nn.Module, probe_1S: Tensor) -> None:
        self.body = body_of(model)
        _run_body(self.body, probe_1S)
        self.probe = self.catch(probe_1S)

    def catch(self, ids_NS: Tensor) -> list[BlockCall]:
        return [BlockCall(ids_NS, (), {"use_cache": False})]


@dataclass(frozen=True, eq=False)
class Stage:
    """Linears that can be solved together: none of their inputs depends on what another becomes.

    Attributes:
        groups: names of those that are looked at, by their input.
        chunk: of experts that are visited together, the module's name and the first one's number; None: these are no experts.
        called: names of all linears of these experts that read such inputs.
    """

    groups: list[list[str]]
    chunk: tuple[str, int] | None = None
    called: tuple[str, ...] = ()


def find_stages(
    block: nn.Module, call: BlockCall, linears: Mapping[str, Linear], of_experts: Collection[str], at_once: int
) -> tuple[list[Stage], dict[str, int]]:
    """The linears of a block by the input that they read, in the order in which they are reached.

    Found by running the block on a few tokens and looking at which tensor each linear is given.

    Args:
        block: with everything but its experts in place.
        call: how it is called.
        linears: that are looked at, by name.
        of_experts: names of linears that are an expert's.
        at_once: how many experts are visited together.

    Returns:
        The stages, and how often each linear is used.
    """
    seen: dict[str | Stage, list[tuple[Any, ...]]] = {}
    alive: list[Tensor] = []  # no tensor may be freed and its address be used again

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0]
            alive.append(x)
            seen.setdefault(name, []).append((x.data_ptr(), x.shape, x.stride(), x._version))

        return hook

    def announce(module: Experts, rows: Sequence[Rows]) -> bool:
        called = [[f"{module.name}.{linear}" for linear in each.linears] for each in rows]
        groups = [chosen for group in called if (chosen := [name for name in group if name in linears])]
        chunk = (module.name, rows[0].expert)
        seen[Stage(groups, chunk, tuple(name for group in called for name in group))] = []
        return False  # their weights may not be there

    handles = [m.register_forward_pre_hook(watch(name)) for name, m in linears.items() if name not in of_experts]
    try:
        with visited(block, lambda _: Visit(announce, at_once)):
            call.run(block, call.hidden)
    finally:
        for handle in handles:
            handle.remove()
    return _stages(seen), {name: 1 if name in of_experts else len(seen.get(name, ())) for name in linears}


def _stages(seen: Mapping[str | Stage, list[tuple[Any, ...]]]) -> list[Stage]:
    """The stages, of linears by the inputs that they were given and of experts as they were announced."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    stages: list[Stage] = []
    for found, inputs in seen.items():
        if isinstance(found, Stage):
            stages.append(found)
            continue
        if tuple(inputs) not in groups:
            groups[tuple(inputs)] = []
            stages.append(Stage([groups[tuple(inputs)]]))
        groups[tuple(inputs)].append(found)
    return stages
