"""Running a model that memory does not hold: as many blocks as fit stay in it, and the others are read each time they run.

What a block computes on is read into one of two buffers, in the form that its files have it in, while the block before
computes in the other: nothing is copied or unpacked. What of a packed weight does not lie in the files as it is, such as where
its rows begin, is small and stays in memory. With a device that has memory of its own, the first blocks stay there, the next in
pinned memory of the host, from which they are copied when they run, and the last are read and copied.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import CheckpointError, UsageError
from secateur.folder.extents import Extent, OpenFiles, find_extents
from secateur.formats.layouts.layout import all_finite
from secateur.kernels.backends import AUTO
from secateur.mixture.skipping import skip_experts
from secateur.model.source import Source
from secateur.model.stream_room import Limits, Sizes, cache_bytes, room_here, room_there
from secateur.model.structure import build_skeleton, find_blocks, parameters_outside, shared_parameters
from secateur.model.weights import ModelWeights, materialise, place, tie
from secateur.offload.link import Link
from secateur.offload.sliced_head import HeadInSlices
from secateur.offload.streamer import StreamedBlock, attach
from secateur.offload.table_in_file import TableInFile
from secateur.offload.taken_out import Part, take_form_of_files, take_out
from secateur.plugin.packed_modules import memory_footprint, packed_linears, replace_linears
from secateur.plugin.quantization_config import SecateurConfig
from secateur.plugin.quantizer import SecateurQuantizer

# Tokens whose keys and values have a place, where nobody says how many.
_CACHED_TOKENS = 2048
# Bytes that are looked at together for values that are not finite.
_CHECKED = 16 * 2**20
_CPU = torch.device("cpu")


def load_streamed(
    source: Source,
    dtype: torch.dtype,
    limits: Limits,
    backend: str,
    tokens: int = _CACHED_TOKENS,
) -> Any:
    """Load a model of which no more than the limits allow is to be in memory.

    Args:
        dtype: of the weights that are not packed.
        backend: computes on the packed ones.
        tokens: so many are kept keys and values of.

    Raises:
        UsageError: a limit is too little, or a backend cannot be used.
        CheckpointError: a tensor is missing or damaged.
    """
    model: Any = build_skeleton(source, dtype).eval()
    weights = ModelWeights(source, model)
    found = find_blocks(model).modules
    shared = shared_parameters(model)
    loading = _Loading(source, model, weights, backend, dtype, limits.link)
    loading.place_outside(found.values())
    weights.release()
    _check_there(source, model, dict(parameters_outside(model, found.values())))
    sizes = Sizes.of(weights, found, cache_bytes(model, tokens), loading.head_bytes)
    if limits.link is None:
        here = left = room_here(source.name, limits.host, sizes)
    else:
        here = room_here(source.name, limits.host, replace(sizes, kept=0, head=0))
        left = room_there(source.name, limits.device, sizes, model)
    split = left + sizes.head < 0 or (limits.link is not None and here < 0)
    spared = 2 * (sizes.block - sizes.part) if split else 0
    loading.place_head(None if left >= 0 else sizes.part if split else sizes.block)
    left += 0 if left >= 0 else sizes.head + spared
    here += spared
    check_cache = partial(_check_cache, tokens)
    streamed: list[tuple[nn.Module, StreamedBlock]] = []
    for prefix, block in found.items():
        size = loading.place(prefix, block)
        _check_there(source, model, (f"{prefix}.{name}" for name in block.state_dict()))
        shares = any(f"{prefix}.{name}" in shared for name in block.state_dict())
        if (size <= left and not streamed) or shares:
            left -= size
            loading.keep(block)
            weights.release()
            continue
        if not streamed:
            block.register_forward_pre_hook(check_cache, with_kwargs=True)
        for module, out in loading.take_out(prefix, block, left, split):
            streamed.append((module, out))
            left -= out.kept
        weights.release()
    streamed += loading.head_slices
    for _, out in streamed:
        if limits.link and out.size <= here:
            here -= out.size
            out.held = limits.link.pinned(out.size)
            out.read(loading.files, out.held)
    if source.quantization is not None:
        model.hf_quantizer = SecateurQuantizer(SecateurConfig(**source.quantization))
        model.hf_quantizer.put_gates(model, source.weights.stored)
    skip_experts(model, source.quantization)
    model.get_memory_footprint = partial(memory_footprint, model)
    if streamed:
        attach(model, streamed, loading.files, limits.link)
        model.save_pretrained = _refuse_to_save
    return model


@dataclass(frozen=True)
class _Head:
    """A head that lies in a file.

    Attributes:
        module: that computes.
        extent, weight: where it lies, and what is there.
        table: of embeddings, that has the same weight.
    """

    module: nn.Linear
    extent: Extent
    weight: Tensor
    table: nn.Module | None

    @property
    def owner(self) -> nn.Module:
        """What has the weight as its own."""
        return self.module if self.table is None else self.table


class _Loading:
    """Puts blocks in place one at a time, and finds out what of them lies in the files as it is computed on.

    Attributes:
        files: of the model, to read from while it runs.
        head_slices: of a head that is read, too: its parts, and how they are read.
    """

    def __init__(
        self,
        source: Source,
        model: Any,
        weights: ModelWeights,
        backend: str,
        dtype: torch.dtype,
        link: Link | None,
    ) -> None:
        self._name, self._model, self._weights, self._backend, self._dtype = source.name, model, weights, backend, dtype
        self._link, self._device = link, _CPU if link is None else link.device
        self._extents: dict[str, Extent] = {}
        files = [file for file in source.files if file.suffix == ".safetensors"]
        for file in files:
            self._extents |= find_extents(file)
        self.files = OpenFiles(files)
        self._head: _Head | None = None
        self.head_slices: list[tuple[nn.Module, StreamedBlock]] = []

    def place_outside(self, blocks: Iterable[nn.Module]) -> None:
        """Give everything outside the blocks its weights, but for a table of embeddings, and a head, that lie in a file."""
        model = self._model
        table, head = model.get_input_embeddings(), model.get_output_embeddings()
        tied = head is not None and head.weight is table.weight
        for name, _ in parameters_outside(model, blocks):
            owner, leaf = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
            plain = leaf == "weight" and type(owner) in (nn.Embedding, nn.Linear)
            mapped = plain and owner in (table, head) and self._as_in_file(name, owner.weight)
            materialise(model, "", [name], self._weights, _CPU, check_finite=not mapped)
            if mapped:
                extent = self._extents[self._weights.stored_name(name)]
                self._check_finite(name, extent, owner.weight)
                if owner is table and not tied:
                    model.set_input_embeddings(TableInFile(extent, table.weight))
                elif type(head) is nn.Linear:
                    self._head = _Head(head, extent, owner.weight, table if tied else None)
                else:
                    _own(owner, leaf, self._device)
            else:
                _own(owner, leaf, self._device)
        tie(model)
        for module in model.modules():
            for leaf, buffer in module._buffers.items():
                module._buffers[leaf] = None if buffer is None else buffer.to(self._device)

    @property
    def head_bytes(self) -> int:
        """Of a head that can be read when it runs."""
        return 0 if self._head is None else self._head.weight.nbytes

    def place_head(self, size: int | None) -> None:
        """Keep the head in memory, or have parts of so many bytes of it read when they run."""
        model, head = self._model, self._head
        if head is not None and size is None:
            _own(head.owner, "weight", self._device)
            tie(model)
        elif head is not None and size is not None:
            sliced = HeadInSlices(head.extent, head.weight, head.module.bias, size, self._device)
            name = next(name for name, module in model.named_modules() if module is head.module)
            model.set_submodule(name, sliced)
            if head.table is not None:
                model.set_input_embeddings(TableInFile(head.extent, head.weight))
            self.head_slices = list(sliced.streamed())
        self._head = None

    def _check_finite(self, name: str, extent: Extent, weight: Tensor) -> None:
        """Raise CheckpointError where a tensor of a file has a value that is not finite, reading a little of it at a time."""
        piece = torch.empty(min(_CHECKED, extent.size), dtype=torch.uint8)
        for at in range(0, extent.size, _CHECKED):
            size = min(_CHECKED, extent.size - at)
            memory = memoryview(piece.numpy().data)[:size]
            self.files.read([(replace(extent, start=extent.start + at, size=size), memory)])
            if not all_finite(piece[:size].view(weight.dtype)):
                raise CheckpointError(f"{name} holds NaN or infinity: the checkpoint is damaged")

    def _as_in_file(self, name: str, tensor: Tensor) -> bool:
        """Whether a tensor that is not packed lies in a file as it is computed on."""
        weights = self._weights
        if name not in weights or weights.converted or name in weights.pieces or weights.packed(name) is not None:
            return False
        stored = weights.stored_name(name)
        if stored not in self._extents:
            return False
        raw = weights.stored_tensors[stored]
        return raw.dtype == tensor.dtype and raw.shape == tensor.shape

    def place(self, prefix: str, block: nn.Module) -> int:
        """Give a block its weights, in the memory of the host; the bytes that they take."""
        weights = self._weights
        readers = {}
        for name in list(block.state_dict()):
            full = f"{prefix}.{name}"
            packed = weights.packed(full) if name.endswith(".weight") else None
            if packed is not None:
                readers[full.removesuffix(".weight")] = partial(packed.read, full, weights.stored_tensors)
        if self._backend != "dense":
            # Not even `auto` is to find a form that is another than the files'.
            backend = "torch" if self._link is not None and self._backend == AUTO else self._backend
            where = backend, self._device, self._dtype
            for name in replace_linears(self._model, readers, *where, weights.stored_tensors.at_hand):
                self._model.get_submodule(name).backend = self._backend
        materialise(block, prefix, list(block.state_dict()), weights, _CPU, check_finite=False)
        return memory_footprint_of(block)

    def keep(self, block: nn.Module) -> None:
        """Let a block stay, where it computes."""
        for name in block.state_dict():
            _own(block.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], self._device)
        for _, linear in packed_linears(block):
            if self._link is not None:
                take_form_of_files(linear, linear.packed(), self._device)
            linear.place(self._device)

    def take_out(self, prefix: str, block: nn.Module, room: int, split: bool) -> list[tuple[nn.Module, StreamedBlock]]:
        """Let go of a block's weights, but for what cannot be read from the files; how the rest is read, before what runs.

        Args:
            room: bytes that there are for what cannot be read.
            split: whether each of its modules is read when it runs, and what is small is kept.

        Raises:
            UsageError: what lies otherwise in the files is more than there is room for.
        """
        found: dict[nn.Module, StreamedBlock] = {}
        linears = dict(packed_linears(block))
        for name, module in block.named_modules():
            here = found.setdefault(module if split else block, StreamedBlock())
            path = f"{prefix}.{name}" if name else prefix
            if name in linears:
                out = take_out(linears[name], self._parts(f"{path}.weight"), self._device, self.files)
                here.add(list(out.parts.values()))
                here.packed.append((linears[name], out))
                here.kept += out.kept
                if not out.parts and here.kept > room:
                    raise self._other(f"{path}.weight")
            for leaf, parameter in module._parameters.items():
                if parameter is None:
                    continue
                full = f"{path}.{leaf}"
                if self._as_in_file(full, parameter) and not (split and parameter.ndim < 2):
                    part = Part(self._extents[self._weights.stored_name(full)], 0, parameter.dtype, parameter.shape)
                    here.add([part])
                    here.parameters.append((module, leaf, part))
                    continue
                _own(module, leaf, self._device)
                here.kept += parameter.nbytes
                if parameter.ndim > 1 and here.kept > room:
                    raise self._other(full)
        for each in found.values():
            each.unbind(self._device)
        return [(module, each) for module, each in found.items() if each.places or not split]

    def _other(self, name: str) -> UsageError:
        return UsageError(
            f"{name} does not lie in the files of {self._name} as it is computed with: leave `dtype` out, or compress or "
            "export the model first"
        )

    def _parts(self, weight: str) -> list[tuple[Extent, Tensor]]:
        packed = self._weights.packed(weight)
        assert packed is not None
        stored = self._weights.stored_tensors
        return [(self._extents[key], stored[key]) for key in packed.parts.values() if key in self._extents]


def _own(owner: nn.Module, leaf: str, device: torch.device) -> None:
    """Let a tensor have memory of its own, that is no view of a file, which others may change."""
    tensor = getattr(owner, leaf)
    if not tensor.is_meta:
        place(owner, leaf, tensor.detach().to(device, copy=True))


def memory_footprint_of(block: nn.Module) -> int:
    """Bytes of all weights of a block."""
    dense = sum(tensor.nbytes for tensor in block.state_dict().values())
    return dense + sum(linear.nbytes for _, linear in packed_linears(block))


def _check_there(source: Source, model: nn.Module, names: Iterable[str]) -> None:
    """Raise CheckpointError where a parameter has no weights."""
    for name in names:
        owner, _, leaf = name.rpartition(".")
        if getattr(model.get_submodule(owner), leaf).is_meta:
            raise CheckpointError(f"{source.name} lacks the tensor {name}")


def _check_cache(tokens: int, _: nn.Module, args: Any, kwargs: Any) -> None:
    """Raise UsageError where keys and values have outgrown what was left for them."""
    cache = next((each for each in (*args, *kwargs.values()) if hasattr(each, "get_seq_length")), None)
    x = args[0] if args else kwargs.get("hidden_states")
    texts = len(x) if isinstance(x, Tensor) else 1
    kept = 0 if cache is None else texts * cache.get_seq_length()
    if kept > tokens:
        raise UsageError(
            f"`max_memory` left room for the keys and values of {tokens} tokens, and there are {kept}: "
            "give more, or ask for fewer tokens"
        )


def _refuse_to_save(*_: Any, **__: Any) -> Any:
    raise UsageError("a model with `max_memory` reads its weights when it runs, and cannot be saved: copy its folder")
