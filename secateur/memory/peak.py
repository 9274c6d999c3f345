"""The most memory that this process has had resident."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path

import psutil


def peak_memory() -> int:
    """The most memory this process has had resident, in bytes."""
    try:
        # Not getrusage: on Linux that starts with what the parent process had.
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        if sys.platform == "win32":
            return psutil.Process().memory_info().peak_wset
        import resource  # which Windows has not

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def forget_peak() -> None:
    """Let `peak_memory` count from now on, where the system can do that: Linux."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
