"""Writing a checkpoint folder: shards as the tensors come, and nothing under the final name until all is there."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from secateur.errors import SecateurError, UsageError
from secateur.folder.manifest import MANIFEST_NAME, seal, sha256_of
from secateur.folder.paths import Inputs, check_free, current_umask, drop_empty, make_parents, place_of
from secateur.folder.reader import INDEX_NAME, SINGLE_NAME

# Tensors wait in memory until this much is there, so that small models make one file and large ones stay within bounds.
SHARD_BYTES = 256 * 2**20


@contextmanager
def staged_folder(out: str | Path, overwrite: bool, inputs: Inputs | None = None) -> Iterator[Path]:
    """A new folder beside `out` that takes its name when the block ends well, and is removed when it does not.

    Raises:
        UsageError: `out` exists and may not be overwritten (see `check_free`), or cannot be created.
        SecateurError: the disk is full.
    """
    out = place_of(out)
    check_free(out, overwrite, inputs)
    parents = make_parents(out)
    try:
        staging = Path(tempfile.mkdtemp(prefix=_beside(out, "partial"), dir=out.parent))
    except OSError as error:
        drop_empty(parents)
        raise UsageError(f"{out} cannot be created: {error.strerror or error}") from error
    try:
        # mkdtemp made it for this user alone; a model folder is like any other.
        staging.chmod(0o777 & ~current_umask())
        yield staging
        check_free(out, overwrite, inputs)  # another run may have made it meanwhile
        put_in_place(staging, out)
    except (OSError, SafetensorError) as error:
        reason = why_not_written(error)
        if reason is None:
            raise
        raise SecateurError(
            f"{out} could not be written: {reason}; nothing is left behind, free some space and run again"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        drop_empty(parents)


def _beside(out: Path, what: str) -> str:
    """How a temporary neighbour of a folder is called; it is no longer than file systems take."""
    return f".{out.name[:40]}.{what}-"


def why_not_written(error: OSError | SafetensorError) -> str | None:
    """What the user can do something about in an error of writing; None for an error of another kind."""
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or "os error 28" in str(error):
        return "the disk is full"
    return str(error) if isinstance(error, SafetensorError) else None


def put_in_place(staging: Path, out: Path) -> None:
    """Rename `staging` to `out`; wherever this stops, one of the two folders stands under the name."""
    if not out.exists():
        staging.rename(out)
        sync(out.parent)
        return
    retired = Path(tempfile.mkdtemp(prefix=_beside(out, "old"), dir=out.parent))
    try:
        out.rename(retired / out.name)
        staging.rename(out)
        sync(out.parent)
    finally:
        if not out.exists():
            (retired / out.name).rename(out)
        shutil.rmtree(retired, ignore_errors=True)


def write_whole(file: Path, write: Callable[[Path], object]) -> None:
    """Have a file written beside its name, and rename it when it is whole; what is left of one that failed is removed."""
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    try:
        write(part)
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk itself, where a power cut does not reach them."""
    folder = path.is_dir()
    try:
        handle = os.open(path, os.O_RDONLY if folder else os.O_RDWR)  # Windows syncs only what may be written
    except PermissionError:
        if folder:
            return  # and opens no folders at all
        raise
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save_tensors(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, with the permissions of any other: safetensors makes it for this user alone."""
    save_file(tensors, file, metadata=metadata)
    file.chmod(0o666 & ~current_umask())


class ShardWriter:
    """Collects named tensors into safetensors files of a folder; `assemble` makes a checkpoint of them.

    Attributes:
        files: those written so far, in order, with their bytes.
    """

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES, begin: int = 0) -> None:
        self.folder = folder
        self.shard_bytes = shard_bytes
        self.files: dict[str, int] = {}
        self._next = begin
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Take one tensor; it may be written at once or wait for others."""
        self._pending[name] = tensor.detach().cpu().contiguous()
        self._pending_bytes += tensor.nbytes
        if self._pending_bytes >= self.shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Write what waits."""
        if self._pending:
            name = f"shard-{self._next:05d}"
            save_tensors(self._pending, self.folder / name, {"format": "pt"})
            sync(self.folder / name)
            self.files[name] = (self.folder / name).stat().st_size
            self._next += 1
            self._pending, self._pending_bytes = {}, 0


def assemble(parts: Mapping[str, int], come_from: Path, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Make the weight files of a checkpoint, and their index, of what a `ShardWriter` wrote.

    Neighbours are put together until a file has `shard_bytes`. Parts go as soon as what they hold is in its place, and
    whoever calls this again after it was interrupted finds it go on.

    Args:
        parts: names of files, with their bytes.
        come_from: the folder that they lie in.
        folder: that the checkpoint is for.
        shard_bytes: the least size of a file but the last.
    """
    groups: list[list[str]] = [[]]
    for name in parts:
        if sum(parts[other] for other in groups[-1]) >= shard_bytes:
            groups.append([])
        groups[-1].append(name)
    weight_map: dict[str, str] = {}
    total = 0
    for i, group in enumerate(groups):
        file = SINGLE_NAME if len(groups) == 1 else f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors"
        target = folder / file
        if not target.exists():
            if len(group) == 1:
                os.replace(come_from / group[0], target)
            else:
                tensors = {name: tensor for part in group for name, tensor in load_file(come_from / part).items()}
                save_tensors(tensors, target.with_suffix(".new"), {"format": "pt"})
                del tensors
                sync(target.with_suffix(".new"))
                os.replace(target.with_suffix(".new"), target)
            sync(folder)
        for part in group:
            (come_from / part).unlink(missing_ok=True)
        if len(groups) > 1:
            with safe_open(target, framework="pt") as stored:
                weight_map.update(dict.fromkeys(stored.keys(), file))
            total += target.stat().st_size - header_bytes(target)
    if len(groups) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(folder / INDEX_NAME, index)


def header_bytes(file: Path) -> int:
    """How many bytes of a safetensors file stand before its tensors."""
    with file.open("rb") as stream:
        return 8 + int.from_bytes(stream.read(8), "little")


def entry_bytes(name: str) -> int:
    """The most that the entry of a matrix takes in the header of its file: name, dtype, shape and two offsets."""
    return len(name) + 85


def write_json(path: Path, content: Any) -> None:
    """Write JSON as people read it."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write `secateur.json`: what the caller says, the SHA-256 of every other file of the folder, and its own."""
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    content = {**manifest, "files": sha256_of(folder, (name for name in names if name != MANIFEST_NAME))}
    content.pop("sha256", None)
    (folder / MANIFEST_NAME).write_bytes(seal(content))
