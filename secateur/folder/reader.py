"""Reading the files of a checkpoint folder: JSON, and tensors by the names that they have on disk.

Nothing here trusts the files: safetensors checks every offset against the file, and names in an index must stay in the folder
(and its links, see `entries`).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from weakref import finalize

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

from secateur.errors import CheckpointError
from secateur.folder.entries import is_plain_name
from secateur.folder.extents import Extent, find_extents

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MAPPED_BYTES = 64 * 2**20
# What is said about tensors, in headers and JSON, takes up to 25 times its size in memory. So much of it there may be beside so
# many bytes of weights; real checkpoints have a thousandth.
_SPARE_TEXT = 2**20
_WEIGHTS_PER_TEXT = 16
# Places in a file at which is looked whether it is in memory: 2 µs each.
_SAMPLES = 32
# torch can do next to nothing with them.
_UNREADABLE = {torch.complex64, torch.float4_e2m1fn_x2}
# Those that parts of packed weights have, as far as they are worth leaving where they are.
_LASTING = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "U8": torch.uint8, "I64": torch.int64}
_STORED_FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


def read_limited(path: Path) -> bytes:
    """The bytes of a JSON file of a checkpoint folder. Raises CheckpointError when it cannot be read, or is far too large."""
    try:
        weights = sum(file.stat().st_size for file in path.parent.glob("*.safetensors"))
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > _SPARE_TEXT + weights // _WEIGHTS_PER_TEXT:
                raise CheckpointError(f"{path} has {size} bytes, far too many beside weight files of {weights}")
            return file.read()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error


def parse_json(content: bytes, path: Path) -> dict[str, Any]:
    """The object in such bytes. Raises CheckpointError when they hold something else."""
    try:
        found = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} does not hold a JSON object")
    return found


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError when it cannot be read, is too large, or holds something else."""
    return parse_json(read_limited(path), path)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder.

    Raises:
        CheckpointError: there are none, or the index is damaged or names a file that is missing or outside the folder.
    """
    index_path = folder / INDEX_NAME
    if not index_path.exists():
        if (folder / SINGLE_NAME).exists():
            return [folder / SINGLE_NAME]
        found = sorted(folder.glob("*.safetensors"))
        if found:
            return found
        others = [p.name for p in folder.iterdir() if p.suffix in {".bin", ".pt", ".pth"}]
        hint = f"; it has {others[0]}, a pickle, which secateur never opens: convert it first" if others else ""
        raise CheckpointError(f"{folder} holds no weights: no {SINGLE_NAME} and no {INDEX_NAME}{hint}")
    names = read_json(index_path).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(n, str) for n in names.values()):
        raise CheckpointError(f"{index_path} has no usable 'weight_map'")
    files = []
    for name in sorted(set(names.values())):
        if not is_plain_name(name) or not name.endswith(".safetensors"):
            raise CheckpointError(f"{index_path} names {name!r}, which is not a safetensors file in this folder")
        if not (folder / name).exists():
            raise CheckpointError(f"{folder / name} is missing: {INDEX_NAME} names it")
        files.append(folder / name)
    return files


class Tensors(Mapping[str, Tensor]):
    """Tensors by their names, wherever they come from."""

    def headers(self) -> Iterator[tuple[str, torch.dtype | None, tuple[int, ...]]]:
        """Names, dtypes (None for one that weights do not have) and shapes."""
        for name, tensor in self.items():
            yield name, tensor.dtype if tensor.dtype in _STORED_FLOATS.values() else None, tuple(tensor.shape)

    def release(self) -> None:
        """Let the memory go that has been read, as far as it is not of tensors that are held."""

    def lasting(self, name: str, room: int) -> Tensor:
        """A tensor for as long as it is wanted. Its memory may go on for `room` bytes after it, whatever they are."""
        return self[name]

    def held(self, names: Iterable[str]) -> Mapping[str, Tensor]:
        """Some of them, for longer than the others are there."""
        return {name: self[name] for name in names}

    @property
    def at_hand(self) -> bool:
        """Whether nothing has to wait for a disk."""
        return True


class LoadedTensors(dict[str, Tensor], Tensors):
    """Tensors in memory."""


class StoredTensors(Tensors):
    """The tensors of a folder's safetensors files under the names they have there, read at each access.

    A tensor is a view of the mapped file. What has been read of a mapping stays in memory until it is dropped, so a file is
    mapped anew whenever some tens of megabytes have been read from it: not for every tensor, because that costs the
    reading of its header.
    """

    def __init__(self, files: list[Path]) -> None:
        self._file: dict[str, Path] = {}
        self._mapped: tuple[Path, Any] | None = None
        self._left = 0
        # Files whose tensors are kept: what reads them, all of their bytes, and where tensors lie.
        self._lasting: dict[Path, tuple[Any, Any, dict[str, Extent]]] = {}
        for file in files:
            _check_header(file)
            for name in self.open_file(file).keys():  # noqa: SIM118 - a handle is not a mapping
                if name in self._file:
                    raise CheckpointError(f"tensor {name!r} is both in {self._file[name]} and in {file}")
                self._file[name] = file

    @staticmethod
    def open_file(file: Path) -> Any:
        """A safetensors file, mapped. Raises CheckpointError when it is none."""
        try:
            return safe_open(str(file), framework="pt")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} is truncated or not a safetensors file: {error}") from error

    def __getitem__(self, name: str) -> Tensor:
        file = self._file[name]
        mapped = self._mapped
        if mapped is None or mapped[0] != file or self._left <= 0:
            mapped = self._mapped = (file, self.open_file(file))
            self._left = MAPPED_BYTES
        tensor = _tensor_of(mapped[1], file, name)
        self._left -= tensor.nbytes
        return tensor

    def lasting(self, name: str, room: int) -> Tensor:
        """A tensor that stays where its file is mapped, once for all such tensors.

        Where the file ends before the room does, or the tensor is at an odd place, there is nothing after it.
        """
        file = self._file[name]
        if file not in self._lasting:
            extents, size = find_extents(file), file.stat().st_size
            try:
                self._lasting[file] = (
                    self.open_file(file),
                    torch.UntypedStorage.from_file(str(file), False, size),
                    extents,
                )
            except RuntimeError as error:
                raise CheckpointError(f"{file} cannot be mapped: {str(error).splitlines()[0]}") from error
        opened, whole, extents = self._lasting[file]
        place = extents.get(name)
        dtype = None if place is None else _LASTING.get(place.dtype)
        if place is None or dtype is None or place.start + place.size + room > whole.nbytes():
            return _tensor_of(opened, file, name)
        count = math.prod(place.shape)
        if count * dtype.itemsize != place.size or (whole.data_ptr() + place.start) % dtype.itemsize:
            return _tensor_of(opened, file, name)
        memory = torch.empty(0, dtype=dtype, device="cpu")
        memory.set_(whole[place.start : place.start + place.size + room])
        return memory[:count].view(place.shape)

    @property
    def at_hand(self) -> bool:
        """Whether the operating system has the files in memory, as far as samples tell; False where it does not say."""
        return all(map(_in_memory, self.files))

    @property
    def files(self) -> list[Path]:
        """All of them."""
        return sorted(set(self._file.values()))

    def file_of(self, name: str) -> Path:
        """The file that a tensor lies in."""
        return self._file[name]

    def headers(self) -> Iterator[tuple[str, torch.dtype | None, tuple[int, ...]]]:
        for file in self.files:
            opened = self.open_file(file)
            for name in opened.keys():  # noqa: SIM118 - a handle is not a mapping
                found = opened.get_slice(name)
                yield name, _STORED_FLOATS.get(found.get_dtype()), tuple(found.get_shape())

    def release(self) -> None:
        self._mapped = None  # files are mapped anew from here on
        self._lasting = {}

    def held(self, names: Iterable[str]) -> Mapping[str, Tensor]:
        return HeldTensors(self, names)

    def __contains__(self, name: object) -> bool:
        # Not Mapping's own, which would read the tensor to find out.
        return name in self._file

    def __iter__(self) -> Iterator[str]:
        return iter(self._file)

    def __len__(self) -> int:
        return len(self._file)


class HeldTensors(Mapping[str, Tensor]):
    """Tensors of files that are kept open: they can be read where the folder was moved, deleted or replaced in the meantime.

    Pickled, they are read.
    """

    def __init__(self, stored: Any, names: Iterable[str]) -> None:
        self._file = {name: stored.file_of(name) for name in names}
        self._open = {file: _OpenFile(file) for file in set(self._file.values())}

    def __getitem__(self, name: str) -> Tensor:
        file = self._file[name]
        if not self._open[file].intact():
            self._open[file] = _OpenFile(file)
        return self._open[file].get(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._file)

    def __len__(self) -> int:
        return len(self._file)

    def __deepcopy__(self, memo: Any) -> HeldTensors:
        return self

    def __reduce__(self) -> Any:
        return _CopiedTensors(self).__reduce__()


class _CopiedTensors(dict[str, Tensor]):
    """What `HeldTensors` are once they were pickled."""

    def __reduce__(self) -> Any:
        # As bytes: tensors that are handed to another process have to live until it has started, and these need not.
        return _copied, (save(dict(self)),)


def _copied(content: bytes) -> _CopiedTensors:
    return _CopiedTensors(load(content))


class _OpenFile:
    """A file of tensors, and whether somebody wrote to it since it was opened."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file = path.open("rb")
            finalize(self, self._file.close)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
        self._written = self._last_written()
        self._mapped = StoredTensors.open_file(path)

    def _last_written(self) -> tuple[int, int]:
        found = os.fstat(self._file.fileno())
        return found.st_size, found.st_mtime_ns

    def intact(self) -> bool:
        return self._last_written() == self._written

    def get(self, name: str) -> Tensor:
        try:
            tensor: Tensor = self._mapped.get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(f"{self._path} was written to since it was loaded: {error}") from error
        return tensor


def _tensor_of(opened: Any, file: Path, name: str) -> Tensor:
    """A tensor of an open file. Raises CheckpointError where it cannot be read, or is none of a language model."""
    try:
        tensor: Tensor = opened.get_tensor(name)
    except (SafetensorError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"tensor {name!r} in {file} cannot be read: {error}") from error
    if tensor.dtype in _UNREADABLE:
        raise CheckpointError(f"tensor {name!r} in {file} is {tensor.dtype}, which no weight of a language model is")
    return tensor


def _in_memory(file: Path) -> bool:
    """Whether bytes all over a file can be read without waiting."""
    try:
        with file.open("rb") as opened:
            size = os.fstat(opened.fileno()).st_size
            for i in range(_SAMPLES):
                os.preadv(opened.fileno(), [bytearray(1)], size * i // _SAMPLES, os.RWF_NOWAIT)
    except (OSError, AttributeError):  # it would have to wait; or it cannot be told here
        return False
    return True


def _check_header(file: Path) -> None:
    """Raise CheckpointError when the header of a safetensors file is so long that it is not about weights."""
    try:
        with file.open("rb") as opened:
            header, size = int.from_bytes(opened.read(8), "little"), os.fstat(opened.fileno()).st_size
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}") from error
    if _SPARE_TEXT + size // _WEIGHTS_PER_TEXT < header < size:  # one beyond the file safetensors refuses
        raise CheckpointError(f"{file} has a header of {header} bytes, far too many for a file of {size}")
