"""What a linear's inputs tell a solver: additive statistics over calibration tokens.

T: tokens, C: tokens of a chunk, I: input features, O: output features.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from secateur.core.histogram import Histogram

# Rows of the Gram matrix computed at a time: only the upper triangle is needed, and panels of this height skip most of
# the lower one while each product stays large enough to run at full speed.
_PANEL = 192
# Tokens summed at a time: few enough to stay in cache and to keep the rounding of long sums small.
_CHUNK = 512


class Level(enum.IntEnum):
    """How much is gathered; each level holds what the ones below it hold."""

    NONE = 0
    MOMENTS = 1
    GRAM = 2


def add_products(upper_II: Tensor, x_TI: Tensor) -> None:
    """Add Σxᵀx of float32 inputs to the upper triangle of a matrix; below it may be anything afterwards."""
    for i, panel in zip(range(0, len(upper_II), _PANEL), upper_panels(upper_II), strict=True):
        panel.addmm_(x_TI[:, i : i + _PANEL].T, x_TI[:, i:])


def upper_panels(upper_II: Tensor) -> list[Tensor]:
    """Views of some rows each that hold the upper triangle of a matrix, and little of what is below it."""
    return [upper_II[i : i + _PANEL, i:] for i in range(0, len(upper_II), _PANEL)]


@dataclass
class InputStats:
    """Sums over the inputs `x_TI` of one linear, or of several that read the same input.

    Additive: the statistics of two halves of the data merge into those of the whole by `+`.

    Attributes:
        level: what is gathered.
        tokens: how many inputs have been seen.
        sum_I: Σx, float32.
        square_I: Σx², float32. At `Level.GRAM` it is the diagonal of the Gram matrix.
        upper_II: Σxᵀx, float32; only the upper triangle is meaningful, see `gram`.
        borrowed: how many of the inputs are none that the linear has in the model: an expert of a mixture that few tokens are
            sent to is shown others.
        drift_II: Σ(x̃ − x)ᵀx, float32, where x̃ are the inputs that the linear has in the dense model; None: not gathered.
        halves: the statistics of even and of odd windows, of which these are the sum; None: not gathered apart.
        histogram: how large the inputs are; None: not gathered.
    """

    level: Level
    tokens: int
    sum_I: Tensor
    square_I: Tensor
    upper_II: Tensor | None = None
    borrowed: int = 0
    drift_II: Tensor | None = None
    halves: tuple[InputStats, InputStats] | None = None
    histogram: Histogram | None = None
    _found: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def empty(cls, features: int, level: Level, device: torch.device | str = "cpu") -> InputStats:
        """Statistics of no tokens at all, for inputs of `features` features."""
        zeros_I = torch.zeros(features, device=device)
        upper_II = torch.zeros(features, features, device=device) if level >= Level.GRAM else None
        return cls(level, 0, zeros_I, zeros_I.clone(), upper_II)

    def with_drift(self) -> InputStats:
        """Statistics of no tokens that also gather how far inputs are from the dense model's."""
        return replace(self, drift_II=torch.zeros(self.features, self.features, device=self.sum_I.device), _found={})

    @property
    def both_halves(self) -> tuple[InputStats, InputStats] | None:
        """Those of even and of odd windows, where some tokens are in each; None where nothing can be held out."""
        return self.halves if self.halves is not None and all(half.tokens for half in self.halves) else None

    @property
    def features(self) -> int:
        return self.sum_I.numel()

    @classmethod
    def isotropic(cls, features: int, level: Level, device: torch.device | str = "cpu") -> InputStats:
        """Statistics of one token as if inputs were uncorrelated and alike: what is known where none was seen."""
        stats = cls.empty(features, level, device)
        if level > Level.NONE:
            stats.square_I += 1
        if stats.upper_II is not None:
            stats.upper_II.diagonal().fill_(1)
        return stats

    def or_isotropic(self) -> InputStats:
        """These, or what is known where no token was seen."""
        return self if self.tokens else self.isotropic(self.features, self.level, self.square_I.device)

    def add(
        self,
        x_TI: Tensor,
        weight_T: Tensor | None = None,
        borrowed: int = 0,
        dense_TI: Tensor | None = None,
        add_products: Callable[[Tensor, Tensor], None] = add_products,
    ) -> None:
        """Count the tokens `x_TI` of any floating dtype in. Values that are not finite leave traces: see `finite`.

        Args:
            weight_T: by which the squares of each token's inputs count; None: 1.
            borrowed: how many of them are.
            dense_TI: the inputs of the same tokens in the dense model, where the drift is gathered.
            add_products: adds what the tokens make of the Gram matrix to its upper triangle.
        """
        if self.level == Level.NONE:
            return
        self.forget()
        x_TI = x_TI.float()
        away_TI = None if dense_TI is None or self.drift_II is None else dense_TI.float() - x_TI
        if weight_T is not None:
            root_T1 = weight_T.float().sqrt()[:, None]
            x_TI = x_TI * root_T1
            away_TI = None if away_TI is None else away_TI * root_T1
        self.tokens += x_TI.shape[0]
        self.borrowed += borrowed
        for x_CI in x_TI.split(_CHUNK):
            # Sums over tokens as products with ones: many times as fast as a reduction over the first dimension.
            ones_C = torch.ones_like(x_CI[:, 0])
            self.sum_I += ones_C @ x_CI
            if self.upper_II is None:
                self.square_I += ones_C @ x_CI.square()
        if self.drift_II is not None and away_TI is not None:
            self.drift_II.addmm_(away_TI.T, x_TI)
        if self.upper_II is None:
            return
        add_products(self.upper_II, x_TI)
        self.square_I = self.upper_II.diagonal().clone()

    def __add__(self, other: InputStats) -> InputStats:
        """The statistics of both sets of tokens together."""
        if (self.level, self.features) != (other.level, other.features):
            raise ValueError(
                f"cannot merge {self.level.name} statistics of {self.features} features with "
                f"{other.level.name} of {other.features}"
            )
        if (self.drift_II is None) != (other.drift_II is None):
            raise ValueError(
                "cannot merge statistics of which only some hold how far inputs are from the dense model's"
            )
        upper_II = drift_II = halves = histogram = None
        if self.upper_II is not None and other.upper_II is not None:
            upper_II = self.upper_II + other.upper_II
        if self.drift_II is not None and other.drift_II is not None:
            drift_II = self.drift_II + other.drift_II
        if self.halves is not None and other.halves is not None:
            halves = (self.halves[0] + other.halves[0], self.halves[1] + other.halves[1])
        if self.histogram is not None and other.histogram is not None:
            histogram = self.histogram + other.histogram
        return InputStats(
            self.level,
            self.tokens + other.tokens,
            self.sum_I + other.sum_I,
            self.square_I + other.square_I,
            upper_II,
            self.borrowed + other.borrowed,
            drift_II,
            halves,
            histogram,
        )

    @property
    def finite(self) -> bool:
        """Whether every input seen so far was finite (and no sum overflowed float32)."""
        sums = (self.square_I,) if self.drift_II is None else (self.square_I, self.drift_II)
        return all(bool(torch.isfinite(sum_).all()) for sum_ in sums)

    def upper(self) -> Tensor:
        """The Gram matrix Σxᵀx of which only the upper triangle is meaningful, `[I, I]`; not a copy.

        Raises:
            ValueError: these statistics were gathered below `Level.GRAM`.
        """
        if self.upper_II is None:
            raise ValueError(f"the Gram matrix was not gathered: these statistics are at level {self.level.name}")
        return self.upper_II

    def gram(self) -> Tensor:
        """The symmetric Gram matrix Σxᵀx as a new `[I, I]` float32 tensor; raises as `upper` does."""
        upper_II = self.upper()
        gram_II = upper_II.triu()
        for i in range(0, self.features, _PANEL):
            # Panel by panel, for want of room for another such matrix.
            gram_II[i:, i : i + _PANEL] += upper_II[i : i + _PANEL, i:].triu(1).T
        return gram_II

    def forget(self) -> None:
        """Let go of what `once` found: the sums have changed."""
        self._found.clear()

    def once(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        """What `compute` gives, computed the first time that it is asked for by this key: a factorisation that solves share."""
        if key not in self._found:
            self._found[key] = compute()
        return self._found[key]

    def norm(self) -> Tensor:
        """‖x_j‖₂ / √T of each feature j, `[I]`: the root mean square of the inputs."""
        return (self.square_I / max(self.tokens, 1)).sqrt()

    def mean(self) -> Tensor:
        """The mean of each feature, `[I]`."""
        return self.sum_I / max(self.tokens, 1)

    def variance(self) -> Tensor:
        """The (biased) variance of each feature, `[I]`, never negative."""
        return (self.square_I / max(self.tokens, 1) - self.mean().square()).clamp_(min=0)

    def energy(self, W_OI: Tensor) -> Tensor:
        """‖X w‖² of each row w of a matrix, `[O]`: the squared outputs that it gives on the inputs seen, summed over them.

        Without the Gram matrix it is what it would be if the inputs were uncorrelated with mean zero.
        """
        diagonal_O = W_OI.square() @ self.square_I
        if self.upper_II is None:
            return diagonal_O
        # Half the Gram matrix is enough: wGwᵀ = 2 wUwᵀ − wDwᵀ for its upper triangle U and its diagonal D.
        upper_O = torch.zeros_like(diagonal_O)
        for i in range(0, self.features, _PANEL):
            panel_PI = self.upper_II[i : i + _PANEL, i:].triu()
            upper_O += ((W_OI[:, i : i + _PANEL] @ panel_PI) * W_OI[:, i:]).sum(1)
        return 2 * upper_O - diagonal_O
