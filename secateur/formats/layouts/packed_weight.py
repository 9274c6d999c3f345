"""Weights that lie packed in a checkpoint, and the view of a checkpoint in which they are dense.

O: output features, I: input features.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from secateur.errors import CheckpointError
from secateur.folder.reader import Tensors
from secateur.formats.layouts.layout import Decoder, Layout, Stored
from secateur.kernels.packed import PADDING, Packed

#: What stands in files below the name of a weight and is none of it: what activation sparsity needs, see `gates.section`.
BESIDE = ("activation_scale", "activation_left", "activation_right")


@dataclass(frozen=True)
class StoredForm:
    """How the parts of a weight look in its file, so that the weight can be stored again without the file.

    Attributes:
        layout: its codec.
        tensors: part of the layout → dtype and shape, which may be chosen in more than one way.
    """

    layout: Layout
    tensors: dict[str, tuple[torch.dtype, torch.Size]]

    def __call__(self, weight: Packed) -> dict[str, Tensor]:
        """The parts, bit for bit as they were read."""
        parts = self.layout.store(weight)
        return {
            part: parts[part].to(dtype).reshape(shape) for part, (dtype, shape) in self.tensors.items() if part in parts
        }


D = TypeVar("D", bound=Decoder)


@dataclass(frozen=True)
class PackedWeight(Generic[D]):
    """Where and how one weight is stored.

    Attributes:
        layout: its codec.
        parts: part of the layout → name of the tensor in the files.
        transposed: the weight belongs to a Conv1D module, which keeps it as `[I, O]`.
    """

    layout: D
    parts: dict[str, str]
    transposed: bool = False

    def tensors(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Its parts, by the names that its layout has for them."""
        return {part: stored[key] for part, key in self.parts.items()}

    def decode(self, name: str, stored: Mapping[str, Tensor]) -> Tensor:
        """The dense weight as its module keeps it. Raises CheckpointError, naming it, when its parts are damaged."""
        with self._named(name, "decoded"):
            W_OI = self.layout.unpack(self.tensors(stored))
        return W_OI.T.contiguous() if self.transposed else W_OI

    def decode_expert(self, name: str, stored: Mapping[str, Tensor], expert: int) -> Tensor:
        """`decode(name, stored)[expert]`, with strides of any kind, without decoding the others. Raises as it does."""
        with self._named(name, "decoded"):
            return self.layout.unpack_expert(self.tensors(stored), expert)

    def form(self, name: str, stored: Mapping[str, Tensor]) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of the dense weight, without decoding it where that can be told. Raises as `decode` does."""
        with self._named(name, "decoded"):
            shape, dtype = self.layout.form(self.tensors(stored))
        return shape[::-1] if self.transposed else shape, dtype

    def describe(self, name: str, stored: Mapping[str, Tensor]) -> Stored:
        """What its parts tell, all of which is checked. Raises CheckpointError as `decode` does."""
        with self._named(name, "read"):
            return self.layout.describe(self.tensors(stored))

    @contextmanager
    def _named(self, name: str, what: str) -> Iterator[None]:
        """Within the context, what is wrong with its parts is a CheckpointError that names it."""
        try:
            yield
        except ValueError as error:
            raise CheckpointError(f"{name} cannot be {what} from layout {self.layout.name!r}: {error}") from error

    def load(self: PackedWeight[Layout], name: str, stored: Mapping[str, Tensor]) -> Packed:
        """The weight as kernels compute on it, `[O, I]`. Raises CheckpointError as `decode` does."""
        return self.read(name, stored)[0]

    def read(self: PackedWeight[Layout], name: str, stored: Mapping[str, Tensor]) -> tuple[Packed, StoredForm]:
        """The same, and how it is stored. Large tensors stay in the mapped files where they are, see `packed.padded`."""
        if isinstance(stored, Tensors):
            tensors = {part: stored.lasting(key, PADDING) for part, key in self.parts.items()}
        else:
            tensors = self.tensors(stored)
        form = StoredForm(self.layout, {part: (tensor.dtype, tensor.shape) for part, tensor in tensors.items()})
        with self._named(name, "read"):
            return self.layout.load(tensors), form

    def load_ours(self, name: str, stored: Mapping[str, Tensor]) -> tuple[Packed, StoredForm] | None:
        """The same of a weight that somebody else packed, by the layout of ours that holds it; None where there is none."""
        with self._named(name, "read"):
            found = self.layout.ours(self.tensors(stored))
            if found is None:
                return None
            layout, tensors = found
            form = StoredForm(layout, {part: (tensor.dtype, tensor.shape) for part, tensor in tensors.items()})
            return layout.load(tensors), form


class DecodedWeights(Mapping[str, Tensor]):
    """A checkpoint's weights under their own names, of which the packed ones are decoded when they are asked for.

    Attributes:
        stored: its tensors as the files have them.
        packed: those weights that are packed.
    """

    def __init__(self, stored: Tensors, packed: Mapping[str, PackedWeight] | None = None) -> None:
        self.stored = stored
        self.packed = packed or {}
        parts = {name for weight in self.packed.values() for name in weight.parts.values()}
        self._plain = dict.fromkeys(
            name for name in stored if name not in parts and name.rpartition(".weight.")[2] not in BESIDE
        )

    def __getitem__(self, name: str) -> Tensor:
        weight = self.packed.get(name)
        return self.stored[name] if weight is None else weight.decode(name, self.stored)

    def expert(self, name: str, expert: int) -> Tensor:
        """`self[name][expert]` of a weight that holds the matrices of several experts, of which no other is decoded."""
        weight = self.packed.get(name)
        return self.stored[name][expert] if weight is None else weight.decode_expert(name, self.stored, expert)

    def form(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of `self[name]`, without decoding it where that can be told."""
        weight = self.packed.get(name)
        if weight is not None:
            return weight.form(name, self.stored)
        plain = self.stored[name]
        return tuple(plain.shape), plain.dtype

    def __contains__(self, name: object) -> bool:
        # Not Mapping's own, which would decode the weight to find out.
        return name in self.packed or name in self._plain

    def __iter__(self) -> Iterator[str]:
        yield from self._plain
        yield from self.packed

    def __len__(self) -> int:
        return len(self._plain) + len(self.packed)


class DecodedAhead(DecodedWeights):
    """The same, of which packed ones are being decoded by other threads, but for some; each can be had once."""

    def __init__(self, weights: DecodedWeights, pool: Executor, but: Container[str] = ()) -> None:
        super().__init__(weights.stored, weights.packed)
        self._futures = {name: pool.submit(weights.__getitem__, name) for name in weights.packed if name not in but}

    def __getitem__(self, name: str) -> Tensor:
        future = self._futures.pop(name, None)
        return super().__getitem__(name) if future is None else future.result()
