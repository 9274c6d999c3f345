"""`secateur cache`."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from secateur.commands.command import command
from secateur.commands.result_files import check_files, takes_stdout, write_json
from secateur.commands.shared_options import Debug, JsonFile, Quiet
from secateur.errors import SecateurError
from secateur.terminal.figures import size
from secateur.terminal.screen import screen, show
from secateur.terminal.tables import Column, print_table

# Sampled text, and what a run that was killed left of it: nothing else in the folder is ours to delete.
_OURS = re.compile(r"self-[0-9a-f]{32}\.safetensors|tmp[a-z0-9_]{8}")


@dataclass(frozen=True)
class _Kept:
    file: Path
    bytes: int
    changed: float


@command("cache")
@dataclass(frozen=True)
class Cache:
    """Show the calibration text that models wrote and that is kept in ~/.cache/secateur, or delete it."""

    clear: Annotated[bool, typer.Option("--clear", help="Deletion of all that is kept.")] = False
    json_file: JsonFile = None
    quiet: Quiet = False
    debug: Debug = False

    def run(self) -> None:
        from secateur.calibration.kept_windows import cache_folder

        check_files({"--json": self.json_file})
        folder = cache_folder()
        kept = _kept_in(folder)
        if self.clear:
            _delete(kept)
        total = sum(each.bytes for each in kept)
        if not self.quiet and not takes_stdout(self.json_file):
            if not self.clear and kept:
                rows = [
                    [k.file.name, size(k.bytes), time.strftime("%Y-%m-%d", time.localtime(k.changed))] for k in kept
                ]
                print_table(screen, [Column("file", right=False), Column("size"), Column("written")], rows, lines=False)
            done = "deleted" if self.clear else "kept"
            show(f"{folder}: {len(kept)} file{'' if len(kept) == 1 else 's'} {done}, {size(total)}")
        files = [{"file": each.file.name, "bytes": each.bytes} for each in kept]
        write_json({"folder": str(folder), "bytes": total, "cleared": self.clear, "files": files}, self.json_file)


def _kept_in(folder: Path) -> list[_Kept]:
    try:
        found = [file for file in folder.iterdir() if _OURS.fullmatch(file.name) and file.is_file()]
        about = [(file, file.stat()) for file in sorted(found)]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise SecateurError(f"the cache {folder} cannot be read: {error.strerror or error}") from error
    return [_Kept(file, stat.st_size, stat.st_mtime) for file, stat in about]


def _delete(kept: list[_Kept]) -> None:
    for each in kept:
        try:
            each.file.unlink(missing_ok=True)
        except OSError as error:
            raise SecateurError(f"{each.file} cannot be deleted: {error.strerror or error}") from error
