"""Bringing the weights of blocks to where they are computed on when they run, ahead of what computes."""

from __future__ import annotations

import mmap
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any
from weakref import finalize

import torch
from torch import Tensor, nn

from secateur.errors import UsageError
from secateur.folder.extents import NOT_COPIED, Extent, OpenFiles
from secateur.kernels.module import PackedLinear
from secateur.memory.free_memory import free_memory
from secateur.offload.link import Event, Link
from secateur.offload.taken_out import Outline, Part

# Every tensor begins where wide loads and all dtypes want it.
ALIGNED = 64


@dataclass
class StreamedBlock:
    """A block whose weights are read when it runs.

    Attributes:
        size: bytes of a buffer for them.
        kept: bytes that stay where it computes.
        places: where in the buffer an extent lies, and the zeros after it.
        parameters: module, name of the parameter, and what is read for it.
        packed: linears, and their weights without what is read.
        held: the filled buffer in the host's memory, where only a device has no room for it.
    """

    size: int = 0
    kept: int = 0
    places: dict[Extent, tuple[int, int]] = field(default_factory=dict)
    parameters: list[tuple[nn.Module, str, Part]] = field(default_factory=list)
    packed: list[tuple[PackedLinear, Outline]] = field(default_factory=list)
    held: Tensor | None = None

    def add(self, parts: Sequence[Part]) -> None:
        """Have places in the buffer for what is read."""
        for part in parts:
            if part.extent not in self.places:
                self.places[part.extent] = self.size, part.padding
                self.size += -(-part.size // ALIGNED) * ALIGNED

    def bind(self, buffer: Tensor) -> None:
        """Let the block compute on a buffer that has been filled."""

        def view(part: Part) -> Tensor:
            return part.view(buffer[self.places[part.extent][0] :])

        for module, leaf, part in self.parameters:
            module._parameters[leaf] = nn.Parameter(view(part), requires_grad=False)
        for linear, outline in self.packed:
            assert linear.prepared is not None
            linear.prepared = replace(linear.prepared, weight=outline.filled(view))

    def unbind(self, device: torch.device) -> None:
        """Let go of the buffer."""
        for module, leaf, part in self.parameters:
            # Of one value: a model is where its parameters are, which is not the meta device.
            empty = torch.zeros((), dtype=part.dtype, device=device).expand(part.shape)
            module._parameters[leaf] = nn.Parameter(empty, requires_grad=False)
        for linear, outline in self.packed:
            assert linear.prepared is not None
            linear.prepared = replace(linear.prepared, weight=outline.weight)

    def read(self, files: OpenFiles, buffer: Tensor) -> int:
        """Fill a buffer of the host from the files; the bytes that were read."""
        memory = memoryview(buffer.numpy().data)
        wanted = []
        for extent in sorted(self.places, key=lambda each: (each.file, each.start)):
            at, padding = self.places[extent]
            end = at + extent.size
            memory[end : end + padding] = bytes(padding)
            wanted.append((extent, memory[at:end]))
        return files.read(wanted)


def _aligned(size: int) -> Tensor:
    """Bytes that begin with a page."""
    return torch.frombuffer(mmap.mmap(-1, max(size, 1)), dtype=torch.uint8)


class Streamer:
    """Reads blocks in the order in which they run, each while the one before computes.

    On the CPU a block computes in the one of two buffers that it was read into. With a link to a device there are two more of
    them there, and while a block computes, the next one is copied, and the one after that is read.

    Attributes:
        bytes_read: from files, since the model was loaded.
        bytes_copied: to the device.
    """

    def __init__(self, blocks: list[StreamedBlock], files: OpenFiles, link: Link | None = None) -> None:
        self.bytes_read = self.bytes_copied = 0
        self.blocks, self.files = blocks, files
        self._link = link
        # What comes around again in a cycle longer than the cache is never there when it is wanted: others have more of it.
        files.dropped = sum(block.size for block in blocks if block.held is None) > free_memory() // 2
        size = max(block.size for block in blocks)
        self._host = [(_aligned if link is None else link.pinned)(size) for _ in range(2)]
        self._buffers = self._host if link is None else [link.buffer(size) for _ in range(2)]
        self._pool = ThreadPoolExecutor(1, "secateur-stream")
        finalize(self, self._pool.shutdown, wait=False, cancel_futures=True)
        # What is on its way: turn, block and bytes read. A turn is one run of one block, and takes the buffers turn % 2.
        self._coming: deque[tuple[int, int, Future[int]]] = deque()
        self._turn = 1
        # Of a link: turns read and not yet copied; the last turn computed; by buffer, when that was, and when it was filled.
        self._lock = threading.Lock()
        self._arrived: dict[int, int] = {}
        self._computed = 1
        self._free: list[Event | None] = [None, None]
        self._filled: list[Event | None] = [None, None]

    def __reduce__(self) -> Any:
        raise UsageError(NOT_COPIED)

    def before(self, number: int) -> None:
        """A block is about to run: its weights are put in place, and the next ones begin to be read.

        Raises:
            CheckpointError: a file was changed or cannot be read.
        """
        if not self._coming or self._coming[0][1] != number:  # the first, or after a pass that was broken off
            self._begin(number)
        self._turn, _, future = self._coming.popleft()
        self.bytes_read += future.result()
        slot = self._turn % 2
        if self._link is not None:
            event = self._filled[slot]
            assert event is not None
            self._link.wait(event)
        self.blocks[number].bind(self._buffers[slot])
        while len(self._coming) < (1 if self._link is None else 2):
            turn, last = (self._coming[-1][0], self._coming[-1][1]) if self._coming else (self._turn, number)
            self._start(turn + 1, (last + 1) % len(self.blocks))

    def after(self, number: int) -> None:
        """A block has run."""
        self.blocks[number].unbind(self._buffers[0].device)
        self._end(self._turn)

    def _begin(self, number: int) -> None:
        """Read a block that was not expected, and nothing else that is under way."""
        last = self._turn
        for turn, _, future in self._coming:
            last = turn
            future.cancel() or future.exception()
        self._coming.clear()
        self._end(last)
        self._start(last + 1, number)

    def _start(self, turn: int, number: int) -> None:
        self._coming.append((turn, number, self._pool.submit(self._read, turn, number)))

    def _read(self, turn: int, number: int) -> int:
        block, slot = self.blocks[number], turn % 2
        filled = self._filled[slot]
        if filled is not None:
            filled.synchronize()  # it was copied from what is read into now
        count = 0 if block.held is not None else block.read(self.files, self._host[slot])
        if self._link is not None:
            with self._lock:
                self._arrived[turn] = number
                self._copy(turn)
        return count

    def _end(self, turn: int) -> None:
        """Turns until this one need their buffers on the device no more."""
        if self._link is None:
            return
        with self._lock:
            for each in range(self._computed + 1, turn + 1):
                self._free[each % 2] = self._link.mark()
            self._computed = turn
            self._arrived = {each: number for each, number in self._arrived.items() if each > turn}
            for each in sorted(self._arrived):
                self._copy(each)

    def _copy(self, turn: int) -> None:
        """Begin to copy a block to the device if it is there, and the one that had the buffer has run."""
        if turn not in self._arrived or turn - 2 > self._computed:
            return
        assert self._link is not None
        block, slot = self.blocks[self._arrived.pop(turn)], turn % 2
        source = self._host[slot] if block.held is None else block.held
        self._filled[slot] = self._link.copy(self._buffers[slot][: block.size], source[: block.size], self._free[slot])
        self.bytes_copied += block.size


def attach(
    model: Any, streamed: Sequence[tuple[nn.Module, StreamedBlock]], files: OpenFiles, link: Link | None
) -> None:
    """Have modules of a model read when they run, in this order; `model.streamer` does it."""
    streamer = Streamer([block for _, block in streamed], files, link)
    for number, (module, _) in enumerate(streamed):
        module.register_forward_pre_hook(partial(_before, streamer, number), with_kwargs=True)
        module.register_forward_hook(partial(_after, streamer, number), always_call=True)
    model.streamer = streamer


def _before(streamer: Streamer, number: int, _: nn.Module, args: Any, kwargs: Any) -> None:
    x = args[0] if args else kwargs.get("hidden_states")
    if torch.is_grad_enabled() and isinstance(x, Tensor) and x.requires_grad:
        raise UsageError(
            "a model that reads its weights when it runs has none any more when gradients are wanted: load it whole to train it"
        )
    streamer.before(number)


def _after(streamer: Streamer, number: int, *_: Any) -> None:
    streamer.after(number)
