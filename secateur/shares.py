"""Shares as people write them: 50% or 0.5."""

from __future__ import annotations

import re
from fractions import Fraction

from secateur.errors import UsageError

_SHARE = re.compile(r"\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d{1,3})?)\s*(%?)\s*", re.ASCII)
_LONGEST, _SHOWN = 310, 20


def exact_share(text: str, option: str) -> Fraction:
    """The share behind `50%` or `0.5`, exactly as it is written: 0.1 three times is 0.3, which floats do not know.

    Whether 3 is 3 % or 300 % is not to be guessed: from 1 on a share needs the sign.

    Args:
        text: what somebody wrote.
        option: what the user calls it, for the error's sake.

    Raises:
        UsageError: it is no share, or a number of 1 or more without the sign.
    """
    match = _SHARE.fullmatch(text) if len(text) <= _LONGEST else None
    said = text.strip() if len(text) <= _SHOWN else f"{text.strip()[:_SHOWN]}…"
    if match is None:
        raise UsageError(f"{option} {said!r} is not a share: write it like 50% or 0.5")
    number = Fraction(match[1])
    if match[2]:
        return number / 100
    if number >= 1:
        instead = (
            f"{said}%, or {float(number / 100):g}" if len(text) <= _SHOWN and number <= 1000 else "it like 50% or 0.5"
        )
        raise UsageError(f"{option} {said} is not clear without %: write {instead}")
    return number


def parse_share(given: str | float, option: str) -> float:
    """The share that somebody gave as text or as a number, as if the number were written. Raises as `exact_share` does."""
    try:
        return float(exact_share(given if isinstance(given, str) else repr(given), option))
    except OverflowError as error:
        raise UsageError(f"{option} {given} is not a share: write it like 50% or 0.5") from error
