"""The fastest way to carry a run out that the memory allows."""

from __future__ import annotations

from collections.abc import Callable

import torch

from secateur.memory.footprint import Footprint, Settings


def choose_settings(
    measure: Callable[[bool], Footprint], limit: int | None, device: torch.device, tokens: int | None
) -> Settings:
    """The fastest settings that fit the memory.

    Args:
        measure: what the run holds, exactly or roughly: see `measure`.
        limit: of the host's memory, in bytes; None: most of what is free.
        tokens: to be run at a time; None: what fits.

    Raises:
        UsageError: nothing fits the limit.
    """
    on_device = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
    # Most models fit by far, which a rough estimate tells.
    rough = measure(False)
    fastest = next(iter(rough.choices(tokens)))
    if rough.fits(fastest, limit, on_device):
        return fastest
    return measure(True).choose(limit, on_device, tokens)
