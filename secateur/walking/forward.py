"""Running blocks for their inputs: measured, and no more exactly than the model asks for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from secateur.walking.clock import Clock


@contextmanager
def forward(clock: Clock, dtype: torch.dtype) -> Iterator[None]:
    """Within the context blocks are run, which counts as the phase `forward`.

    The factors of float32 products on a CPU may be rounded to bfloat16 where the model is in bfloat16: its weights lose
    nothing, and sums stay in float32, as all that is between products does. Processors with tiles for bfloat16 are several
    times as fast at it; on others nothing changes. Statistics and solvers are outside.

    Args:
        dtype: the model's own.
    """
    backends: Any = torch.backends.mkldnn  # of whose attributes torch says no types
    precision = backends.matmul
    before = precision.fp32_precision
    with clock("forward"):
        try:
            if dtype is torch.bfloat16:
                precision.fp32_precision = "bf16"
            yield
        finally:
            precision.fp32_precision = before
