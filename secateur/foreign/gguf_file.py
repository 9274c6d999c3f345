"""A GGUF file: its tensors as they lie in it, and the same file with other tensors, both through the package gguf.

R: rows of a tensor, all of its matrices' one after the other, B: bytes of a row, I: weights of a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from secateur.errors import CheckpointError, UsageError
from secateur.folder.gguf_header import Place, tensor_places
from secateur.foreign.gguf_blocks import read_blocks
from secateur.formats.layouts.block_types import BLOCK_TYPES

#: What a converter writes in the place of tensors: rows of bytes, and the name of their type; None: nothing.
Change = Callable[[str], tuple[Tensor, str] | None]
_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# What the package tells shapes by; of all other types by bytes.
_NUMPY = {"F32": np.float32, "F16": np.float16}
# What llama.cpp calls files most of whose matrices are of a type.
_FILE_TYPES = {
    "F32": 0, "F16": 1, "BF16": 32, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K": 12, "Q4_K": 15,
    "Q5_K": 17, "Q6_K": 18, "IQ4_NL": 25, "IQ4_XS": 30,
}  # fmt: skip


def check_package(why: str) -> None:
    """Raise UsageError where the package gguf is not installed."""
    if find_spec("gguf") is None:
        raise UsageError(f"{why} needs the package gguf: pip install gguf")


class GGUFFile:
    """The tensors of a file, read at each access.

    Raises:
        UsageError: the package gguf is missing.
        CheckpointError: it is not a GGUF file, is truncated, or has a tensor of a type that nobody knows.
    """

    def __init__(self, file: Path) -> None:
        check_package(f"reading {file.name}")
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        self.file = file
        self._places: dict[str, tuple[Place, str, int]] = {}
        size = file.stat().st_size
        for place in tensor_places(file):
            try:
                kind = GGMLQuantizationType(place.kind)
            except ValueError as error:
                raise CheckpointError(f"{file}: {place.name} is of type {place.kind}, which is not known") from error
            weights, nbytes = GGML_QUANT_SIZES[kind]
            if not place.shape or 0 in place.shape or place.shape[-1] % weights:
                raise CheckpointError(
                    f"{file}: {place.name} is {list(place.shape)}, which no tensor of type {kind.name} is"
                )
            row = place.shape[-1] // weights * nbytes
            if place.start + math.prod(place.shape[:-1]) * row > size:
                raise CheckpointError(f"{file} cannot be read: it is truncated: {place.name} ends beyond it")
            self._places[place.name] = place, kind.name, row

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def type(self, name: str) -> str:
        """Of a tensor."""
        return self._places[name][1]

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor, rows before what is in them."""
        return self._places[name][0].shape

    def rows(self, name: str) -> Tensor:
        """A tensor as it lies in the file, `[R, B]` uint8."""
        place, _, row = self._places[name]
        shape = (math.prod(place.shape[:-1]), row)
        return torch.from_numpy(np.fromfile(self.file, np.uint8, math.prod(shape), offset=place.start)).view(shape)

    def values(self, name: str) -> Tensor:
        """What a tensor stands for, `[R, I]` float32."""
        kind = self.type(name)
        if kind in BLOCK_TYPES:
            return read_blocks(kind, self.rows(name)).values()
        if kind in _FLOATS:
            return self.rows(name).view(_FLOATS[kind]).float()
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        try:
            return torch.from_numpy(dequantize(self.rows(name).numpy(), GGMLQuantizationType[kind]))
        except NotImplementedError as error:
            raise CheckpointError(
                f"{self.file}: {name} is of type {kind}, which the package gguf does not read"
            ) from error

    def copy(self, out: Path, change: Change) -> dict[str, int]:
        """Write the same file with other tensors.

        Args:
            out: the new file.
            change: gives what is to stand in the place of a tensor. It is asked once for each, in their order.

        Returns:
            How many matrices there are of each type.
        """
        import gguf

        fields = gguf.GGUFReader(self.file).fields
        writer = gguf.GGUFWriter(out, fields["general.architecture"].contents(), use_temp_file=True)
        if "general.alignment" in fields:
            writer.data_alignment = int(fields["general.alignment"].contents())
        counts: dict[str, int] = {}
        weights: dict[str, int] = {}
        try:
            for name in self:
                shape = self.shape(name)
                rows_RB, kind = change(name) or (self.rows(name), self.type(name))
                if len(shape) > 1:
                    counts[kind] = counts.get(kind, 0) + 1
                    weights[kind] = weights.get(kind, 0) + math.prod(shape) * name.startswith("blk.")
                data = rows_RB.numpy().reshape(*shape[:-1], -1)
                writer.add_tensor(
                    name, data.view(_NUMPY.get(kind, np.uint8)), raw_dtype=gguf.GGMLQuantizationType[kind]
                )
            most = max(weights, key=weights.__getitem__) if weights else "F16"
            _copy_fields(fields, writer, _FILE_TYPES.get(most))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
        return counts


def _copy_fields(fields: Any, writer: Any, file_type: int | None) -> None:
    """All that the file says but for its tensors; which type most of them have is told anew."""
    import gguf

    own = {"general.file_type": file_type, "general.quantization_version": gguf.GGML_QUANT_VERSION}
    for name, field in fields.items():
        if name == "general.architecture" or name.startswith("GGUF.") or own.get(name) is not None:
            continue
        inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], sub_type=inner)
    for name, value in own.items():
        if value is not None:
            writer.add_key_value(name, value, gguf.GGUFValueType.UINT32)
