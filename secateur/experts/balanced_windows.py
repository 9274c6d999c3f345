"""Calibration text that a mixture writes, balanced: of several windows the one that evens out how often experts are chosen
("MoEQuant", Hu et al. 2025, arXiv:2505.03804, expert-balanced self-sampling).

The paper searches with several beams a token at a time. Here whole windows are drawn, and of each few one is kept, which is
cheaper and leaves each window as the model wrote it.

N: windows drawn, S: tokens of a window, L: layers with experts, E: experts of the layer with most, C: windows among which one
is chosen.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import UsageError
from secateur.mixture.expert_rows import chosen_by
from secateur.mixture.experts import DOWN, Experts
from secateur.mixture.skipping import modules_of


@torch.no_grad()
def balanced(model: Any, ids_NS: Tensor, candidates: int) -> Tensor:
    """Of each few windows in a row one: that after which the experts of all layers have been chosen most evenly.

    Args:
        model: a mixture of experts in evaluation mode.
        candidates: C, which divides N.

    Raises:
        UsageError: the model is no mixture.
    """
    use_NLE = _use_of(model, ids_NS)
    chosen = _even(use_NLE.unflatten(0, (-1, candidates)))
    return ids_NS.unflatten(0, (-1, candidates))[torch.arange(len(chosen)), chosen]


def _even(use_NCLE: Tensor) -> Tensor:
    """For each few windows the number of the one that is kept: least Σ_l KL(use of layer l ‖ all alike) with those before."""
    total_LE = torch.zeros_like(use_NCLE[0, 0])
    found = []
    for use_CLE in use_NCLE:
        would_CLE = total_LE + use_CLE
        p_CLE = would_CLE / would_CLE.sum(-1, keepdim=True).clamp(min=1)
        best = int(torch.xlogy(p_CLE, p_CLE).sum((1, 2)).argmin())
        found.append(best)
        total_LE = would_CLE[best]
    return torch.tensor(found)


def _use_of(model: Any, ids_NS: Tensor) -> Tensor:
    """How often each window has each expert chosen, float64 `[N, L, E]`; zeros where a layer has fewer."""
    modules = modules_of(model)
    if not modules:
        raise UsageError("`expert_balance` is for mixtures of experts, and this model is none: leave it out")
    counts = [m.count if isinstance(m, Experts) else len(m.get_parameter(DOWN)) for m in modules]
    use_LE = torch.zeros(len(modules), max(counts), dtype=torch.float64)

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        layer = modules.index(module)
        chosen_TK = chosen_by(counts[layer], (*args, *kwargs.values())).long()
        use_E = torch.bincount(chosen_TK[chosen_TK >= 0], minlength=counts[layer])
        use_LE[layer, : counts[layer]] += use_E.cpu()

    handles = [module.register_forward_pre_hook(note, with_kwargs=True) for module in modules]
    found = []
    try:
        for ids_S in ids_NS:
            use_LE.zero_()
            model.base_model(input_ids=ids_S[None].to(model.device), use_cache=False)
            found.append(use_LE.clone())
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(found)
