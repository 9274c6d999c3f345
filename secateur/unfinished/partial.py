"""What a run has done so far: the folder `OUT.partial` with a journal in it, from which `--resume` goes on."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError

from secateur.core.ranks import Ranks
from secateur.errors import CheckpointError, Interrupted, RepeatedError, SecateurError, UsageError
from secateur.folder.manifest import MANIFEST_NAME, sha256
from secateur.folder.paths import Inputs, check_apart, check_free, drop_empty, make_parents, place_of
from secateur.folder.reader import parse_json
from secateur.folder.writer import assemble, put_in_place, sync, why_not_written

JOURNAL_NAME = "journal.json"
LOCK_NAME = "lock"
# What a run puts into its folder.
_OWN = re.compile(
    r"lock|journal\.json(\.new)?|shard-\d+|hidden-\d+-\d+(-dense)?|fisher\.(safetensors|new)|search(-.*|\.json(\.new)?)|experts(-[0-9a-f]+|\.json.*)|out"
)
_BEGIN_AGAIN = "or `overwrite` to begin again"


class Partial:
    """An unfinished run.

    The first process keeps the journal; the others know what it said when they began. A record stands for what was written
    at a time: what is not compressed, then each block. Its files are on the disk before it is.

    Attributes:
        folder: `OUT.partial`.
        records: by now.
        complete: whether the run had ended, but for its cleaning up, when it was interrupted.
    """

    def __init__(self, out: str | Path, ranks: Ranks, inputs: Inputs | None = None) -> None:
        self.out = place_of(out)
        self.folder = self.out.with_name(f"{self.out.name}.partial")
        self.ranks = ranks
        self.inputs = inputs or {}
        self.complete = False
        self._journal: dict[str, Any] = {}
        self._lock: FileLock | None = None
        self._parents: list[Path] = []

    @property
    def records(self) -> list[dict[str, Any]]:
        return self._journal.get("records", [])

    @property
    def blocks(self) -> int:
        """How many blocks are recorded."""
        return _blocks_in(self._journal)

    @property
    def settings(self) -> dict[str, Any] | None:
        """How the run was begun to be carried out, where it was begun before."""
        return self._journal.get("settings")

    # --- beginning

    def open(self, overwrite: bool, resume: bool) -> None:
        """Take the folder: a new one, or one to go on from.

        Raises:
            UsageError: `out` stands in the way, another process writes it, or an unfinished run is neither resumed nor
                replaced.
        """
        if self.ranks.first:
            try:
                self._open(overwrite, resume)
            except BaseException:
                self._release()
                raise
        self._journal, self.complete = self.ranks.share([self._journal, self.complete])
        if not self.folder.is_dir():
            raise UsageError(
                f"{self.folder} is not seen by all processes: OUT must lie on a file system that all machines share"
            )

    def _open(self, overwrite: bool, resume: bool) -> None:
        journal = self.folder / JOURNAL_NAME
        begun = parse_json(journal.read_bytes(), journal) if os.path.exists(journal) else {}
        finished = begun.get("finished")
        placed = finished is not None and (self.out / MANIFEST_NAME).is_file()
        if resume and placed and sha256(self.out / MANIFEST_NAME) == finished:
            self._journal, self.complete = begun, True
            return
        check_free(self.out, overwrite, self.inputs)
        if os.path.lexists(self.folder):
            check_partial(self.folder, _OWN, (LOCK_NAME, JOURNAL_NAME), "run of `compress`")
            check_apart(self.folder, self.inputs)
            self._take_lock()
            self._journal = begun if resume else {}
            if resume and begun:
                return
            if not overwrite and self._worth_keeping(begun):
                raise UsageError(
                    f"{self.folder} holds a run that was interrupted after {_blocks_in(begun)} blocks: give `resume` to go on "
                    f"with it, {_BEGIN_AGAIN}"
                )
            self._release()
            shutil.rmtree(self.folder)
        self._parents = make_parents(self.folder)
        try:
            self.folder.mkdir()
        except OSError as error:
            drop_empty(self._parents)
            raise UsageError(f"{self.folder} cannot be created: {error.strerror or error}") from error
        self._take_lock()

    def _take_lock(self) -> None:
        self._lock = lock_folder(self.folder)

    def _release(self) -> None:
        if self._lock is not None:
            unlock(self._lock)
            self._lock = None

    def begin(self, identity: dict[str, Any]) -> None:
        """Say what the run is, in values that JSON holds.

        Raises:
            UsageError: the run to go on with was another one; the first difference is named.
        """
        identity = json.loads(json.dumps(identity))
        if self._journal:
            difference = first_difference(self._journal.get("identity"), identity)
            if difference is not None:
                where, before, now = difference
                raise UsageError(
                    f"{self.folder} was begun with another {where}, {before} and not {now}: give what it was begun with, "
                    f"{_BEGIN_AGAIN}"
                )
            if self.ranks.first:
                self._check_files()
        else:
            self._journal = {"identity": identity, "settings": None, "records": [], "hidden": None, "finished": None}

    def settle(self, settings: dict[str, Any]) -> None:
        """Keep the settings that a resumed run has to have, too."""
        self._journal["settings"] = settings
        self._write()

    def _check_files(self) -> None:
        for record in self.records:
            for name, (size, digest) in record["files"].items():
                file = self.folder / name
                # What is no longer there was put together with others: the checkpoint is checked as a whole at the end.
                moved = self.assembling and not file.exists()
                if not moved and (not file.exists() or file.stat().st_size != size or sha256(file) != digest):
                    raise CheckpointError(f"{file} is missing or damaged: run again with `overwrite` to begin again")

    # --- going on

    def _write(self) -> None:
        if not self.ranks.first:
            return
        new = self.folder / f"{JOURNAL_NAME}.new"
        with new.open("w", encoding="utf-8") as stream:
            json.dump(self._journal, stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(new, self.folder / JOURNAL_NAME)
        sync(self.folder)

    def record(self, files: Mapping[str, int], content: dict[str, Any], hidden: dict[str, Any] | None = None) -> None:
        """Record what was written: the names of its files in the folder, with their bytes, and what is to be known of them.

        Args:
            files: on the disk by now.
            content: what is to be known.
            hidden: where to go on from, if it is another place than before: `block`, and the files of each process with their
                SHA-256.
        """
        hashed = {name: [size, sha256(self.folder / name)] for name, size in files.items()}
        self.records.append({**content, "files": hashed})
        if hidden is not None:
            self._journal["hidden"] = hidden
        self._journal["random"] = base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode()
        self._write()

    def restore_random_state(self) -> None:
        """Let random numbers go on where the last record was made."""
        if "random" in self._journal:
            state = bytearray(base64.b64decode(self._journal["random"]))
            torch.set_rng_state(torch.frombuffer(state, dtype=torch.uint8))

    def hidden_file(self, block: int) -> Path:
        """Where this process keeps the inputs of a block."""
        return self.folder / f"hidden-{block:05d}-{self.ranks.rank:04d}"

    def find_hidden(self) -> tuple[int, list[Path]] | None:
        """The last block whose inputs all processes have, and this one's files of them; None if there is no such block."""
        hidden = self._journal.get("hidden")
        files: list[Path] = []
        if hidden is not None:
            said = hidden["files"][self.ranks.rank]
            files = [self.folder / name for name, _ in said]
            good = all(file.is_file() and sha256(file) == digest for file, (_, digest) in zip(files, said, strict=True))
            files = files if good else []
        return (hidden["block"], files) if all(self.ranks.gather(bool(files))) and hidden is not None else None

    def drop_hidden(self, keep: set[Path]) -> None:
        """Remove this process's files of inputs but those."""
        for file in self.folder.glob(f"hidden-*-{self.ranks.rank:04d}*"):
            if file not in keep:
                file.unlink()

    @property
    def fisher_file(self) -> Path:
        """Where squared gradients are kept: renamed to this when it is whole."""
        return self.folder / "fisher.safetensors"

    # --- ending

    @property
    def assembling(self) -> bool:
        """Whether the checkpoint is being put together."""
        return (self.folder / "out").is_dir()

    def assemble(self) -> Path:
        """Put the weight files together; returns the folder of the new checkpoint, which lacks everything else."""
        folder = self.folder / "out"
        folder.mkdir(exist_ok=True)
        parts = {name: size for record in self.records for name, (size, _) in record["files"].items()}
        assemble(parts, self.folder, folder)
        return folder

    def finish(self, overwrite: bool) -> None:
        """Give the new checkpoint its name, and remove the rest."""
        folder = self.folder / "out"
        for path in folder.rglob("*"):
            sync(path)
        sync(folder)
        check_free(self.out, overwrite, self.inputs)  # another run may have made it meanwhile
        self._journal["finished"] = sha256(folder / MANIFEST_NAME)
        self._write()
        put_in_place(folder, self.out)
        self.clean_up()

    def clean_up(self) -> None:
        """Remove the folder, the journal last: as long as it is there, it tells that the run is over."""
        self._release()
        for path in self.folder.iterdir():
            if path.name != JOURNAL_NAME:
                _remove(path)
        _remove(self.folder / JOURNAL_NAME)
        _remove(self.folder)

    def _worth_keeping(self, journal: dict[str, Any]) -> bool:
        """Whether a run could go on from more than its beginning."""
        return _blocks_in(journal) > 0 or self.fisher_file.exists()

    def leave(self, repeated: bool = False) -> str:
        """Leave an unfinished run, or nothing; what is left, in words.

        Args:
            repeated: whether one that is resumed would end as this one did.
        """
        self._release()
        # The first process may have recorded more than this one knows of.
        journal = self.folder / JOURNAL_NAME
        said = parse_json(journal.read_bytes(), journal) if journal.exists() else {}
        if self._worth_keeping(said):
            done = _blocks_in(said)
            what = "1 block is" if done == 1 else f"{done} blocks are"
            if repeated:
                return f"{what} kept in {self.folder}, but `resume` would come to the same: `overwrite` begins again"
            return f"{what} kept in {self.folder}: run again with `resume` to go on"
        if self.ranks.first:
            shutil.rmtree(self.folder, ignore_errors=True)
            drop_empty(self._parents)
        return "nothing is left behind"


@contextmanager
def partial_folder(
    out: str | Path, overwrite: bool, resume: bool, ranks: Ranks, inputs: Inputs | None = None
) -> Iterator[Partial]:
    """The folder of an unfinished run. Where the block fails it stays, if there is something to go on from.

    Raises:
        UsageError: see `Partial.open`.
        SecateurError: the disk is full, or what was raised inside, each with what is left.
    """
    partial = Partial(out, ranks, inputs)
    partial.open(overwrite, resume)
    try:
        yield partial
    except BaseException as error:
        left = partial.leave(isinstance(error, RepeatedError))
        if isinstance(error, Interrupted):
            error.left = left
        reason = why_not_written(error) if isinstance(error, OSError | SafetensorError) else None
        if reason is not None:
            raise SecateurError(f"{partial.out} could not be written: {reason}; {left}") from error
        if isinstance(error, SecateurError) and not isinstance(error, UsageError):
            raise type(error)(f"{error}; {left}") from error
        raise


def check_partial(folder: Path, own: re.Pattern[str], known_by: tuple[str, ...], what: str) -> None:
    """Raise UsageError when the folder of an unfinished run is something else, which nobody asked to have removed.

    Args:
        folder: is there.
        own: names of what a run puts into it.
        known_by: one of them it has, unless it is empty.
        what: the run is of.
    """
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise UsageError(f"{folder} stands in the way: {error.strerror or error}; move it") from error
    foreign = [name for name in names if not own.fullmatch(name)]
    if not foreign and not set(names) & set(known_by):
        foreign = names
    if foreign:
        raise UsageError(f"{folder} stands in the way and holds {foreign[0]}, which is of no {what}: move it")


# A lock that nobody refers to is released.
_held: set[FileLock] = set()


def lock_folder(folder: Path) -> FileLock:
    """Have a folder for this process alone, until the lock is released or the process ends, however it ends.

    Raises:
        UsageError: another process has it, or it cannot be written.
    """
    lock = FileLock(folder / LOCK_NAME, timeout=0)
    try:
        lock.acquire()
        _held.add(lock)
    except Timeout as error:
        raise UsageError(
            f"{folder} is being written by another process: wait for it, or choose another folder"
        ) from error
    except OSError as error:
        raise UsageError(f"{folder} cannot be written: {error.strerror or error}") from error
    return lock


def unlock(lock: FileLock) -> None:
    """Let others have the folder of a lock; again, for nothing."""
    lock.release()
    _held.discard(lock)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _blocks_in(journal: dict[str, Any]) -> int:
    return max(len(journal.get("records", [])) - 1, 0)


def first_difference(before: Any, now: Any, where: str = "") -> tuple[str, str, str] | None:
    """Where two structures of JSON differ first, and what stands there in each."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in {**before, **now}:
            found = first_difference(before.get(key), now.get(key), f"{where} {key}".strip())
            if found is not None:
                return found
        return None
    return None if before == now else (where, json.dumps(before), json.dumps(now))
