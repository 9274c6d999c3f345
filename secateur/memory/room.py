"""The memory that a user allows a run."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from dataclasses import dataclass

from secateur.errors import UsageError
from secateur.units import enough, parse_size, words

_M_MMAP_THRESHOLD = -3


def return_freed() -> None:
    """Have the C library give memory back when it is freed, at some cost in time. It keeps pieces of up to 32 MiB otherwise."""
    with suppress(OSError, AttributeError, TypeError):  # only glibc has this
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 2**20)


def trim() -> None:
    """Have the C library give back at once what it keeps of freed memory, which else goes on growing for many blocks."""
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def limit_memory(max_memory: str | int | None) -> int | None:
    """The limit in bytes that a user gave in bytes or in words, if any; what is freed is then given back: see `return_freed`.

    Raises:
        UsageError: the words are no size.
    """
    limit = parse_size(max_memory, "`max_memory`") if isinstance(max_memory, str) else max_memory
    if limit is not None:
        return_freed()
    return limit


@dataclass(frozen=True)
class Room:
    """The memory of the host that a process may have in use.

    Attributes:
        limit: in bytes; None: no limit.
        device: the type of device that models are loaded to: on a GPU they take none of it.
    """

    limit: int | None
    device: str

    def check(self, needed: int, what: str, instead: str) -> None:
        """Raise UsageError where `what` loads the model as a whole, which takes so many bytes, and may not."""
        if self.limit is not None and self.device != "cuda" and needed > self.limit:
            raise UsageError(
                f"{what} loads the model as a whole, and `max_memory` {words(self.limit)} is too little for it: give "
                f"{enough(needed)}, or {instead}"
            )
