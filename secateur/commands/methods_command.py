"""`secateur methods`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import typer

from secateur.commands.command import command
from secateur.commands.result_files import check_files, check_names_no_file, takes_stdout, write_json
from secateur.commands.shared_options import Debug, JsonFile
from secateur.errors import UsageError, did_you_mean
from secateur.terminal.screen import screen, show
from secateur.terminal.tables import Column, print_table

_ROLE = {"prune": "--prune", "refine": "--refine", "quantize": "--quantize", "factorize": "--factorize"}
_NEEDS = ("nothing but weights", "square sums of the inputs", "the Gram matrix of the inputs")


@command("methods")
@dataclass(frozen=True)
class Methods:
    """List the methods, or show one method's options, needs and paper."""

    name: Annotated[str | None, typer.Argument(help="Method to show the options of.")] = None
    json_file: JsonFile = None
    debug: Debug = False

    def run(self) -> None:
        from secateur.core.registry import ROLES
        from secateur.recipes.methods import OPTIONS_KEY  # importing it registers all methods

        name = self.name
        found = {each: (role, ROLES[role][each]) for role in OPTIONS_KEY for each in sorted(ROLES[role])}
        if name is not None and name not in found:
            raise UsageError(f"method {name!r} is not known: {did_you_mean(name, found)}")
        check_names_no_file(name, self.json_file, found)
        check_files({"--json": self.json_file})
        told = {each: _about(role, method) for each, (role, method) in found.items() if name in (None, each)}
        write_json(told if name is None else told[name], self.json_file)
        if takes_stdout(self.json_file):
            return
        if name is None:
            columns = [Column("method", right=False), Column("as", right=False), Column("needs", right=False, spare=2)]
            rows = [[each, about["option"], about["needs"], about["paper"] or "–"] for each, about in told.items()]
            print_table(screen, [*columns, Column("paper", right=False, spare=1)], rows, lines=False)
        else:
            _print_one(name, told[name])


def _about(role: str, method: Any) -> dict[str, Any]:
    from secateur.core.options import given_options, options_of, types_of

    default = method()
    values = given_options(default)
    needs = _NEEDS[default.level]
    if getattr(default, "needs_fisher", False):
        needs += " and squared gradients"
    return {
        "option": _ROLE[role],
        "needs": needs,
        "paper": method.paper,
        "about": " ".join((method.__doc__ or "").split()),
        "options": {
            option: {
                "default": values.get(option),
                "type": str(types_of(method)[option]).removeprefix("<class '").removesuffix("'>"),
                "values": about.range,
                "help": about.help,
            }
            for option, about in options_of(method).items()
        },
    }


def _print_one(name: str, about: dict[str, Any]) -> None:
    lines = [f"{about['option']} {name}: {about['about']}", f"needs: {about['needs']}"]
    lines += [f"paper: {about['paper']}"] if about["paper"] else []
    lines += [] if about["options"] else ["no options"]
    for line in lines:
        show(line)
    columns = [Column(heading, right=False) for heading in ("option", "default", "values", "")]
    rows = []
    for option, each in about["options"].items():
        default = "–" if each["default"] is None else str(each["default"])
        rows.append([f"--{option.replace('_', '-')}", default, each["values"], each["help"]])
    if rows:
        print_table(screen, columns, rows, lines=False)
