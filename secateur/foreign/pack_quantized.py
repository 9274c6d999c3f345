"""The format `pack-quantized` of compressed-tensors, which transformers, vLLM and others load: written and read.

Integer codes of 2 to 8 bits, with a scale (and a zero point) for each group of a row or for the whole row. A weight that we
write is decoded by compressed-tensors to the bits of `Quantized.dequantize`: it computes (code − zero) · scale in the dtype of
the scale, where code − zero has at most 8 significant bits and so is exact, and the product is rounded once, as ours is.

O: output features, I: input features, G: groups of a row, B: bytes, W: words of 32 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from secateur.core.quantized import Quantized
from secateur.errors import CheckpointError
from secateur.foreign.ours import as_ours
from secateur.formats.layouts.coded import check_finite
from secateur.formats.layouts.layout import Decoder, Layout, check_parts, dtype_name, read_shape
from secateur.formats.layouts.packed_int import Uniform
from secateur.formats.layouts.packed_weight import PackedWeight
from secateur.kernels.bits import bytes_of, pack_bits, unpack_bits
from secateur.kernels.packed import FLOAT_DTYPES

FORMAT = "pack-quantized"
BITS = (2, 3, 4, 5, 6, 7, 8)
_WORD = 4
_READ = "secateur reads integer weights of 2 to 8 bits, in groups or per output channel, and nothing else quantized"
# What a section may say. `quantization_status` is not looked at: early releases wrote "frozen" beside packed weights.
_SECTION_KEYS = {
    "config_groups", "dequantize", "format", "global_compression_ratio", "ignore", "quant_method", "quantization_status",
    "version",
}  # fmt: skip


@dataclass(frozen=True)
class Scheme:
    """How a weight is quantized, as far as compressed-tensors tells weights apart.

    Attributes:
        bits: of a code.
        group_size: weights that share a scale; None when all weights of a row do.
        symmetric: all zero points are 2^(bits − 1) and not stored.
        ordered: which group an input feature belongs to is stored, as `actorder: group` did it; read, never written.
    """

    bits: int
    group_size: int | None
    symmetric: bool
    ordered: bool = False

    @classmethod
    def of(cls, weight: Quantized) -> Scheme:
        """The scheme of a weight of ours. Raises ValueError when this format cannot hold it."""
        codes, I = uniform_codes(weight), weight.shape[1]
        if codes.bits not in BITS:
            raise ValueError(f"its codes are of {codes.bits} bits: {FORMAT} stores uniform codes of 2 to 8 bits")
        check_codes_alone(weight, FORMAT)
        if codes.group_size < I and I % codes.group_size:
            raise ValueError(f"its {I} input features do not divide into groups of {codes.group_size}")
        return cls(codes.bits, codes.group_size if codes.group_size < I else None, codes.zero_OG is None)

    def groups(self, I: int) -> int | None:
        """How many groups a row of I weights has; None when it does not divide."""
        if self.group_size is None or self.group_size >= I:
            return 1
        return None if I % self.group_size else I // self.group_size

    def __str__(self) -> str:
        size = "per output channel" if self.group_size is None else f"in groups of {self.group_size}"
        order = ", in activation order" if self.ordered else ""
        return f"{self.bits} bits {size}, {'symmetric' if self.symmetric else 'with zero points'}{order}"


def check_codes_alone(weight: Quantized, where: str) -> None:
    """Raise ValueError where a weight is more than codes in their order, which is all that some formats store."""
    for what, there in (
        ("a mask of kept weights", weight.keep_OI is not None),
        ("columns in another order", weight.order_I is not None),
        ("outliers", weight.outliers is not None),
    ):
        if there:
            raise ValueError(f"it has {what}, which {where} does not store")


def uniform_codes(weight: Quantized) -> Uniform:
    """The codes of a weight. Raises ValueError when they are of another family."""
    if not isinstance(weight.codes, Uniform):
        raise ValueError(f"its codes are not on a uniform grid: {FORMAT} stores uniform codes of 2 to 8 bits")
    return weight.codes


def pack(weight: Quantized) -> dict[str, Tensor]:
    """The tensors of a weight, by the names that they have behind the name of its module.

    `weight_packed int32 [O, W]` holds the codes of each row and `weight_zero_point int32 [W, G]` the zero points of each
    group's rows, the first in the least significant bits of a word. `weight_scale [O, G]` has the weight's dtype, and
    `weight_shape int64 [2]` says O and I.

    Raises:
        ValueError: the format cannot hold it, or a scale is no number of the weight's dtype.
    """
    scheme = Scheme.of(weight)
    codes = uniform_codes(weight)
    scale_OG = codes.scale_OG.to(weight.dtype)
    if not torch.equal(scale_OG.float(), codes.scale_OG.float()):
        raise ValueError(
            f"its scales are {dtype_name(codes.scale_OG.dtype)} numbers that {dtype_name(weight.dtype)}, "
            "the model's dtype, does not have"
        )
    parts = {
        "weight_packed": _pack_words(codes.code_OK, scheme.bits),
        "weight_scale": scale_OG,
        "weight_shape": torch.tensor(weight.shape),
    }
    if codes.zero_OG is not None:
        parts["weight_zero_point"] = _transpose(_pack_words(codes.zero_OG.T, scheme.bits))
    return parts


def quantization_config(schemes: Mapping[str, Scheme], ignore: Collection[str]) -> dict[str, Any]:
    """What `config.json` says about a model with such weights.

    Args:
        schemes: of each packed linear, by module name.
        ignore: all other linears of the model, the output head included.
    """
    modules: dict[Scheme, list[str]] = {}
    for name, scheme in schemes.items():
        modules.setdefault(scheme, []).append(name)
    # transformers 5.23 refuses packed zero points, which it expects to be as many as the scales, unless it decodes weights as
    # it loads them; and that it can do only where all are of one scheme.
    decode_first = len(modules) == 1 and not next(iter(modules)).symmetric
    return {
        **({"dequantize": True} if decode_first else {}),
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": {
            # Never "Linear" beside names: vLLM fuses linears, and finds a fused one's class before the names of its parts.
            f"group_{i}": _group(scheme, ["Linear"] if len(modules) == 1 else names)
            for i, (scheme, names) in enumerate(modules.items())
        },
        "ignore": list(ignore),
        "kv_cache_scheme": None,
    }


def _group(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "targets": targets,
        "weights": {
            "num_bits": scheme.bits,
            "type": "int",
            "symmetric": scheme.symmetric,
            "strategy": "channel" if scheme.group_size is None else "group",
            "group_size": scheme.group_size,
            "dynamic": False,
        },
        "input_activations": None,
        "output_activations": None,
    }


@dataclass(frozen=True)
class PackQuantized(Decoder):
    """The layout of a checkpoint's packed weights, whoever wrote it.

    A weight's tensors tell of which scheme it is. The config names its modules by class, by pattern and by names that
    transformers has changed since, so that all it is asked is whether there is such a scheme.
    """

    schemes: tuple[Scheme, ...]

    name: ClassVar[str] = FORMAT
    rounded: ClassVar[bool] = True
    parts: ClassVar[tuple[str, ...]] = (
        "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx",
    )  # fmt: skip

    def unpack(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The weight `[O, I]`, in the dtype of its scales. Raises ValueError, saying what is wrong."""
        return self.read(tensors).dequantize()

    def ours(self, tensors: Mapping[str, Tensor]) -> tuple[Layout, dict[str, Tensor]] | None:
        """With scales of 16 bits, if there are such."""
        weight = self.read(tensors)
        return as_ours(weight, uniform_codes(weight))

    def read(self, tensors: Mapping[str, Tensor]) -> Quantized:
        check_parts(
            tensors,
            {
                "weight_packed": lambda t: t.ndim == 2 and t.dtype == torch.int32,
                "weight_scale": lambda t: t.ndim == 2 and t.dtype in FLOAT_DTYPES,
                "weight_shape": lambda t: t.numel() == 2 and t.dtype in (torch.int32, torch.int64),
            },
        )
        packed_OW, scale_OG = tensors["weight_packed"], tensors["weight_scale"]
        O, I = read_shape(tensors["weight_shape"])
        if len(packed_OW) != O or len(scale_OG) != O:
            rows = f"its weight_packed {len(packed_OW)} and its weight_scale {len(scale_OG)}"
            raise ValueError(f"its weight_shape says {O} rows, but {rows}")
        scheme = self._scheme_of(tensors, I)
        check_finite(tensors, "weight_scale")
        zero_OG = None if scheme.symmetric else _read_zero(tensors["weight_zero_point"], scheme.bits, scale_OG.shape)
        order_I = _read_order(tensors["weight_g_idx"], I, scale_OG.shape[1]) if "weight_g_idx" in tensors else None
        code_OI = _unpack_words(packed_OW.contiguous(), scheme.bits, I)
        if order_I is not None:
            code_OI = code_OI[:, order_I]
        codes = Uniform(scheme.bits, scheme.group_size or I, code_OI, scale_OG, zero_OG)
        return Quantized(codes, (O, I), scale_OG.dtype, order_I=order_I)

    def _scheme_of(self, tensors: Mapping[str, Tensor], I: int) -> Scheme:
        """The scheme that fits a weight's tensors. Raises ValueError, naming the first that does not, when none does."""
        W, G = tensors["weight_packed"].shape[1], tensors["weight_scale"].shape[1]
        ordered, asymmetric = "weight_g_idx" in tensors, "weight_zero_point" in tensors
        tests: dict[str, Callable[[Scheme], bool]] = {
            f"its weight_packed has {W} words for {I} weights of a row": lambda s: _words(I, s.bits) == W,
            f"its weight_scale has {G} columns for {I} weights of a row": lambda s: s.groups(I) == G,
            f"it has {'a' if asymmetric else 'no'} weight_zero_point": lambda s: s.symmetric != asymmetric,
            "it has no weight_g_idx": lambda s: ordered or not s.ordered,
        }
        left = self.schemes
        for found, fits in tests.items():
            fitting = tuple(scheme for scheme in left if fits(scheme))
            if not fitting:
                raise ValueError(f"{found}, but config.json says {' or '.join(map(str, left))}")
            left = fitting
        if len({scheme.bits for scheme in left}) > 1:  # so few weights that words of either are as many
            raise ValueError(f"it may be of {' or of '.join(map(str, left))}")
        return left[0]


def _read_zero(zero: Tensor, bits: int, shape: torch.Size) -> Tensor:
    """Zero points `[O, G]`, packed, or signed and one by one as compressed-tensors 0.8 kept them."""
    O, G = shape
    middle = 2 ** (bits - 1)
    if zero.dtype == torch.int8 and zero.shape == shape and not ((zero < -middle) | (zero > middle - 1)).any():
        return (zero.short() + middle).to(torch.uint8)
    if zero.dtype != torch.int32 or zero.shape != (_words(O, bits), G):
        raise ValueError(
            f"its weight_zero_point has dtype {zero.dtype} and shape {list(zero.shape)}, "
            f"which does not hold {bits} bits for {G} groups in each of {O} rows"
        )
    return _transpose(_unpack_words(_transpose(zero), bits, O))


def _read_order(group_I: Tensor, I: int, G: int) -> Tensor | None:
    """The input features sorted by the groups that they belong to; None when they are in order."""
    if group_I.dtype not in (torch.int32, torch.int64) or group_I.shape != (I,):
        form = f"dtype {group_I.dtype} and shape {list(group_I.shape)}"
        raise ValueError(f"its weight_g_idx has {form}, which is not a group for each of {I} input features")
    if (group_I == -1).all():  # how it was made, and nothing was reordered
        return None
    if ((group_I < 0) | (group_I >= G)).any():
        raise ValueError(f"its weight_g_idx has groups that are not from 0 to {G - 1}")
    if (torch.bincount(group_I, minlength=G) != I // G).any():
        raise ValueError(f"its weight_g_idx does not give every group {I // G} input features")
    return group_I.argsort(stable=True)


def packed_weights(stored: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, PackedWeight]:
    """The packed weights of a checkpoint in this format.

    Args:
        stored: its tensors by name, such as `….up_proj.weight_packed`.
        config: its `quantization_config`.

    Raises:
        CheckpointError: it has more than packed weights, or weights that are not read here.
    """
    layout = PackQuantized(_read_schemes(config))
    parts_of: dict[str, dict[str, str]] = {}
    for key in stored:
        module, _, part = key.rpartition(".")
        if part in layout.parts:
            parts_of.setdefault(module, {})[part] = key
    for key in stored:
        module, _, part = key.rpartition(".")
        if module in parts_of and part not in (*layout.parts, "bias"):
            raise CheckpointError(f"{key} lies beside a weight in {FORMAT} and is not known: {_READ}")
    return {f"{module}.weight": PackedWeight(layout, parts) for module, parts in parts_of.items()}


def _read_schemes(config: Mapping[str, Any]) -> tuple[Scheme, ...]:
    """The schemes of a section. Raises CheckpointError when one is not read here, or the section says more."""
    said = {key for key, value in config.items() if value and not _is_dense(key, value)}
    more = sorted(said - _SECTION_KEYS)
    if more:
        raise CheckpointError(f"the checkpoint in {FORMAT} has {', '.join(more)} as well: {_READ}")
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise CheckpointError(f"the checkpoint in {FORMAT} has no usable 'config_groups'")
    return tuple(dict.fromkeys(_read_scheme(str(name), group) for name, group in groups.items()))


def _is_dense(key: str, value: Any) -> bool:
    return key == "sparsity_config" and isinstance(value, Mapping) and value.get("format") == "dense"


def _read_scheme(name: str, group: Any) -> Scheme:
    weights = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(weights, Mapping):
        raise CheckpointError(f"the checkpoint's {name!r} of 'config_groups' has no 'weights': {_READ}")
    bits: Any = weights.get("num_bits")
    size, order, symmetric = weights.get("group_size"), weights.get("actorder"), weights.get("symmetric", True)
    strategy = weights.get("strategy") or ("tensor" if size is None else "channel" if size == -1 else "group")
    per_channel = strategy == "channel" and size in (None, -1)
    for what, found, right in (
        ("format", group.get("format"), group.get("format") in (None, FORMAT)),
        ("input_activations", group.get("input_activations"), not group.get("input_activations")),
        ("output_activations", group.get("output_activations"), not group.get("output_activations")),
        ("type", weights.get("type"), weights.get("type", "int") == "int"),
        ("num_bits", bits, type(bits) is int and bits in BITS),
        ("strategy", strategy, strategy in ("group", "channel")),
        ("group_size", size, per_channel or (strategy == "group" and type(size) is int and size > 0)),
        ("symmetric", symmetric, type(symmetric) is bool),
        ("dynamic", weights.get("dynamic"), not weights.get("dynamic")),
        ("actorder", order, order in (None, False, True, "group", "dynamic", "weight", "static")),
    ):
        if not right:
            raise CheckpointError(f"the checkpoint's {name!r} of 'config_groups' has {what} {found!r}: {_READ}")
    ordered = not per_channel and order in (True, "group", "dynamic")
    return Scheme(bits, None if per_channel else size, symmetric, ordered)


def _words(count: int, bits: int) -> int:
    return -(-bytes_of(count, bits) // _WORD)


def _pack_words(code_RK: Tensor, bits: int) -> Tensor:
    """Rows of codes as int32 words `[R, W]`: our streams of bytes, the first byte being the least significant of a word."""
    stream_RB = pack_bits(code_RK, bits)
    R, B = stream_RB.shape
    byte_RB = stream_RB.new_zeros(R, _WORD * _words(code_RK.shape[1], bits))
    byte_RB[:, :B] = stream_RB
    return byte_RB.view(torch.int32)


def _unpack_words(word_RW: Tensor, bits: int, count: int) -> Tensor:
    """The reverse of `_pack_words`. Bits after the last code are not looked at, as compressed-tensors does not either."""
    return unpack_bits(word_RW.view(torch.uint8), bits, count)


def _transpose(x: Tensor) -> Tensor:
    """A transposed copy. `contiguous` would leave a single row or column with strides that `view` does not take."""
    return x.T.clone(memory_format=torch.contiguous_format)
