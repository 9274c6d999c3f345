"""Squared gradients of a run: computed once by all processes, kept in a file by the first.

O: output features, I: input features, N: windows, S: tokens of a window.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from secateur.calibration.fisher import fisher
from secateur.core.ranks import Ranks
from secateur.folder.reader import StoredTensors
from secateur.folder.writer import save_tensors, sync


@dataclass(frozen=True)
class KeptFisher:
    """The diagonal of the Fisher information of a model's linears, in a file, which a resumed run need not compute again.

    Attributes:
        file: that the first process keeps; it has its name when it is whole.
        ranks: the processes.
    """

    file: Path
    ranks: Ranks

    @property
    def there(self) -> bool:
        """Whether the file was written."""
        return bool(self.ranks.share(self.file.exists()))

    def gather(
        self, model: Any, ids_NS: Tensor, names: Sequence[str], say: Callable[[str], None], bos: Sequence[int] = ()
    ) -> None:
        """Compute it for linears of a model and write it; each process computes gradients on its part of the windows."""
        own_NS = self.ranks.mine(ids_NS)
        means = fisher(
            model, own_NS, names, lambda done, total: say(f"computing gradients: {done} of {total} windows"), bos
        )
        for mean_OI in means.values():
            mean_OI.mul_(len(own_NS) / len(ids_NS))
            self.ranks.add(mean_OI)
        if self.ranks.first:
            new = self.file.with_suffix(".new")
            save_tensors(means, new)
            sync(new)
            new.rename(self.file)

    def of(self, names: Sequence[str]) -> dict[str, Tensor]:
        """fisher_OI of some linears by name, in all processes: float32, on the CPU."""
        found: list[Tensor] = []
        if self.ranks.first:
            stored = StoredTensors([self.file])
            found = [stored[name] for name in names]
        return dict(zip(names, self.ranks.share_with_tensors(None, found)[1], strict=True))
