"""What a method is given: the weights of linears that read the same input, and what is known of that input.

O: output features of all of them, R: those of one, I: input features.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from secateur.core.stats import InputStats
from secateur.solvers.inverse_cholesky import inverse_cholesky


@dataclass(frozen=True)
class Stack:
    """Linears of one input, one below the other. Nothing in it is changed.

    Attributes:
        W_OI: their weights, float32.
        stats: of the input, for the level that the method asks for.
        rows: how many rows each linear has.
        dtype: of the weights in the source, and of the dense weights that a result stands for.
        fisher_OI: the squared gradient of the loss for every weight, where the method asks for it.
        shared: for each linear what it has in common with linears of other blocks, or None; empty: none of them has anything.
    """

    W_OI: Tensor
    stats: InputStats
    rows: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    fisher_OI: Tensor | None = None
    shared: tuple[Any, ...] = ()

    @classmethod
    def of(
        cls,
        weights: Sequence[Tensor],
        stats: InputStats,
        dtype: torch.dtype = torch.float32,
        fishers: Sequence[Tensor] = (),
    ) -> Stack:
        """Weights `[R, I]` in any dtype, stacked; `fishers` are their squared gradients."""
        W_OI = torch.cat([W_RI.float() for W_RI in weights])
        fisher_OI = torch.cat([fisher_RI.to(W_OI.device) for fisher_RI in fishers]) if fishers else None
        return cls(W_OI, stats, tuple(len(W_RI) for W_RI in weights), dtype, fisher_OI)

    @property
    def features(self) -> int:
        """I."""
        return self.W_OI.shape[1]

    @property
    def dead_I(self) -> Tensor:
        """Which inputs were never anything but zero: nothing depends on their weights."""
        return self.stats.square_I <= 0

    def split(self, x_OI: Tensor) -> Iterator[Tensor]:
        """The part of each linear of something that has a row for each of all."""
        return iter(x_OI.split(list(self.rows)))

    def of_linears(self, numbers: Sequence[int]) -> Stack:
        """Some of the linears, by their numbers in the stack, with what is known of their inputs."""
        if len(numbers) == len(self.rows):
            return self
        pieces = list(self.split(torch.arange(len(self.W_OI), device=self.W_OI.device)))
        chosen_O = torch.cat([pieces[i] for i in numbers])
        fisher_OI = None if self.fisher_OI is None else self.fisher_OI[chosen_O]
        shared = tuple(self.shared[i] for i in numbers) if self.shared else ()
        rows = tuple(self.rows[i] for i in numbers)
        return replace(self, W_OI=self.W_OI[chosen_O], rows=rows, fisher_OI=fisher_OI, shared=shared)

    def once(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        """What `compute` makes of the statistics, computed once for all solves of the same ones: see `InputStats.once`."""
        return self.stats.once(key, compute)

    def inverse(self, damping: float, falling: bool = False) -> tuple[Tensor, float]:
        """The factor U of the inverse of the damped Gram matrix, and the damping that it took: see `inverse_cholesky`.

        Args:
            damping: as a share of the mean diagonal entry.
            falling: with the inputs in the order `falling_I`.

        Raises:
            ValueError: the statistics are not finite, or hold no Gram matrix.
        """

        def factor() -> tuple[Tensor, float]:
            order_I = self.falling_I if falling else None
            upper_II = self.stats.upper() if order_I is None else self.stats.gram()[order_I][:, order_I]
            return inverse_cholesky(upper_II, damping)

        return self.once(("inverse", damping, falling), factor)

    def damped_gram(self, damping: float) -> Tensor:
        """The matrix that `inverse_cholesky` inverts, as a new `[I, I]` tensor: symmetric, float32."""
        gram_II = self.stats.gram()
        diagonal_I = gram_II.diagonal()
        mean = diagonal_I.mean().item() or 1.0
        diagonal_I.copy_(torch.where(diagonal_I <= 0, mean, diagonal_I) + damping * mean)
        return gram_II

    @property
    def falling_I(self) -> Tensor:
        """The inputs by falling energy."""
        return self.stats.upper().diagonal().argsort(descending=True, stable=True)

    def notes(self, damping: float, used: float) -> tuple[str, ...]:
        """What the user should know about statistics that were solved with the damping `used` instead of `damping`."""
        notes = []
        if self.stats.tokens < self.stats.features:
            notes.append(
                f"{self.stats.tokens} calibration tokens are fewer than the {self.stats.features} inputs: give more"
            )
        if used != damping:
            notes.append(
                f"damping raised from {damping:g} to {used:g} of the mean diagonal: the Gram matrix is singular"
            )
        return tuple(notes)

    def dead_notes(self) -> tuple[str, ...]:
        """What the user should know about dead inputs, whose weights a pruner sets to zero."""
        dead = int(self.dead_I.sum())
        return (f"{dead} of {self.stats.features} inputs are always zero in the calibration text",) if dead else ()
