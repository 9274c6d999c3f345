"""What the header of a GGUF file says of its tensors: only that, which takes a hundredth of the time of reading all of it.

A header is: the magic, a version, the number of tensors and of entries; the entries, each a key, a type and a value; and for
each tensor its name, its dimensions, its type and where it lies. All numbers are little-endian.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from secateur.errors import CheckpointError

_FLOATS = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9
_UINT32 = 4
_MOST_DIMENSIONS = 4
_ALIGNMENT_KEY = b"general.alignment"


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in a file.

    Attributes:
        name: of the tensor.
        shape: rows before what is in them.
        kind: the number of its type.
        start: its first byte.
    """

    name: str
    shape: tuple[int, ...]
    kind: int
    start: int


def matrix_dtype(file: Path) -> torch.dtype | None:
    """The dtype of most weights in the matrices of a file's blocks, or None where most are quantized.

    Raises:
        CheckpointError: it is not a GGUF file, or is truncated.
    """
    counts: dict[torch.dtype | None, int] = {}
    for place in tensor_places(file):
        if len(place.shape) == 2 and place.name.startswith("blk."):
            dtype = _FLOATS.get(place.kind)
            counts[dtype] = counts.get(dtype, 0) + math.prod(place.shape)
    return max(counts, key=lambda dtype: counts[dtype]) if counts else None


def tensor_places(file: Path) -> list[Place]:
    """Where the tensors of a file begin; how long they are is told by their types.

    Raises:
        CheckpointError: it is not a GGUF file, or is truncated.
    """
    try:
        with file.open("rb") as stream:
            size = file.stat().st_size
            count, alignment = _read_entries(stream, size)
            found = list(_tensors(stream, size, count))
            begin = -(-stream.tell() // alignment) * alignment
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    places = [
        Place(name.decode("utf-8", "replace"), dims[::-1], kind, begin + offset) for name, dims, kind, offset in found
    ]
    if any(place.start > size for place in places):
        raise CheckpointError(f"{file} cannot be read: it is truncated")
    return places


def _read_entries(stream: BinaryIO, size: int) -> tuple[int, int]:
    """Go past all that stands before the tensors: how many there are, and to what multiples of bytes they are aligned."""
    if stream.read(4) != b"GGUF":
        raise ValueError("it is not a GGUF file")
    version, tensors, entries = _numbers(stream, "IQQ")
    if version not in (2, 3):
        raise ValueError(f"its version is {version}, and 2 and 3 are known")
    alignment = 32
    for _ in range(entries):
        length = _length(stream)
        if length > size:
            raise ValueError("it is truncated")
        key, (kind,) = stream.read(length), _numbers(stream, "I")
        if key == _ALIGNMENT_KEY and kind == _UINT32:
            (alignment,) = _numbers(stream, "I")
            if alignment < 1 or alignment & (alignment - 1):
                raise ValueError(f"its tensors are aligned to {alignment}, which is no power of two")
        else:
            _skip_value(stream, kind, size)
    return tensors, alignment


def _tensors(stream: BinaryIO, size: int, count: int) -> Iterator[tuple[bytes, tuple[int, ...], int, int]]:
    for _ in range(count):
        length = _length(stream)
        if length > size:
            raise ValueError("it is truncated")
        name = stream.read(length)
        (dimensions,) = _numbers(stream, "I")
        if dimensions > _MOST_DIMENSIONS:
            raise ValueError(f"a tensor has {dimensions} dimensions")
        *dims, kind, offset = _numbers(stream, f"{dimensions}QIQ")
        yield name, tuple(dims), kind, offset


def _skip_value(stream: BinaryIO, kind: int, size: int) -> None:
    if kind in _SIZES:
        _skip(stream, _SIZES[kind], size)
    elif kind == _STRING:
        _skip(stream, _length(stream), size)
    elif kind == _ARRAY:
        inner, count = _numbers(stream, "IQ")
        if inner in _SIZES:
            _skip(stream, _SIZES[inner] * count, size)
        elif inner == _STRING:
            for _ in range(count):
                _skip(stream, _length(stream), size)
        else:
            raise ValueError(f"an array in its header is of type {inner}")
    else:
        raise ValueError(f"a value in its header is of type {kind}")


def _length(stream: BinaryIO) -> int:
    return _numbers(stream, "Q")[0]


def _skip(stream: BinaryIO, count: int, size: int) -> None:
    if stream.tell() + count > size:
        raise ValueError("it is truncated")
    stream.seek(count, 1)


def _numbers(stream: BinaryIO, form: str) -> tuple[int, ...]:
    form = f"<{form}"
    content = stream.read(struct.calcsize(form))
    if len(content) < struct.calcsize(form):
        raise ValueError("it is truncated")
    return struct.unpack(form, content)
