"""Which share of its inputs a linear reads for a token that is written, as `bench` times it.

T: tokens, I: input features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.gates.running import gates_of
from secateur.gates.section import SECTION, parse_section
from secateur.model.source import Source


def shares_read(source: Source) -> dict[str, float]:
    """By the name of each linear of a model that does not read all, at the level that it has."""
    if source.loaded is not None:
        gates = gates_of(source.loaded)
        section, number = (None, None) if gates is None else (gates.section, gates.number)
    else:
        section = parse_section((source.quantization or {}).get(SECTION))
        number = None if section is None else section.number(section.level)
    if section is None or number is None:
        return {}
    return {name: 1 - each.shares_L[number] for each in section.inputs for name in each.linears}


def some_inputs(T: int, I: int, share: float, device: torch.device) -> tuple[Tensor, float]:
    """A random share of inputs for each token, and which share any of them reads."""
    keep = max(1, round(share * I))
    draw = torch.Generator().manual_seed(0)
    kept_TI = torch.zeros(T, I, dtype=torch.bool)
    for row_I in kept_TI:
        row_I[torch.randperm(I, generator=draw)[:keep]] = True
    return kept_TI.to(device), float(kept_TI.any(0).float().mean())
