"""Quantizers' grids in the blocks that GGUF files know, so that what makes up for errors works on those.

O: output features, I: input features, K: weights of a row, G: groups of a block, S: weights of one group, B: those of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from secateur.core.options import option
from secateur.core.pruned import Pruned
from secateur.core.stack import Stack
from secateur.errors import UsageError
from secateur.formats.layouts.block_codes import Blocks
from secateur.formats.layouts.block_types import BLOCK_TYPES, BlockType, type_for
from secateur.quant.block_fit import Coded, Groups, fit_block

UNIFORM = "uniform"
#: The grid of every linear is that of a type which a search finds for it; until then it is this one.
OPEN, STAND_IN = "gguf", "q4_k"
UNDECIDED = (
    f"`grid` {OPEN} leaves the type of every linear to a search: add `target_size` or `max_perplexity_rise`, or name a type, "
    f"such as {STAND_IN}"
)
#: What `grid` may be.
TYPE_GRIDS = tuple(name.lower() for name in BLOCK_TYPES)
GRIDS = (UNIFORM, *TYPE_GRIDS, OPEN)
# What a search tries for rows that super-blocks divide, and for others. IQ4_NL loses less than Q4_0, which is as large.
_OF_SUPER_BLOCKS = ("q8_0", "q6_k", "q5_k", "q4_k", "iq4_xs", "q3_k", "q2_k")
_OF_BLOCKS = ("q8_0", "q5_1", "q5_0", "q4_1", "iq4_nl")


def grid_option() -> Any:
    """Which grid codes are on."""
    return option(
        UNIFORM, "Grid of codes: uniform, that of a type of GGUF files, or gguf (types by search).", choices=GRIDS
    )


def grids_for(features: int) -> tuple[str, ...]:
    """The grids that a search tries for rows of so many weights, the most bits first; none where no blocks divide them."""
    if features % BLOCK_TYPES["Q4_K"].block_size == 0:
        return _OF_SUPER_BLOCKS
    return _OF_BLOCKS if features % BLOCK_TYPES["Q8_0"].block_size == 0 else ()


def check_grid(method: Any, defaults: Sequence[tuple[str, Any]]) -> None:
    """Raise UsageError where a method has a grid of GGUF's and options that say otherwise.

    Args:
        method: with options `grid` and these.
        defaults: names of options that such a grid decides, with what they are where nothing is said.
    """
    if method.grid == UNIFORM:
        return
    for name, default in defaults:
        if getattr(method, name) != default:
            raise UsageError(f"`{name}` is decided by `grid` {method.grid}: leave `{name}` out, or give `grid` uniform")


def unpruned(grid: str) -> str | None:
    """Why weights on a grid cannot be pruned, and what to do instead; None where they can."""
    if grid == UNIFORM:
        return None
    return f"`grid` {grid} has a code for every weight, and what is pruned has none: leave `prune` out, or give `grid` uniform"


def block_grid(method: Any, stack: Stack, pruned: Pruned | None) -> BlockGrid | None:
    """The grid that a method's options ask for; None: one of its own. Raises UsageError where it does not fit the weights."""
    if method.grid == UNIFORM:
        return None
    if pruned is not None:
        raise UsageError(f"pruned weights have no place: {method.unpruned}")
    if method.grid == OPEN:
        raise UsageError(UNDECIDED)
    form = type_for(method.grid.upper(), stack.features)
    if form is None:
        raise UsageError(
            f"`grid` {method.grid} does not fit a linear of {stack.features} inputs, which are not whole blocks of 32: "
            "leave it alone by `ignore`, or give `grid` uniform"
        )
    return BlockGrid(form)


@dataclass(frozen=True)
class FittedBlock:
    """The grids of one block in every row."""

    form: BlockType
    coded: Coded
    groups: Groups

    def at(self, column: int) -> Groups:
        """The grid of a column of the block."""
        group = column // self.form.group_size
        offset = self.groups.offset
        return Groups(self.form, self.groups.scale[group, 0], None if offset is None else offset[group, 0])


@dataclass(frozen=True)
class BlockGrid:
    """Grids as `quant.grid.Grid` makes them, of which those of a block are fitted together."""

    form: BlockType
    half: torch.dtype = torch.float16

    @property
    def group_size(self) -> int:
        """Columns that are fitted together."""
        return self.form.block_size

    @property
    def levels(self) -> int:
        return 2**self.form.bits - 1

    def fit(self, w_BO: Tensor, importance_BO: Tensor | None = None) -> FittedBlock:
        """The grids for a block of every row: see `Grid.fit`."""
        importance = w_BO.new_ones(len(w_BO), 1) if importance_BO is None else importance_BO
        split = (self.form.groups, self.form.group_size)
        coded = fit_block(self.form, w_BO.unflatten(0, split), importance.unflatten(0, split))
        return FittedBlock(self.form, coded, coded.groups(self.form))

    def assemble(self, fitted: list[FittedBlock], W_OK: Tensor, first: int, last: int) -> Blocks:
        """The codes of weights, rows `first` to `last` of those that the blocks were fitted for."""
        code_OK = torch.empty(W_OK.shape, dtype=torch.uint8, device=W_OK.device)
        split = (self.form.groups, self.form.group_size)
        for i, block in enumerate(fitted):
            at = slice(i * self.group_size, (i + 1) * self.group_size)
            scale, offset = block.groups.scale[..., first:last], block.groups.offset
            groups = Groups(self.form, scale, None if offset is None else offset[..., first:last])
            code_OK[:, at] = groups.code(W_OK[:, at].T.unflatten(0, split)).flatten(0, 1).T.to(torch.uint8)

        def halves(name: str) -> Tensor | None:
            found = [getattr(block.coded, name) for block in fitted]
            return None if found[0] is None else torch.stack([x_O[first:last] for x_O in found], 1).half()

        def codes(name: str) -> Tensor | None:
            found = [getattr(block.coded, name) for block in fitted]
            return None if found[0] is None else torch.cat([x_GO[:, first:last] for x_GO in found]).T.to(torch.uint8)

        scale_OB = halves("scale_O")
        assert scale_OB is not None
        return Blocks(self.form.name, code_OK, scale_OB, halves("offset_O"), codes("c_GO"), codes("m_GO"))
