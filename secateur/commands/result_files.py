"""Results in the files that options name, or on standard output."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from secateur.commands.command import JSON_TAKES_A_FILE
from secateur.errors import UsageError


def _plain_json(value: Any) -> str:
    """JSON without NaN or infinity, which other programs do not read: null instead."""

    def clean(v: Any) -> Any:
        if isinstance(v, float) and not math.isfinite(v):
            return None
        if isinstance(v, dict):
            return {k: clean(x) for k, x in v.items()}
        return [clean(x) for x in v] if isinstance(v, list | tuple) else v

    return json.dumps(clean(value), indent=2, default=str)


def check_files(files: dict[str, Path | None], out: Path | None = None) -> None:
    """Raise UsageError when a file that an option names cannot be written, see `check_file`."""
    from secateur.folder.paths import check_file

    for option, file in files.items():
        if file is not None:
            check_file(option, file, out)


def check_names_no_file(name: str | None, file: Path | None, names: Iterable[str]) -> None:
    """Raise UsageError where `--json` has taken for its file what used to follow it: the name of what is asked for."""
    if name is None and file is not None and str(file) in names:
        raise UsageError(f"{JSON_TAKES_A_FILE}: write `{file} --json -`")


def takes_stdout(file: Path | None) -> bool:
    """Whether `--json` has standard output for itself, so that nothing else may go there."""
    return str(file) == "-"


def write_json(value: Any, file: Path | None) -> None:
    """Write a value to the file that `--json` names, if it names one; `-`: to standard output."""
    if file is None:
        return
    if takes_stdout(file):
        print(_plain_json(value))
    else:
        write_text("--json", _plain_json(value) + "\n", file)


def write_text(option: str, text: str, file: Path, append: bool = False) -> None:
    """Write text to the file that an option names. Raises UsageError when it cannot be written."""
    try:
        with file.open("a" if append else "w", encoding="utf-8") as stream:
            stream.write(text)
    except OSError as error:
        raise UsageError(f"{option} {file} cannot be written: {error.strerror or error}") from error
