"""The hidden states between two blocks, batch by batch: in memory, or in a file where memory does not hold them.

N: windows of a batch, S: tokens of a window, H: features.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Sequence
from copy import copy
from pathlib import Path

import torch
from torch import Tensor

from secateur.errors import SecateurError
from secateur.folder.writer import sync
from secateur.formats.layouts.layout import all_finite


class HiddenStates:
    """Batches `x_NSH` in the order in which they were appended. A file holds their values and nothing else.

    Args:
        keep_on: the device that batches wait on; they are read back on the one that they came from.
        file: where they wait instead; an old file of that name is replaced.

    Attributes:
        finite: whether no value that was appended is NaN or infinite.
    """

    def __init__(self, keep_on: torch.device, file: Path | None = None) -> None:
        self.keep_on = keep_on
        self.file = file
        self._kept: list[Tensor | None] = []
        self._forms: list[tuple[torch.Size, torch.dtype, torch.device]] = []
        self._hash = hashlib.sha256()
        self.finite = True
        if file is not None:
            file.write_bytes(b"")

    @classmethod
    def open(cls, file: Path, like: HiddenStates) -> HiddenStates:
        """What `save` wrote, batches of the forms that `like` has, kept as it keeps them.

        Raises:
            SecateurError: the file is not of the size that they need.
        """
        sizes = [shape.numel() * dtype.itemsize for shape, dtype, _ in like._forms]
        if file.stat().st_size != sum(sizes):
            raise SecateurError(f"{file} has {file.stat().st_size} bytes, and {sum(sizes)} are needed")
        found = cls(like.keep_on)
        found.file = file
        found._forms = list(like._forms)
        found._kept = [None] * len(sizes)
        if like.file is not None:
            return found
        in_memory = cls(like.keep_on)
        for i in range(len(found)):
            in_memory.append(found.read(i))
        return in_memory

    def __len__(self) -> int:
        return len(self._forms)

    @property
    def shapes(self) -> Sequence[torch.Size]:
        return [shape for shape, _, _ in self._forms]

    def append(self, x_NSH: Tensor) -> None:
        self._forms.append((x_NSH.shape, x_NSH.dtype, x_NSH.device))
        self.finite = self.finite and all_finite(x_NSH)
        if self.file is None:
            self._kept.append(x_NSH.to(self.keep_on))
            return
        self._kept.append(None)
        with self.file.open("ab", buffering=0) as stream:
            self._hash.update(_write(stream, x_NSH))

    def read(self, i: int) -> Tensor:
        """Batch i, on the device that it came from."""
        shape, dtype, device = self._forms[i]
        kept = self._kept[i]
        if kept is not None:
            return kept.to(device)
        assert self.file is not None
        x_NSH = torch.empty(shape, dtype=dtype)
        view = _bytes_of(x_NSH)
        with self.file.open("rb", buffering=0) as stream:
            stream.seek(sum(s.numel() * d.itemsize for s, d, _ in self._forms[:i]))
            while view:
                count = stream.readinto(view)
                if not count:
                    raise SecateurError(f"{self.file} ends too early: something cut it off while it was in use")
                view = view[count:]
        return x_NSH.to(device)

    def take(self, i: int) -> Tensor:
        """Batch i, for the last time: its memory is free when the caller lets it go."""
        x_NSH = self.read(i)
        self._kept[i] = None
        return x_NSH

    def twin(self) -> HiddenStates:
        """The same batches, which stay here when they are taken there."""
        found = copy(self)
        found._kept = list(self._kept)
        return found

    def save(self, file: Path) -> str:
        """Put all batches on disk, for good; those that are in a file are in `file` already.

        Returns:
            The SHA-256 of the file, in hex.
        """
        if self.file is None:
            with file.open("wb", buffering=0) as stream:
                digest = hashlib.sha256()
                for i in range(len(self)):
                    digest.update(_write(stream, self.read(i)))
                os.fsync(stream.fileno())
            return digest.hexdigest()
        assert file == self.file
        sync(file)
        return self._hash.hexdigest()


def _write(stream: io.FileIO, x: Tensor) -> memoryview:
    """Write a tensor's values; returns their bytes."""
    content = left = _bytes_of(x.detach().cpu().contiguous())
    while left:
        left = left[stream.write(left) :]
    return content


def _bytes_of(x: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return x.view(-1).view(torch.uint8).numpy().data
