"""A block as it is in the dense model, beside the one whose linears become something else."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn


class Twin:
    """A second block that computes with the weights that the first one has now.

    No weight is copied: what compresses a linear of the first puts another tensor in its place, and the twin keeps the old.

    Args:
        block: the first.

    Attributes:
        block: the second.
    """

    def __init__(self, block: nn.Module) -> None:
        # What is in the memo is not copied.
        shared: dict[int, Any] = {id(tensor): tensor for tensor in (*block.parameters(), *block.buffers())}
        self.block = copy.deepcopy(block, shared)
        self._of = dict(zip(map(id, block.modules()), self.block.modules(), strict=True))

    def of(self, module: Any) -> Any:
        """What stands in the place of a module of the first block."""
        return self._of[id(module)]
