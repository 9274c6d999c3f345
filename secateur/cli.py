"""The command line: find the command, run it, and say in one line what went wrong."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from secateur._version import __version__
from secateur.commands.command import Asked
from secateur.commands.find_commands import find, names
from secateur.errors import Interrupted, ReportedError, SecateurError, UsageError, did_you_mean, one_line
from secateur.registration import when_imported
from secateur.terminal.output import write_any_text


class _Commands(TyperGroup):
    """Imports a command's file when it is called or listed."""

    def list_commands(self, ctx: Any) -> list[str]:
        return names()

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return find(cmd_name)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if find(args[0]) is None and not ctx.resilient_parsing:
            raise UsageError(f"there is no command {args[0]!r}: {did_you_mean(args[0], names())}")
        return super().resolve_command(ctx, args)


app = typer.Typer(
    cls=_Commands,
    name="secateur",
    help="Prune and quantize Hugging Face causal language models without training, and write smaller checkpoints that load.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted by a signal.",
)
# typer has click inside or beside it, by its release: what its errors descend from is found by one that typer shows.
_CLICK_ERROR: Any = typer.BadParameter.__mro__[2]


def _version(value: bool) -> None:
    if value:
        print(f"secateur {__version__}")
        raise typer.Exit


@app.callback()
def _app(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


def _interrupt(*_: object) -> None:
    raise Interrupted


def run(command: Callable[..., Any]) -> int:
    """Run a command and return its exit code; what goes wrong is one line on standard error, unless --debug."""
    asked = Asked()
    try:
        code = command(obj=asked, standalone_mode=False)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except (KeyboardInterrupt, Interrupted) as stop:
        _say(f"interrupted: {_spelled(getattr(stop, 'left', Interrupted.left), asked)}")
        return 130
    except typer.Abort:  # what asked for input got none
        _say("aborted")
        return 1
    except ReportedError as error:
        return error.exit_code
    except Exception as error:
        return _tell(error, asked)
    return code if isinstance(code, int) else 0


def _tell(error: Exception, asked: Asked) -> int:
    """Say what went wrong; the exit code."""
    if isinstance(error, _CLICK_ERROR):
        return _tell_usage(error)
    if asked.debug:
        from secateur.terminal.screen import err

        err.print_exception()
    elif isinstance(error, SecateurError):
        _say(f"error: {_spelled(str(error), asked)}")
    else:
        _say(f"error: {type(error).__name__}: {one_line(error)} (run again with --debug for details)")
    return error.exit_code if isinstance(error, SecateurError) else 1


def _spelled(text: str, asked: Asked) -> str:
    from secateur.commands.spelling import as_flags

    return as_flags(text, asked.command)


def _tell_usage(error: Any) -> int:
    """Say what the parser found; the exit code."""
    if type(error).__name__ != "NoArgsIsHelpError":  # the help is printed already
        text = one_line(Exception(error.format_message())).removesuffix(".").replace("Input should", "it should")
        context = getattr(error, "ctx", None)
        where = "" if context is None else f"; see `{context.command_path} --help`"
        _say(f"error: {text[:1].lower()}{text[1:]}{where}")
    return int(error.exit_code)


def _say(line: str) -> None:
    from secateur.terminal.screen import say

    say(line)


def _quieten() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def main() -> None:
    """The command `secateur`."""
    write_any_text()
    when_imported("transformers.utils.logging", _quieten)
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _interrupt)
    sys.exit(run(app))


if __name__ == "__main__":
    main()
