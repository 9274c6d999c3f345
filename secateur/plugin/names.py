"""The names that the tensors of a model have in its files: by its own module names, and as older releases named modules."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from secateur.mixture.unfuse import moved_experts


def spellings(model: Any, name: str) -> tuple[str, str, str]:
    """A tensor's or module's name as it is, without the name of the base model, and with it."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    return name, name.removeprefix(prefix), prefix + name


def block_of(name: str) -> str | None:
    """The block of a tensor or module: what is numbered first of all that it is in; None where nothing is."""
    words = name.split(".")
    number = next((i for i, word in enumerate(words) if word.isdecimal()), None)
    return None if number is None else ".".join(words[: number + 1])


def renamed(stored: Iterable[str], model: Any) -> dict[str, str]:
    """Stored names by the name that transformers gives their tensors as it loads them, where it gives another.

    What it renames is not looked up where a model's own tensors have all of the names: only to make that list takes longer than
    to read a small model.
    """
    own = {spelling for name in model.state_dict() for spelling in spellings(model, name)}
    stored = list(stored)
    if own.issuperset(stored):
        return {}
    conversions = get_model_conversion_mapping(model)
    renamings = [t for t in conversions if isinstance(t, WeightRenaming)]
    moves = list(moved_experts(conversions))
    found = {}
    for name in stored:
        new = name
        for renaming in renamings:
            new, _ = renaming.rename_source_key(new)
        for before, after in moves:
            new = new.replace(f"{before}.", f"{after}.")
        if new != name:
            found[new] = name
    return found


def used_renamings(conversions: Iterable[Any], stored: Iterable[str]) -> list[Any]:
    """Without those renamings among a model's conversions that change no name in its files."""
    names, used = list(stored), []
    for conversion in conversions:
        if isinstance(conversion, WeightRenaming):
            new = [conversion.rename_source_key(name)[0] for name in names]
            if new == names:
                continue
            names = new
        used.append(conversion)
    return used


def stored_as(model: Any, name: str, stored: Any, known: dict[str, str]) -> str | None:
    """The name in the files of what is called `name` in the model; None where they do not have it.

    Args:
        model: whose tensor it is.
        name: of the tensor.
        stored: the names in the files.
        known: of those, by the names that `renamed` says.
    """
    for spelling in spellings(model, name):
        if spelling in stored:
            return spelling
    return next((known[spelling] for spelling in spellings(model, name) if spelling in known), None)
