"""Rotation by blocks of Walsh and Hadamard: it spreads what few features hold over all of a block, by additions alone.

b: features of a block.
"""

from __future__ import annotations

import torch
from torch import Tensor


def block_of(features: int, most: int) -> int:
    """The largest power of two that divides so many features, and is no more than `most`, itself a power of two."""
    return min(features & -features, most)


def rotate(x: Tensor, block: int, dim: int = -1) -> Tensor:
    """x times a block-diagonal matrix, along one dimension: symmetric and orthonormal, so that doing it twice undoes it.

    Each entry is found by the same additions in the same order, whatever else there is in x, and on any device.

    Args:
        x: floating.
        block: of the Walsh-Hadamard matrices on the diagonal: a power of two that divides the dimension.
        dim: along which.
    """
    dim %= x.ndim
    size = x.shape[dim]
    x = x.unflatten(dim, (size // block, block))
    half = block // 2
    for _ in range(block.bit_length() - 1):
        # Sums and differences of the halves, interleaved: as many times as there are bits, that is the natural order.
        first, second = x.narrow(dim + 1, 0, half), x.narrow(dim + 1, half, half)
        x = torch.stack((first + second, first - second), dim + 2).flatten(dim + 1, dim + 2)
    return x.flatten(dim, dim + 1) * block**-0.5
