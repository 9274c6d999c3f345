"""What is printed, and where: tables to standard output, all that is said besides to standard error."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from rich.console import Console
from rich.highlighter import NullHighlighter
from rich.markup import escape

from secateur.terminal.figures import clock

#: Seconds after which it is told again how far something has come, if by a tenth, where there is no terminal.
TELL_AFTER = 10
# No emoji: `:M:` in a message is not to become a picture.
err = Console(stderr=True, highlight=False, emoji=False)
screen = Console(highlight=False, emoji=False)


def say(line: str) -> None:
    """Print a line to standard error."""
    # What a file calls its tensors is not to reach the terminal as anything but text.
    plain = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line)
    err.print(escape(plain), soft_wrap=True)


def show(line: str) -> None:
    """Print a line to standard output."""
    screen.print(escape(line), soft_wrap=True)


def show_log() -> None:
    """Have what is logged under `secateur` on standard error, as long as this process runs."""
    from rich.logging import RichHandler

    log = logging.getLogger("secateur")
    log.setLevel(logging.INFO)
    if not any(isinstance(handler, RichHandler) for handler in log.handlers):
        log.addHandler(RichHandler(console=err, show_path=False, highlighter=NullHighlighter()))


def counter(quiet: bool, what: str = "window ") -> Callable[[int, int], None]:
    """Shows on a terminal how many are done, a bar, the rate and the time left, in one line that goes when all are.

    It draws no longer than a call takes, so that an error finds the terminal as it was. Elsewhere it prints lines, where it
    takes long.
    """
    began, first, said, told = 0.0, 0, 0.0, 0

    def tell(done: int, total: int) -> None:
        nonlocal began, first, said, told
        if quiet:
            return
        now = time.monotonic()
        if began == 0.0 or done <= first:
            began, first, said, told = now, done, now, done
        text = f"{what}{done} of {total}"
        spent = now - began
        if done > first and spent > 0:
            rate = (done - first) / spent
            text += f", {rate:.3g}/s, {clock((total - done) / rate)} left"
        if not err.is_terminal:
            if now - said > TELL_AFTER and told + total / 10 <= done < total:
                said, told = now, done
                say(text)
            return
        wide = max(err.width - 1, 0)
        room = min(wide - len(text) - 1, 40)
        if room >= 8:
            full = room * done // max(total, 1)
            text = f"{'━' * full}{'─' * (room - full)} {text}"
        ended = done >= total
        err.print(escape(("" if ended else text)[:wide].ljust(wide)), end="\r", soft_wrap=True)
        began = 0.0 if ended else began

    return tell
