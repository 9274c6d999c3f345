"""What a checkpoint folder may consist of: plain files of its own, or links that Hugging Face's cache makes."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from secateur.errors import CheckpointError

LEADS_OUT = "is a link that leads out of the folder: put the file itself there"
# The one folder within a model's that transformers reads.
_TEMPLATES = "additional_chat_templates"
_SHARED_BLOB = re.compile(r"([0-9a-f]{2})/\1[0-9a-f]{62}")


def is_plain_name(name: Any) -> bool:
    """Whether a name that stands in a file can only mean a file of the same folder."""
    return isinstance(name, str) and name.isprintable() and name not in ("", ".", "..") and not set(name) & set("/\\:")


def is_inner_name(name: Any) -> bool:
    """Whether a name that stands in a file can only mean a file of the same folder, or of a folder in it: `a/b`."""
    return isinstance(name, str) and all(map(is_plain_name, name.split("/")))


def unsafe_entries(folder: Path) -> Iterator[tuple[str, str]]:
    """The entries of a folder that are not to be opened, each with what is wrong with it.

    That is what is neither file nor folder, such as a pipe, and links that lead out of the folder. Those of Hugging Face's
    cache are right: `models--ORG--NAME/snapshots/REVISION/FILE` leads to `models--ORG--NAME/blobs/…`, which may be a link to
    the files that models share, `blobs/XX/…` beside their folders.
    """
    home = Path(os.path.realpath(folder))
    for place in (home, home / _TEMPLATES):
        for path in sorted(place.iterdir()) if place.is_dir() else ():
            name = path.relative_to(home).as_posix()
            if leads_out(path, home):
                yield name, LEADS_OUT
                continue
            try:
                mode = path.stat().st_mode
            except OSError:
                continue  # nothing that could be opened
            if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                yield name, "is neither a file nor a folder: take it away"


def leads_out(path: Path, folder: Path) -> bool:
    """Whether an entry of a folder is, in the end, something outside of it that is not of Hugging Face's cache."""
    target, home = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    return home not in target.parents and not _is_blob(target, home)


def _is_blob(target: Path, home: Path) -> bool:
    repository = home.parent.parent
    if home.parent.name != "snapshots" or not repository.name.startswith("models--"):
        return False
    shared = repository.parent / "blobs"
    return target.parent == repository / "blobs" or (
        shared in target.parents and _SHARED_BLOB.fullmatch(target.relative_to(shared).as_posix()) is not None
    )


def check_entries(folder: Path) -> None:
    """Raise CheckpointError, naming the first, when a folder has entries that are not to be opened, or cannot be read."""
    try:
        for name, what in unsafe_entries(folder):
            raise CheckpointError(f"{folder / name} {what}")
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error.strerror or error}") from error
