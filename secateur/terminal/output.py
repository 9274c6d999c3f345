"""Standard output and error that take any text: what their encoding has no character for is written another way."""

from __future__ import annotations

import codecs
import io
import sys

# What tables and messages are made of.
_ASCII = {"×": "x", "–": "-", "−": "-", "→": "->", "±": "+/-", "↑": "^", "↓": "v", "…": "...", "▸": ">", "\ufffd": "?"}
_ASCII |= {"━": "=", "─": "-"}
_NAME = "secateur"


def write_any_text() -> None:
    """Have text that does not fit the encoding of the terminal or pipe (`LANG=C`, `PYTHONIOENCODING=ascii`) be no error.

    Signs of our own get the like of them in ASCII; other characters are written as in a string of Python's, `\\u2713`.
    """
    codecs.register_error(_NAME, _replace)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_NAME)


def _replace(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    first = error.object[error.start]
    if first in _ASCII:
        return _ASCII[first], error.start + 1
    return codecs.backslashreplace_errors(
        UnicodeEncodeError(error.encoding, error.object, error.start, error.start + 1, "")
    )
