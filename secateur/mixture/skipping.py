"""Experts that are left out when the model runs, where the router gives them little ("Not All Experts are Equal", Lu et al.
2024, arXiv:2402.14800, section 3.3; MC#, arXiv:2510.10962, does the same beside what it trains).

The second to the last expert of a token are left out where their weight is less than β_l times the largest one; those that
stay get its share. β_l is a quantile of what that ratio is in layer l on the calibration text: the paper's is the median,
which is a share of one half.

T: tokens, K: experts of a token, B: bins of a histogram, Q: quantiles of a layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import CheckpointError, UsageError
from secateur.mixture.experts import Experts
from secateur.mixture.unfuse import experts_in, fused_in

#: Where our section of a config has it, and what it says there: the share that is skipped unless another is asked for, and
#: quantiles of each layer's ratios, in the order of the model, from the least to the largest.
KEY, SHARE, RATIOS = "expert_skip", "share", "ratios"
QUANTILES = 21
_BINS = 1000
# By what a model is told that it skips, so that it can be told otherwise.
_HANDLES = "_secateur_skips"


def modules_of(model: nn.Module) -> list[nn.Module]:
    """A model's modules of experts in its order, transformers' own and ours."""
    names = {*fused_in(model), *experts_in(model)}
    return [module for name, module in model.named_modules() if name in names]


def ratios(weight_TK: Tensor) -> Tensor:
    """What each expert's weight is to the largest of its token, `[T, K]` from 0 to 1; the first of the largest has 1."""
    size_TK = weight_TK.float().abs()
    largest_T1, first_T1 = size_TK.max(1, keepdim=True)
    found_TK = torch.where(largest_T1 > 0, size_TK / largest_T1, 0)
    return found_TK.scatter_(1, first_T1, 1.0)


def without_weak(weight_TK: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """The weights of those experts that stay, with the sum that all had, and which are left out."""
    stays_TK = ratios(weight_TK) >= beta
    kept_TK = torch.where(stays_TK, weight_TK, 0)
    share_T1 = kept_TK.float().sum(1, keepdim=True) / weight_TK.float().sum(1, keepdim=True)
    scaled_TK = torch.where(share_T1 > 0, kept_TK / share_T1, kept_TK).to(weight_TK.dtype)
    return scaled_TK, ~stays_TK


class _Skip:
    """A hook before a module of experts: those that are left out are nobody's where that is known, and weigh nothing
    elsewhere."""

    def __init__(self, beta: float) -> None:
        self.beta = beta

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        given = [*args, *kwargs.values()]
        if not _has_weights(given):
            return None
        weight_TK, out_TK = without_weak(given[2], self.beta)
        index_TK = given[1].masked_fill(out_TK, module.count) if isinstance(module, Experts) else given[1]
        given[1:3] = index_TK, weight_TK
        return tuple(given[: len(args)]), dict(zip(kwargs, given[len(args) :], strict=True))


def _has_weights(given: Sequence[Any]) -> bool:
    """Whether experts are called with tokens, their experts and those experts' weights, of which there are several."""
    return (
        len(given) > 2 and isinstance(given[2], Tensor) and given[1].shape == given[2].shape and given[2].shape[1] > 1
    )


@contextmanager
def _ratios_counted(model: nn.Module) -> Iterator[list[Tensor]]:
    """Within the context, how often each ratio is met in each layer: histograms `[B]`."""
    modules = modules_of(model)
    counts = [torch.zeros(_BINS, dtype=torch.int64) for _ in modules]

    def count(module: nn.Module, args: Any, kwargs: Any) -> None:
        given = [*args, *kwargs.values()]
        if _has_weights(given):
            # All but one of each token, which is 1 by itself.
            ratio_TK = ratios(given[2]).sort(1).values[:, :-1]
            bin_N = (ratio_TK * _BINS).long().clamp_(max=_BINS - 1).flatten()
            counts[modules.index(module)] += torch.bincount(bin_N, minlength=_BINS).cpu()

    handles = [module.register_forward_pre_hook(count, with_kwargs=True) for module in modules]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def quantiles_on(model: Any, windows: Sequence[Tensor], progress: Callable[[int, int], None]) -> list[list[float]]:
    """The quantiles of each layer's ratios on some windows of text.

    Raises:
        UsageError: the model sends a token to one expert alone, or to none.
    """
    with _ratios_counted(model) as counts:
        for n, ids_S in enumerate(windows):
            model.base_model(input_ids=ids_S[None].to(model.device), use_cache=False)
            progress(n + 1, len(windows))
    if not counts or not all(int(count_B.sum()) for count_B in counts):
        raise UsageError("`expert_skip` is for mixtures that send a token to several experts: leave it out")
    return [_quantiles(count_B) for count_B in counts]


def _quantiles(count_B: Tensor) -> list[float]:
    reached_B = count_B.cumsum(0).double() / count_B.sum()
    wanted_Q = torch.linspace(0, 1, QUANTILES, dtype=torch.float64)
    # The bin in which a quantile lies; of what is in a bin its middle is near enough.
    bin_Q = torch.searchsorted(reached_B, wanted_Q.clamp(1e-9, 1 - 1e-9))
    found = ((bin_Q + 0.5) / _BINS).tolist()
    return [0.0, *(round(x, 6) for x in found[1:])]


def section_of(share: float, found: list[list[float]]) -> dict[str, Any]:
    """What our section of a config says of skipping."""
    return {SHARE: share, RATIOS: found}


def check_share(share: float) -> None:
    """Raise UsageError where it is no share of experts that can be left out."""
    if not 0 <= share < 1:
        raise UsageError(f"`expert_skip` is {share:g}: give a share from 0 to less than 1, such as 30%")


def parse_skip(section: Any) -> dict[str, Any] | None:
    """What our section of a config says of skipping, checked; None where it says nothing.

    Raises:
        CheckpointError: it makes no sense.
    """
    said = section.get(KEY) if isinstance(section, Mapping) else None
    if said is None:
        return None
    layers = said.get(RATIOS) if isinstance(said, Mapping) else None
    sound = isinstance(layers, list) and all(isinstance(each, list) and _are_quantiles(each) for each in layers)
    if not sound or not _is_number(said.get(SHARE)) or not 0 <= said[SHARE] < 1:
        raise CheckpointError(f"'{KEY}' of the checkpoint's quantization_config makes no sense")
    return {SHARE: float(said[SHARE]), RATIOS: layers}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _are_quantiles(values: list[Any]) -> bool:
    return (
        len(values) == QUANTILES
        and all(_is_number(value) and 0 <= value <= 1 for value in values)
        and all(low <= high for low, high in pairwise(values))
    )


def check_known(section: Any, share: float | None) -> dict[str, Any] | None:
    """What a section says of skipping. Raises UsageError where a share is asked for that makes no sense, or of which it says
    nothing."""
    said = parse_skip(section)
    if share is not None:
        check_share(share)
    if share and said is None:
        raise UsageError(
            "which experts are weak is not known of this model: compress it with `expert_skip`, or leave it out"
        )
    return said


def skip_experts(model: Any, section: Any, share: float | None = None) -> None:
    """Have a model leave weak experts out from now on.

    Args:
        section: what the config of its folder says, see `parse_skip`; None: nothing.
        share: of all choices beside the largest, how many are left out on text like that of the calibration; 0: none; None: as
            the folder says.

    Raises:
        UsageError: the folder does not know which ones they are.
        CheckpointError: it knows of another number of layers.
    """
    said = check_known(section, share)
    if share is None and said is None:
        return
    share = said[SHARE] if share is None and said is not None else float(share or 0)
    for handle in model.__dict__.pop(_HANDLES, []):
        handle.remove()
    if not share or said is None:
        return
    modules = modules_of(model)
    if len(modules) != len(said[RATIOS]):
        raise CheckpointError(
            f"'{KEY}' of the checkpoint's quantization_config has {len(said[RATIOS])} layers, and the model {len(modules)} "
            "with experts"
        )
    handles = [
        module.register_forward_pre_hook(_Skip(beta_of(each, share)), with_kwargs=True)
        for module, each in zip(modules, said[RATIOS], strict=True)
    ]
    model.__dict__[_HANDLES] = handles


def beta_of(quantiles: Sequence[float], share: float) -> float:
    """β of a layer for a share of skipped experts: between quantiles that are known, on the line that joins them."""
    place = share * (len(quantiles) - 1)
    low = int(place)
    return quantiles[low] + (place - low) * (quantiles[low + 1] - quantiles[low])
