"""Progress: a live bar on a terminal, a few plain lines elsewhere, nothing when quiet."""

from __future__ import annotations

import re
import time
from typing import Any

from rich.markup import escape
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

from secateur.terminal.figures import clock, size
from secateur.terminal.screen import TELL_AFTER, err, say

# Lines on blocks of a run, at most, where there is no terminal.
_MOST_LINES = 20
_COUNTED = re.compile(r"(?:block )?(\d+) of (\d+)(?: (\w+))?")


class Display:
    """Shows the progress of a run that it is told of, while it is open."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet
        self.live = err.is_terminal and not quiet
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=None), TextColumn("{task.fields[state]}"))
        self.bar = Bar(*columns, console=err, expand=True)
        self.task = self.bar.add_task("", total=None, state="")
        self.pace: _Pace | None = None
        self.stage = ""
        self.block = 0
        self.in_block = self.most_in_block = 0
        self.seen: list[Any] = []
        self.said = 0.0
        self.told = 0.0

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
            (self._move_bar if progress.linear is None else self._move_blocks)(progress)
        elif progress.linear is None:
            self._tell_blocks()
            self._tell_stage(progress.stage)
        else:
            self._tell_linear(progress)

    # --- on a terminal

    def _move_bar(self, progress: Any) -> None:
        """A stage without linears: its bar fills where it counts up, else it runs to and fro."""
        name, counted = _name_of(progress.stage), _COUNTED.search(progress.stage)
        if counted is None:
            self.pace = None
            self.bar.tasks[0].total = None  # which `update` takes for "as it was"
            self.bar.update(self.task, description=escape(progress.stage), state="")
            return
        done, total, what = int(counted[1]), int(counted[2]), counted[3] or ""
        if self.pace is None or self.stage != name:
            self.pace, self.stage = _Pace(done), name
        state = self.pace.state(done, total, what)
        self.bar.update(self.task, description=escape(progress.stage), total=total, completed=done, state=state)

    def _move_blocks(self, progress: Any) -> None:
        """Blocks that are compressed: the bar moves with every linear, as far as one knows how many a block has."""
        if self.pace is None or self.stage != progress.stage:
            self.pace, self.stage, self.block, self.in_block = _Pace(0), progress.stage, progress.block, 0
        if progress.block != self.block:
            self.block, self.in_block = progress.block, 0
        self.in_block += 1
        self.pace.count += 1
        known, self.most_in_block = self.most_in_block, max(self.most_in_block, self.in_block)
        of_block = min(self.in_block / known, 1) if known else 0
        left = f"{clock(progress.seconds_left)} left, memory {size(progress.peak_bytes)}"
        self.bar.update(
            self.task,
            description=f"block {progress.block + 1} of {progress.blocks}",
            total=progress.blocks,
            completed=progress.block + of_block,
            state=f"{self.pace.rate(self.pace.count)} linears/s, {left}",
        )

    # --- elsewhere

    def _tell_stage(self, stage: str) -> None:
        name, now, counted = _name_of(stage), time.monotonic(), _COUNTED.search(stage)
        share = int(counted[1]) / max(int(counted[2]), 1) if counted else 1.0
        if name != self.stage:
            self.told = 0.0
        elif now - self.said <= TELL_AFTER or share < self.told + 0.1:
            return
        say(stage)
        self.stage, self.said, self.told = name, now, share

    def _tell_linear(self, progress: Any) -> None:
        """Blocks are told when the first linear of the next one is there: some at a time, where there are many."""
        if self.seen and progress.block != self.block:
            many = -(-progress.blocks // _MOST_LINES)
            if (self.block + 1) % many == 0:
                self._tell_blocks()
        self.block = progress.block
        self.seen.append(progress)

    def _tell_blocks(self) -> None:
        """One line on the blocks that are done since the last one."""
        if self.seen:
            last, worst = self.seen[-1], max((p.linear for p in self.seen), key=lambda linear: linear.error)
            say(
                f"block {last.block + 1} of {last.blocks}: {len(self.seen)} linears, largest error {worst.error:.2e} in "
                f"{worst.name}, {last.seconds_left:.0f} s left, peak memory {size(last.peak_bytes)}"
            )
            self.seen.clear()


class _Pace:
    """How fast something counts up."""

    def __init__(self, begin: int) -> None:
        self.begin = self.count = begin
        self.began = time.monotonic()

    def rate(self, done: int) -> str:
        """So many a second, in words."""
        return f"{(done - self.begin) / max(time.monotonic() - self.began, 1e-3):.3g}"

    def state(self, done: int, total: int, what: str) -> str:
        """The rate and the time left, in words; nothing before the second step."""
        if done <= self.begin:
            return ""
        left = (time.monotonic() - self.began) / (done - self.begin) * (total - done)
        return f"{self.rate(done)}{f' {what}' if what else ''}/s, {clock(left)} left"


def _name_of(stage: str) -> str:
    """What a stage is called however far it has come."""
    return stage.partition(":")[0]
