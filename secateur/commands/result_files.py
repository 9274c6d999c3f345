"""Results as JSON on standard output, and in the files that options name."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

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


def print_json(value: Any) -> None:
    """Write a value to standard output."""
    print(_plain_json(value))


def check_files(files: dict[str, Path | None], out: Path | None = None) -> None:
    """Raise UsageError when a file that an option names cannot be written, see `check_file`."""
    from secateur.folder.paths import check_file

    for option, file in files.items():
        if file is not None:
            check_file(option, file, out)


def write_json(value: Any, file: Path | None) -> None:
    """Write a value to the file that `--json` names, if it names one; `-`: to standard output."""
    if file is None:
        return
    if str(file) == "-":
        print_json(value)
    else:
        write_text("--json", _plain_json(value) + "\n", file)


def write_text(option: str, text: str, file: Path, append: bool = False) -> None:
    """Write text to the file that an option names. Raises UsageError when it cannot be written."""
    try:
        with file.open("a" if append else "w", encoding="utf-8") as stream:
            stream.write(text)
    except OSError as error:
        raise UsageError(f"{option} {file} cannot be written: {error.strerror or error}") from error
