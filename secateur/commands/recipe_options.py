"""The options of `compress` and `plan` that make a recipe: those of every recipe, and each method's from its own fields."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from inspect import Parameter
from typing import Annotated, Any

import typer

from secateur.core.options import Option, options_of, types_of
from secateur.core.registry import LOW_RANKERS, ROLES
from secateur.errors import UsageError
from secateur.recipes.built_in import recipe as find_recipe
from secateur.recipes.methods import OPTIONS_KEY, options_by_name
from secateur.recipes.recipe import Recipe

# What stands under no heading of its own comes first in the help.
_METHODS, _TEXT, _SEARCH, _OUTPUT = None, "Calibration", "Search", "Scope, output and memory"
_DETAIL = "Pruning"
# Parts that are played by methods whose options no others have.
_ALONE = ("factorize", "activations", "expert_score")


@dataclass(frozen=True)
class _Given:
    """An option of every recipe.

    Attributes:
        type: as typer takes it.
        help: a noun phrase.
        panel: under which heading it stands; None: with the common ones.
        key: of the recipe, or of its calibration, where it has another name there.
        hidden: left out of the help, for few need it.
    """

    type: Any
    help: str
    panel: str | None
    key: str = ""
    hidden: bool = False


def _names(role: str) -> str:
    return ", ".join(sorted(ROLES[role]))


def _recipe_options() -> dict[str, _Given]:
    return {
        "quantize": _Given(str, f"Quantization method: {_names('quantize')}.", _METHODS),
        "embeddings": _Given(str, "Bits of embeddings: 2 to 8, 16, or q6_k.", _METHODS),
        "head": _Given(str, "Bits of a head that is not tied.", _METHODS),
        "factorize": _Given(str, f"Factorization: {_names('factorize')}.", _METHODS),
        "prune": _Given(str, f"Pruning method: {_names('prune')}.", _METHODS),
        "sparsity": _Given(str, "Fraction of weights to remove: 50% or 0.5.", _METHODS),
        "activations": _Given(str, f"Unread inputs: {_names('activations')}.", _METHODS),
        "activation_sparsity": _Given(str, "Fraction of weights unread (default: 50%).", _METHODS),
        "pattern": _Given(str, "N:M (N of M stay), unstructured, structured.", _DETAIL),
        "units": _Given(str, "Structured: some of neurons,heads,blocks.", _DETAIL),
        "multiple": _Given(int, "Structured: divisor of the neurons left.", _DETAIL),
        "refit": _Given(bool, "Structured: weights that make up for what goes.", _DETAIL),
        "widths": _Given(str, "Structured: uniform or per-layer.", _DETAIL),
        "drop_experts": _Given(str, "Fraction of experts to drop in each layer.", _DETAIL),
        "expert_score": _Given(str, "Score of experts, e.g. gate, reap or naee.", _DETAIL),
        "refine": _Given(str, f"Method that improves the mask: {_names('refine')}.", _DETAIL),
        "reconstruct": _Given(bool, "Best values for the kept weights.", _DETAIL),
        "low_rank": _Given(str, "Share of weights in thin factors beside, e.g. 5%.", _DETAIL),
        "rank": _Given(int, "Rank of these factors, instead of a share.", _DETAIL),
        "low_rank_method": _Given(
            str, f"Method that finds them: {', '.join(sorted(LOW_RANKERS))}.", _DETAIL, hidden=True
        ),
        "match_dense": _Given(bool, "Dense model's outputs as every linear's target.", _TEXT),
        "allocation": _Given(str, "Sharing of a total: uniform, owl, search or mc.", _SEARCH),
        "target_size": _Given(str, "Size to reach by search, e.g. 35%, 100MB or 2.5bit.", _SEARCH),
        "max_perplexity_rise": _Given(str, "Largest rise of perplexity in a search, e.g. 3%.", _SEARCH),
        "share_choice": _Given(str, "One choice within each expert, or each layer of experts.", _SEARCH),
        "expert_skip": _Given(str, "Share of weaker experts left out at run time.", _OUTPUT),
        "targets": _Given(list[str], "Glob of the linears to compress; repeatable.", _OUTPUT),
        "ignore": _Given(list[str], "Glob of the linears to leave alone; repeatable.", _OUTPUT),
        "format": _Given(str, "Layout of the result: auto, dense, bitmap or nm.", _OUTPUT),
        "dtype": _Given(str, "Precision: auto, bfloat16, float16, float32.", _OUTPUT),
    }


_CALIBRATION = {
    "calibration": _Given(
        str, "Text: self, docs, a file of text or rows, wikitext2, c4, hub-id[:config][:split].", _TEXT, "source"
    ),
    "text_field": _Given(str, "Field of a row that holds its text.", _TEXT),
    "samples": _Given(int, "Number of calibration windows.", _TEXT),
    "seq_len": _Given(int, "Tokens in a window.", _TEXT),
    "seed": _Given(int, "Random seed.", _TEXT),
    "expert_tokens": _Given(int, "Tokens that each expert sees at least.", _TEXT),
    "expert_inputs": _Given(str, "Tokens of an expert: routed, gate or all.", _TEXT),
    "expert_balance": _Given(int, "Windows written for each kept, for even use.", _TEXT),
    "bos": _Given(bool, "BOS of the tokenizer at the start of windows.", _TEXT),
}
_RECIPE = _Given(str, "Built-in recipe, YAML file, or folder.", _METHODS)


def _parameter(
    name: str, kind: Any, help: str, panel: str | None, opposite: str = "", hidden: bool = False
) -> Parameter:
    flag = f"--{name.replace('_', '-')}"
    flags = (f"{flag}/--{opposite or f'no-{name}'.replace('_', '-')}",) if kind is bool else (flag,)
    option = typer.Option(*flags, help=help, rich_help_panel=panel, show_default=False, hidden=hidden)
    return Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option])


def _type_of(method: Any, name: str, option: Option) -> Any:
    hint = types_of(method)[name]
    types = [each for each in getattr(hint, "__args__", (hint,)) if each is not type(None)]
    # A share or a number that a word may stand for is text until the method has seen it.
    return str if option.share or len(types) > 1 else types[0]


def _of_methods() -> Iterator[Parameter]:
    """An option of several methods is one: it goes to each of them that the recipe names.

    They are too many for the help, where `secateur methods NAME` is named instead.
    """
    for name, methods in options_by_name().items():
        option = options_of(methods[0])[name]
        ranges = dict.fromkeys(filter(None, (options_of(method)[name].range for method in methods)))
        values = f" ({next(iter(ranges))})" if len(ranges) == 1 else ""
        help = option.help.removesuffix(".") + f"{values}."
        yield _parameter(name, _type_of(methods[0], name, option), help, None, option.opposite, hidden=True)


def parameters() -> list[Parameter]:
    """All options that make a recipe, as a command's signature holds them."""
    every = {"recipe": _RECIPE, **_recipe_options(), **_CALIBRATION}
    fixed = [
        _parameter(name, given.type, given.help, given.panel, hidden=given.hidden) for name, given in every.items()
    ]
    return [*fixed, *_of_methods()]


def recipe_of(given: dict[str, Any]) -> Recipe:
    """The recipe that options name: what `--recipe` says, and what is given besides.

    Raises:
        UsageError: an option belongs to none of the methods of the recipe.
    """
    given = {name: value for name, value in given.items() if value is not None and value != []}
    base = find_recipe(given.pop("recipe")) if "recipe" in given else Recipe()
    text = {each.key or name: given.pop(name) for name, each in _CALIBRATION.items() if name in given}
    plain = {name: given.pop(name) for name in _recipe_options() if name in given}
    for name in ("targets", "ignore"):
        if name in plain:
            plain[name] = tuple(plain[name])
    calibration = dataclasses.replace(base.calibration, **text) if text else base.calibration
    recipe = dataclasses.replace(base, calibration=calibration, **plain)
    return dataclasses.replace(recipe, **_options_by_method(recipe, given))


def _options_by_method(recipe: Recipe, given: dict[str, Any]) -> dict[str, Any]:
    """Options of methods, by what a recipe calls those of each of its methods, with those that it has already."""
    found = {key: dict(getattr(recipe, key)) for key in OPTIONS_KEY.values()}
    for name, value in given.items():
        takers = options_by_name()[name]
        roles = [role for role in OPTIONS_KEY if getattr(recipe, role) in [method.name for method in takers]]
        if not roles:
            raise UsageError(
                f"`{name}` is an option of {', '.join(m.name for m in takers)}: {_instead(recipe, takers)}"
            )
        for role in roles:
            found[OPTIONS_KEY[role]][name] = _read(ROLES[role][getattr(recipe, role)], name, value)
    return found


def _instead(recipe: Recipe, takers: list[Any]) -> str:
    named = [getattr(recipe, role) for role in OPTIONS_KEY if getattr(recipe, role)]
    if named:
        return f"{' and '.join(named)} would not heed it, leave it out"
    alone = [role for role in _ALONE if all(method in ROLES[role].values() for method in takers)]
    return f"name one by {f'`{alone[0]}`' if alone else '`prune` or `quantize`'}"


def _read(method: Any, name: str, value: Any) -> Any:
    """Text from the command line as the number that the method takes, where it is one; the method says what is wrong."""
    if not isinstance(value, str) or options_of(method)[name].share:
        return value
    if value.lstrip("-").isdecimal():
        return int(value)
    hint = types_of(method)[name]
    if float in getattr(hint, "__args__", (hint,)):
        with suppress(ValueError):
            return float(value)
    return value
