"""Where tensors lie in their files, and reading many of them at once into memory that is there already."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any
from weakref import finalize

from secateur.errors import CheckpointError, UsageError

#: What is said to those who copy or pickle what reads files again and again.
NOT_COPIED = "a model that reads its weights when it runs can be neither copied nor pickled: load it again"
# What one call of the operating system takes.
_MOST_PIECES = 512


@dataclass(frozen=True)
class Extent:
    """Bytes of a tensor in a file: `size` of them from `start` on.

    Attributes:
        dtype: as the file's header calls it.
        shape: as there, of which nobody has looked whether it fits.
    """

    file: Path
    name: str
    start: int
    size: int
    dtype: str = ""
    shape: tuple[int, ...] = ()


def find_extents(file: Path) -> dict[str, Extent]:
    """Where each tensor of a safetensors file lies.

    Raises:
        CheckpointError: the file is none, or places are beyond its end.
    """
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            size = os.fstat(opened.fileno()).st_size
            if length > size - 8:
                raise ValueError("its header is longer than the file")
            header = json.loads(opened.read(length))
        found = {}
        for name, about in header.items():
            if name == "__metadata__":
                continue
            begin, end = about["data_offsets"]
            if not 0 <= begin <= end <= size - 8 - length:
                raise ValueError(f"tensor {name!r} is said to lie beyond its end")
            shape = tuple(about["shape"])
            if not all(type(count) is int and count >= 0 for count in shape):
                raise ValueError(f"tensor {name!r} is said to be {list(shape)}")
            found[name] = Extent(file, name, 8 + length + begin, end - begin, str(about["dtype"]), shape)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} is no safetensors file: {error}") from error
    return found


class OpenFiles:
    """Files that are read again and again, by any thread, and must stay what they were when they were opened.

    Attributes:
        dropped: whether the system need not keep what was read, for the next time.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._open: dict[Path, int] = {}
        self._state: dict[Path, tuple[int, int]] = {}
        self.dropped = True
        self._lock = Lock()
        finalize(self, _close, self._open)
        for file in files:
            try:
                self._open[file] = os.open(file, os.O_RDONLY | getattr(os, "O_BINARY", 0))
            except OSError as error:
                raise CheckpointError(f"{file} cannot be read: {error.strerror or error}") from error
            self._state[file] = self._look(file)
            _advise(self._open[file], 0, 0, "SEQUENTIAL")

    def _look(self, file: Path) -> tuple[int, int]:
        found = os.fstat(self._open[file])
        return found.st_size, found.st_mtime_ns

    def read(self, places: Sequence[tuple[Extent, memoryview]]) -> int:
        """Read extents, each into its memory; those that follow one another in a file, in one go. Returns the bytes read.

        Raises:
            CheckpointError: a file was changed since it was opened, or cannot be read.
        """
        total, at = 0, 0
        while at < len(places):
            end = at + 1
            while (
                end < min(len(places), at + _MOST_PIECES)
                and places[end][0].file == places[at][0].file
                and places[end][0].start == places[end - 1][0].start + places[end - 1][0].size
            ):
                end += 1
            total += self._read_run(places[at:end])
            at = end
        return total

    def __reduce__(self) -> Any:
        raise UsageError(NOT_COPIED)

    def check(self) -> None:
        """Raise CheckpointError where one was changed since it was opened."""
        for file in self._open:
            self._check(file)

    def _check(self, file: Path) -> None:
        if self._look(file) != self._state[file]:
            raise CheckpointError(f"{file} was changed while it was in use: load the model again")

    def _read_run(self, run: Sequence[tuple[Extent, memoryview]]) -> int:
        first = run[0][0]
        wanted = sum(extent.size for extent, _ in run)
        left, done = [view for _, view in run], 0
        while done < wanted:
            try:
                self._check(first.file)
                count = self._read_at(self._open[first.file], left, first.start + done)
            except OSError as error:
                raise CheckpointError(
                    f"{first.file} cannot be read at tensor {first.name!r}: {error.strerror or error}"
                ) from error
            if count == 0:
                raise CheckpointError(f"{first.file} ends within tensor {first.name!r}")
            done += count
            while left and count >= len(left[0]):
                count -= len(left.pop(0))
            if left and count:
                left[0] = left[0][count:]
        if self.dropped:
            _advise(self._open[first.file], first.start, wanted, "DONTNEED")
        return wanted

    def _read_at(self, descriptor: int, views: Sequence[memoryview], at: int) -> int:
        """Read into memory, as much as one call gives; the bytes."""
        if hasattr(os, "preadv"):  # not on macOS and Windows
            return os.preadv(descriptor, views, at)
        with self._lock:
            os.lseek(descriptor, at, os.SEEK_SET)
            found = os.read(descriptor, len(views[0]))
        views[0][: len(found)] = found
        return len(found)


class MappedFiles:
    """Files that tensors in use are mapped from: deleted and replaced they may be, but not written over.

    Copies share it; pickled, tensors are in memory of their own.
    """

    def __init__(self, files: Sequence[Path] = ()) -> None:
        self._state = {file: os.stat(file) for file in files}

    def check(self) -> None:
        """Raise CheckpointError where one was written over."""
        for file, before in self._state.items():
            with suppress(OSError):  # deleted
                now = os.stat(file)
                same = (now.st_dev, now.st_ino) == (before.st_dev, before.st_ino)
                if same and (now.st_size, now.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
                    raise CheckpointError(f"{file} was written over since the model was loaded: load the model again")

    def __deepcopy__(self, memo: Any) -> MappedFiles:
        return self

    def __reduce__(self) -> Any:
        return MappedFiles, ()


def _advise(descriptor: int, start: int, size: int, advice: str) -> None:
    """Tell the operating system how a file is read, where it can be told: network file systems need not listen."""
    with suppress(OSError, AttributeError):
        os.posix_fadvise(descriptor, start, size, getattr(os, f"POSIX_FADV_{advice}"))


def _close(opened: dict[Path, int]) -> None:
    for descriptor in opened.values():
        os.close(descriptor)
    opened.clear()
