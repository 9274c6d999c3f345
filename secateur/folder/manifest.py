"""The manifest `secateur.json`: the SHA-256 of every file of a folder and of itself, made and checked."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.errors import CheckpointError, SecateurError
from secateur.folder.entries import LEADS_OUT, is_inner_name, leads_out, unsafe_entries
from secateur.folder.reader import parse_json, read_limited

MANIFEST_NAME = "secateur.json"
_CHUNK = 2**20
_BLANK = "0" * 64
# As `seal` ends a manifest.
_SEAL = re.compile(rb'"sha256": "([0-9a-f]{64})"\n}\n\Z')
# What no loader reads: pictures and prose. Whatever else stands in a folder could be read by one.
_PROSE = re.compile(
    r"(?:README|LICENSE|LICENCE|NOTICE|USE_POLICY)(?:\.(?:txt|md|rst))?|.*\.(?:md|png|jpe?g|gif|svg|webp|pdf)"
)


@dataclass(frozen=True)
class Problem:
    """Something that is broken in a checkpoint folder.

    Attributes:
        where: the file, tensor or module.
        what: is wrong with it.
    """

    where: str
    what: str

    @classmethod
    def of(cls, where: str, error: SecateurError, folder: Path) -> Problem:
        """What an error says that was raised over something in a folder."""
        what = str(error).removeprefix(f"{folder}: ").replace(f"{folder}{os.sep}", "")
        return cls(where, what.removeprefix(f"{where} "))

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


def hash_of_values(values: Any) -> str:
    """The SHA-256, in hex, of values that JSON holds: the key of what is kept for them."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hex."""
    digest, chunk = hashlib.sha256(), bytearray(_CHUNK)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(chunk):
            digest.update(memoryview(chunk)[:count])
    return digest.hexdigest()


def sha256_of(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """The SHA-256 of files of a folder by their names: as many at a time as there are cores, as hashing releases the GIL."""
    names = list(names)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(names, pool.map(lambda name: sha256(folder / name), names), strict=True))


def seal(manifest: dict[str, Any]) -> bytes:
    """The bytes of a manifest file, with their own SHA-256 as the last key (computed with zeros in its place)."""
    content = json.dumps({**manifest, "sha256": _BLANK}, indent=2).encode() + b"\n"
    return content[:-68] + hashlib.sha256(content).hexdigest().encode() + content[-4:]


def check_files(folder: Path) -> Iterator[Problem]:
    """What is wrong with the files of a folder, by its manifest: all that can be told without looking into them.

    Every changed byte of any file that is named, or of the manifest, is found; and files that the manifest does not name,
    unless no loader would read them.
    """
    unsafe = dict(unsafe_entries(folder))
    yield from (Problem(name, what) for name, what in unsafe.items())
    if MANIFEST_NAME in unsafe:
        return
    path = folder / MANIFEST_NAME
    if not path.exists():
        what = "is missing: secateur writes it beside the weights, and it tells what the files have to be"
        yield Problem(MANIFEST_NAME, what)
        return
    try:
        content = read_limited(path)
        yield from _check_seal(content)
        files = parse_json(content, path).get("files")
    except CheckpointError as error:
        yield Problem.of(MANIFEST_NAME, error, folder)
        return
    if not isinstance(files, dict):
        yield Problem(MANIFEST_NAME, "has no 'files' with their SHA-256")
        return
    wanted = {}
    for name, digest in files.items():
        if not is_inner_name(name) or name == MANIFEST_NAME:
            yield Problem(MANIFEST_NAME, f"names {name!r}, which is not the name of another file in this folder")
        elif name not in unsafe and leads_out(folder / name, folder):
            yield Problem(name, LEADS_OUT)
        elif name not in unsafe:
            wanted[name] = digest
    there = [name for name in wanted if (folder / name).is_file()]
    yield from (Problem(name, f"is missing: {MANIFEST_NAME} names it") for name in wanted if name not in there)
    try:
        digests = sha256_of(folder, there)
    except OSError as error:
        yield Problem(str(error.filename or folder), f"cannot be read: {error.strerror or error}")
        return
    for name, digest in digests.items():
        if digest != wanted[name]:
            yield Problem(name, f"was changed: its SHA-256 is not the one in {MANIFEST_NAME}")
    for name in _readable(folder):
        if name != MANIFEST_NAME and name not in files and name not in unsafe:
            yield Problem(name, f"is not named in {MANIFEST_NAME}, and could be read with the model: take it away")


def _check_seal(content: bytes) -> Iterator[Problem]:
    found = _SEAL.search(content)
    if found is None:
        yield Problem(MANIFEST_NAME, "does not end in a SHA-256 of its own: it is damaged, or of an early version")
        return
    start, end = found.span(1)
    if hashlib.sha256(content[:start] + _BLANK.encode() + content[end:]).hexdigest() != found[1].decode():
        yield Problem(MANIFEST_NAME, "was changed: its SHA-256 is not the one that it ends in")


def require_files(folder: Path) -> None:
    """Check all files of a folder against its manifest. Raises CheckpointError for the first that is not as it was."""
    problem = next(check_files(folder), None)
    if problem is not None:
        raise CheckpointError(f"{folder / problem.where}: {problem.what}")


def _readable(folder: Path) -> Iterator[str]:
    """The files at any depth that a loader might read, as they are called from the folder."""
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        linked = [name for name in folders if os.path.islink(os.path.join(root, name))]  # which are not walked into
        for name in sorted([*files, *linked]):
            if not name.startswith(".") and not _PROSE.fullmatch(name):
                yield (Path(root) / name).relative_to(folder).as_posix()
