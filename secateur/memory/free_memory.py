"""How much memory of the host is free, for a process that may be in a container."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil


def free_memory(root: Path = Path("/")) -> int:
    """Bytes that this process can still take: what the machine has available, within the limits of its control groups.

    Args:
        root: of the file system that `/proc` and `/sys` are in.
    """
    return max(0, min([psutil.virtual_memory().available, *_rooms(root)]))


def _rooms(root: Path) -> Iterator[int]:
    """What each control group with a limit has left, by both versions of them. The cache of files gives way where it must."""
    for folder, limit, used, cache in _groups(root):
        with suppress(OSError, ValueError):  # no such group, no limit ("max"), or not for us to read
            most = int((folder / limit).read_text(encoding="ascii"))
            stats = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
            yield most - int((folder / used).read_text(encoding="ascii")) + int(stats.get(cache, 0))


def _groups(root: Path) -> Iterator[tuple[Path, str, str, str]]:
    """Folders of the groups that this process is in, outermost last, and the names of their limit, usage and cache."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return
    for line in lines:
        number, controllers, name = (*line.split(":", 2), "", "")[:3]
        if number == "0" and not controllers:
            top, files = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            top = root / "sys/fs/cgroup/memory"
            files = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        # In a container the name may be the host's: then only the top is there, and is the container's own.
        parts = [part for part in name.split("/") if part not in ("", ".", "..")]
        for depth in range(len(parts), -1, -1):
            yield top.joinpath(*parts[:depth]), *files
