"""The name of a recipe: the string that gives this recipe alone."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

from secateur.recipes.recipe import Recipe

#: What a part may say about the whole recipe.
COMMON = ("format", "dtype", "match_dense", "embeddings", "head", "low_rank", "rank", "low_rank_method")
#: What a pruner may say besides.
PRUNING = ("reconstruct",)


def name_of(recipe: Recipe) -> str:
    """What gives this recipe alone."""
    common = {name: getattr(recipe, name) for name in COMMON if getattr(recipe, name) != getattr(Recipe(), name)}
    parts = []
    if recipe.prune:
        amount = recipe.pattern or _plain(recipe.sparsity)
        options = {**recipe.pruning, **{name: True for name in PRUNING if getattr(recipe, name)}}
        parts.append(f"{recipe.prune}:{amount}{_in_brackets(options if recipe.quantize else {**options, **common})}")
    if recipe.refine is not None:
        parts.append(f"{recipe.refine}{_in_brackets(recipe.refining)}")
    if recipe.drop_experts is not None:
        options = {**recipe.scoring, **({} if recipe.prune or recipe.quantize else common)}
        parts.append(f"{recipe.expert_score}:{_plain(recipe.drop_experts)}{_in_brackets(options)}")
    if recipe.quantize is not None:
        options = dict(recipe.quantization)
        bits = options.pop("bits", None)
        parts.append(f"{recipe.quantize}{'' if bits is None else f':{bits}'}{_in_brackets({**options, **common})}")
    if recipe.activations is not None:
        options = {**recipe.gating, **({} if parts else common)}
        unread = "" if recipe.activation_sparsity is None else f":{_plain(recipe.activation_sparsity)}"
        parts.append(f"{recipe.activations}{unread}{_in_brackets(options)}")
    if recipe.factorize is not None:
        options = dict(recipe.factorization)
        size = options.pop("size", None)
        amount = "" if size is None else f":{_plain(size)}"
        parts.append(f"{recipe.factorize}{amount}{_in_brackets({**options, **common})}")
    return "+".join(parts)


def _plain(share: float | None) -> str:
    return f"{Decimal(repr(share)).normalize():f}"


def _in_brackets(options: dict[str, Any]) -> str:
    said = [f"{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in options.items()]
    return f"({','.join(said)})" if said else ""
