"""Packed weights of a model of which a device map leaves parts on disk, or in the host's memory: brought when they run.

accelerate offloads parameters, and packed weights are none. They are read from the model's own files, ahead of what computes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_module
from torch import Tensor, nn

from secateur.folder.extents import Extent, OpenFiles, find_extents
from secateur.folder.reader import StoredTensors
from secateur.formats.layouts.packed_weight import PackedWeight, StoredForm
from secateur.kernels.module import PackedLinear
from secateur.kernels.packed import Packed, nbytes
from secateur.memory.free_memory import free_memory
from secateur.offload.link import link_to
from secateur.offload.streamer import StreamedBlock, attach
from secateur.offload.taken_out import Outline, find_parts, outline, take_out
from secateur.plugin.names import block_of
from secateur.plugin.packed_modules import SHARED_OUT, main_device, packed_linears, place_named

# Of the free memory, what weights may take before it is known where they go.
_SHARE = 4
# Norms and biases stay in memory: to open a file for each of them takes longer than to read a packed weight.
_SMALL = 2**20
_CPU = torch.device("cpu")

Read = Callable[[], tuple[Packed, StoredForm]]


def may_offload(device_map: Any) -> bool:
    """Whether a device map may leave parts of a model where they do not compute."""
    if isinstance(device_map, dict):
        return "disk" in device_map.values() or ("cpu" in device_map.values() and len(set(device_map.values())) > 1)
    return device_map in SHARED_OUT


class Offloaded:
    """Lets go of packed weights as soon as they have been read and checked, and reads them again where they are wanted.

    Args:
        stored: the tensors of the model's files.
    """

    def __init__(self, stored: StoredTensors) -> None:
        self._stored = stored
        files = stored.files
        self._extents: dict[str, Extent] = {}
        for file in files:
            self._extents |= find_extents(file)
        self._files = OpenFiles(files)
        self._room = free_memory() // _SHARE
        self._lock = threading.Lock()
        self._outlines: dict[str, Outline] = {}

    def reader(self, name: str, packed: PackedWeight | None, read: Read) -> Read:
        """What reads the weight of a linear, and gives it without most of its tensors where there is no room for them."""

        if packed is None or block_of(name) is None:
            return read

        def light() -> tuple[Packed, StoredForm]:
            weight, form = read()
            with self._lock:
                self._room -= nbytes(weight)
                if self._room >= 0:
                    return weight, form
            found = self._outlines[name] = outline(weight, find_parts(weight, self._parts(packed)))
            return found.weight, form

        return light

    def _parts(self, packed: PackedWeight) -> list[tuple[Extent, Tensor]]:
        return [(self._extents[key], self._stored[key]) for key in packed.parts.values()]

    def let_go(self, model: nn.Module) -> None:
        """Have linears that were given so little of their weights read them when they are asked for them."""
        for name, linear in packed_linears(model):
            if name in self._outlines:
                found = self._outlines.pop(name)
                linear.let_go(found.weight, partial(found.read, self._files, _CPU))

    def stream(self, model: Any, packed_of: Callable[[str], PackedWeight | None]) -> None:
        """Have blocks that the model's `hf_device_map` leaves elsewhere brought when they run.

        Args:
            packed_of: tells how a linear's weight is stored.
        """
        device = main_device(dict(getattr(model, "hf_device_map", None) or {}))
        if device.type not in ("cpu", "cuda"):
            return
        blocks: dict[str, StreamedBlock] = {}
        places: dict[str, set[Any]] = {}
        for name, linear, place in _elsewhere(model, device):
            packed, unit = packed_of(name), block_of(name)
            if packed is None or unit is None:
                continue
            out = take_out(linear, self._parts(packed), device, self._files)
            block = blocks.setdefault(unit, StreamedBlock())
            block.add(list(out.parts.values()))
            block.packed.append((linear, out))
            places.setdefault(unit, set()).add(place)
        self._stored.release()
        if not blocks:
            return
        link = link_to(device)
        for unit, block in blocks.items():
            _hold_small(model.get_submodule(unit))
            if link is not None and places[unit] == {"cpu"}:
                block.held = link.pinned(block.size)
                block.read(self._files, block.held)
        attach(model, [(model.get_submodule(unit), block) for unit, block in blocks.items()], self._files, link)


def _elsewhere(model: Any, device: torch.device) -> Iterator[tuple[str, PackedLinear, Any]]:
    """Packed linears that do not lie where they compute, and where they do."""
    for name, linear in list(packed_linears(model)):
        place = place_named(model, name)
        if place == "disk" or (place == "cpu" and device.type != "cpu"):
            yield name, linear, place


def _hold_small(block: nn.Module) -> None:
    """Keep what is small of a block where it computes, instead of having accelerate bring it each time."""
    for module in block.modules():
        hook = getattr(module, "_hf_hook", None)
        wanted = {leaf: each for leaf, each in module._parameters.items() if each is not None}
        if not getattr(hook, "offload", False) or sum(each.nbytes for each in wanted.values()) > _SMALL:
            continue
        assert hook is not None
        values = {leaf: hook.weights_map[leaf].to(hook.execution_device, each.dtype) for leaf, each in wanted.items()}
        remove_hook_from_module(module)
        for leaf, value in values.items():
            module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
