"""The errors a user can cause.

Each carries one line that says what is wrong, where, and what to do about it. The command line prints that line and
exits with `exit_code`; a script catches `SecateurError`.
"""

import difflib
from collections.abc import Iterable


class SecateurError(Exception):
    """Something the user can act on: 1 is the exit code of a check that failed or a run that could not be finished."""

    exit_code = 1


class UsageError(SecateurError):
    """What was asked for cannot be done as it was asked: exit code 2."""

    exit_code = 2


class CheckpointError(SecateurError):
    """A checkpoint's files are missing, damaged, or disagree with each other."""


class RepeatedError(SecateurError):
    """What a run met in what it computes: one that is resumed would come to the same."""


class ReportedError(SecateurError):
    """The run ends, and another of its processes has said why."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("another process of this run has said what went wrong")
        self.exit_code = exit_code


class Interrupted(BaseException):
    """A signal to stop. Not a KeyboardInterrupt, which typer would keep to itself.

    Attributes:
        left: what the run leaves behind, in words.
    """

    left = "nothing is left behind"


def one_line(error: BaseException) -> str:
    """The text of somebody else's error on one line of reasonable length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) < 300 else text[:297] + "..."


def did_you_mean(name: str, among: Iterable[str]) -> str:
    """What to say to somebody who gave a name that is not there: the nearest one, or else all of them."""
    names = sorted(among)
    close = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {close[0]!r}?" if close else f"it can be {', '.join(names)}"
