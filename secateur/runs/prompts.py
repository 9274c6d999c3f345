"""Prompts in a file."""

from __future__ import annotations

from pathlib import Path

from secateur.calibration.text_files import is_row_file, read_file
from secateur.errors import UsageError


def read_prompts(path: Path, text_field: str) -> list[str]:
    """The prompts of a file: the lines of one of text, or the rows of others; empty ones are none.

    Raises:
        UsageError: it cannot be read, is of no known kind, or holds none.
    """
    found = read_file(path, text_field, None, None)
    if not is_row_file(path.name):
        found = found[0].split("\n")
    prompts = [each for each in found if each and not each.isspace()]
    if not prompts:
        raise UsageError(f"{path} holds no prompts: give one a line")
    return prompts
