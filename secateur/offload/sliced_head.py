"""A head of which memory holds some rows at a time.

V: vocabulary, H: features.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from secateur.folder.extents import Extent
from secateur.offload.streamer import StreamedBlock
from secateur.offload.taken_out import Part

# Rows that kernels compute together.
_TILE = 64


class HeadInSlices(nn.Module):
    """x W^T + bias by linears for one part of the vocabulary after the other, each of which is read when it runs.

    Args:
        extent: where the weight lies.
        weight: `[V, H]`, of which shape and dtype are kept.
        bias_V: where it computes, or None.
        size: bytes that a part may have.
        device: where it computes.
    """

    def __init__(self, extent: Extent, weight: Tensor, bias_V: Tensor | None, size: int, device: torch.device) -> None:
        super().__init__()
        V, H = weight.shape
        width = H * weight.itemsize
        # Of whole tiles, so that each row is summed as it is in the whole.
        step = max(_TILE, size // width // _TILE * _TILE)
        self.slices = nn.ModuleList()
        self._parts: list[Part] = []
        self._device = device
        for start in range(0, V, step):
            rows = min(step, V - start)
            part = nn.Linear(H, rows, bias_V is not None, device="meta", dtype=weight.dtype).requires_grad_(False)
            if bias_V is not None:
                part.bias = nn.Parameter(bias_V[start : start + rows].clone(), requires_grad=False)
            self.slices.append(part)
            place = replace(extent, start=extent.start + start * width, size=rows * width)
            self._parts.append(Part(place, 0, weight.dtype, torch.Size((rows, H))))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.slices], -1)

    def streamed(self) -> Iterator[tuple[nn.Module, StreamedBlock]]:
        """Its linears, and how each is read."""
        for module, part in zip(self.slices, self._parts, strict=True):
            block = StreamedBlock(parameters=[(module, "weight", part)])
            block.add([part])
            block.unbind(self._device)
            yield module, block
