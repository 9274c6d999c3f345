"""Where users have things written: what may be replaced, and whether it can be written at all, before any work is done.

Nothing is removed but what secateur wrote: a folder is known by its manifest, or as the report of a sweep.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from secateur.errors import CheckpointError, UsageError
from secateur.folder.manifest import MANIFEST_NAME
from secateur.folder.reader import read_json

# What a sweep leaves in its folder, beside the checkpoints that it may keep, and the file that it is known by.
SWEEP_RESULT = "sweep.json"
SWEEP_FILES = frozenset({SWEEP_RESULT, "index.html", "points.csv", "frontier.png"})
SWEEP_MODELS = "models"
_LISTED = 3

# What a user calls an input, such as MODEL, and where it lies, if it is a path at all.
Inputs = Mapping[str, str | Path | None]


def check_named(path: str | Path | None, what: str) -> None:
    """Raise UsageError for an empty path, as a shell makes it of a variable that is not set: it would be the current folder."""
    if path is not None and os.fspath(path) == "":
        raise UsageError(f"{what} is empty: give a name (the current folder is called '.')")


def place_of(out: str | Path) -> Path:
    """Where a folder is to be made: what a link leads to is replaced, and not the link."""
    check_named(out, "OUT")
    place = Path(os.path.realpath(out))
    if not place.name:
        raise UsageError(f"{out} is the root of all folders: name one in it")
    return place


def check_free(out: Path, overwrite: bool, inputs: Inputs | None = None) -> None:
    """Raise UsageError when `out` stands in the way: it is there and is not to be replaced, or must not be.

    Args:
        out: a folder.
        overwrite: whether it may be replaced.
        inputs: what the run reads, which it must not remove.
    """
    try:
        mode = out.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise UsageError(f"{out} cannot be created: {error.strerror or error}") from error
    if not stat.S_ISDIR(mode):
        raise UsageError(f"{out} is a file, not a folder: choose another name")
    why = _why_kept(out, inputs or {})
    if not overwrite:
        advice = ", or give `overwrite` to replace it" if why is None else f"; `overwrite` does not replace it: {why}"
        raise UsageError(f"{out} exists already: choose another folder{advice}")
    if why is not None:
        raise UsageError(f"{out} is not replaced: {why}; choose another folder, or remove it yourself")


def check_apart(folder: Path, inputs: Inputs) -> None:
    """Raise UsageError when a folder that is about to be removed holds an input, or the current folder."""
    held = _held(folder, inputs)
    if held is not None:
        raise UsageError(f"{folder} stands in the way and is not removed, since it {held}: move it")


def _why_kept(out: Path, inputs: Inputs) -> str | None:
    try:
        held, foreign = _held(out, inputs), sorted(_foreign(out))
    except OSError as error:
        return f"{error.filename or out} cannot be read: {error.strerror or error}"
    if held is not None:
        return f"it {held}, and {_listed(sorted(os.listdir(out)))} would be lost"
    if foreign:
        return f"secateur did not write {_listed(foreign)}, which would be lost"
    return None


def _listed(names: list[str]) -> str:
    more = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {more} more" if more > 0 else "")


def _held(folder: Path, inputs: Inputs) -> str | None:
    """Which input lies in a folder, or is it."""
    with suppress(FileNotFoundError):  # somebody removed it
        if _lies_in(Path.cwd(), folder):
            return "is the current folder" if os.path.samefile(os.curdir, folder) else "holds the current folder"
    for what, path in inputs.items():
        for name in _readings(path):
            if os.path.exists(name) and _lies_in(Path(name), folder):
                return f"{'is' if os.path.samefile(name, folder) else 'holds'} {what}"
    return None


def _readings(path: str | Path | None) -> Iterator[str]:
    """The paths that an input may stand for: a folder of data may have a config and a split behind its name."""
    if path is not None:
        whole = os.path.expanduser(path)
        yield whole
        if ":" in whole:
            yield whole.split(":")[0]


def _lies_in(path: Path, folder: Path) -> bool:
    """Whether a path is a folder or anywhere in it, whatever links lead there."""
    for place in (Path(os.path.abspath(path)), Path(os.path.realpath(path))):
        for parent in (place, *place.parents):
            with suppress(OSError):
                if os.path.samefile(parent, folder):
                    return True
    return False


def _foreign(folder: Path) -> Iterator[str]:
    """What is in a folder that secateur did not write there: of its own folders single files, else all entries."""
    known = _written(folder)
    if known is None:
        yield from os.listdir(folder)
        return
    models = folder / SWEEP_MODELS
    for root, folders, files in os.walk(folder, onerror=_raise):
        if SWEEP_RESULT in known and Path(root) == models:
            for name in folders:
                inner = models / name
                yield from ([f"{SWEEP_MODELS}/{name}"] if inner.is_symlink() else _below(inner, folder))
            folders.clear()
        linked = [name for name in folders if os.path.islink(os.path.join(root, name))]  # which are not walked into
        for name in [*files, *linked]:
            path = (Path(root) / name).relative_to(folder).as_posix()
            if path not in known:
                yield path


def _below(folder: Path, top: Path) -> Iterable[str]:
    return ((folder / name).relative_to(top).as_posix() for name in _foreign(folder))


def _raise(error: OSError) -> None:
    raise error


def _written(folder: Path) -> set[str] | None:
    """The files that secateur wrote into a folder, as it says there itself; None where it says nothing."""
    with suppress(CheckpointError):
        files = read_json(folder / MANIFEST_NAME).get("files")
        if isinstance(files, dict):
            return {*files, MANIFEST_NAME}
    with suppress(OSError, ValueError, RecursionError):
        content = json.loads((folder / SWEEP_RESULT).read_bytes())
        if isinstance(content, dict) and {"layout", "secateur", "points"} <= content.keys():
            return {*SWEEP_FILES}
    return None


def make_parents(path: Path) -> list[Path]:
    """Make the folders above a path that are missing; they are returned, the innermost first, for `drop_empty`.

    Raises:
        UsageError: they cannot be made; none is left then.
    """
    missing = [parent for parent in path.parents if not os.path.lexists(parent)]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        drop_empty(missing)
        raise UsageError(f"{path} cannot be created: {error.strerror or error}") from error
    return missing


def drop_empty(folders: Iterable[Path]) -> None:
    """Remove folders, the innermost first, unless there is something in them."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def current_umask() -> int:
    """The permissions that what this process makes does not get."""
    umask = os.umask(
        0o077
    )  # there is no other way to read it; what another thread makes meanwhile is only more private
    os.umask(umask)
    return umask


def check_file(option: str, file: Path, out: Path | None = None, named: Path | None = None) -> None:
    """Find out whether a file can be written, before the work that its content comes of.

    One that is there stays as it is, and one that is not is not left behind.

    Args:
        option: that names the file; `-` is standard output.
        file: to be written.
        out: the folder that the run makes anew, if any: what stands in it is not its to write.
        named: what the user knows the file as, if that is another name.

    Raises:
        UsageError: it cannot, or lies in `out`.
    """
    check_named(file, option)
    if str(file) == "-":
        return
    called = f"{option} {named or file}"
    target = Path(os.path.realpath(file))
    if out is not None and Path(os.path.realpath(out)) in (target, *target.parents):
        raise UsageError(f"{called} lies in {out}, which is made anew as a whole: name a file outside of it")
    try:
        mode = _mode_of(file)
        if mode is None:
            if not target.parent.is_dir():
                raise UsageError(f"{called} cannot be written: there is no folder {file.parent}")
            with suppress(FileExistsError):  # made by somebody at this moment
                os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
                target.unlink()
        elif stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        elif stat.S_ISREG(mode):
            os.close(os.open(file, os.O_WRONLY))
        elif not os.access(file, os.W_OK):  # a pipe would have to be read by somebody to be opened
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise UsageError(f"{called} cannot be written: {error.strerror or error}") from error


def check_whole(option: str, file: Path) -> None:
    """The same for a file that `write_whole` replaces: what counts is the folder. Raises UsageError when it cannot be."""
    check_named(file, option)
    if os.path.isdir(file):
        raise UsageError(f"{option} {file} cannot be written: {os.strerror(errno.EISDIR)}")
    check_file(option, file.with_name(f"{file.name}.{os.getpid()}.part"), named=file)


def _mode_of(file: Path) -> int | None:
    try:
        return file.stat().st_mode
    except FileNotFoundError:
        return None


@contextmanager
def scratch_folder(out: str | Path, prefix: str) -> Iterator[Path]:
    """A folder on the disk that `out` would be on, for a while. Raises UsageError where none can be made.

    Args:
        prefix: what its name begins with.
    """
    place = Path(out).absolute()
    while not os.path.isdir(place):
        place = place.parent
    try:
        folder = tempfile.TemporaryDirectory(prefix=prefix, dir=place)
    except OSError as error:
        raise UsageError(f"{place} cannot be written: {error.strerror or error}") from error
    with folder as name:
        yield Path(name)
