"""`card`: the model card of a finished folder anew, with figures that were measured since."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from secateur.checkpoint.card import CARD_NAME, write_card
from secateur.checkpoint.measured import read_figures
from secateur.errors import CheckpointError
from secateur.folder.manifest import MANIFEST_NAME, check_files, seal, sha256
from secateur.folder.paths import check_named
from secateur.folder.reader import read_json
from secateur.folder.writer import write_whole


def renew_card(out: str | Path, results: Iterable[str | Path] = ()) -> int:
    """Write `README.md` of a folder anew. What stands below our part of it, and what its YAML says besides, is kept.

    Args:
        out: a folder made by secateur.
        results: files that `eval --json`, `gate --json` or `gate --write` wrote of it.

    Returns:
        How many figures the card has.

    Raises:
        UsageError: a file holds no figures, or those of another model.
        CheckpointError: another file of the folder is not as secateur wrote it.
    """
    check_named(out, "OUT")
    folder = Path(out)
    problem = next((found for found in check_files(folder) if found.where != CARD_NAME), None)
    if problem is not None:
        raise CheckpointError(f"{folder / problem.where}: {problem.what}")
    figures = [figure for file in results for figure in read_figures(file, folder)]
    manifest = read_json(folder / MANIFEST_NAME)
    write_card(folder, _name(manifest, folder), read_json(folder / "config.json"), manifest, figures=figures)
    manifest.pop("sha256", None)
    files = {**manifest["files"], CARD_NAME: sha256(folder / CARD_NAME)}
    sealed = seal({**manifest, "files": dict(sorted(files.items()))})
    write_whole(folder / MANIFEST_NAME, lambda part: part.write_bytes(sealed))
    return len(figures)


def _name(manifest: Mapping[str, Any], folder: Path) -> str:
    """Of the model that a folder was made of."""
    source = manifest.get("source")
    found = source.get("model") if isinstance(source, Mapping) else None
    return found if isinstance(found, str) and found else str(folder)
