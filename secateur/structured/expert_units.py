"""The neurons inside the experts of a mixture: units of what their last linear reads.

I: inner size of an expert.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from secateur.mixture.experts import Experts
from secateur.mixture.unfuse import experts_in
from secateur.structured.coupling import Coupling, Feeds

_TOKENS = 4


@torch.enable_grad()
def expert_couplings(block: nn.Module) -> list[Coupling]:
    """Those of each expert of a block; none where a neuron is not one row of each first linear, or biases stay fused."""
    found = []
    for path, experts in experts_in(block).items():
        if experts.has_bias or not _is_elementwise(experts):
            continue
        for e in range(experts.count):
            I = experts.linear(e, experts.last).in_features
            rows_I = torch.arange(I)
            producers = {f"{path}.{e}.{name}": Feeds(rows_I, rows_I + 1) for name in experts.firsts}
            found.append(Coupling(f"{path}.{e}.{experts.last}", "neurons", I, I, 1, producers))
    return found


def _is_elementwise(experts: Experts) -> bool:
    """Whether each inner value hangs on the same row of every first linear and on no other."""
    I = experts.linear(0, experts.last).in_features
    if any(experts.linear(0, name).out_features != I for name in experts.firsts):
        return False
    draw = torch.Generator().manual_seed(0)
    first = {name: torch.randn(_TOKENS, I, generator=draw).requires_grad_(True) for name in experts.firsts}
    try:
        for name, y in first.items():  # weights are not there
            experts.linear(0, name).forward = lambda _, y=y: y
        inner = experts.inner(0, torch.zeros(_TOKENS, 1))
    finally:
        for name in first:
            vars(experts.linear(0, name)).pop("forward", None)
    numbers_I = torch.arange(I)
    return inner.shape == (_TOKENS, I) and all(
        _stays_within(inner, list(first.values()), (numbers_I >> bit & 1).bool())
        for bit in range(max(1, (I - 1).bit_length()))
    )


def _stays_within(inner: Tensor, first: list[Tensor], part_I: Tensor) -> bool:
    """Whether inner values of some numbers hang on rows of these numbers alone, and the others on the others."""
    for own_I in (part_I, ~part_I):
        gradients = torch.autograd.grad(inner[:, own_I].sum(), first, retain_graph=True, allow_unused=True)
        if any(gradient is not None and bool((gradient[:, ~own_I] != 0).any()) for gradient in gradients):
            return False
    return True
