"""How long calls take with weights from memory, and a copy to hold them against."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from pathlib import Path

import torch

from secateur.memory.free_memory import free_memory

#: Memory that is gone over in turn is this many times the last-level cache, so that nothing of it is left there.
COLD = 2
# Where the system does not say.
_USUAL_CACHE = 32 * 2**20
_ROUNDS = 7
_WARM_UP = 2


def cache_bytes(device: torch.device) -> int:
    """The size of the last cache before a device's memory: the L2 cache of a GPU, the largest cache of a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [_bytes(file.read_text()) for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max(sizes, default=0) or _USUAL_CACHE


def _bytes(size: str) -> int:
    """Linux writes `2048K`. 0 for what is not understood."""
    digits = size.strip().removesuffix("K")
    return int(digits) * 1024 if digits.isdecimal() else 0


def free_bytes(device: torch.device) -> int:
    """Memory of a device that can be had without swapping."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return free_memory()


def time_in_turn(
    cases: Sequence[Sequence[Callable[[], object]]], device: torch.device, seconds: float
) -> list[list[float]]:
    """Time several things on the same machine at the same time: a little of each, round after round.

    What slows the machine down for a while, such as other programs, then slows all of them down.

    Args:
        cases: of each, calls that differ in their weights alone. They are made one after the other, and from the start again;
            each round goes on where the last one ended.
        device: which they compute on.
        seconds: how long all of it may take, about. A round makes one call of each case at least.

    Returns:
        Of each case, the seconds that a call took on average, round by round.
    """
    turns = [cycle(calls) for calls in cases]
    counts = []
    for turn in turns:
        _seconds(turn, _WARM_UP, device)
        once = _seconds(turn, _WARM_UP, device) / _WARM_UP
        counts.append(max(1, math.floor(seconds / (_ROUNDS * len(cases)) / once)))
    found: list[list[float]] = [[] for _ in cases]
    for _ in range(_ROUNDS):
        for turn, count, samples in zip(turns, counts, found, strict=True):
            samples.append(_seconds(turn, count, device) / count)
    return found


def _seconds(turn: Iterator[Callable[[], object]], count: int, device: torch.device) -> float:
    """How long the next so many calls take."""
    _wait(device)
    start = time.perf_counter()
    for _ in range(count):
        next(turn)()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def large_copy(device: torch.device) -> tuple[Callable[[], object], int]:
    """A copy within a device's memory, of so much that the cache is of no help, and the bytes that it moves.

    As in STREAM, bytes are counted once as they are read and once as they are written. A CPU may also read a line before it
    writes it, which is not counted; so what only reads can be somewhat faster.
    """
    size = min(COLD * cache_bytes(device), free_bytes(device) // 16)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 2 * size


def large_product(device: torch.device, dtype: torch.dtype) -> tuple[Callable[[], object], int]:
    """A product of dense matrices so large that arithmetic alone bounds it, and the floating-point operations that it takes."""
    size = 1024 if device.type == "cpu" else 8192
    A = torch.ones(size, size, device=device, dtype=dtype)
    return lambda: A @ A, 2 * size**3
