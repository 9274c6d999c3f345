"""Writing a checkpoint folder: shards as the tensors come, and nothing under the final name until all is there."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from secateur.errors import SecateurError, UsageError
from secateur.formats.manifest import MANIFEST_NAME, seal, sha256_of
from secateur.formats.reader import INDEX_NAME, SINGLE_NAME

# Tensors wait in memory until this much is there, so that small models make one file and large ones stay within bounds.
SHARD_BYTES = 256 * 2**20


@contextmanager
def staged_folder(out: Path, overwrite: bool) -> Iterator[Path]:
    """A new folder beside `out` that takes its name when the block ends well, and is removed when it does not.

    Raises:
        UsageError: `out` exists and may not be overwritten, or cannot be created.
        SecateurError: the disk is full.
    """
    out = Path(os.path.abspath(out))
    _check_free(out, overwrite)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
    except OSError as error:
        raise UsageError(f"{out} cannot be created: {error.strerror or error}") from error
    try:
        # mkdtemp made it for this user alone; a model folder is like any other.
        umask = os.umask(0)
        os.umask(umask)
        staging.chmod(0o777 & ~umask)
        yield staging
        _check_free(out, overwrite)  # another run may have made it meanwhile
        _put_in_place(staging, out)
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or "os error 28" in str(error)
        if not full and not isinstance(error, SafetensorError):
            raise
        reason = "the disk is full" if full else str(error)
        raise SecateurError(
            f"{out} could not be written: {reason}; nothing is left behind, free some space and run again"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _check_free(out: Path, overwrite: bool) -> None:
    if out.exists() and not overwrite:
        raise UsageError(f"{out} exists already: choose another folder, or give --overwrite to replace it")
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file, not a folder: choose another name")


def _put_in_place(staging: Path, out: Path) -> None:
    """Rename `staging` to `out`; wherever this stops, one of the two folders stands under the name."""
    if not out.exists():
        staging.rename(out)
        return
    retired = Path(tempfile.mkdtemp(prefix=f".{out.name}.old-", dir=out.parent))
    try:
        out.rename(retired / out.name)
        staging.rename(out)
    finally:
        if not out.exists():
            (retired / out.name).rename(out)
        shutil.rmtree(retired, ignore_errors=True)


class ShardWriter:
    """Collects named tensors into safetensors shards of a folder, with an index when there are several."""

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
        self.folder = folder
        self.shard_bytes = shard_bytes
        self.total_bytes = 0
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        """Take one tensor; it may be written at once or wait for others."""
        self._pending[name] = tensor.detach().cpu().contiguous()
        self._pending_bytes += tensor.nbytes
        if self._pending_bytes >= self.shard_bytes:
            self._flush()

    def _flush(self) -> None:
        save_file(self._pending, self.folder / f"shard-{len(self._shards)}", metadata={"format": "pt"})
        self._shards.append(list(self._pending))
        self.total_bytes += self._pending_bytes
        self._pending, self._pending_bytes = {}, 0

    def finish(self) -> None:
        """Write what waits, give the shards their names and write the index."""
        if self._pending or not self._shards:
            self._flush()
        if len(self._shards) == 1:
            (self.folder / "shard-0").rename(self.folder / SINGLE_NAME)
            return
        weight_map = {}
        for i, names in enumerate(self._shards):
            file = f"model-{i + 1:05d}-of-{len(self._shards):05d}.safetensors"
            (self.folder / f"shard-{i}").rename(self.folder / file)
            weight_map.update(dict.fromkeys(names, file))
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(self.folder / INDEX_NAME, index)


def write_json(path: Path, content: Any) -> None:
    """Write JSON as people read it."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write `secateur.json`: what the caller says, the SHA-256 of every other file of the folder, and its own."""
    files = sha256_of(p for p in sorted(folder.iterdir()) if p.is_file() and p.name != MANIFEST_NAME)
    content = {**manifest, "files": files}
    content.pop("sha256", None)
    (folder / MANIFEST_NAME).write_bytes(seal(content))
