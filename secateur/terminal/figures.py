"""Figures as people read them."""

from __future__ import annotations

from secateur.units import words as size

__all__ = ["between", "clock", "duration", "size"]


def duration(seconds: float) -> str:
    """Seconds, in minutes or hours where they are many."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds:02} s" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02} min"


def clock(seconds: float) -> str:
    """Seconds as a clock counts them down: 0:05, or 1:02:09."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}" if minutes >= 60 else f"{minutes}:{seconds:02}"


def between(ends: tuple[float, float] | None, form: str) -> str:
    """The interval of a figure, in brackets behind it."""
    return f" ({ends[0]:{form}} to {ends[1]:{form}})" if ends else ""
