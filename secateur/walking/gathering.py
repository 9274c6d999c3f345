"""Statistics of one input as its batches come: of all windows at once, or of even and odd ones apart.

T: tokens, N: windows, I: input features.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from secateur.core.histogram import FIRST, Histogram
from secateur.core.ranks import Ranks
from secateur.core.stats import InputStats, Level, add_products
from secateur.mixture.experts import Rows


class Gathering:
    """What has come so far of the input of some linears.

    Args:
        features: of the input.
        level: of the statistics.
        halves: whether even and odd windows are kept apart.
        drift: whether what the linears read in the dense model is known.
        device: that it is computed on.
        histogram: where sizes are counted, if they are.
        add_products: adds inputs to the Gram matrix, see `InputStats.add`.
    """

    def __init__(
        self,
        features: int,
        level: Level,
        halves: bool,
        drift: bool,
        device: torch.device,
        histogram: Histogram | None = None,
        add_products: Callable[[Tensor, Tensor], None] = add_products,
    ) -> None:
        self._histogram, self._add_products = histogram, add_products
        self._parts = [InputStats.empty(features, level, device) for _ in range(2 if halves else 1)]
        if drift:
            self._parts = [part.with_drift() for part in self._parts]

    def add(self, rows: Rows, dense_TI: Tensor | None, first: int, windows: int) -> None:
        """Count a batch in.

        Args:
            rows: of the batch.
            dense_TI: what the linears read of the same tokens in the dense model.
            first: the number of the batch's first window, among those of all processes.
            windows: of the batch.
        """
        if self._histogram is not None:
            self._histogram.add(_behind_the_first(rows.x_TI, windows))
        x_TI = rows.x_TI.reshape(-1, rows.x_TI.shape[-1])
        dense_TI = None if dense_TI is None else dense_TI.reshape(x_TI.shape)
        if len(self._parts) == 1:
            self._parts[0].add(x_TI, rows.weight_T, rows.borrowed, dense_TI, self._add_products)
            return
        part_T = (_window_of(rows, len(x_TI), windows).to(x_TI.device) + first) % 2
        for number, part in enumerate(self._parts):
            chosen_T = part_T == number
            borrowed = int(chosen_T[len(x_TI) - rows.borrowed :].sum())
            weight_T = None if rows.weight_T is None else rows.weight_T[chosen_T]
            dense = None if dense_TI is None else dense_TI[chosen_T]
            part.add(x_TI[chosen_T], weight_T, borrowed, dense, self._add_products)

    @property
    def finite(self) -> bool:
        """Whether every input that came was finite."""
        return all(part.finite for part in self._parts)

    def total(self, ranks: Ranks) -> InputStats:
        """The statistics over the batches of all processes."""
        for part in self._parts:
            ranks.add_up(part)
        whole = self._parts[0]
        if len(self._parts) > 1:
            even, odd = self._parts
            whole = even + odd
            whole.halves = (even, odd)
        if self._histogram is not None:
            whole.histogram = self._histogram
            ranks.add_up_sizes(whole.histogram)
        return whole


def _window_of(rows: Rows, tokens: int, windows: int) -> Tensor:
    """In which window of the batch each row lies; tokens of a batch lie window by window."""
    token_T = torch.arange(tokens) if rows.token_T is None else rows.token_T
    of_batch = tokens if rows.batch_tokens is None else rows.batch_tokens
    return token_T // max(1, of_batch // windows)


def _behind_the_first(x: Tensor, windows: int) -> Tensor:
    """The inputs of a batch of windows without those of the first positions of each."""
    return x.reshape(windows, -1, x.shape[-1])[:, FIRST:]
