"""Numbers of bytes as people write and read them."""

from __future__ import annotations

import math
import re

from secateur.errors import UsageError

_UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_UNITS["TiB"] = 2**40


def parse_size(text: str, flag: str) -> int:
    """Bytes in words such as `8GB`, `500MiB` or `2000000`. Raises UsageError, naming the flag, when it is none."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    units = {unit.lower(): size for unit, size in _UNITS.items()}
    unit = match.group(2).lower() if match else ""
    if match is None or (unit and unit not in units):
        raise UsageError(f"{flag} {text!r} is not a size: write it like 8GB or 500MB")
    return int(float(match.group(1)) * units.get(unit, 1))


def words(size: float) -> str:
    """A number of bytes as people read it: in decimal units, in which disks are sold, here and everywhere."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"


def enough(size: float) -> str:
    """The same for a size that has to be there: a person who gives what it says gives enough."""
    step = 10**7 if size >= 10**9 else 10**6 if size >= 10**8 else 10**5 if size >= 10**6 else 100
    return words(math.ceil(size / step) * step)
