"""The inputs of blocks on the disk, from which a run that is resumed goes on."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from secateur.unfinished.hidden import HiddenStates
from secateur.unfinished.partial import Partial

# They are put there when so long has passed since the last time, in seconds, and so many times what it took: a resumed run has
# to run its blocks again from there, without solving them.
_HIDDEN_EVERY = 5.0
_HIDDEN_SHARE = 50


def file_beside(file: Path) -> Path:
    """Where the dense model's inputs of a block are, by where those of the compressed one are."""
    return file.with_name(f"{file.name}-dense")


class KeptInputs:
    """Of one run, in each process its own: those of the compressed model, and those of the dense one where they go along."""

    def __init__(self, partial: Partial) -> None:
        self._partial = partial
        self._saved: list[set[Path]] = []
        self._saved_at = time.monotonic()
        self._saving_took = 0.0

    def start(self) -> None:
        """Blocks are run from now on."""
        self._saved_at = time.monotonic()

    def go_on(self, like: Sequence[HiddenStates]) -> tuple[int, list[HiddenStates]] | None:
        """The last block whose inputs all processes have, and these, in the form that `like` has; None: there is none."""
        found = self._partial.find_hidden()
        if found is None:
            return None
        number, files = found
        self._saved.append(set(files))
        return number, [HiddenStates.open(file, each) for file, each in zip(files, like, strict=True)]

    def save(self, inputs: Sequence[HiddenStates], block: int) -> dict[str, Any] | None:
        """Now and then, put the inputs of a block on disk in each process; what the journal says of them."""
        if not inputs:
            return None
        ranks, now = self._partial.ranks, time.monotonic()
        if not ranks.share(now - self._saved_at > max(_HIDDEN_EVERY, _HIDDEN_SHARE * self._saving_took)):
            return None
        file = self._partial.hidden_file(block)
        files = [file, file_beside(file)][: len(inputs)]
        said = ranks.gather([[f.name, hiddens.save(f)] for f, hiddens in zip(files, inputs, strict=True)])
        self._saved.append(set(files))
        self._saved_at, self._saving_took = time.monotonic(), time.monotonic() - now
        return {"block": block, "files": said}

    def drop(self, inputs: Sequence[HiddenStates]) -> None:
        """Remove all but those that were saved last, and the files that hidden states are in."""
        saved = {file for files in self._saved[-2:] for file in files}
        self._partial.drop_hidden(saved | {hiddens.file for hiddens in inputs if hiddens.file is not None})
