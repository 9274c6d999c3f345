"""What the header of a GGUF file says of its tensors: only that, which takes a hundredth of the time of reading all of it.

A header is: the magic, a version, the number of tensors and of entries; the entries, each a key, a type and a value; and for
each tensor its name, its dimensions, its type and where it lies. All numbers are little-endian.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import torch

from secateur.errors import CheckpointError

_FLOATS = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9
_MOST_DIMENSIONS = 4


def matrix_dtype(file: Path) -> torch.dtype | None:
    """The dtype of most weights in the matrices of a file's blocks, or None where most are quantized.

    Raises:
        CheckpointError: it is not a GGUF file, or is truncated.
    """
    counts: dict[torch.dtype | None, int] = {}
    try:
        with file.open("rb") as stream:
            for name, dims, kind in _tensors(stream, file.stat().st_size):
                if len(dims) == 2 and name.startswith(b"blk."):
                    dtype = _FLOATS.get(kind)
                    counts[dtype] = counts.get(dtype, 0) + math.prod(dims)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    return max(counts, key=lambda dtype: counts[dtype]) if counts else None


def _tensors(stream: BinaryIO, size: int) -> Iterator[tuple[bytes, tuple[int, ...], int]]:
    if stream.read(4) != b"GGUF":
        raise ValueError("it is not a GGUF file")
    version, tensors, entries = _numbers(stream, "IQQ")
    if version not in (2, 3):
        raise ValueError(f"its version is {version}, and 2 and 3 are known")
    for _ in range(entries):
        _skip(stream, _length(stream), size)
        _skip_value(stream, _numbers(stream, "I")[0], size)
    for _ in range(tensors):
        length = _length(stream)
        if length > size:
            raise ValueError("it is truncated")
        name = stream.read(length)
        (count,) = _numbers(stream, "I")
        if count > _MOST_DIMENSIONS:
            raise ValueError(f"a tensor has {count} dimensions")
        *dims, kind, _ = _numbers(stream, f"{count}QIQ")
        yield name, tuple(dims), kind


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
