"""Linears of blocks in a row that are called the same and have the same shape: those that may have something in common."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from secateur.model.block_names import split_name
from secateur.model.structure import weight_matrix


def sharing_of(
    model: nn.Module, names: Iterable[str], blocks: Sequence[str], lists: Sequence[str], together: int
) -> dict[str, str]:
    """Of linears that share something with others, the first of those that each shares it with: itself where it is the first.

    Args:
        model: a skeleton.
        names: of linears, in the order of their blocks.
        blocks: the names of all blocks, of which so many in a row are `together`.
        lists: the names of the lists of blocks.
    """
    number_of = {name: i for i, name in enumerate(blocks)}
    alike: dict[Any, list[str]] = {}
    for name in names:
        block, rest = split_name(name, lists)
        prefix = block.rpartition(".")[0]
        if any(word.isdecimal() for word in prefix.split(".")):  # in a file it is the first number that tells the block
            continue
        shape = tuple(weight_matrix(model.get_submodule(name)).shape)
        alike.setdefault((number_of[block] // together, prefix, rest, shape), []).append(name)
    return {name: members[0] for members in alike.values() if len(members) > 1 for name in members}
