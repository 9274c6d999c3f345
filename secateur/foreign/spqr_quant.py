"""The checkpoint format of the package spqr_quant, which transformers reads by its SpQRConfig: 3 bits, tiles of 16 × 16.

O: output features, I: input features, T: tiles of 16 rows, G: groups of 16 stored columns, P: the 16 rows of a tile,
L: the 8 levels of a code, N: outliers.

`dense_weights` has a word of 64 bits for each row of a tile: from the lowest bit on the code of its scale, the code of its
zero point, 16 codes of weights, 8 bits of what the tile shares, and 2 that are not used. Words lie tile after tile, as the
tiles do in a row of tiles. What a tile shares is four float16: step and zero point of the scales, step and zero point of the
zero points, which `SHARED` puts in the order on disk. Their 8 bytes are spread over its rows: rows 2b and 2b + 1 both have
byte b.

All numbers are float16, and every operation rounds to it: scale = step · (code − zero'), and alike for the zero point; then
w = scale · (code − zero). Outliers are added to that: `col_vals` has the stored column in its lower half and the float16 to
be added in its upper one, rows as `row_offsets [O + 1]` says. Where `in_perm` is not empty, its 16-bit halves say which input
feature each stored column is.

The kernels of the package read columns as signed numbers of 16 bits, and have no place for a bias.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from secateur.core.quantized import Outliers, Quantized
from secateur.errors import CheckpointError
from secateur.foreign.format import Foreign, foreign
from secateur.formats.layouts.layout import Decoder, check_parts
from secateur.formats.layouts.packed_weight import PackedWeight
from secateur.formats.layouts.two_level_int import TwoLevel

QUANT_METHOD = "spqr"
PARTS = ("dense_weights", "row_offsets", "col_vals", "in_perm")
BITS = 3
TILE = 16  # rows of a tile, and weights of a group
LEVELS = 2**BITS
SHARED_BIT = BITS * (2 + TILE)
UNUSED_BIT = SHARED_BIT + 8
SHARED = ("scale step", "zero step", "scale zero", "zero zero")
MOST_COLUMNS = 2**15
_NEAR = (0, -1, 1)


def pack(weight: Quantized) -> dict[str, Tensor]:
    """The four tensors of a linear.

    The codes of weights are kept, and what they stand for changes a little. Here low + step · code becomes step' · (code −
    zero') in float16, with the pair that comes nearest among those around −low / step (`_fit`); an exact one need not exist.
    Measured on normally distributed weights, the root mean square of what that changes is 0.3 to 0.4 % of the quantization's
    own error, and no weight moved by more than 2 % of its scale. Outliers make up for it, to float16's own precision.

    Raises:
        ValueError: the format cannot hold it.
    """
    codes = weight.codes
    if not isinstance(codes, TwoLevel):
        raise ValueError(f"its codes are {type(codes).__name__}, and the format spqr holds two-level codes only")
    form = (codes.bits, codes.group_size, codes.scale_bits, codes.tile_rows)
    if form != (BITS, TILE, BITS, TILE):
        raise ValueError(
            f"its bits, group size, bits of scales and rows of a tile are {form}, and the format spqr holds "
            f"{(BITS, TILE, BITS, TILE)} only"
        )
    if weight.keep_OI is not None:
        raise ValueError("it has a mask of kept weights, and the format spqr stores all weights")
    O, I = weight.shape
    if O % TILE or I % TILE:
        raise ValueError(f"its {O} × {I} features do not divide into the tiles of {TILE} × {TILE} of the format spqr")
    if I > MOST_COLUMNS:
        raise ValueError(f"it has {I} input features, and the format spqr numbers {MOST_COLUMNS}")
    words_TGP = _words(codes)
    dense_OI = _dense(words_TGP)
    if not torch.isfinite(dense_OI).all():
        raise ValueError("its codes stand for values beyond float16, which the format spqr computes in")
    order_I = torch.empty(0, dtype=torch.int64) if weight.order_I is None else weight.order_I
    row_offsets, col_vals = _pack_outliers(weight, dense_OI)
    return {
        "dense_weights": words_TGP.flatten(),
        "row_offsets": row_offsets,
        "col_vals": col_vals,
        "in_perm": order_I.to(torch.int16).view(torch.int32),
    }


def _words(codes: TwoLevel) -> Tensor:
    """`[T, G, P]`, int64."""
    step_TG, low_TG, zero_step_TG, zero_low_TG = codes.second_TG4.float().unbind(2)
    step_TG, zero_TG, scale_code_TGP = _fit(step_TG, low_TG, _by_tile(codes.scale_code_OG))
    zero_step_TG, zero_zero_TG, zero_code_TGP = _fit(zero_step_TG, zero_low_TG, _by_tile(codes.zero_code_OG))
    shared_TG4 = torch.stack([step_TG, zero_step_TG, zero_TG, zero_zero_TG], 2)
    byte_TGP = shared_TG4.view(torch.uint8).repeat_interleave(2, 2)
    words_TGP = scale_code_TGP.long() | zero_code_TGP.long() << BITS | byte_TGP.long() << SHARED_BIT
    for column in range(TILE):
        words_TGP |= _by_tile(codes.code_OK[:, column::TILE]).long() << BITS * (2 + column)
    return words_TGP


def _by_tile(x_OG: Tensor) -> Tensor:
    """`[T, G, P]`."""
    return x_OG.unflatten(0, (-1, TILE)).transpose(1, 2).contiguous()


def _by_row(x_TGP: Tensor) -> Tensor:
    """The reverse of `_by_tile`."""
    return x_TGP.transpose(1, 2).flatten(0, 1)


def _fit(step_TG: Tensor, low_TG: Tensor, code_TGP: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """step' and zero', float16, for which step' · (code − zero') is nearest to low + step · code, and codes.

    Nearest by the sum of squares over the rows of a tile. The codes stay as they are, but where all of a tile are better
    served by one value, as they are where step is 0: that is value · (1 − 0).
    """
    level_L = torch.arange(LEVELS)
    value_TGL = low_TG[..., None] + step_TG[..., None] * level_L
    count_TGL = torch.stack([(code_TGP == level).sum(2) for level in range(LEVELS)], 2)
    mean_code_TG = (count_TGL * level_L).sum(2) / code_TGP.shape[2]
    mean_TG = low_TG.double() + step_TG.double() * mean_code_TG

    def error(found_TGL: Tensor) -> Tensor:
        return ((found_TGL.float() - value_TGL).square() * count_TGL).sum(2).nan_to_num_(torch.inf)

    best_step_TG = step_TG.half()
    best_zero_TG = torch.zeros_like(best_step_TG)
    least_TG = torch.full_like(step_TG, torch.inf)
    for tried_step_TG in _neighbours(step_TG.half()):
        # The zero point that leaves the mean where it is.
        zero_TG = (mean_code_TG - mean_TG / tried_step_TG.double()).half()
        for tried_zero_TG in _neighbours(zero_TG):
            error_TG = error(_on_grid(level_L, tried_step_TG, tried_zero_TG))
            better_TG = error_TG < least_TG
            best_step_TG = torch.where(better_TG, tried_step_TG, best_step_TG)
            best_zero_TG = torch.where(better_TG, tried_zero_TG, best_zero_TG)
            least_TG = torch.where(better_TG, error_TG, least_TG)
    one_TG = mean_TG.half()
    is_one_TG = error(one_TG[..., None]) < least_TG
    return (
        torch.where(is_one_TG, one_TG, best_step_TG),
        torch.where(is_one_TG, 0, best_zero_TG),
        torch.where(is_one_TG[..., None], 1, code_TGP),
    )


def _neighbours(x: Tensor) -> Iterator[Tensor]:
    """A float16 itself and those next to it; at zero and infinity also what is no number."""
    for distance in _NEAR:
        yield (x.view(torch.int16) + distance).view(torch.float16)


def _on_grid(code: Tensor, step_TG: Tensor, zero_TG: Tensor) -> Tensor:
    """step · (code − zero), as the package computes it."""
    return step_TG[..., None] * (code.half() - zero_TG[..., None])


def _dense(words_TGP: Tensor) -> Tensor:
    """What words stand for, `[O, I]` float16, in the order of stored columns."""
    step_TG, zero_step_TG, zero_TG, zero_zero_TG = _shared(words_TGP).unbind(2)
    scale_TGP = _on_grid(_code(words_TGP, 0), step_TG, zero_TG)
    zero_TGP = _on_grid(_code(words_TGP, 1), zero_step_TG, zero_zero_TG)
    tiles, groups, _ = words_TGP.shape
    dense_OI = torch.empty(tiles * TILE, groups * TILE, dtype=torch.float16)
    for column in range(TILE):
        dense_OI[:, column::TILE] = _by_row(scale_TGP * (_code(words_TGP, 2 + column).half() - zero_TGP))
    return dense_OI


def _shared(words_TGP: Tensor) -> Tensor:
    """What each tile shares, `[T, G, 4]` float16."""
    return (words_TGP[..., ::2] >> SHARED_BIT).to(torch.uint8).view(torch.float16)


def _code(words: Tensor, place: int) -> Tensor:
    return (words >> BITS * place) & (LEVELS - 1)


def _pack_outliers(weight: Quantized, dense_OI: Tensor) -> tuple[Tensor, Tensor]:
    """`row_offsets` and `col_vals`, with what each outlier lacks of its weight."""
    O, I = weight.shape
    outliers = weight.outliers
    if outliers is None:
        return torch.zeros(O + 1, dtype=torch.int32), torch.empty(0, dtype=torch.int32)
    row_N, column_N, value_N = outliers.row_N, outliers.column_N, outliers.value_N
    if weight.order_I is not None:
        column_N = weight.order_I.argsort()[column_N]
        sorted_N = (row_N * I + column_N).argsort()
        column_N, value_N = column_N[sorted_N], value_N[sorted_N]  # row_N is the same in either order
    wanted_N = weight.codes.values()[row_N, column_N].double() + value_N.double()
    value_N = (wanted_N - dense_OI[row_N, column_N].double()).half()
    if not (torch.isfinite(value_N) & torch.isfinite(wanted_N.half())).all():
        raise ValueError("it has outliers beyond float16, which the format spqr stores them in")
    halves_N2 = torch.stack([column_N.to(torch.int16), value_N.view(torch.int16)], 1)
    return pad(outliers.count_O.cumsum(0), (1, 0)).to(torch.int32), halves_N2.view(torch.int32).flatten()


def config(sizes: Mapping[str, int], dense_linears: Iterable[str]) -> dict[str, Any]:
    """The `quantization_config` of such a checkpoint.

    Args:
        sizes: of each of its packed tensors, such as `model.layers.0.mlp.up_proj.dense_weights`, in elements.
        dense_linears: all other linears, such as `lm_head`. transformers 4 wants the names of their weights in that place
            and transformers 5 those of the modules: both are written.
    """
    return {
        "quant_method": QUANT_METHOD,
        "bits": BITS,
        "beta1": TILE,
        "beta2": TILE,
        "shapes": {f"{name}.shape": size for name, size in sizes.items()},
        "modules_to_not_convert": [name for linear in dense_linears for name in (linear, f"{linear}.weight")],
    }


@foreign
class SpQRFormat(Foreign):
    """Its tensors are called such as `….up_proj.dense_weights`."""

    quant_method: ClassVar[str] = QUANT_METHOD
    reads: ClassVar[str] = "spqr_quant's"
    card: ClassVar[str] = """
FOLDER is this folder, or its name on the hub. The weights are in SpQR's format: transformers opens it on a CUDA GPU where the
package `spqr_quant` is installed.
"""

    @classmethod
    def packed_weights(cls, stored: Mapping[str, Tensor], section: Mapping[str, Any]) -> dict[str, PackedWeight]:
        wanted = {"bits": BITS, "beta1": TILE, "beta2": TILE}
        for key, value in wanted.items():
            if section.get(key, value) != value:
                raise CheckpointError(
                    f"the checkpoint is quantized by spqr with {key} {section[key]!r}: it can only be {value}"
                )
        shapes = section.get("shapes")
        if not isinstance(shapes, Mapping):
            raise CheckpointError("the checkpoint is quantized by spqr, but its config has no 'shapes'")
        packed = {}
        for owner in dict.fromkeys(_owners(stored)) | dict.fromkeys(
            _owners(key.removesuffix(".shape") for key in shapes)
        ):
            names = {part: f"{owner}.{part}" for part in PARTS}
            missing = [name for name in names.values() if f"{name}.shape" not in shapes]
            if missing:
                raise CheckpointError(
                    f"the checkpoint is quantized by spqr, but its config's 'shapes' do not have {missing[0]}"
                )
            layout = SpQRQuant({part: shapes[f"{name}.shape"] for part, name in names.items()})
            packed[f"{owner}.weight"] = PackedWeight(
                layout, {part: name for part, name in names.items() if name in stored}
            )
        return packed


def _owners(names: Iterable[str]) -> Iterator[str]:
    for name in names:
        owner, _, part = name.rpartition(".")
        if part in PARTS:
            yield owner


@dataclass(frozen=True)
class SpQRQuant(Decoder):
    """One such weight, of which the config of its checkpoint tells the sizes of the tensors and nothing more.

    The weight's shape follows from the tensors: `dense_weights` tells O · I; `in_perm`, where there is any, I; `row_offsets`
    O. That may also be in the package's other form, in which 16 rows have as many outliers as the one of them with most, in
    turn, with zeros to fill up (PTCSR): then it has O / 16 + 1 numbers. Where both can be meant it is not taken for that.
    """

    sizes: Mapping[str, Any]

    name: ClassVar[str] = "spqr_quant"
    rounded: ClassVar[bool] = True
    parts: ClassVar[tuple[str, ...]] = PARTS

    def unpack(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """float16. Raises ValueError, saying what is wrong."""
        check_parts(
            tensors,
            {
                "dense_weights": lambda t: t.ndim == 1 and t.dtype == torch.int64,
                "row_offsets": _is_int32_vector,
                # The package makes a float32 of none.
                "col_vals": lambda t: _is_int32_vector(t) or t.shape == (0,),
                "in_perm": _is_int32_vector,
            },
        )
        for part, size in self.sizes.items():
            if tensors[part].numel() != size:
                raise ValueError(f"its {part} has {tensors[part].numel()} elements, and its config says {size!r}")
        O, I = _shape(tensors)
        order_I = _read_order(tensors["in_perm"], I)
        words_TGP = tensors["dense_weights"].view(O // TILE, I // TILE, TILE)
        _check_words(words_TGP)
        outliers = _read_outliers(tensors["row_offsets"].long(), tensors["col_vals"], O, I)
        W_OI = _dense(words_TGP).float()
        W_OI[outliers.row_N, outliers.column_N] += outliers.value_N.float()
        if order_I is not None:
            W_OI = torch.empty_like(W_OI).index_copy_(1, order_I, W_OI)
        dense_OI = W_OI.half()
        if not torch.isfinite(dense_OI).all():
            raise ValueError("it stands for values that are not finite")
        return dense_OI


def _is_int32_vector(tensor: Tensor) -> bool:
    return tensor.ndim == 1 and tensor.dtype == torch.int32


def _shape(tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """(O, I): see `SpQRQuant`."""
    dense, rows, order = (tensors[part].numel() for part in ("dense_weights", "row_offsets", "in_perm"))
    for O in (rows - 1, TILE * (rows - 1)):
        if O > 0 and O % TILE == 0 and dense * TILE % O == 0:
            I = dense * TILE // O
            if I > 0 and I % TILE == 0 and order in (0, I // 2):
                return O, I
    raise ValueError(
        f"its tensors of {dense} dense_weights, {rows} row_offsets and {order} in_perm are of no shape in tiles of 16 × 16"
    )


def _read_order(in_perm: Tensor, I: int) -> Tensor | None:
    if not in_perm.numel():
        return None
    order_I = in_perm.view(torch.int16).long() & 0xFFFF
    if not torch.equal(order_I.sort().values, torch.arange(I)):
        raise ValueError(f"its in_perm does not have each of {I} input features once")
    return order_I


def _check_words(words_TGP: Tensor) -> None:
    if (words_TGP >> UNUSED_BIT).any():
        raise ValueError("its dense_weights have bits set that are not used")
    if (words_TGP[..., ::2] >> SHARED_BIT != words_TGP[..., 1::2] >> SHARED_BIT).any():
        raise ValueError("its dense_weights have rows that disagree on what a tile shares")
    for name, shared_TG in zip(SHARED, _shared(words_TGP).unbind(2), strict=True):
        if not torch.isfinite(shared_TG).all():
            raise ValueError(f"its dense_weights have a {name} that is not finite")


def _read_outliers(row_offsets: Tensor, col_vals: Tensor, O: int, I: int) -> Outliers:
    """In the order of stored columns."""
    N = col_vals.numel()
    if row_offsets[0] != 0 or row_offsets[-1] != N or (row_offsets.diff() < 0).any():
        raise ValueError(f"its row_offsets do not rise from 0 to the number of outliers, {N}")
    halves_N2 = col_vals.to(torch.int32).view(torch.int16).view(N, 2)
    column_N, value_N = halves_N2[:, 0].long(), halves_N2[:, 1].contiguous().view(torch.float16)
    if ((column_N < 0) | (column_N >= I)).any():
        raise ValueError(f"its col_vals have a column outside the row of {I}")
    if not torch.isfinite(value_N).all():
        raise ValueError("its col_vals have a value that is not finite")
    if len(row_offsets) == O + 1:
        row_N = torch.repeat_interleave(torch.arange(O), row_offsets.diff())
    else:
        if (row_offsets % TILE).any():
            raise ValueError(f"its row_offsets are not multiples of {TILE}")
        row_N = torch.repeat_interleave(torch.arange(O // TILE) * TILE, row_offsets.diff()) + torch.arange(N) % TILE
        filled_N = col_vals != 0
        row_N, column_N, value_N = row_N[filled_N], column_N[filled_N], value_N[filled_N]
        sorted_N = row_N.argsort(stable=True)
        row_N, column_N, value_N = row_N[sorted_N], column_N[sorted_N], value_N[sorted_N]
    if ((row_N[1:] == row_N[:-1]) & (column_N[1:] <= column_N[:-1])).any():
        raise ValueError("its col_vals are out of order within a row")
    return Outliers(row_N.bincount(minlength=O), column_N, value_N)
