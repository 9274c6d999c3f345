"""The format of GPTQ checkpoints, as AutoGPTQ and GPTQModel write it: read, and written.

`qweight int32 [W, O]` has the codes of each output feature, `qzeros int32 [G, V]` the zero points of each group, both as
streams of bits in words, the first in the least significant; `scales float16 [G, O]`; `g_idx int32 [I]`, the group of each
input feature, without which they are in order. w = (code − zero) · scale in float16, rounded once.

The zero points of version 1 (`checkpoint_format: gptq`) are less by one. In words of 2, 4 and 8 bits one is added to all of a
word at once, with the carry from one to the next that was borrowed when they were written; 3 bits are added one by one.

O: output features, I: input features, G: groups, W, V: words.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from secateur.core.quantized import Quantized
from secateur.errors import CheckpointError
from secateur.foreign.format import Foreign, foreign
from secateur.foreign.ours import as_ours
from secateur.foreign.pack_quantized import uniform_codes
from secateur.formats.layouts.coded import HALF_DTYPES, check_finite
from secateur.formats.layouts.layout import Decoder, Layout, check_parts, dtype_name, only_finite
from secateur.formats.layouts.packed_int import Uniform
from secateur.formats.layouts.packed_weight import PackedWeight
from secateur.kernels.bits import pack_bits, unpack_bits

QUANT_METHOD = "gptq"
#: What `checkpoint_format` calls the two versions.
VERSIONS = {1: "gptq", 2: "gptq_v2"}
BITS = (2, 3, 4, 8)
_WORD = 32
_READ = "secateur reads GPTQ of 2, 3, 4 or 8 bits, checkpoint_format gptq and gptq_v2"


@dataclass(frozen=True)
class _Parts:
    """What is stored of a weight.

    Attributes:
        zero_GO: uint8.
        group_I: of each input feature.
    """

    bits: int
    code_OI: Tensor
    scale_GO: Tensor
    zero_GO: Tensor
    group_I: Tensor

    def dense(self) -> Tensor:
        group_I = self.group_I
        W_IO = self.code_OI.T.float() - self.zero_GO.float()[group_I]
        return (W_IO * self.scale_GO.float()[group_I]).T.to(self.scale_GO.dtype).contiguous()


@dataclass(frozen=True)
class GPTQWeight(Decoder):
    """Decodes weights of one checkpoint.

    Attributes:
        bits: of a code; None: as the tensors tell, of those that may differ.
        group_size: weights of a group; None: of a row, -1 in the config.
        version: of its zero points.
        symmetric: whether all zero points are said to be in the middle.
    """

    bits: int | None
    group_size: int | None
    version: int
    symmetric: bool

    name: ClassVar[str] = QUANT_METHOD
    rounded: ClassVar[bool] = True
    parts: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales", "g_idx")

    def unpack(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return only_finite(self._read(tensors).dense())

    def read(self, tensors: Mapping[str, Tensor]) -> Quantized:
        """Raises ValueError, also where groups are not all of one size, which no codes of ours are."""
        found = self._read(tensors)
        G, O = found.scale_GO.shape
        I = len(found.group_I)
        size = max(2, -(-I // G) if self.group_size is None else min(self.group_size, I))
        order_I = found.group_I.argsort(stable=True)
        if not torch.equal(found.group_I[order_I], torch.arange(I) // size):
            raise ValueError(f"its g_idx does not give every group {size} input features")
        ordered = not torch.equal(order_I, torch.arange(I))
        code_OI = found.code_OI[:, order_I] if ordered else found.code_OI
        middle = bool((found.zero_GO == 2 ** (found.bits - 1)).all())
        zero_OG = None if middle else found.zero_GO.T.contiguous()
        codes = Uniform(found.bits, size, code_OI, found.scale_GO.T.contiguous(), zero_OG)
        return Quantized(codes, (O, I), found.scale_GO.dtype, order_I=order_I if ordered else None)

    def ours(self, tensors: Mapping[str, Tensor]) -> tuple[Layout, dict[str, Tensor]] | None:
        try:
            weight = self.read(tensors)
        except ValueError:
            self._read(tensors)  # raises what is wrong with it, if that is not just the groups
            return None
        return as_ours(weight, uniform_codes(weight))

    def _read(self, tensors: Mapping[str, Tensor]) -> _Parts:
        check_parts(
            tensors,
            {
                "qweight": lambda t: t.ndim == 2 and t.dtype == torch.int32 and t.numel() > 0,
                "qzeros": lambda t: t.ndim == 2 and t.dtype == torch.int32,
                "scales": lambda t: t.ndim == 2 and t.dtype in (*HALF_DTYPES, torch.float32) and t.numel() > 0,
            },
        )
        word_WO, scale_GO = tensors["qweight"], tensors["scales"]
        W, O = word_WO.shape
        G = len(scale_GO)
        if "g_idx" in tensors:
            check_parts(
                tensors, {"g_idx": lambda t: t.ndim == 1 and t.dtype in (torch.int32, torch.int64) and t.numel() > 0}
            )
        I = len(tensors["g_idx"]) if "g_idx" in tensors else W * _WORD // (self.bits or 4)
        fitting = [b for b in BITS if _words(I, b) == W and self.bits in (None, b)]
        if len(fitting) != 1:
            said = " or ".join(map(str, fitting or BITS)) if self.bits is None else self.bits
            raise ValueError(f"its qweight has {W} words for {I} weights of a row, and config.json says {said} bits")
        bits = fitting[0]
        if scale_GO.shape[1] != O or tensors["qzeros"].shape != (G, _words(O, bits)):
            raise ValueError(
                f"its qweight has {O} columns, but its scales are {list(scale_GO.shape)} and its qzeros "
                f"{list(tensors['qzeros'].shape)}"
            )
        if self.bits is not None and (1 if self.group_size is None else -(-I // self.group_size)) != G:
            size = "one group" if self.group_size is None else f"groups of {self.group_size}"
            raise ValueError(f"its scales have {G} rows for {I} weights of a row, but config.json says {size}")
        check_finite(tensors, "scales")
        code_OI = unpack_bits(word_WO.T.clone(memory_format=torch.contiguous_format).view(torch.uint8), bits, I)
        zero_GO = self._zeros(tensors["qzeros"], bits, O)
        return _Parts(bits, code_OI, scale_GO, zero_GO, _groups(tensors.get("g_idx"), I, G))

    def _zeros(self, word_GV: Tensor, bits: int, O: int) -> Tensor:
        """Zero points `[G, O]`. Raises ValueError where they are those of the other version."""
        stored_GO = unpack_bits(word_GV.clone(memory_format=torch.contiguous_format).view(torch.uint8), bits, O)
        middle = 2 ** (bits - 1)
        if self.symmetric and bool((stored_GO == (middle if self.version == 1 else middle - 1)).all()):
            raise ValueError(
                f"its qzeros are all {int(stored_GO[0, 0])}, which is what symmetric weights have with checkpoint_format "
                f"{VERSIONS[3 - self.version]}, but config.json says {VERSIONS[self.version]}"
            )
        if self.version == 2:
            return stored_GO
        if _WORD % bits:
            return (stored_GO + 1) & 2**bits - 1
        ones = sum(1 << shift for shift in range(0, _WORD, bits))
        word_GV = (word_GV.long() + ones & 2**_WORD - 1).to(torch.uint32).view(torch.int32)
        return unpack_bits(word_GV.clone(memory_format=torch.contiguous_format).view(torch.uint8), bits, O)


def _groups(group_I: Tensor | None, I: int, G: int) -> Tensor:
    """The group of each input feature. Raises ValueError where there is none of that number."""
    if group_I is None:
        return torch.arange(I) // -(-I // G)
    if ((group_I < 0) | (group_I >= G)).any():
        raise ValueError(f"its g_idx has groups that are not from 0 to {G - 1}")
    return group_I.long()


def _words(count: int, bits: int) -> int:
    return -(-count * bits // _WORD)


def pack(weight: Quantized, version: int) -> dict[str, Tensor]:
    """The tensors of a weight, by the names that they have behind the name of its module.

    Codes, scales and zero points are the same numbers; the products are rounded to the dtype that they are computed in.

    Raises:
        ValueError: the format cannot hold it.
    """
    try:
        codes = uniform_codes(weight)
    except ValueError as error:
        raise ValueError("its codes are not on a uniform grid, and GPTQ's format stores no others") from error
    O, I = weight.shape
    bits, size = codes.bits, min(codes.group_size, I)
    for what, wrong in (
        (f"codes of {bits} bits", bits not in BITS),
        ("a mask of kept weights", weight.keep_OI is not None),
        ("outliers", weight.outliers is not None),
        (f"{I} input features, which do not divide into groups of {size}", I % size > 0),
        (
            f"{O} × {I} weights, neither of which may leave a word of 32 bits half full",
            O * bits % _WORD or I * bits % _WORD,
        ),
    ):
        if wrong:
            raise ValueError(f"it has {what}, which GPTQ's format does not store")
    scale_GO = codes.scale_OG.T.to(torch.float16).contiguous()
    if not torch.equal(scale_GO.T.float(), codes.scale_OG.float()):
        raise ValueError(
            f"its scales are {dtype_name(codes.scale_OG.dtype)} numbers that float16, the dtype of GPTQ's scales, does not have"
        )
    zero_OG = torch.full_like(codes.scale_OG, 2 ** (bits - 1)).byte() if codes.zero_OG is None else codes.zero_OG
    code_OI, group_I = codes.code_OK, torch.arange(I) // size
    if weight.order_I is not None:
        at_I = weight.order_I.argsort()
        code_OI, group_I = code_OI[:, at_I], group_I[at_I]
    word_GV = _pack_words(zero_OG.T.contiguous(), bits)
    if version == 1:
        if (zero_OG == 0).any():
            raise ValueError("it has zero points of 0, which version 1 has no place for: write version 2, `to='gptq'`")
        word_GV = _pack_words((zero_OG - 1).T.contiguous(), bits)
    return {
        "qweight": _pack_words(code_OI, bits).T.contiguous(),
        "qzeros": word_GV,
        "scales": scale_GO,
        "g_idx": group_I.to(torch.int32),
    }


def _pack_words(code_RK: Tensor, bits: int) -> Tensor:
    # `contiguous` would leave a single row with strides that `view` does not take.
    return pack_bits(code_RK, bits).clone(memory_format=torch.contiguous_format).view(torch.int32)


@dataclass(frozen=True)
class Scheme:
    """How a weight is quantized, as far as a config tells weights apart; `group_size` -1: one group a row."""

    bits: int
    group_size: int
    sym: bool
    desc_act: bool

    @classmethod
    def of(cls, weight: Quantized) -> Scheme:
        codes = uniform_codes(weight)
        size = codes.group_size if codes.group_size < weight.shape[1] else -1
        return cls(codes.bits, size, codes.zero_OG is None, weight.order_I is not None)


def quantization_config(schemes: Mapping[str, Scheme], dense: Collection[str], version: int) -> dict[str, Any]:
    """What `config.json` says about a model with such weights.

    Args:
        schemes: of each packed linear, by module name.
        dense: the other linears in the blocks.
        version: of the zero points.
    """
    found = list(schemes.values())
    most = max(dict.fromkeys(found), key=found.count)
    # What GPTQModel and vLLM know modules by that differ from the others, or are none of them.
    others = {f"+:^{re.escape(name)}$": vars(scheme) for name, scheme in schemes.items() if scheme != most}
    others |= {f"-:^{re.escape(name)}$": {} for name in dense}
    return {
        "quant_method": QUANT_METHOD,
        **vars(most),
        "checkpoint_format": VERSIONS[version],
        "pack_dtype": "int32",
        "lm_head": False,
        **({"dynamic": others} if others else {}),
    }


@foreign
class GPTQ(Foreign):
    """Its tensors are called such as `….up_proj.qweight`; those alone tell which modules are quantized."""

    quant_method: ClassVar[str] = QUANT_METHOD
    reads: ClassVar[str] = "GPTQ"
    card: ClassVar[str] = """
FOLDER is this folder, or its name on the hub. The weights are in GPTQ's format: vLLM and SGLang open it, and transformers where
the package `gptqmodel` is installed.
"""

    @classmethod
    def packed_weights(cls, stored: Mapping[str, Tensor], section: Mapping[str, Any]) -> dict[str, PackedWeight]:
        layout = _read_section(section)
        return {
            f"{module}.weight": PackedWeight(layout, parts) for module, parts in owners(stored, layout.parts).items()
        }


def owners(stored: Iterable[str], parts: Collection[str]) -> dict[str, dict[str, str]]:
    """The modules that have a `qweight` among stored names, and of each the names of its parts.

    Raises CheckpointError where there are none.
    """
    there = dict.fromkeys(stored)
    modules = [name.removesuffix(".qweight") for name in there if name.endswith(".qweight")]
    if not modules:
        raise CheckpointError(
            "config.json says that weights are packed, but the files hold no qweight: take its section out"
        )
    return {m: {part: f"{m}.{part}" for part in parts if f"{m}.{part}" in there} for m in modules}


def _read_section(section: Mapping[str, Any]) -> GPTQWeight:
    """What a section says of weights. Raises CheckpointError when it is not read here."""
    bits, size, symmetric = section.get("bits"), section.get("group_size", -1), section.get("sym", True)
    said = {key: section[key] for key in ("checkpoint_format", "format") if section.get(key) is not None}
    versions = {name: version for version, name in VERSIONS.items()}
    form = next(iter(said.values()), VERSIONS[1])
    dynamic = section.get("dynamic") or {}
    for what, found, right in (
        ("bits", bits, type(bits) is int and bits in BITS),
        ("group_size", size, type(size) is int and (size == -1 or size > 1)),
        ("sym", symmetric, type(symmetric) is bool),
        ("checkpoint_format", form, isinstance(form, str) and form in versions),
        ("is_marlin_format", section.get("is_marlin_format"), not section.get("is_marlin_format")),
        ("pack_dtype", section.get("pack_dtype"), section.get("pack_dtype") in (None, "int32")),
        ("dynamic", dynamic, isinstance(dynamic, Mapping)),
    ):
        if not right:
            raise CheckpointError(f"the checkpoint's quantization_config has {what} {found!r}: {_READ}")
    if len(set(said.values())) > 1:
        both = " and ".join(f"{key} {value!r}" for key, value in said.items())
        raise CheckpointError(
            f"the checkpoint's quantization_config has {both}, two conventions of zero points: {_READ}"
        )
    assert isinstance(bits, int)
    if any(dynamic.values()):  # which has others for some modules
        return GPTQWeight(None, None, versions[form], symmetric=False)
    return GPTQWeight(bits, None if size == -1 else size, versions[form], symmetric)
