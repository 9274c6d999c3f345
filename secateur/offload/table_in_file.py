"""A table of embeddings that stays in its file."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from secateur.folder.extents import Extent, OpenFiles


class TableInFile(nn.Module):
    """Reads the rows that are asked for.

    Args:
        extent: where the table lies.
        weight: the table, of which shape and dtype are kept.
    """

    def __init__(self, extent: Extent, weight: Tensor) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = weight.shape
        self._dtype, self._extent, self._files = weight.dtype, extent, OpenFiles([extent.file])

    def forward(self, ids: Tensor) -> Tensor:
        wanted, place_of = ids.cpu().flatten().unique(return_inverse=True)
        rows = torch.empty(len(wanted), self.embedding_dim, dtype=self._dtype)
        size = rows[0].nbytes if len(rows) else 0
        memory = memoryview(rows.view(-1).view(torch.uint8).numpy().data)
        whole = self._extent
        self._files.read(
            [
                (replace(whole, start=whole.start + size * row, size=size), memory[size * i : size * (i + 1)])
                for i, row in enumerate(wanted.tolist())
            ]
        )
        return rows[place_of].view(*ids.shape, -1).to(ids.device)
