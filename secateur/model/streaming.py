"""Running a model that memory does not hold: as many blocks as fit stay in it, and the others are read each time they run.

What a block computes on is read into one of two buffers, in the form that its files have it in, while the block before
computes in the other: nothing is copied or unpacked. What of a packed weight does not lie in the files as it is, such as where
its rows begin, is small and stays in memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from secateur.errors import CheckpointError, UsageError
from secateur.folder.extents import Extent, OpenFiles, find_extents
from secateur.folder.reader import MAPPED_BYTES
from secateur.kernels.packed import PADDING, map_tensors
from secateur.model.source import Source
from secateur.model.streamer import ALIGNED, Piece, StreamedBlock, Streamer
from secateur.model.structure import build_skeleton, find_blocks, parameters_outside, shared_parameters
from secateur.model.weights import ModelWeights, materialise, place, tie
from secateur.plugin.packed_modules import memory_footprint, packed_linears, replace_linears
from secateur.plugin.quantizer import SecateurConfig, SecateurQuantizer
from secateur.units import enough, words

# What activations, logits and the libraries themselves take beside weights.
_SPARE = 64 * 2**20
# Tokens whose keys and values have a place, where nobody says how many.
_CACHED_TOKENS = 2048


def load_streamed(
    source: Source,
    dtype: torch.dtype,
    limit: int,
    backend: str,
    tokens: int = _CACHED_TOKENS,
) -> Any:
    """Load a model of which no more than `limit` bytes are to be in memory, on the CPU.

    Args:
        dtype: of the weights that are not packed.
        backend: computes on the packed ones.
        tokens: so many are kept keys and values of.

    Raises:
        UsageError: the limit is too little, or a backend cannot be used.
        CheckpointError: a tensor is missing or damaged.
    """
    model: Any = build_skeleton(source, dtype).eval()
    weights = ModelWeights(source, model)
    found = find_blocks(model).modules
    shared = shared_parameters(model)
    loading = _Loading(source, model, weights, backend, dtype)
    loading.place_outside(found.values())
    weights.release()
    _check_there(source, model, dict(parameters_outside(model, found.values())))
    largest = max(_stored_bytes(weights, prefix, block) for prefix, block in found.items())
    left = _room(source.name, limit, cache_bytes(model, tokens), largest)
    streamed: list[tuple[nn.Module, StreamedBlock]] = []
    for prefix, block in found.items():
        size = loading.place(prefix, block)
        _check_there(source, model, (f"{prefix}.{name}" for name in block.state_dict()))
        shares = any(f"{prefix}.{name}" in shared for name in block.state_dict())
        if (size <= left and not streamed) or shares:
            left -= size
            for name in block.state_dict():
                _own(block.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2])
            continue
        streamed.append((block, loading.take_out(prefix, block, left)))
        left -= streamed[-1][1].kept
        weights.release()
    if source.quantization is not None:
        model.hf_quantizer = SecateurQuantizer(SecateurConfig(**source.quantization))
    model.get_memory_footprint = partial(memory_footprint, model)
    if streamed:
        _attach(model, streamed, tokens)
    return model


def _room(name: str, limit: int, cache: int, block: int) -> int:
    """Bytes that blocks may keep in memory, beside what is there, two buffers of a block's size and keys and values."""
    least = psutil.Process().memory_info().rss + _SPARE + MAPPED_BYTES + cache + 2 * block
    if limit < least:
        raise UsageError(f"`max_memory` {words(limit)} is too little for {name}, which needs {enough(least)} at least")
    return limit - least


def cache_bytes(model: Any, tokens: int) -> int:
    """Keys and values of so many tokens in all blocks, at most."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", 1)
    width = getattr(config, "head_dim", None) or config.hidden_size // getattr(config, "num_attention_heads", 1)
    return int(2 * config.num_hidden_layers * heads * width * tokens * model.dtype.itemsize)


def _stored_bytes(weights: ModelWeights, prefix: str, block: nn.Module) -> int:
    total = 0
    for name, tensor in block.state_dict().items():
        packed = weights.packed(f"{prefix}.{name}")
        total += (
            tensor.nbytes
            if packed is None
            else sum(part.nbytes + PADDING + ALIGNED for part in weights.parts(f"{prefix}.{name}").values())
        )
    weights.release()
    return total


class _TableInFile(nn.Module):
    """A table of embeddings of which the rows that are asked for are read."""

    def __init__(self, extent: Extent, weight: Tensor) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = weight.shape
        self._dtype, self._extent, self._files = weight.dtype, extent, OpenFiles([extent.file])

    def forward(self, ids: Tensor) -> Tensor:
        wanted, place_of = ids.flatten().unique(return_inverse=True)
        rows = torch.empty(len(wanted), self.embedding_dim, dtype=self._dtype)
        size = rows[0].nbytes if len(rows) else 0
        memory = memoryview(rows.view(-1).view(torch.uint8).numpy().data)
        whole = self._extent
        self._files.read(
            [
                (replace(whole, start=whole.start + size * row, size=size), memory[size * i : size * (i + 1)])
                for i, row in enumerate(wanted.tolist())
            ]
        )
        return rows[place_of].view(*ids.shape, -1)


class _Loading:
    """Puts blocks in place one at a time, and finds out what of them lies in the files as it is computed on."""

    def __init__(self, source: Source, model: Any, weights: ModelWeights, backend: str, dtype: torch.dtype) -> None:
        self._name, self._model, self._weights, self._backend, self._dtype = source.name, model, weights, backend, dtype
        self._extents: dict[str, Extent] = {}
        for file in source.files:
            if file.suffix == ".safetensors":
                self._extents |= find_extents(file)

    def place_outside(self, blocks: Iterable[nn.Module]) -> None:
        """Give everything outside the blocks its weights, but for a table of embeddings that is not the head, too."""
        model, cpu = self._model, torch.device("cpu")
        table = model.get_input_embeddings()
        head = model.get_output_embeddings()
        tied = head is not None and head.weight is table.weight
        for name, _ in parameters_outside(model, blocks):
            owner, leaf = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
            materialise(model, "", [name], self._weights, cpu)
            if owner is table and type(table) is nn.Embedding and not tied and self._as_in_file(name, table.weight):
                extent = self._extents[self._weights.stored_name(name)]
                model.set_input_embeddings(_TableInFile(extent, table.weight))
            else:
                _own(owner, leaf)
        tie(model)

    def _as_in_file(self, name: str, tensor: Tensor) -> bool:
        """Whether a tensor lies in a file as it is computed on."""
        stored = self._weights.stored_name(name)
        return stored in self._extents and _is_padded(tensor, self._weights.stored(stored))

    def place(self, prefix: str, block: nn.Module) -> int:
        """Give a block its weights; the bytes that they take."""
        cpu, weights = torch.device("cpu"), self._weights
        readers = {}
        for name in list(block.state_dict()):
            full = f"{prefix}.{name}"
            packed = weights.packed(full) if name.endswith(".weight") else None
            if packed is not None:
                readers[full.removesuffix(".weight")] = partial(packed.read, full, weights.stored_tensors)
        if self._backend != "dense":
            replace_linears(self._model, readers, self._backend, cpu, self._dtype)
        materialise(block, prefix, list(block.state_dict()), weights, cpu, check_finite=False)
        for _, linear in packed_linears(block):
            linear.place(cpu)
        return memory_footprint_of(block)

    def take_out(self, prefix: str, block: nn.Module, room: int) -> StreamedBlock:
        """Let go of a block's weights, but for what cannot be read from the files; how the rest is read.

        Raises:
            UsageError: what lies otherwise in the files is more than there is room for.
        """
        found = StreamedBlock()
        for name, linear in packed_linears(block):
            parts = self._parts(f"{prefix}.{name}.weight")
            pieces: dict[int, Piece] = {}
            kept: list[Tensor] = []  # or another tensor would have the identity of one that is gone

            def empty(tensor: Tensor, parts: Any = parts, pieces: Any = pieces, kept: Any = kept) -> Tensor:
                extent = next((extent for extent, part in parts if _is_padded(tensor, part)), None)
                if extent is None:
                    found.kept += tensor.nbytes
                    return tensor
                kept.append(torch.empty_like(tensor, device="meta"))
                pieces[id(kept[-1])] = found.add(extent, tensor, tensor.nbytes - extent.size)
                return kept[-1]

            assert linear.prepared is not None
            found.packed.append((linear, map_tensors(linear.prepared.weight, empty), pieces))
            linear._source = None
            if not pieces and found.kept > room:
                raise self._other(f"{prefix}.{name}.weight")
        for name, module in block.named_modules():
            for leaf, parameter in module._parameters.items():
                if parameter is None:
                    continue
                full = ".".join(part for part in (prefix, name, leaf) if part)
                if self._as_in_file(full, parameter):
                    extent = self._extents[self._weights.stored_name(full)]
                    found.parameters.append((module, leaf, found.add(extent, parameter)))
                    continue
                _own(module, leaf)
                found.kept += parameter.nbytes
                if parameter.ndim > 1 and found.kept > room:
                    raise self._other(full)
        found.pieces.sort(key=lambda piece: (piece.extent.file, piece.extent.start))
        found.unbind()
        return found

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


def _own(owner: nn.Module, leaf: str) -> None:
    """Let a tensor have memory of its own, that is no view of a file, which others may change."""
    tensor = getattr(owner, leaf)
    if not tensor.is_meta:
        place(owner, leaf, tensor.detach().clone())


def memory_footprint_of(block: nn.Module) -> int:
    """Bytes of all weights of a block."""
    dense = sum(tensor.nbytes for tensor in block.state_dict().values())
    return dense + sum(linear.nbytes for _, linear in packed_linears(block))


def _is_padded(tensor: Tensor, part: Tensor) -> bool:
    """Whether a tensor is one of a file, byte for byte, but for zeros after the end."""
    if not part.nbytes <= tensor.nbytes <= part.nbytes + PADDING or not tensor.is_contiguous() or not part.nbytes:
        return False
    mine, other = (each.contiguous().view(-1).view(torch.uint8) for each in (tensor, part))
    return torch.equal(mine[: len(other)], other) and not bool(mine[len(other) :].any())


def _check_there(source: Source, model: nn.Module, names: Iterable[str]) -> None:
    """Raise CheckpointError where a parameter has no weights."""
    for name in names:
        owner, _, leaf = name.rpartition(".")
        if getattr(model.get_submodule(owner), leaf).is_meta:
            raise CheckpointError(f"{source.name} lacks the tensor {name}")


def _attach(model: Any, streamed: list[tuple[nn.Module, StreamedBlock]], tokens: int) -> None:
    """Have blocks read when they run."""
    streamer = Streamer([each for _, each in streamed])
    for number, (block, _) in enumerate(streamed):
        block.register_forward_pre_hook(partial(_before, streamer, number, tokens), with_kwargs=True)
        block.register_forward_hook(partial(_after, streamer, number), always_call=True)
    model.streamer = streamer

    def refuse(*_: Any, **__: Any) -> Any:
        raise UsageError(
            "a model with `max_memory` reads its weights when it runs, and cannot be saved: copy its folder"
        )

    model.save_pretrained = refuse


def _before(streamer: Streamer, number: int, tokens: int, _: nn.Module, args: Any, kwargs: Any) -> None:
    cache = kwargs.get("past_key_values")
    if number == 0 and cache is not None and cache.get_seq_length() > tokens:
        raise UsageError(
            f"`max_memory` left room for the keys and values of {tokens} tokens, and there are {cache.get_seq_length()}: "
            "give more, or ask for fewer tokens"
        )
    streamer.before(number)


def _after(streamer: Streamer, number: int, *_: Any) -> None:
    streamer.after(number)
