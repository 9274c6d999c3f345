"""Where tensors lie in their files, and reading many of them at once into memory that is there already."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from weakref import finalize

from secateur.errors import CheckpointError

# What one call of the operating system takes.
_MOST_PIECES = 512


@dataclass(frozen=True)
class Extent:
    """Bytes of a tensor in a file: `size` of them from `start` on."""

    file: Path
    name: str
    start: int
    size: int


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
            found[name] = Extent(file, name, 8 + length + begin, end - begin)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} is no safetensors file: {error}") from error
    return found


class OpenFiles:
    """Files that are read again and again, and must stay what they were when they were opened."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._open: dict[Path, int] = {}
        self._state: dict[Path, tuple[int, int]] = {}
        finalize(self, _close, self._open)
        for file in files:
            try:
                self._open[file] = os.open(file, os.O_RDONLY)
            except OSError as error:
                raise CheckpointError(f"{file} cannot be read: {error.strerror or error}") from error
            self._state[file] = self._look(file)

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

    def _read_run(self, run: Sequence[tuple[Extent, memoryview]]) -> int:
        first = run[0][0]
        if self._look(first.file) != self._state[first.file]:
            raise CheckpointError(f"{first.file} was changed while it was in use: load the model again")
        wanted = sum(extent.size for extent, _ in run)
        left, done = [view for _, view in run], 0
        while done < wanted:
            try:
                count = os.preadv(self._open[first.file], left, first.start + done)
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
        # What comes around again in a cycle longer than the cache is never there when it is wanted: others have more of it.
        if hasattr(os, "posix_fadvise"):  # not on macOS
            os.posix_fadvise(self._open[first.file], first.start, wanted, os.POSIX_FADV_DONTNEED)
        return wanted


def _close(opened: dict[Path, int]) -> None:
    for descriptor in opened.values():
        os.close(descriptor)
    opened.clear()
