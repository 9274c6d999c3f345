"""Taking the fused experts of a model apart, and knowing what must be left alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import MergeModulelist, WeightConverter
from transformers.initialization import no_init_weights

from secateur.errors import UsageError
from secateur.mixture.experts import COPIED_INPUTS, DOWN, GATE_UP, UP, Experts

# What the projections are called where a checkpoint's own names are not known: it holds them fused.
_NAMES = {GATE_UP: ("gate_proj", "up_proj"), UP: ("up_proj",), DOWN: ("down_proj",)}
# How classes and modules that hold experts are called.
_ROUTED = re.compile("expert|moe")


def fused_in(model: nn.Module) -> list[str]:
    """The names of a model's fused experts."""
    return [name for name, module in model.named_modules() if _is_fused(module)]


def unfuse(model: nn.Module, names: Iterable[str], within: nn.Module | None = None) -> None:
    """Put `Experts` in the place of fused experts, whose weights are let go of.

    Args:
        model: of whose family they are.
        names: of the experts, in `within`, where that is given: a block like those of the model.
    """
    names = list(names)
    if not names:
        return
    projections = _names_on_disk(get_model_conversion_mapping(model))
    with no_init_weights():  # they have no memory, and may be tens of thousands
        for name in names:
            place = within if within is not None else model
            place.set_submodule(name, Experts(place.get_submodule(name), projections, name))


def experts_in(model: nn.Module) -> dict[str, Experts]:
    """The unfused experts of a model, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Experts)}


def routers_in(block: nn.Module) -> set[str]:
    """The names of modules beside experts that choose among them or weigh them, which stay as they are.

    They are what is not an expert: of one output or one for each expert, or of a class of its own. A module with several
    linears chooses if one of them has an output for each expert and none goes back to the width of the experts' inputs.
    """
    found = set()
    for name, parent in block.named_modules():
        for experts in [m for m in parent.children() if isinstance(m, Experts)]:
            for child_name, child in parent.named_children():
                if child is not experts and _chooses(child, experts):
                    found.add(f"{name}.{child_name}" if name else child_name)
    return found


def _chooses(module: nn.Module, experts: Experts) -> bool:
    weight = module._parameters.get("weight")
    if weight is not None and not isinstance(module, nn.Linear):
        return weight.ndim == 2 and len(weight) in (1, experts.count)
    if isinstance(module, nn.Linear):
        return type(module) is not nn.Linear or module.out_features in (1, experts.count)
    width = experts.linear(0, experts.firsts[0]).in_features
    outputs = {part.out_features for part in module.modules() if isinstance(part, nn.Linear)}
    return width not in outputs and bool(outputs & {experts.count, experts.count + 1})


def _is_fused(module: nn.Module) -> bool:
    leaves = [GATE_UP if hasattr(module, GATE_UP) else UP, DOWN]
    kept = [module._parameters.get(leaf) for leaf in leaves]
    if (
        any(parameter is None or parameter.ndim != 3 for parameter in kept)
        or len({len(p) for p in kept if p is not None}) > 1
    ):
        return False
    decorated = hasattr(module, "_apply_gate") and hasattr(module, "is_transposed")
    return decorated or type(module).__name__ == COPIED_INPUTS


def check_unfused(block: nn.Module, name: str) -> None:
    """Raise UsageError when a block routes its tokens to experts that could not be taken apart.

    A module is one by what it holds: weights of three dimensions in a class or under a name that speaks of experts, or a list
    of modules with linears under such a name.
    """
    for part, module in block.named_modules():
        if isinstance(module, Experts) or not _speaks_of_experts(part, module):
            continue
        fused = any(p.ndim == 3 and len(p) > 1 for p in module.parameters(recurse=False))
        listed = isinstance(module, nn.ModuleList) and any(isinstance(m, nn.Linear) for m in module.modules())
        if fused or listed:
            how = "in a form of its own" if fused else "as a list of modules"
            raise UsageError(
                f"{name}.{part} ({type(module).__name__}) holds a mixture of experts {how}: secateur compresses those that "
                "transformers keeps in one tensor for each projection, as its newest releases do for most families"
            )


def _speaks_of_experts(part: str, module: nn.Module) -> bool:
    # A convolution, as blocks with a short memory have, keeps three dimensions too.
    return not isinstance(module, nn.Conv1d) and bool(_ROUTED.search(f"{part} {type(module).__name__}".lower()))


# --- names on disk


def _names_on_disk(conversions: Iterable[Any]) -> dict[str, tuple[str, ...]]:
    """What checkpoints call the projections of an expert, by the parameter that they are fused into."""
    names = dict(_NAMES)
    for sources, target in _merges(conversions):
        leaf = target.rpartition(".")[2]
        if leaf in names:
            names[leaf] = tuple(source.removesuffix(".weight").rpartition(".")[2] for source in sources)
    return names


def merges_experts(model: Any) -> bool:
    """Whether checkpoints of a model's family hold each projection of each expert, which transformers merges as it loads."""
    return next(_merges(get_model_conversion_mapping(model)), None) is not None


def moved_experts(conversions: Iterable[Any]) -> Iterable[tuple[str, str]]:
    """Where experts lie in checkpoints and where in a model, by its conversions: the ends of both names, if they differ."""
    moves = {}
    for sources, target in _merges(conversions):
        before, after = sources[0].partition(".*.")[0], target.rpartition(".")[0]
        if before != after:
            moves[before] = after
    return moves.items()


def _merges(conversions: Iterable[Any]) -> Iterator[tuple[list[str], str]]:
    """By which names transformers finds the projections of experts that it fuses, and that of what it fuses them to."""
    for conversion in conversions:
        if isinstance(conversion, WeightConverter) and any(
            isinstance(operation, MergeModulelist) for operation in conversion.operations
        ):
            sources = [re.sub(r"\\(.)", r"\1", source) for source in conversion.source_patterns]
            # The number of an expert is a star, with a dot before it or not: `experts.*.w1`, `experts*.w1`.
            yield (
                [re.sub(r"\.?\*\.", ".*.", s) for s in sources],
                re.sub(r"\\(.)", r"\1", conversion.target_patterns[0]),
            )
