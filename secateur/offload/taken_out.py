"""Packed weights that are not in memory: what of them can be read from files, and what is kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from secateur.folder.extents import Extent, OpenFiles
from secateur.kernels.backends import AUTO, why_not
from secateur.kernels.module import PackedLinear
from secateur.kernels.packed import PADDING, Packed, map_tensors, tensors_in

# Backends that do; `torch` does so with all weights.
_AS_IN_FILES = ("cpu", "triton")


@dataclass(frozen=True)
class Part:
    """A tensor that lies in a file as it is computed on, but for zeros after its end.

    Attributes:
        extent: where.
        padding: bytes of zeros after it.
        dtype, shape: of the tensor, zeros included.
    """

    extent: Extent
    padding: int
    dtype: torch.dtype
    shape: torch.Size

    @property
    def size(self) -> int:
        """Bytes of memory."""
        return self.extent.size + self.padding

    def view(self, memory: Tensor) -> Tensor:
        """The tensor, in bytes that begin with it."""
        return memory[: self.size].view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class Outline:
    """A weight without what can be read from files.

    Attributes:
        weight: with tensors on the meta device in the place of that.
        parts: what they stand for, by their identity.
    """

    weight: Any
    parts: dict[int, Part]

    def filled(self, view: Callable[[Part], Tensor]) -> Any:
        """The weight with tensors for its parts."""
        return map_tensors(self.weight, lambda each: view(self.parts[id(each)]) if id(each) in self.parts else each)

    @property
    def kept(self) -> int:
        """Bytes that stay in memory."""
        return sum(each.nbytes for each in tensors_in(self.weight) if id(each) not in self.parts)

    def read(self, files: OpenFiles, device: torch.device) -> Any:
        """The whole weight on a device, read anew."""

        def view(part: Part) -> Tensor:
            memory = torch.zeros(part.size, dtype=torch.uint8)
            files.read([(part.extent, memoryview(memory.numpy().data)[: part.extent.size])])
            return part.view(memory).to(device)

        return self.filled(view)


def is_padded(tensor: Tensor, part: Tensor) -> bool:
    """Whether a tensor is one of a file, byte for byte, but for what follows its end."""
    if tensor.nbytes not in (part.nbytes, part.nbytes + PADDING) or not tensor.is_contiguous() or not part.nbytes:
        return False
    mine, other = (each.contiguous().view(-1).view(torch.uint8) for each in (tensor, part))
    return torch.equal(mine[: len(other)], other)


def find_parts(weight: Any, stored: Sequence[tuple[Extent, Tensor]]) -> dict[int, Part]:
    """Of the tensors of a packed weight in the CPU's memory those that lie in files as they are, by where they begin there.

    Args:
        weight: as it was read.
        stored: the tensors of the files that it was made of, and where they lie.
    """
    found = {}
    for tensor in tensors_in(weight):
        extent = next((extent for extent, part in stored if is_padded(tensor, part)), None)
        if extent is not None:
            found[tensor.data_ptr()] = Part(extent, tensor.nbytes - extent.size, tensor.dtype, tensor.shape)
    return found


def outline(weight: Any, known: dict[int, Part]) -> Outline:
    """A weight without its parts that begin where those do that are known."""
    parts: dict[int, Part] = {}
    empty_of: dict[int, Tensor] = {}

    def empty(tensor: Tensor) -> Tensor:
        part = known.get(tensor.data_ptr()) if type(tensor) is Tensor and tensor.numel() else None
        if part is None or part.size != tensor.nbytes or not tensor.is_contiguous():
            return tensor
        if id(tensor) not in empty_of:
            empty_of[id(tensor)] = torch.empty_like(tensor, device="meta")
        found = empty_of[id(tensor)]
        parts[id(found)] = replace(part, dtype=tensor.dtype, shape=tensor.shape)
        return found

    return Outline(map_tensors(weight, empty), parts)


def take_form_of_files(linear: PackedLinear, weight: Packed, device: torch.device) -> None:
    """Have `auto` take, of the backends for a device, one that computes on a weight as it lies in files."""
    if linear.backend == AUTO:
        fit = (name for name in _AS_IN_FILES if why_not(name, weight, device, linear.dtype) is None)
        linear.backend = next(fit, "torch")


def take_out(
    linear: PackedLinear, stored: Sequence[tuple[Extent, Tensor]], device: torch.device, files: OpenFiles
) -> Outline:
    """Have a linear, whose weight is in the CPU's memory, let go of what can be read from files; how the rest is read.

    Args:
        linear: which is ready for the device afterwards, but for what has to be bound before it computes.
        stored: see `find_parts`.
        device: where it computes.
        files: to read from where the whole weight is asked for.
    """
    weight = linear.packed()
    take_form_of_files(linear, weight, device)
    known = find_parts(weight, stored)
    moved = map_tensors(weight, lambda tensor: tensor.to(device))
    there = {
        new.data_ptr(): known[old.data_ptr()]
        for old, new in zip(tensors_in(weight), tensors_in(moved), strict=True)
        if old.data_ptr() in known
    }
    linear.take(moved, device)
    assert linear.prepared is not None
    found = outline(linear.prepared.weight, there)
    linear.let_go(found.weight, partial(outline(moved, there).read, files, device))
    return found
