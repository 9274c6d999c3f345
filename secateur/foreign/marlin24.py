"""The format `marlin-24` of compressed-tensors up to 0.13, as the kernel of that name reads it: read only.

Of every four weights of a row two have a code, on a symmetric grid of 4 or 8 bits per output channel or group of 128 weights.

- `weight_packed int32 [K/16, 16·O·bits/32]`: codes, in tiles of 16 kept weights × 16 rows, four tiles of which are shuffled
  together as a warp of the kernel takes them.
- `meta int16`, O · I/16 words, of four groups of four weights each: two bits for the place of the first, two for the second.
  Words are in the order of CUTLASS's interleaved columns.
- `scale_packed float16 [G, O]`, shuffled within 64 rows where there are groups.

No release of compressed-tensors could unpack it.

O: output features, I: input features, K: kept weights of a row, I/2, G: groups of a row, W: words of a row, I/16, Q: fours of a
row.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from secateur.core.quantized import Quantized
from secateur.foreign.ours import as_ours
from secateur.formats.layouts.coded import check_finite
from secateur.formats.layouts.layout import Decoder, Layout, Stored, all_finite, bytes_of, check_parts
from secateur.formats.layouts.packed_int import Uniform
from secateur.formats.layouts.packed_weight import PackedWeight
from secateur.kernels.bits import unpack_bits

FORMAT = "marlin-24"
_TILE = 16
_ROWS = 64  # that the kernel takes at a time
_GROUP = 128
# Which code of a word is which of the shuffled ones.
_IN_WORD = {4: (0, 2, 4, 6, 1, 3, 5, 7), 8: (0, 2, 1, 3)}
_SCALES = (0, 4, 1, 5, 2, 6, 3, 7)


@dataclass(frozen=True)
class Marlin24(Decoder):
    """Decodes one such weight, whose shape and bits its tensors tell."""

    name: ClassVar[str] = FORMAT
    rounded: ClassVar[bool] = True
    parts: ClassVar[tuple[str, ...]] = ("weight_packed", "scale_packed", "meta")

    def unpack(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return self.read(tensors).dequantize()

    def read(self, tensors: Mapping[str, Tensor]) -> Quantized:
        return self._read(tensors)[0]

    def ours(self, tensors: Mapping[str, Tensor]) -> tuple[Layout, dict[str, Tensor]] | None:
        return as_ours(*self._read(tensors))

    def describe(self, tensors: Mapping[str, Tensor]) -> Stored:
        weight = self.read(tensors)
        return Stored(self.name, weight.shape, weight.stored, 0, bytes_of(tensors), all_finite(weight.dequantize()))

    def _read(self, tensors: Mapping[str, Tensor]) -> tuple[Quantized, Uniform]:
        check_parts(
            tensors,
            {
                "weight_packed": lambda t: t.ndim == 2 and t.dtype == torch.int32 and t.numel() > 0,
                "scale_packed": lambda t: t.ndim == 2 and t.dtype in (torch.float16, torch.bfloat16) and t.numel() > 0,
                "meta": lambda t: t.dtype == torch.int16,
            },
        )
        word, scale_GO, meta = (tensors[part] for part in self.parts)
        G, O = scale_GO.shape
        K = _TILE * len(word)
        I = 2 * K
        bits = next((b for b in _IN_WORD if word.shape[1] * 32 == _TILE * O * b), None)
        if bits is None or O % _ROWS or G not in (1, I // _GROUP) or (G > 1 and I % _GROUP):
            raise ValueError(
                f"its weight_packed {list(word.shape)} and scale_packed {list(scale_GO.shape)} are of no weight of 4 or 8 bits "
                "per output channel or in groups of 128"
            )
        if meta.numel() * 16 != O * I:
            raise ValueError(f"its meta has {meta.numel()} words, but a weight of {[O, I]} has {O * I // 16}")
        check_finite(tensors, "scale_packed")
        first_OQ, second_OQ = _places(meta.flatten(), O, I // 16)
        keep_OI = torch.zeros(O, I // 4, 4, dtype=torch.bool)
        for place_OQ in (first_OQ, second_OQ):
            keep_OI.scatter_(2, place_OQ[..., None], True)
        scale_GO = _in_order(scale_GO.reshape(-1, _ROWS), _of_scales(), scale_GO) if G > 2 else scale_GO
        codes = Uniform(bits, K if G == 1 else _GROUP // 2, _codes(word, bits, O, K), scale_GO.T.contiguous(), None)
        return Quantized(codes, (O, I), scale_GO.dtype, keep_OI.view(O, I)), codes


def _in_order(found: Tensor, order: Tensor, like: Tensor) -> Tensor:
    """Columns that were taken in an order, put back; in the shape of another tensor."""
    return torch.empty_like(found).index_copy_(1, order, found).reshape(like.shape)


def _of_scales() -> Tensor:
    return (8 * torch.arange(8)[:, None] + torch.tensor(_SCALES)).flatten()


def _codes(word: Tensor, bits: int, O: int, K: int) -> Tensor:
    """The codes of the kept weights, `[O, K]`."""
    shuffled = unpack_bits(word.clone(memory_format=torch.contiguous_format).view(torch.uint8), bits, _TILE * O)
    tiles = _in_order(shuffled.reshape(-1, _TILE * _ROWS), _of_codes(bits), shuffled)
    return tiles.view(K // _TILE, O // _TILE, _TILE, _TILE).permute(1, 3, 0, 2).reshape(O, K).contiguous()


def _of_codes(bits: int) -> Tensor:
    """Which code of four tiles is where: one thread after the other of a warp, and what it hands to the tensor cores."""
    tile, right, lane, column, block, below, pair = torch.meshgrid(
        *map(torch.arange, (4, 2, 4, 4, 2, 2, 2)), indexing="ij"
    )
    place = 256 * tile + 16 * (2 * lane + 8 * below + pair) + 8 * right + 4 * block + column
    in_word = torch.tensor(_IN_WORD[bits])
    return place.reshape(-1, len(in_word))[:, in_word].flatten()


def _places(meta: Tensor, O: int, W: int) -> tuple[Tensor, Tensor]:
    """Where in every four weights the two kept ones are, `[O, Q]` each. Raises ValueError when one is not behind the other."""
    row, column = torch.arange(O)[:, None], torch.arange(W)[None]
    to = row // 64 * 64 + row % 64 // 8 * 4 + row % 2 * 2 + row % 8 // 4 + row % 4 // 2 * 32
    # Of each 2 × 2 words, the two off the diagonal change places.
    off = (to + column) % 2 * (1 - 2 * (to % 2))
    to, column = to + off, column - off
    word_OW = meta[column // 2 * (2 * O) + 2 * to + column % 2].int()
    nibble_OQ = ((word_OW[..., None] >> torch.arange(0, 16, 4)) & 15).view(O, -1).long()
    first_OQ, second_OQ = nibble_OQ & 3, nibble_OQ >> 2
    if (first_OQ >= second_OQ).any():
        raise ValueError("its meta does not name two places in order for every four weights")
    return first_OQ, second_OQ


def packed_weights(names: Iterable[str]) -> dict[str, PackedWeight]:
    """The packed weights of a checkpoint in this format, whose tensors have such names as `….up_proj.weight_packed`."""
    parts_of: dict[str, dict[str, str]] = {}
    for name in names:
        module, _, part = name.rpartition(".")
        if part in Marlin24.parts:
            parts_of.setdefault(module, {})[part] = name
    return {f"{module}.weight": PackedWeight(Marlin24(), parts) for module, parts in parts_of.items()}
