"""The built-in recipes: the YAML files of the folder `builtin`, under the names of the files.

A file begins with two comments, which say what the recipe is good for and what it costs.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.errors import UsageError, did_you_mean
from secateur.folder.manifest import MANIFEST_NAME
from secateur.folder.paths import check_named
from secateur.recipes.methods import OPTIONS_KEY, check_names, find
from secateur.recipes.recipe import Recipe

SUFFIXES = (".yaml", ".yml", ".json")
_FILES = dict(sorted((file.stem, file) for file in (Path(__file__).parent / "builtin").glob("*.yaml")))
_ABOUT = re.compile(r"# Good for: (.+)\n# Costs: (.+)\n")

NAMES = tuple(_FILES)
#: For most uses: little loss, and kernels on CPUs and GPUs, see docs/choosing.md.
TO_BEGIN_WITH = "spqr-4bit"


@dataclass(frozen=True)
class BuiltIn:
    """A built-in recipe.

    Attributes:
        text: of its file.
        good_for, costs: a line each. Perplexities are SmolLM2-135M's on WikiText-2, from docs/choosing.md.
    """

    name: str
    recipe: Recipe
    text: str
    good_for: str
    costs: str


def built_in(name: str) -> BuiltIn:
    """The built-in recipe of a name.

    Raises:
        UsageError: there is none; the nearest one is offered.
    """
    if name not in _FILES:
        raise UsageError(f"built-in recipe {name!r} is not known: {did_you_mean(name, NAMES)}")
    text = _FILES[name].read_text(encoding="utf-8")
    about = _ABOUT.match(text)
    assert about is not None, f"{name} does not say what it is good for"
    return BuiltIn(name, Recipe.read(_FILES[name]), text, about[1], about[2])


def as_recipe(given: Recipe | Mapping[str, Any] | str | Path) -> Recipe:
    """The recipe that a script names: itself, its keys and values as a recipe file has them, or what `recipe` takes.

    Raises:
        UsageError: it is none of these.
    """
    if isinstance(given, Recipe):
        return given
    if isinstance(given, str | Path):
        return recipe(str(given))
    if isinstance(given, Mapping):
        return Recipe.from_dict(dict(given))
    raise UsageError(
        f"a recipe is a secateur.Recipe, a dict, the name of a built-in recipe or a file, not {type(given).__name__}"
    )


def recipe(given: str) -> Recipe:
    """The recipe in a file, or the built-in one of that name if there is no such file, or that of a folder that we made.

    Raises:
        UsageError: there is neither, or the file holds no recipe.
    """
    check_named(given, "`recipe`")
    path = Path(given)
    if os.path.isfile(path):  # no error for a name that is too long for a file
        return _read(path)
    if given in _FILES:
        return built_in(given).recipe
    if os.path.isdir(path):
        if not (path / MANIFEST_NAME).is_file():
            raise UsageError(
                f"`recipe` {given} is a folder without {MANIFEST_NAME}: give one that secateur made, or a file"
            )
        return _read(path / MANIFEST_NAME)
    # What looks like a path is one: the error is then why it cannot be read.
    if os.path.exists(path) or path.name != given or path.suffix in SUFFIXES:
        return _read(path)
    raise UsageError(f"`recipe` {given!r} is neither a file nor a built-in recipe: {did_you_mean(given, NAMES)}")


def _read(path: Path) -> Recipe:
    """The recipe of a file, of which methods and their options have names that are known."""
    recipe = Recipe.read(path)
    try:
        for role, key in OPTIONS_KEY.items():
            if getattr(recipe, role):
                check_names(find(role, getattr(recipe, role)), getattr(recipe, key))
    except UsageError as error:
        raise UsageError(f"recipe {path}: {error}") from error
    return recipe
