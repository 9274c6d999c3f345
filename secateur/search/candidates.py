"""What a linear may become, and choosing among that."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from secateur.core.damping import AUTO
from secateur.core.registry import QUANTIZERS, Quantizer
from secateur.quant.block_grid import OPEN, STAND_IN, grids_for
from secateur.quant.rotated_trellis import RotatedTrellis
from secateur.recipes.goals import placeholder, with_methods
from secateur.recipes.plan import Plan, plan
from secateur.recipes.pruning_plan import STRUCTURED
from secateur.recipes.recipe import Choice, Recipe
from secateur.search.budget import between
from secateur.solvers.knapsack import choose

# Candidates, pruned and quantized, on either side of the mean size that are tried where there is one; and how many times as
# large or small as the mean a candidate may be.
NEAR, _FAR = 2, 3
# What a target is reached with besides bits alone: sparsity with bits, and sparsity.
_BOTH = ((0.5, 4), (0.5, 3), (0.75, 4), (0.75, 3), (0.75, 2), (0.9, 3))
_PRUNED = tuple((sparsity, None) for sparsity in (0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9))
# Beside codes that are better at the bits that they have: of the others what is smaller than all of them.
_SMALLER = ((0.75, 3), (0.75, 2), (0.9, 3))
# Of codes whose search takes a time that is proportional to them.
_STATES = 256
# A pruner that takes many times as long stands back for this one in the library: what is compared is how linears differ.
_STANDS_IN = {"alps": "sparsegpt"}


@dataclass(frozen=True)
class Candidate:
    """What a linear may become.

    Attributes:
        choice: of it.
        bytes: of its tensors on disk, with their entries in the header of the file.
        divergence: KL(dense ‖ model) that it causes alone, in nats a token.
    """

    choice: Choice
    bytes: int
    divergence: float


Library = dict[str, list[Candidate]]


def bare(recipe: Recipe) -> Recipe:
    """The recipe by which candidates are solved: without what takes many times as long, where linears are only compared."""
    recipe = with_methods(recipe)
    found = replace(
        placeholder(recipe),
        prune=_STANDS_IN.get(recipe.prune, recipe.prune),
        pruning={} if recipe.prune in _STANDS_IN else _without_choice(recipe.pruning),
        quantization=_without_choice(recipe.quantization),
        # Of whole units it is what says that they are searched for.
        allocation=recipe.allocation if recipe.pattern == STRUCTURED else "uniform",
        target_size=None,
        max_perplexity_rise=None,
        reconstruct=False,
        match_dense=False,  # candidates are solved on the dense model's inputs
        refine=None,
        refining={},
        low_rank_method=None if recipe.low_rank is None and recipe.rank is None else "eora",
    )
    if found.quantization.get("grid") == OPEN:
        found = replace(found, quantization={**found.quantization, "grid": STAND_IN})
    if plan(found).needs_fisher:
        found = replace(found, quantization={**found.quantization, "sensitivity": "hessian"})
    return found


def _without_choice(options: dict[str, Any]) -> dict[str, Any]:
    """The options of a method without a damping that would be chosen anew for every candidate."""
    return {name: value for name, value in options.items() if (name, value) != ("damping", AUTO)}


def quick(plan: Plan) -> Plan:
    """A linear's plan as its candidates are solved: a code whose search takes long has few states, at as many bits."""
    quantizer = plan.quantizer
    if isinstance(quantizer, RotatedTrellis):
        quantizer = replace(quantizer, states=min(quantizer.states, _STATES))
    return replace(plan, quantizer=quantizer)


def bits_alone(quantizer: Quantizer | None) -> list[Choice]:
    """A candidate for every number of bits, unpruned."""
    return [] if quantizer is None else [Choice(None, bits) for bits in quantizer.all_bits]


def for_a_target(recipe: Recipe, quantizer: Quantizer | None, also: str | None = None) -> list[Choice]:
    """The candidates of every linear where a size or a quality is to be reached, besides leaving it alone.

    Of grids of GGUF's all that fit some linear: see `fitting`.

    Args:
        also: a quantizer that is better than the recipe's at the bits that it has.
    """
    if recipe.quantization.get("grid") == OPEN:
        every = dict.fromkeys(name for features in (256, 32) for name in grids_for(features))
        return [Choice(grid=name) for name in every]
    found = bits_alone(quantizer)
    if also is not None:
        better = QUANTIZERS[also].all_bits
        found = [Choice(None, bits, also) for bits in better] + [c for c in found if c.bits not in better]
        return found + [Choice(*each) for each in _SMALLER]
    if recipe.prune:
        found += [Choice(*each) for each in (_PRUNED if quantizer is None else _BOTH)]
    return found


def fitting(choices: list[Choice], features: int) -> list[Choice]:
    """Those choices that are for linears of so many inputs."""
    return [choice for choice in choices if choice.grid is None or choice.grid in grids_for(features)]


def is_both(choice: Choice) -> bool:
    """Whether a linear is pruned and quantized."""
    return choice.sparsity is not None and choice.bits is not None


def near_the_mean(first: list[Candidate], mean: float) -> list[Choice]:
    """The candidates whose size is not far from the mean that there is room for, or the two that are least far.

    Those pruned and quantized take longest to solve: of them there are fewer.

    Args:
        first: the candidates of a linear, which tell what sizes are.
        mean: bytes for a linear like it.
    """
    by_size = sorted(first, key=lambda candidate: candidate.bytes)
    both = [candidate for candidate in by_size if is_both(candidate.choice)]
    under = sum(candidate.bytes <= mean for candidate in both)
    far = [*both[: max(0, under - NEAR)], *both[under + NEAR :]]
    near = [c.choice for c in first if c not in far and mean / _FAR <= c.bytes <= mean * _FAR]
    ends = by_size[-2:] if by_size[-1].bytes < mean else by_size[:2]
    return near or [candidate.choice for candidate in ends]


def finer(candidates: list[Candidate]) -> list[Candidate]:
    """Sparsities between those that were solved, with what they would cost: see `share_sparsity`."""
    solved = [c for c in candidates if c.choice.sparsity is not None]
    found = list(candidates)
    for low, high in pairwise(solved):
        assert low.choice.sparsity is not None
        assert high.choice.sparsity is not None
        for step in range(1, 20):
            x = step / 20
            cost = float(between((0, 1), (low.divergence, high.divergence), x))
            sparsity = low.choice.sparsity + x * (high.choice.sparsity - low.choice.sparsity)
            found.append(Candidate(Choice(sparsity), round(low.bytes + x * (high.bytes - low.bytes)), cost))
    return found


def cheapest(
    library: Library, cost: Callable[[Candidate], float], size: Callable[[Candidate], float], most: float
) -> dict[str, Choice]:
    """What costs least within a total size, where either may be bytes and the other the divergence."""
    costs = [[cost(c) for c in each] for each in library.values()]
    sizes = [[size(c) for c in each] for each in library.values()]
    chosen = choose(costs, sizes, most)
    return {name: each[i].choice for (name, each), i in zip(library.items(), chosen, strict=True)}


def bytes_of(candidate: Candidate) -> float:
    """For `cheapest`."""
    return candidate.bytes


def divergence_of(candidate: Candidate) -> float:
    """For `cheapest`."""
    return candidate.divergence
