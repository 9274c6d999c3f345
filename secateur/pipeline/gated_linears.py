"""Of which linears of a model it is chosen for a token which inputs are read.

O: output features, I: input features.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor

from secateur.core.histogram import Histogram
from secateur.errors import UsageError
from secateur.mixture.unfuse import experts_in
from secateur.model.source import Source
from secateur.model.structure import Blocks
from secateur.recipes.plan import Plan
from secateur.structured.sites import find_sites
from secateur.structured.structure_of import heads_of


def gated_linears(source: Source, model: Any, blocks: Blocks, plan: Plan, among: Collection[str]) -> frozenset[str]:
    """The names of those linears. Experts of mixtures are none: few tokens are sent to each, and which is not known to it.

    Raises:
        UsageError: there are none.
    """
    if plan.sparsifier is None:
        return frozenset()
    of_experts = {f"{name}.{linear}" for name, module in experts_in(model).items() for linear in module.linears}
    found = set(among) - of_experts
    if plan.sparsifier.neurons_only:
        probed = find_sites(model, blocks, *heads_of(source))
        sites = probed.sites if probed is not None else []
        found &= {site.name for site in sites if site.coupling.kind == "neurons"}
    if not found:
        raise UsageError(
            f"`activations` {plan.sparsifier.name} finds no linears of {source.name} to choose inputs of: leave it out"
        )
    return frozenset(found)


def sizes_for(plan: Plan, weights: Sequence[Tensor]) -> Histogram:
    """Where it is counted how large the input is that linears of these weights `[O, I]` read."""
    scale = getattr(plan.sparsifier, "scale", None)
    return Histogram(scale_I=None if scale is None else scale(weights))
