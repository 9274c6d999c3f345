"""`secateur recipes`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from secateur.commands.command import command
from secateur.commands.result_files import check_files, check_names_no_file, takes_stdout, write_json
from secateur.commands.shared_options import Debug, JsonFile
from secateur.terminal.screen import screen
from secateur.terminal.tables import Column, print_table


@command("recipes")
@dataclass(frozen=True)
class Recipes:
    """List the built-in recipes, or print one: `secateur recipes NAME > my.yaml`."""

    name: Annotated[str | None, typer.Argument(help="Recipe to print as YAML, to be edited.")] = None
    json_file: JsonFile = None
    debug: Debug = False

    def run(self) -> None:
        from secateur.recipes.built_in import NAMES, built_in

        check_names_no_file(self.name, self.json_file, NAMES)
        check_files({"--json": self.json_file})
        found = [built_in(each) for each in (NAMES if self.name is None else [self.name])]
        about = [
            {"name": each.name, "good_for": each.good_for, "costs": each.costs, "recipe": each.recipe.to_dict()}
            for each in found
        ]
        write_json(about if self.name is None else about[0], self.json_file)
        if takes_stdout(self.json_file):
            return
        if self.name is not None:
            print(found[0].text, end="")
        else:
            columns = [Column("recipe", right=False), Column("good for, and what it costs", right=False)]
            rows = [[each.name, f"{each.good_for}\n{each.costs}\n"] for each in found]
            print_table(screen, columns, rows, lines=False)
