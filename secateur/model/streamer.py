"""Reading the weights of blocks when they run, each while the one before computes."""

from __future__ import annotations

import mmap
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import finalize

import torch
from torch import Tensor, nn

from secateur.folder.extents import Extent, OpenFiles
from secateur.kernels.packed import map_tensors

# Every tensor begins where wide loads and all dtypes want it.
ALIGNED = 64


@dataclass(frozen=True)
class Piece:
    """A tensor that is read: from where, to where in the buffer, and as what."""

    extent: Extent
    at: int
    dtype: torch.dtype
    shape: torch.Size
    padding: int


@dataclass
class StreamedBlock:
    """A block whose weights are read when it runs.

    Attributes:
        pieces: in the order of the files.
        size: bytes of a buffer for them.
        kept: bytes that stay in memory.
        parameters: module, name of the parameter, and its piece.
        packed: linear, its weight with tensors on the meta device where pieces are to stand, and the pieces by their identity.
    """

    pieces: list[Piece] = field(default_factory=list)
    size: int = 0
    kept: int = 0
    parameters: list[tuple[nn.Module, str, Piece]] = field(default_factory=list)
    packed: list[tuple[Any, Any, dict[int, Piece]]] = field(default_factory=list)

    def add(self, extent: Extent, tensor: Tensor, padding: int = 0) -> Piece:
        """A place in the buffer for a tensor that lies in a file but for its padding."""
        piece = Piece(extent, self.size, tensor.dtype, tensor.shape, padding)
        self.size += -(-(extent.size + padding) // ALIGNED) * ALIGNED
        self.pieces.append(piece)
        return piece

    def bind(self, buffer: Tensor) -> None:
        """Let the block compute on a buffer that has been filled."""

        def view(piece: Piece) -> Tensor:
            return buffer[piece.at : piece.at + piece.extent.size + piece.padding].view(piece.dtype).view(piece.shape)

        for module, leaf, piece in self.parameters:
            module._parameters[leaf] = nn.Parameter(view(piece), requires_grad=False)
        for linear, template, pieces in self.packed:

            def fill(tensor: Tensor, pieces: dict[int, Piece] = pieces) -> Tensor:
                return view(pieces[id(tensor)]) if id(tensor) in pieces else tensor

            linear.prepared = replace(linear.prepared, weight=map_tensors(template, fill))

    def unbind(self) -> None:
        """Let go of the buffer."""
        for module, leaf, piece in self.parameters:
            # Of one value: a model is where its parameters are, which is not the meta device.
            empty = torch.zeros((), dtype=piece.dtype).expand(piece.shape)
            module._parameters[leaf] = nn.Parameter(empty, requires_grad=False)
        for linear, template, _ in self.packed:
            linear.prepared = replace(linear.prepared, weight=template)


class Streamer:
    """Reads blocks in the order in which they run, each while the one before computes.

    Attributes:
        bytes_read: since the model was loaded.
    """

    def __init__(self, blocks: list[StreamedBlock]) -> None:
        self.bytes_read = 0
        self._blocks = blocks
        files = sorted({piece.extent.file for block in blocks for piece in block.pieces})
        self._files = OpenFiles(files)
        size = max(block.size for block in blocks)
        self._maps = [mmap.mmap(-1, size) for _ in range(2)]
        self._buffers = [torch.frombuffer(each, dtype=torch.uint8) for each in self._maps]
        self._pool = ThreadPoolExecutor(1, "secateur-stream")
        finalize(self, self._pool.shutdown, wait=False, cancel_futures=True)
        self._next: tuple[int, int, Future[int]] | None = None
        self._in_use = 1

    def before(self, number: int) -> None:
        """A block is about to run: its weights are put in place, and the next one's begin to be read."""
        waiting = self._next
        if waiting is None or waiting[0] != number:  # the first, or after one that was broken off
            if waiting is not None:
                waiting[2].cancel() or waiting[2].exception()
            waiting = self._start(number, 1 - self._in_use)
        self._next = None
        _, self._in_use, future = waiting
        self.bytes_read += future.result()
        self._blocks[number].bind(self._buffers[self._in_use])
        self._next = self._start((number + 1) % len(self._blocks), 1 - self._in_use)

    def after(self, number: int) -> None:
        """A block has run."""
        self._blocks[number].unbind()

    def _start(self, number: int, buffer: int) -> tuple[int, int, Future[int]]:
        return number, buffer, self._pool.submit(self._read, number, buffer)

    def _read(self, number: int, buffer: int) -> int:
        memory = memoryview(self._maps[buffer])
        places = []
        for piece in self._blocks[number].pieces:
            end = piece.at + piece.extent.size
            memory[end : end + piece.padding] = bytes(piece.padding)
            places.append((piece.extent, memory[piece.at : end]))
        return self._files.read(places)
