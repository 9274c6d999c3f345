"""What is printed, and where: tables to standard output, all that is said besides to standard error."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console
from rich.markup import escape

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


def counter(quiet: bool, what: str = "window ") -> Callable[[int, int], None]:
    """Shows on a terminal how many are done."""

    def tell(done: int, total: int) -> None:
        if not quiet and err.is_terminal:
            err.print(f"{what}{done} of {total}".ljust(40), end="\r")

    return tell
