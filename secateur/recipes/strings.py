"""Recipe strings: many recipes in one line, such as "wanda:0.3..0.7, sparsegpt:2:4+gptq:4(group_size=128), spqr-3bit".

    recipes = item { "," item }
    item    = part { "+" part } | built-in | file
    part    = method [ ":" amount ] [ "(" option "=" value { "," option "=" value } ")" ]
    method  = a pruner, a quantizer, what sparsifies activations, a score of experts, or behind a pruner a refiner; one of each
              at most; or a method that factorizes, alone
    amount  = share | share ".." share [ "/" share ] | whole ":" whole     of a pruner: sparsity or N:M; steps are of 0.1
            | whole | whole ".." whole                                     of a quantizer: bits
            | share                                                        of activation sparsity: what is not read
            | share | share ".." share [ "/" share ]                       of a score of experts: the share that goes
            | share | share ".." share [ "/" share ]                       of a method that factorizes: size
    share   = digits with a point or without [ "%" ]
    option  = an option of the method, "reconstruct" of a pruner, or "format", "dtype", "match_dense", "embeddings", "head",
              "low_rank", "rank" or "low_rank_method"
    value   = number [ "%" ] | word
    file    = a path that ends with .yaml, .yml or .json, without any of , ( ) =

White space may stand between any two of these. A pruner needs an amount, a quantizer or factorization has a default, and a
refiner has none. A range stands for several recipes, and two ranges in an item for every pair.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

from secateur.core.options import options_of
from secateur.core.patterns import Unstructured, parse_pattern
from secateur.core.quantized import BITS
from secateur.core.registry import QUANTIZERS, ROLES
from secateur.errors import UsageError, did_you_mean
from secateur.recipes.built_in import NAMES, SUFFIXES, built_in
from secateur.recipes.methods import make
from secateur.recipes.plan import plan
from secateur.recipes.recipe import Recipe
from secateur.recipes.recipe_name import COMMON, PRUNING, name_of
from secateur.shares import exact_share

_CALLED = {
    "prune": "pruner",
    "refine": "refiner",
    "quantize": "quantizer",
    "activations": "method of activation sparsity",
    "expert_score": "score of experts",
    "factorize": "factorization",
}
_AMOUNTS = ("sparsity", "pattern", "bits", "size")

_FILE = re.compile(rf"[^,()=\n]*(?:{'|'.join(map(re.escape, SUFFIXES))})(?=\s*(?:,|\Z))")
_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")
_DECIMAL = re.compile(r"[0-9]+(?:\.[0-9]+)?|\.[0-9]+")
_NUMBER = re.compile(r"[-+]?(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")
_STEP = "0.1"
_MOST_STEPS = 1000
_LONGEST_NUMBER = 300
_AROUND = 30  # characters of the text before and behind the place of an error


def parse_recipes(text: str) -> list[tuple[str, Recipe]]:
    """The recipes that a text names, each checked as far as can be without a model.

    Returns:
        In the order of the text, each recipe with a name that no other has and that, parsed by itself, gives the same recipe.

    Raises:
        UsageError: the text does not parse, or one of its recipes cannot be carried out or is there twice; with the place.
    """
    reader = _Reader(text)
    found: dict[Any, tuple[str, Recipe]] = {}
    while True:
        reader.skip()
        at = reader.at
        for name, recipe in _item(reader):
            with reader.pointing(at, f"recipe {name!r}: "):
                resolved = plan(recipe)
            # Not the recipe: it may say what another leaves to the defaults.
            linears = tuple(sorted(recipe.linears.items()))
            goals = (recipe.allocation, recipe.target_size, recipe.max_perplexity_rise, recipe.share_choice)
            experts = (recipe.drop_experts, tuple(sorted(recipe.experts.items())))
            key = (resolved, recipe.targets, recipe.ignore, recipe.calibration, linears, goals, experts)
            if key in found:
                other = found[key][0]
                raise reader.wrong(
                    at,
                    f"{name!r} is there twice"
                    if name == other
                    else f"{name!r} is the same recipe as {other!r}: drop one",
                )
            found[key] = (name, recipe)
        if reader.ended:
            return list(found.values())
        if not reader.take(","):
            raise reader.wanted("a comma before the next recipe, or '+' before another method,")


class _Reader:
    """A place in a text, from which one token after the other is taken."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def skip(self) -> None:
        """Go past white space."""
        while self.at < len(self.text) and self.text[self.at].isspace():
            self.at += 1

    @property
    def ended(self) -> bool:
        self.skip()
        return self.at == len(self.text)

    def peek(self, token: str | re.Pattern[str]) -> str:
        """The token if it comes next, or else nothing."""
        self.skip()
        match = re.compile(re.escape(token) if isinstance(token, str) else token).match(self.text, self.at)
        return match[0] if match else ""

    def take(self, token: str | re.Pattern[str]) -> str:
        """The same, and go past it."""
        found = self.peek(token)
        self.at += len(found)
        return found

    def need(self, token: str | re.Pattern[str], what: str) -> tuple[int, str]:
        """A token that must come next, and where it begins; `what` is said where it does not."""
        found = self.take(token)
        if not found:
            raise self.wanted(what)
        at = self.at - len(found)
        if len(found) > _LONGEST_NUMBER:
            raise self.wrong(at, f"what has {len(found)} characters is no name or number of a recipe")
        return at, found

    def wanted(self, what: str) -> UsageError:
        """Something else comes next."""
        rest = self.text[self.at :] if not self.ended else ""
        found = self.peek(_WORD) or self.peek(_NUMBER) or rest[:1]
        return self.wrong(
            self.at, f"{what} is wanted here, not {found!r}" if found else f"{what} is missing at the end"
        )

    def wrong(self, at: int, what: str) -> UsageError:
        """What is wrong at a place, as one line that points there."""
        before, behind = (re.sub(r"\s+", " ", part) for part in (self.text[:at], self.text[at:]))
        before = f"…{before[-_AROUND:]}" if len(before) > _AROUND else before
        behind = f"{behind[:_AROUND]}…" if len(behind) > _AROUND else behind
        return UsageError(f'`recipes`, character {at + 1} in "{before}▸{behind}": {what}')

    @contextmanager
    def pointing(self, at: int, what: str = "") -> Iterator[None]:
        """Errors of other parts of the program, about what stands at a place."""
        try:
            yield
        except UsageError as error:
            raise self.wrong(at, f"{what}{error}") from error


def _item(reader: _Reader) -> list[tuple[str, Recipe]]:
    """The recipes of one item, with their names."""
    at = reader.at
    path = reader.take(_FILE)
    if path:
        with reader.pointing(at):
            return [(path, Recipe.read(Path(path)))]
    word = reader.peek(_WORD)
    if word in NAMES:
        reader.take(_WORD)
        if not reader.ended and not reader.peek(","):
            raise reader.wrong(
                reader.at, f"the built-in recipe {word!r} stands alone: a comma or the end is wanted here"
            )
        return [(word, built_in(word).recipe)]
    return _parts(reader)


def _parts(reader: _Reader) -> list[tuple[str, Recipe]]:
    choices: dict[str, list[dict[str, Any]]] = {}
    common: dict[str, Any] = {}
    while not choices or reader.take("+"):
        at, method = reader.need(_WORD, "a method, a built-in recipe or a recipe file")
        role = next((role for role, registry in ROLES.items() if method in registry), None)
        if role is None:
            if method in NAMES:
                raise reader.wrong(at, f"the built-in recipe {method!r} stands alone: '+' joins methods")
            known = [name for methods in ROLES.values() for name in methods] + ([] if choices else list(NAMES))
            raise reader.wrong(at, f"{method!r} is not known: {did_you_mean(method, known)}")
        if role in choices:
            raise reader.wrong(at, f"{method!r} is a second {_CALLED[role]}: a recipe has one at most")
        if role == "prune":
            amounts = _pruned(reader, method)
            options = _options(reader, method, role, common)
            choices[role] = [{"prune": method, "pruning": options, **amount} for amount in amounts]
        elif role == "refine":
            if "prune" not in choices:
                raise reader.wrong(
                    at, f"{method!r} refines what a pruner chose: give it behind one, as in wanda:0.5+{method}"
                )
            if reader.peek(":"):
                raise reader.wrong(reader.at, f"{method!r} has no amount")
            choices[role] = [{"refine": method, "refining": _options(reader, method, role, common)}]
        elif role == "activations":
            unread = float(_fraction(reader, *_share(reader))) if reader.take(":") else None
            options = _options(reader, method, role, common)
            choices[role] = [{"activations": method, "activation_sparsity": unread, "gating": options}]
        elif role == "expert_score":
            dropped = _dropped(reader, method)
            options = _options(reader, method, role, common)
            choices[role] = [{"expert_score": method, "scoring": options, "drop_experts": share} for share in dropped]
        elif role == "factorize":
            sizes = _sizes(reader, method)
            options = _options(reader, method, role, common)
            choices[role] = [{"factorize": method, "factorization": {**size, **options}} for size in sizes]
        else:
            bits = _bits(reader, method)
            options = _options(reader, method, role, common)
            choices[role] = [{"quantize": method, "quantization": {**b, **options}} for b in bits]
    recipes = []
    for chosen in itertools.product(*choices.values()):
        content = {key: value for part in chosen for key, value in part.items()}
        recipe = Recipe.from_dict({**content, **common})
        recipes.append((name_of(recipe), recipe))
    return recipes


# --- amounts


def _pruned(reader: _Reader, method: str) -> list[dict[str, Any]]:
    """The patterns or sparsities behind the name of a pruner, as a recipe holds them."""
    if not reader.take(":"):
        raise reader.wanted(f"how much {method} removes, such as {method}:0.5, {method}:2:4 or {method}:0.3..0.7,")
    at, first = _share(reader)
    if reader.take(":"):
        _, second = reader.need(_DECIMAL, "M of a pattern N:M")
        with reader.pointing(at):
            return [{"pattern": str(parse_pattern(f"{first}:{second}", None))}]
    shares = _shares(reader, at, first)
    with reader.pointing(at):
        return [{"sparsity": Unstructured(float(share)).sparsity} for share in shares]


def _dropped(reader: _Reader, method: str) -> list[float]:
    """The shares behind the name of a score of experts."""
    if not reader.take(":"):
        raise reader.wanted(f"how many experts {method} drops, such as {method}:25% or {method}:0.25..0.5/0.25,")
    return list(map(float, _shares(reader, *_share(reader))))


def _sizes(reader: _Reader, method: str) -> list[dict[str, Any]]:
    """The options `size` behind the name of a method that factorizes; of one that has no amount: none."""
    if not reader.take(":"):
        return [{}]
    at, first = _share(reader)
    shares = _shares(reader, at, first, "size")
    return [_option(reader, at, "factorize", method, "size", float(share)) for share in shares]


def _shares(reader: _Reader, at: int, first: str, what: str = "sparsity") -> list[Fraction]:
    """A share, the first of which was read already, or those of a range."""
    shares = [_fraction(reader, at, first, what)]
    if reader.take(".."):
        to, last = _share(reader)
        by, step = _share(reader) if reader.take("/") else (to, _STEP)
        shares = _range(reader, at, first, to, last, by, step)
    return shares


def _share(reader: _Reader) -> tuple[int, str]:
    at, digits = reader.need(_DECIMAL, "a number, such as 0.5, 50% or 2:4,")
    return at, digits + reader.take("%")


def _fraction(reader: _Reader, at: int, share: str, what: str = "sparsity") -> Fraction:
    with reader.pointing(at):
        return exact_share(share, what)


def _range(reader: _Reader, at: int, first: str, to: int, last: str, by: int, step: str) -> list[Fraction]:
    start, stop = _fraction(reader, at, first), _fraction(reader, to, last)
    stride = _fraction(reader, by, step)
    if stop < start:
        raise reader.wrong(at, f"the range {first}..{last} goes down: give the smaller number first")
    if not stride:
        raise reader.wrong(by, f"steps of {step} lead nowhere: give more, such as {_STEP}")
    count = (stop - start) / stride
    if count > _MOST_STEPS:
        raise reader.wrong(by, f"steps of {step} are more than {_MOST_STEPS}: give a larger one")
    if count.denominator != 1:
        raise reader.wrong(
            to, f"{last} is not reached from {first} in steps of {step}: give the step, as in {first}..{last}/0.05"
        )
    return [start + i * stride for i in range(int(count) + 1)]


def _bits(reader: _Reader, method: str) -> list[dict[str, Any]]:
    """The options `bits` behind the name of a quantizer; of one that has no amount: none."""
    if not reader.take(":"):
        return [{}]
    at, bits = first = _width(reader)
    if reader.take(".."):
        last_at, last = _width(reader)
        if last < bits:
            raise reader.wrong(at, f"the range {bits}..{last} goes down: give the smaller number first")
        if reader.peek("/"):
            raise reader.wrong(reader.at, f"a range of bits has no step: it is over {_words(BITS)}")
        for end_at, end in (first, (last_at, last)):
            if end not in BITS:
                raise reader.wrong(end_at, f"there are no codes of {end} bits: give {_words(BITS)}")
        return [_option(reader, at, "quantize", method, "bits", b) for b in BITS if bits <= b <= last]
    return [_option(reader, at, "quantize", method, "bits", bits)]


def _width(reader: _Reader) -> tuple[int, int]:
    at, digits = reader.need(_DECIMAL, f"a number of bits ({_words(BITS)})")
    if not digits.isdecimal():
        raise reader.wrong(at, f"{digits} is no number of bits: give {_words(BITS)}")
    return at, int(digits)


def _words(numbers: tuple[int, ...]) -> str:
    return f"{', '.join(map(str, numbers[:-1]))} or {numbers[-1]}"


# --- options


def _options(reader: _Reader, method: str, role: str, common: dict[str, Any]) -> dict[str, Any]:
    """The options in brackets: those of the method are returned, those of the whole recipe added to `common`."""
    given: dict[str, Any] = {}
    if not reader.take("("):
        return given
    while True:
        at, name = reader.need(_WORD, f"an option of {method}")
        if name in _AMOUNTS:
            raise reader.wrong(
                at, f"{name!r} is no option here: the amount stands behind a colon, such as {_example(method)}"
            )
        if name in given or name in common:
            raise reader.wrong(at, f"{name!r} is given twice")
        reader.need("=", f"'=' and what {name} is to be")
        value_at, text = reader.need(re.compile(f"{_NUMBER.pattern}%?|{_WORD.pattern}"), f"what {name} is to be")
        if (name in COMMON and role != "refine") or (role == "prune" and name in PRUNING):
            with reader.pointing(value_at):
                common[name] = getattr(Recipe.from_dict({name: _value(text)}), name)
        else:
            given |= _option(reader, value_at, role, method, name, _value(text), at)
        if reader.take(")"):
            return given
        reader.need(",", f"')' behind the options of {method}, or a comma,")


def _example(method: str) -> str:
    return f"{method}:4" if method in QUANTIZERS else f"{method}:0.5"


def _option(
    reader: _Reader, at: int, role: str, method: str, name: str, value: Any, name_at: int | None = None
) -> dict[str, Any]:
    """One option of a method, checked for itself; the value stands at `at`, the name at `name_at`."""
    names = list(options_of(ROLES[role][method]))
    if name not in names:
        known = [n for n in names if n not in _AMOUNTS]
        known += [*(COMMON if role != "refine" else ()), *(PRUNING if role == "prune" else ())]
        raise reader.wrong(
            at if name_at is None else name_at,
            f"{name!r} is no option of {method}: {did_you_mean(name, known) if known else 'it has none'}",
        )
    with reader.pointing(at):
        found = make(role, method, {name: value})
    return {name: getattr(found, name)}


def _value(text: str) -> Any:
    if _NUMBER.fullmatch(text):
        return int(text) if text.lstrip("+-").isdecimal() else float(text)
    return {"true": True, "false": False}.get(text, text)
