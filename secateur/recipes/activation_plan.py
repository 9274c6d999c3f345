"""What a recipe says of activation sparsity, checked: whether it goes together with how weights are stored.

O: output features, I: input features.
"""

from __future__ import annotations

from typing import Any

import torch

from secateur.core.histogram import FIRST
from secateur.core.registry import Quantizer, Sparsifier
from secateur.core.stack import Stack
from secateur.core.stats import InputStats, Level
from secateur.errors import UsageError
from secateur.formats.layouts.choose import layout_by_inputs
from secateur.gates.section import check_level
from secateur.recipes.goals import has_target
from secateur.recipes.methods import make
from secateur.recipes.recipe import Recipe

#: What is left unread where a recipe does not say how much.
UNREAD = 0.5
# A weight that quantizers are tried on: of as many inputs as the largest groups have.
_TRIED = (32, 256)


def unread_of(recipe: Recipe) -> float:
    """The share of weights that is to be left unread."""
    if recipe.activations is None:
        return 0.0
    return UNREAD if recipe.activation_sparsity is None else recipe.activation_sparsity


def sparsifier_of(recipe: Recipe) -> Sparsifier | None:
    """The method of activation sparsity, if there is one. Raises UsageError where something else does not go with it."""
    if recipe.activations is None:
        given = {"activation_sparsity": recipe.activation_sparsity, **recipe.gating}
        given |= {"unread": next((c.unread for c in recipe.linears.values() if c.unread is not None), None)}
        for name, value in given.items():
            if value is not None:
                raise UsageError(
                    f"`{name}` is about what is read for a token, but no method is given: `activations` is missing"
                )
        return None
    check_level(unread_of(recipe))
    found: Sparsifier = make("activations", recipe.activations, recipe.gating)
    if recipe.pattern == "structured":
        raise UsageError("`activations` does not go with `pattern` structured: compress the result again for it")
    if has_target(recipe):
        raise UsageError(
            "`activations` does not go with a search for a size or perplexity: give `bits` or `sparsity` yourself"
        )
    length = recipe.calibration.seq_len
    if length is not None and length <= FIRST:
        raise UsageError(
            f"`seq_len` {length} leaves nothing for `activations`, for which the first {FIRST} tokens do not count: give more"
        )
    if recipe.format != "auto":
        raise UsageError(f"`format` {recipe.format} stores no weights by input, as `activations` needs: leave it out")
    return found


def check_by_inputs(pruning: Any, quantizer: Quantizer | None, low_rank: Any) -> None:
    """Raise UsageError where weights that are quantized, and before that pruned, cannot be stored by input."""
    if low_rank is not None:
        raise UsageError(
            "`activations` stores weights by input, which has no place for low rank beside them: leave one out"
        )
    if quantizer is None:
        return
    stats = InputStats.isotropic(_TRIED[1], Level.GRAM)
    W_OI = torch.randn(_TRIED, generator=torch.Generator().manual_seed(0))
    stack = Stack.of([W_OI], stats, torch.bfloat16, [torch.ones(_TRIED)] if quantizer.needs_fisher else [])
    pruned = None if pruning is None else pruning.pruner.prune(stack, pruning.pattern)
    try:
        layout_by_inputs(quantizer.quantize(stack, pruned)[0], sparse=pruned is not None)
    except ValueError as error:
        raise UsageError(
            f"`activations` stores weights by input, which `quantize` {quantizer.name} does not go with: {error}"
        ) from error
