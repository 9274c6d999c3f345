"""Running blocks for their inputs: measured, and no more exactly than the model asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from secateur.core.stats import add_products
from secateur.kernels.rounded import products_of_rounded, rounded_linears
from secateur.pipeline.prepared import Prepared
from secateur.walking.clock import Clock


@contextmanager
def forward(clock: Clock, dtype: torch.dtype) -> Iterator[None]:
    """Within the context blocks are run, which counts as the phase `forward`.

    The factors of linears on a CPU are rounded to bfloat16 where the model is in bfloat16: its weights lose nothing, and sums
    stay in float32, as all that is between linears does. Processors with instructions for that are twice as fast at it, or
    more; on others nothing changes. Solvers are outside.

    Args:
        dtype: see `precision`.
    """
    with clock("forward"), rounded_linears() if dtype is torch.bfloat16 else nullcontext():
        yield


def products(dtype: torch.dtype) -> Callable[[Tensor, Tensor], None]:
    """What adds the inputs of linears to their Gram matrix: as they are multiplied, rounded where the model is in bfloat16.

    Args:
        dtype: see `precision`.
    """
    return products_of_rounded() if dtype is torch.bfloat16 else add_products


def precision(prepared: Prepared) -> torch.dtype:
    """What a model is run in, as exactly as it is wanted: in its own dtype if it is written in that, too, else in float32."""
    return prepared.source.dtype if prepared.written_dtype == prepared.source.dtype else torch.float32
