"""What a command is: a frozen dataclass whose fields are its arguments and options, with its help in the docstring.

A file of its own registers it under the name that the user types. Calling the command makes one and lets it `run`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from inspect import Parameter, Signature
from typing import Annotated, Any, Protocol, TypeVar, get_args, get_type_hints

import typer
from typer.core import TyperCommand

from secateur.errors import UsageError


class Command(Protocol):
    """One call of a command: a frozen dataclass whose fields carry typer's arguments and options as annotations."""

    def run(self) -> None:
        """Do it, and print what is to be said. Raises SecateurError; typer.Exit(1) where a check has failed."""
        ...


@dataclass(frozen=True)
class Options:
    """Annotates a field in whose place a command has many options.

    Attributes:
        parameters: which, as a signature holds them.
        read: the value of the field, of what was given for each by name.
    """

    parameters: Callable[[], list[Parameter]]
    read: Callable[[dict[str, Any]], Any]


@dataclass
class Asked:
    """What a command line has been found to ask for, as the context of its commands holds it.

    Attributes:
        command: the name of the one that is called; None before it is known.
        debug: whether the traceback of an error is to be shown.
    """

    command: str | None = None
    debug: bool = False


#: The classes of the commands whose files are imported, and what else typer is told about each.
COMMANDS: dict[str, tuple[type[Command], dict[str, Any]]] = {}
JSON_TAKES_A_FILE = "--json takes a file ('-': standard output)"
_C = TypeVar("_C", bound=type[Command])


def command(name: str, **settings: Any) -> Callable[[_C], _C]:
    """Register a class as the command of that name; `settings` are those of `typer.Typer.command`."""

    def register(made: _C) -> _C:
        COMMANDS[name] = made, settings
        return made

    return register


class Summary(TyperCommand):
    """A command as the help of all lists it: what it takes is found out when it is called, which may need torch."""

    def make_context(self, info_name: Any, args: Any, parent: Any = None, **extra: Any) -> Any:
        return build(str(self.name)).make_context(info_name, args, parent, **extra)


def summary(name: str) -> Summary:
    """The command of that name, which is registered."""
    made, settings = COMMANDS[name]
    return Summary(name, help=inspect.getdoc(made), **settings)


def _log(value: bool) -> None:
    if value:
        from secateur.terminal.screen import show_log

        show_log()


_VERBOSE = Annotated[bool, typer.Option("--verbose", "-v", help="Log on standard error.", callback=_log)]


def build(name: str) -> TyperCommand:
    """A registered command with all that it takes."""
    made, settings = COMMANDS[name]
    hints = get_type_hints(made, include_extras=True)
    parameters: list[Parameter] = []
    grouped: dict[str, Options] = {}
    for field in fields(made):  # type: ignore[arg-type]
        options = next((each for each in get_args(hints[field.name]) if isinstance(each, Options)), None)
        if options is not None:
            parameters += options.parameters()
            grouped[field.name] = options
        else:
            default = Parameter.empty if field.default is MISSING else field.default
            kind = Parameter.KEYWORD_ONLY
            parameters.append(Parameter(field.name, kind, default=default, annotation=hints[field.name]))

    # Unknown options that are not refused are somebody else's.
    ours = not settings.get("context_settings", {}).get("ignore_unknown_options")
    logs = ours and all(parameter.name != "verbose" for parameter in parameters)
    if logs:
        parameters.append(Parameter("verbose", Parameter.KEYWORD_ONLY, default=False, annotation=_VERBOSE))

    def call(**given: Any) -> None:
        if logs:
            given.pop("verbose")
        for field, options in grouped.items():
            given[field] = options.read({each.name: given.pop(each.name) for each in options.parameters()})
        made(**given).run()

    call.__doc__ = made.__doc__
    call.__annotations__ = {each.name: each.annotation for each in parameters}
    call.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    alone = typer.Typer(add_completion=False)
    alone.command(name, **{"cls": _Called, **settings})(call)
    found = typer.main.get_command(alone)
    assert isinstance(found, TyperCommand)
    return found


def _explain_missing(error: Exception, args: list[str]) -> None:
    """Raise UsageError where `--json` has taken for its file the argument that is missing, which used to follow it."""
    argument = getattr(getattr(error, "param", None), "param_type_name", None) == "argument"
    taken = args[args.index("--json") + 1] if argument and "--json" in args[:-1] else "-"
    if taken != "-":
        raise UsageError(f"{JSON_TAKES_A_FILE}, and took {taken} for it: write `{taken} --json -`")


class _Called(TyperCommand):
    """A command that refuses empty values, which a shell makes of variables that are not set.

    A bare `--json`, which some commands had before it named a file, is `--json -`.
    """

    def _with_files(self, args: list[str]) -> list[str]:
        if not any("--json" in parameter.opts for parameter in self.params):
            return list(args)
        found = []
        for at, arg in enumerate(args):
            after = args[at + 1] if at + 1 < len(args) else "--"
            bare = arg == "--json" and "--" not in args[:at] and after.startswith("-") and after != "-"
            found += [arg, "-"] if bare else [arg]
        return found

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if isinstance(ctx.obj, Asked):
            ctx.obj.command = self.name
        args = self._with_files(args)
        before = list(args)
        try:
            rest = super().parse_args(ctx, args)
        except Exception as error:
            _explain_missing(error, before)
            raise
        given = self.make_parser(ctx).parse_args(args=before)[0]
        for parameter in self.params:
            values = given.get(parameter.name)
            if parameter.name != "prompt" and "" in (values if isinstance(values, list | tuple) else [values]):
                name = parameter.opts[0] if parameter.param_type_name == "option" else parameter.opts[0].upper()
                raise UsageError(f"{name} is empty: give a value, or leave it out (the current folder is called '.')")
        return rest
