"""Figures as people read them."""

from __future__ import annotations


def size(size: float) -> str:
    """Bytes in decimal units."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"


def duration(seconds: float) -> str:
    """Seconds, in minutes or hours where they are many."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds:02} s" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02} min"


def between(ends: tuple[float, float] | None, form: str) -> str:
    """The interval of a figure, in brackets behind it."""
    return f" ({ends[0]:{form}} to {ends[1]:{form}})" if ends else ""
