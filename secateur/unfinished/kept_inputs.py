"""The inputs of blocks on the disk, from which a run that is resumed goes on."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from secateur.unfinished.hidden import HiddenStates
from secateur.unfinished.partial import Partial

# They are put there when so long has passed since the last time, in seconds, and so many times what it took: a resumed run has
# to run its blocks again from there, without solving them.
_HIDDEN_EVERY = 5.0
_HIDDEN_SHARE = 50


class KeptInputs:
    """Of one run, in each process its own."""

    def __init__(self, partial: Partial) -> None:
        self._partial = partial
        self._saved: list[Path] = []
        self._saved_at = time.monotonic()
        self._saving_took = 0.0

    def start(self) -> None:
        """Blocks are run from now on."""
        self._saved_at = time.monotonic()

    def go_on(self, like: HiddenStates) -> tuple[int, HiddenStates] | None:
        """The last block whose inputs all processes have, and these, in the form that `like` has; None: there is none."""
        found = self._partial.find_hidden()
        if found is None:
            return None
        number, file = found
        self._saved.append(file)
        return number, HiddenStates.open(file, like)

    def save(self, hiddens: HiddenStates | None, block: int) -> dict[str, Any] | None:
        """Now and then, put the inputs of a block on disk in each process; what the journal says of them."""
        if hiddens is None:
            return None
        ranks, now = self._partial.ranks, time.monotonic()
        if not ranks.share(now - self._saved_at > max(_HIDDEN_EVERY, _HIDDEN_SHARE * self._saving_took)):
            return None
        file = self._partial.hidden_file(block)
        files = ranks.gather([file.name, hiddens.save(file)])
        self._saved.append(file)
        self._saved_at, self._saving_took = time.monotonic(), time.monotonic() - now
        return {"block": block, "files": files}

    def drop(self, hiddens: HiddenStates) -> None:
        """Remove all but those that were saved last, and the file that hidden states are in."""
        self._partial.drop_hidden({*self._saved[-2:], *([hiddens.file] if hiddens.file is not None else [])})
