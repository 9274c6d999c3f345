"""A model without some of its blocks: its config, and its weights under the numbers that blocks have then."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from secateur.errors import SecateurError, UsageError
from secateur.folder.reader import Tensors
from secateur.formats.layouts.packed_weight import DecodedWeights
from secateur.model.located import locate
from secateur.model.source import Source
from secateur.model.structure import Blocks, build_skeleton, find_blocks
from secateur.structured.reshape import shares_keys, with_edits
from secateur.structured.sites import Width

# What tells blocks apart by their number alone.
_NUMBERS = ("layer_idx", "layer_id", "layer_number", "block_idx")
_T = TypeVar("_T")


class _Renamed(Tensors):
    """Tensors under other names."""

    def __init__(self, tensors: Tensors, names: Mapping[str, str]) -> None:
        self._tensors, self._names = tensors, names

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[self._names[name]]

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def headers(self) -> Iterator[tuple[str, torch.dtype | None, tuple[int, ...]]]:
        new = {old: name for name, old in self._names.items()}
        return ((new[name], dtype, shape) for name, dtype, shape in self._tensors.headers() if name in new)

    def release(self) -> None:
        self._tensors.release()


def dropped(blocks: Blocks, widths: Mapping[str, Width | float], per_layer: bool = False) -> list[int]:
    """The numbers of the blocks that are to have no units at all, in order.

    Args:
        blocks: of the model.
        widths: that are chosen for linears, by name.
        per_layer: whether a block may lose its attention or its neurons alone: only one that is to have neither goes.
    """
    found = []
    for i, prefix in enumerate(blocks.modules):
        own = [width for name, width in widths.items() if name.startswith(f"{prefix}.")]
        gone = [width for width in own if isinstance(width, Width) and not width.units]
        if gone and (not per_layer or (len(gone) == len(own) and len(own) > 1)):
            found.append(i)
    return found


def without_dropped(blocks: Blocks, widths: Mapping[str, _T], drop: Sequence[int]) -> dict[str, _T]:
    """What is chosen for the linears of the other blocks, or said of these, by the names that they have then."""
    prefixes = list(blocks.modules)
    new_of = {prefix: prefixes[i] for i, prefix in enumerate(p for n, p in enumerate(prefixes) if n not in drop)}
    return {
        f"{new}{name[len(old) :]}": width
        for name, width in widths.items()
        for old, new in new_of.items()
        if name == old or name.startswith(f"{old}.")
    }


def without_blocks(source: Source, model: nn.Module, blocks: Blocks, drop: Sequence[int]) -> Source:
    """The source without some of its blocks.

    Args:
        model: its skeleton.
        blocks: of it.
        drop: numbers of those, in the order in which they run, one at least.

    Raises:
        UsageError: it cannot be without them, and why not.
    """
    count = len(blocks.modules)
    if len(drop) == count:
        raise UsageError(f"all {count} blocks of {source.name} are to go, which would leave nothing")
    (prefix, *more) = blocks.lists
    names = [f"{prefix}.{i}" for i in range(count)]
    text = source.config.get_text_config()
    if more or list(blocks.modules) != names or shares_keys(source):
        why = "its layers share keys and values" if shares_keys(source) else "its blocks stand in several lists"
        raise UsageError(f"blocks of {source.name} cannot go: {why}; leave `blocks` out of `units`")
    kept = [i for i in range(count) if i not in drop]
    edited = with_edits(source, _edits(text, kept, count))
    short = None
    if edited is not None:
        widths = without_dropped(blocks, source.widths, drop)
        short = replace(edited, weights=_renamed(source, model, prefix, kept), widths=widths)
    if short is None or not _alike(short, model, prefix, kept):
        raise UsageError(
            f"{source.name} cannot be without block {drop[0]}: what its blocks are follows a period, or its config cannot "
            "say so; leave `blocks` out of `units`"
        )
    return short


def _edits(text: Any, kept: Sequence[int], count: int) -> dict[str, Any]:
    """Of a config: how many layers there are, and every list that has a value for each."""
    edits: dict[str, Any] = {text.attribute_map.get("num_hidden_layers", "num_hidden_layers"): len(kept)}
    for key, value in text.to_dict().items():
        if isinstance(value, list) and len(value) == count:
            edits[key] = [deepcopy(value[i]) for i in kept]
    return edits


def _renamed(source: Source, model: nn.Module, prefix: str, kept: Sequence[int]) -> DecodedWeights:
    places = locate(source.weights, model).stored
    before = {
        stored.partition(f".{number}.")[0] if not stored.startswith(f"{number}.") else ""
        for name, stored in places.items()
        if name.startswith(f"{prefix}.")
        for number in [name[len(prefix) + 1 :].partition(".")[0]]
    }
    pattern = re.compile(
        rf"({'|'.join(re.escape(f'{each}.' if each else '') for each in sorted(before, reverse=True))})(\d+)\.(.*)"
    )
    new_number = {old: new for new, old in enumerate(kept)}

    def rename(name: str) -> str | None:
        found = pattern.fullmatch(name)
        if found is None:
            return name
        number = new_number.get(int(found[2]))
        return None if number is None else f"{found[1]}{number}.{found[3]}"

    stored = {new: name for name in source.weights.stored if (new := rename(name)) is not None}
    packed = {}
    for name, weight in source.weights.packed.items():
        new = rename(name)
        if new is not None:
            # Some may lie with a weight of a block that goes.
            parts = {part: rename(key) or f"{new}.{part}" for part, key in weight.parts.items()}
            stored |= {key: weight.parts[part] for part, key in parts.items()}
            packed[new] = replace(weight, parts=parts)
    return DecodedWeights(_Renamed(source.weights.stored, stored), packed)


def _alike(short: Source, model: nn.Module, prefix: str, kept: Sequence[int]) -> bool:
    """Whether the blocks of the shorter model are what those of the same weights were, but for their numbers."""
    try:
        built = find_blocks(build_skeleton(short, torch.float32)).modules
    except SecateurError:
        return False
    if list(built) != [f"{prefix}.{i}" for i in range(len(kept))]:
        return False
    return all(
        _told(built[f"{prefix}.{new}"]) == _told(model.get_submodule(f"{prefix}.{old}")) for new, old in enumerate(kept)
    )


def _told(block: nn.Module) -> list[Any]:
    """What modules of a block say of themselves in plain values, and the shapes of its parameters."""
    plain = [
        (name, type(module).__name__, key, value)
        for name, module in block.named_modules()
        for key, value in sorted(vars(module).items())
        if key not in _NUMBERS and isinstance(value, bool | int | float | str | type(None))
    ]
    return [*plain, *((name, tuple(parameter.shape)) for name, parameter in block.named_parameters())]
