"""Which rows of other linears compute a linear's input features.

O: output features, I: input features, R: rows of a producer, U: units.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Feeds:
    """Which units of a consumer's input each row of a producer has a part in: neighbours, from `first_R` up to before `stop_R`.

    A row that has none is no part of this coupling.
    """

    first_R: Tensor
    stop_R: Tensor

    @property
    def some_R(self) -> Tensor:
        """Which rows have a part in any."""
        return self.stop_R > self.first_R

    def kept(self, keep_U: Tensor) -> Tensor:
        """Which rows stay, `[R]`: those that have a part in a unit that does, or in none at all."""
        before_U = torch.cat([torch.zeros(1, dtype=torch.long), keep_U.long().cumsum(0)])
        return ~self.some_R | (before_U[self.stop_R] > before_U[self.first_R])


@dataclass(frozen=True, eq=False)
class Coupling:
    """A linear whose input features make units that can be removed, with what computes them.

    Attributes:
        consumer: its name within the block.
        kind: `neurons` or `heads`.
        features: I.
        units: U.
        groups: of heads, how many sets of them share keys and values; else 1.
        producers: by their names within the block.
    """

    consumer: str
    kind: str
    features: int
    units: int
    groups: int
    producers: Mapping[str, Feeds]

    @property
    def size(self) -> int:
        """Features of a unit."""
        return self.features // self.units

    @property
    def each(self) -> int:
        """Units of a group."""
        return self.units // self.groups


def as_feeds(feeds_RU: Tensor) -> Feeds | None:
    """The same as ranges; None where what a row feeds is not one range."""
    count_R = feeds_RU.sum(1)
    first_R = feeds_RU.int().argmax(1)
    places_U = torch.arange(feeds_RU.shape[1])
    inside_RU = (places_U >= first_R[:, None]) & (places_U < (first_R + count_R)[:, None])
    return Feeds(first_R, first_R + count_R) if torch.equal(inside_RU, feeds_RU) else None


def groups_of(producers: Iterable[Feeds], units: int) -> int | None:
    """How many sets of units, all as large and neighbours, share what computes them; None where they are not of that form."""
    widest = max((int((feeds.stop_R - feeds.first_R).max()) for feeds in producers), default=0)
    if not widest or units % widest:
        return None
    for feeds in producers:
        within_R = feeds.first_R // widest == (feeds.stop_R - 1).clamp(min=0) // widest
        if not (within_R | ~feeds.some_R).all():
            return None
    return units // widest
