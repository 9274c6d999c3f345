"""What runs on one model have in common, so that only the first of them has to find it: calibration text, squared gradients.

N: windows, S: tokens of a window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.calibration.kept_windows import calibration_ids
from secateur.calibration.tokens import hash_of
from secateur.folder.manifest import hash_of_values
from secateur.model.source import Source
from secateur.recipes.recipe import Calibration


@dataclass
class Shared:
    """Of runs on one source.

    Statistics of inputs are not shared: those of a block are of what the blocks before it have become, which every recipe makes
    something else of. Squared gradients are of the dense model.

    Attributes:
        source: the open model.
        folder: where squared gradients are kept.
    """

    source: Source
    folder: Path
    _windows: dict[Calibration, tuple[Tensor, Calibration, list[int]]] = field(default_factory=dict)

    def calibration_ids(
        self, wanted: Calibration, device: torch.device, say: Callable[[str], None], frugal: bool = False
    ) -> tuple[Tensor, Calibration, list[int]]:
        """The same as the function of that name, for the open model."""
        if wanted not in self._windows:
            self._windows[wanted] = calibration_ids(self.source, wanted, device, say, frugal)
        return self._windows[wanted]

    def fisher_file(self, ids_NS: Tensor, begin: list[int], names: Iterable[str], experts: Mapping[str, Any]) -> Path:
        """Where the squared gradients of linears on these windows are kept, of a model with these experts."""
        key = hash_of_values([hash_of(ids_NS), begin, sorted(names), *([experts] if experts else [])])
        return self.folder / f"fisher-{key[:32]}.safetensors"
