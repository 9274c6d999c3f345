"""Which rows of one tensor are which rows of others, by what is in them: whoever converts a model names tensors otherwise,
stacks them, and puts rows in another order, but leaves a row what it is.

O: output features, I: input features, R: rows of a tensor.
"""

from __future__ import annotations

from hashlib import blake2b

import torch
from torch import Tensor

#: A row: whose it is, and its number there.
Row = tuple[str, int]


class RowIndex:
    """Rows of many matrices, to be found by their content, each once as long as there are others like it."""

    def __init__(self) -> None:
        self._rows: dict[bytes, dict[str, list[int]]] = {}

    def add(self, owner: str, W_OI: Tensor) -> None:
        """Take in the rows of a matrix."""
        for number, key in enumerate(_keys(W_OI)):
            self._rows.setdefault(key, {}).setdefault(owner, []).append(number)

    def find(self, W_RI: Tensor) -> list[Row] | None:
        """Where each row is from; None where one is not there. Of rows that are alike those of one matrix stay together."""
        found: list[Row] = []
        for key in _keys(W_RI):
            owners = self._rows.get(key)
            if owners is None:
                return None
            owner = found[-1][0] if found and found[-1][0] in owners else next(iter(owners))
            numbers = owners[owner]
            found.append((owner, numbers.pop(0) if len(numbers) > 1 else numbers[0]))
        return found


def _keys(W_OI: Tensor) -> list[bytes]:
    bytes_OB = W_OI.contiguous().view(torch.uint8).numpy()
    return [blake2b(row, digest_size=16).digest() for row in bytes_OB]
