"""A recipe as the options of `secateur compress`, for what is to be repeated by hand."""

from __future__ import annotations

import shlex
from dataclasses import replace

from secateur.recipes.methods import OPTIONS_KEY
from secateur.recipes.recipe import Recipe
from secateur.recipes.recipe_values import differing


def command_of(recipe: Recipe, model: str, device: str = "cpu", trust_remote_code: bool = False) -> str:
    """The command that compresses a model by a recipe to a folder OUT."""
    flags = [*flags_of(recipe), *(["--device", device] if device != "cpu" else [])]
    flags += ["--trust-remote-code"] if trust_remote_code else []
    return shlex.join(["secateur", "compress", model, "OUT", *flags])


def flags_of(recipe: Recipe) -> list[str]:
    """The options that give a recipe, as a command line has them; without what a search chose."""
    given = differing(replace(recipe, linears={}, experts={}).to_dict(), Recipe().to_dict())
    text = given.pop("calibration", {})
    given |= {"calibration" if name == "source" else name: value for name, value in text.items()}
    for key in OPTIONS_KEY.values():
        given |= given.pop(key, {})
    flags = []
    for name, value in given.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            off = "asymmetric" if name == "symmetric" else f"no-{flag}"
            flags.append(f"--{flag if value else off}")
        else:
            for each in value if isinstance(value, list) else [value]:
                flags += [f"--{flag}", str(each)]
    return flags
