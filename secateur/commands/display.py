"""Progress: a live bar on a terminal, plain lines elsewhere, nothing when quiet."""

from __future__ import annotations

import time
from typing import Any

from rich.markup import escape
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

from secateur.commands.figures import size
from secateur.commands.screen import err, say


class Display:
    """Shows the progress of a run that it is told of, while it is open."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet
        self.live = err.is_terminal and not quiet
        self.bar = Bar(TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[state]}"), console=err)
        self.task = self.bar.add_task("", total=None, state="")
        self.stage = ""
        self.block = 0
        self.seen: list[Any] = []
        self.said = 0.0

    def __enter__(self) -> Display:
        if self.live:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.bar.stop()

    def __call__(self, progress: Any) -> None:
        if self.quiet:
            return
        if self.live:
            self._move_bar(progress)
            return
        if progress.linear is None or progress.block != self.block:
            self._tell_block()
        if progress.linear is None:
            # A stage that counts up is told of now and then.
            name = progress.stage.partition(":")[0]
            if name != self.stage or time.monotonic() - self.said > 10:
                say(progress.stage)
                self.stage, self.said = name, time.monotonic()
        else:
            self.block = progress.block
            self.seen.append(progress)

    def _move_bar(self, progress: Any) -> None:
        linear = progress.linear
        if linear is None:
            self.bar.update(self.task, description=escape(progress.stage), state="")
            return
        state = (
            f"{linear.name.split('.', 2)[-1]} error {linear.error:.2e}, "
            f"{progress.seconds_left:.0f} s left, {size(progress.peak_bytes)}"
        )
        done, blocks = progress.block + 1, progress.blocks
        self.bar.update(self.task, description=f"block {done} of {blocks}", total=blocks, completed=done, state=state)

    def _tell_block(self) -> None:
        """One line on the block that is done."""
        if self.seen:
            last, worst = self.seen[-1], max((p.linear for p in self.seen), key=lambda linear: linear.error)
            say(
                f"block {last.block + 1} of {last.blocks}: {len(self.seen)} linears, largest error {worst.error:.2e} in "
                f"{worst.name}, {last.seconds_left:.0f} s left, peak memory {size(last.peak_bytes)}"
            )
            self.seen.clear()
