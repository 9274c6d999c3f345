"""The checkpoint format of the package spqr_quant: written, read back, and decoded by the package's own code.

The package builds its kernels with CUDA when it is imported. What it does on the processor (packing, and decoding for
tests) is plain C++ beside them, which is compiled here against the few headers in `HEADERS` instead of CUDA's and PyTorch's.
They define a float16 whose operations round as the standard says, and hold tensors; all else is the package's, its Python
side too.

O: output features, I: input features, T: tiles of 16 rows, G: groups of 16 stored columns, N: outliers.
"""

import ctypes
import importlib
import importlib.util
import shutil
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_examples import tries
from transformers import SpQRConfig
from transformers.quantizers.quantizers_utils import should_convert_module

from secateur.core.quantized import Outliers, Quantized
from secateur.errors import CheckpointError
from secateur.foreign.spqr_quant import PARTS, SpQRFormat, SpQRQuant, config, pack
from secateur.formats.layouts.packed_int import Uniform
from secateur.formats.layouts.packed_weight import DecodedWeights
from secateur.formats.layouts.two_level_int import TwoLevel

SEEDS = st.integers(0, 2**32 - 1)
TILES = st.integers(1, 4)


def two_level(O, I, second_TG4, draw):
    """Codes at random on given grids."""
    code_OK = torch.randint(0, 8, (O, I), generator=draw, dtype=torch.uint8)
    scale_code_OG, zero_code_OG = (
        torch.randint(0, 8, (O, I // 16), generator=draw, dtype=torch.uint8) for _ in range(2)
    )
    return TwoLevel(3, 16, 3, 16, code_OK, scale_code_OG, zero_code_OG, second_TG4)


def with_extras(codes, outliers, ordered, draw, dtype=torch.float16):
    """A weight of such codes with outliers in every tenth place, and its columns in another order."""
    O, I = codes.code_OK.shape
    order_I = torch.randperm(I, generator=draw) if ordered else None
    extra = None
    if outliers:
        outlier_OI = torch.rand(O, I, generator=draw) < 0.1
        outlier_OI[O // 2] = False
        extra = Outliers.of(torch.randn(O, I, generator=draw), outlier_OI, dtype)
    return Quantized(codes, (O, I), dtype, order_I=order_I, outliers=extra)


def typical(tiles, groups, seed, dtype=torch.float16, **extras):
    """Grids such as weights of models have. Those of some tiles are of one value: their step is 0."""
    draw = torch.Generator().manual_seed(seed)
    low_step_TG4 = torch.rand(tiles, groups, 4, generator=draw)
    second_TG4 = torch.tensor([0.003, 0.01, 0.3, 2.0]) * (0.2 + low_step_TG4)
    second_TG4[torch.rand(tiles, groups, generator=draw) < 0.1, 0] = 0
    second_TG4[torch.rand(tiles, groups, generator=draw) < 0.1, 2] = 0
    codes = two_level(tiles * 16, groups * 16, second_TG4.to(dtype), draw)
    return with_extras(codes, draw=draw, dtype=dtype, **{"outliers": False, "ordered": False, **extras})


def exact(tiles, groups, seed, **extras):
    """Grids that the format holds to the bit, and all they stand for too; with step and zero point in its own terms."""
    draw = torch.Generator().manual_seed(seed)
    whole_TG4 = torch.randint(0, 8, (tiles, groups, 4), generator=draw)
    step_TG2 = torch.stack([2.0 ** -(whole_TG4[..., 0] + 3), torch.full((tiles, groups), 0.5)], 2)
    zero_TG2 = (-whole_TG4[..., 2:]).float()  # not minus zero
    second_TG4 = torch.stack([step_TG2, -zero_TG2 * step_TG2], 3).flatten(2)
    codes = two_level(tiles * 16, groups * 16, second_TG4.half(), draw)
    extras = {"outliers": False, "ordered": False, **extras}
    return with_extras(codes, draw=draw, **extras), step_TG2.half(), zero_TG2.half()


def sizes(parts):
    return {part: tensor.numel() for part, tensor in parts.items()}


def unpack(parts):
    return SpQRQuant(sizes(parts)).unpack(parts)


def scales_of(weight):
    """`[O, I]`, in the order of input features."""
    scale_OI = weight.codes.scale_and_zero()[0].repeat_interleave(16, 1)
    return scale_OI if weight.order_I is None else torch.empty_like(scale_OI).index_copy_(1, weight.order_I, scale_OI)


def float_values(weight):
    """What it stands for before it is rounded to its dtype."""
    return replace(weight, dtype=torch.float32).dequantize()


# --- one tile by hand


def test_a_tile_is_as_described():
    """The four float16 are 0.25, 0.5, −2 and −3: a scale is 0.25 · (code + 2), a zero point 0.5 · (code + 3)."""
    code_OK = torch.arange(256).view(16, 16) % 7
    scale_code_OG, zero_code_OG = torch.arange(16)[:, None] % 8, (torch.arange(16)[:, None] + 5) % 8
    second_TG4 = torch.tensor([[[0.25, 0.5, 0.5, 1.5]]], dtype=torch.float16)
    codes = TwoLevel(
        3, 16, 3, 16, code_OK.to(torch.uint8), scale_code_OG.to(torch.uint8), zero_code_OG.to(torch.uint8), second_TG4
    )
    outliers = Outliers(
        torch.tensor([0, 2] + [0] * 14), torch.tensor([3, 15]), torch.tensor([1.0, -2.0], dtype=torch.float16)
    )
    parts = pack(Quantized(codes, (16, 16), torch.float16, outliers=outliers))
    shared = struct.pack("<4e", 0.25, 0.5, -2, -3)
    assert shared == bytes([0x00, 0x34, 0x00, 0x38, 0x00, 0xC0, 0x00, 0xC2])
    for row in range(16):
        word = shared[row // 2] << 54 | (row + 5) % 8 << 3 | row % 8
        for column in range(16):
            word |= (16 * row + column) % 7 << 6 + 3 * column
        assert int(parts["dense_weights"][row]) == word, row
    assert f"{int(parts['dense_weights'][3]):064b}" == (
        "00" "00110100" "000110101100011010001000110101100011010001000110" "000" "011"
    )  # fmt: skip
    assert parts["row_offsets"].tolist() == [0, 0] + [2] * 15
    assert [f"{value & 0xFFFFFFFF:08x}" for value in parts["col_vals"].tolist()] == ["3c000003", "c000000f"]
    assert parts["in_perm"].numel() == 0
    assert [tensor.dtype for tensor in parts.values()] == [torch.int64, torch.int32, torch.int32, torch.int32]
    W_OI = unpack(parts)
    assert W_OI.dtype == torch.float16
    # Row 3: scale 0.25 · (3 + 2), zero point 0.5 · (0 + 3); its first code is 48 % 7.
    assert W_OI[3, :3].tolist() == [1.25 * (6 - 1.5), 1.25 * (0 - 1.5), 1.25 * (1 - 1.5)]
    # Row 1: scale 0.25 · (1 + 2), zero point 0.5 · (6 + 3).
    assert W_OI[1, 3].item() == 0.75 * (5 - 4.5) + 1
    assert W_OI[1, 15].item() == 0.75 * (3 - 4.5) - 2


def test_tiles_lie_row_by_row_and_columns_are_numbered_as_stored():
    weight, *_ = exact(2, 3, seed=0)
    dense = pack(weight)["dense_weights"]
    for tile in range(2):
        for group in range(3):
            word = int(dense[(tile * 3 + group) * 16 + 5])
            assert word & 7 == weight.codes.scale_code_OG[tile * 16 + 5, group]
            assert word >> 6 & 7 == weight.codes.code_OK[tile * 16 + 5, group * 16]
    order_I = torch.arange(48).roll(1)
    outliers = Outliers(torch.tensor([2] + [0] * 31), torch.tensor([5, 47]), torch.tensor([1.0, 2.0]).half())
    parts = pack(replace(weight, order_I=order_I, outliers=outliers))
    assert parts["in_perm"][:2].tolist() == [0 << 16 | 47, 2 << 16 | 1]
    assert [value & 0xFFFF for value in parts["col_vals"].tolist()] == [0, 6]
    assert [value >> 16 for value in parts["col_vals"].tolist()] == [0x4000, 0x3C00]


# --- there and back


@tries(40)
@given(tiles=TILES, groups=TILES, outliers=st.booleans(), ordered=st.booleans(), seed=SEEDS)
def test_what_float16_holds_comes_back_to_the_bit(tiles, groups, outliers, ordered, seed):
    weight, *_ = exact(tiles, groups, seed, outliers=outliers, ordered=ordered)
    assert torch.equal(unpack(pack(weight)), weight.dequantize())


@tries(60)
@given(
    tiles=TILES,
    groups=TILES,
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    outliers=st.booleans(),
    ordered=st.booleans(),
    seed=SEEDS,
)
def test_anything_comes_back_nearly(tiles, groups, dtype, outliers, ordered, seed):
    weight = typical(tiles, groups, seed, dtype, outliers=outliers, ordered=ordered)
    found_OI, wanted_OI = unpack(pack(weight)).float(), float_values(weight)
    if outliers:
        at = weight.outliers.row_N, weight.outliers.column_N
        # Half of float16's last place, once for what is added and once for the sum.
        bound_N = 2**-11 * (weight.outliers.value_N.float().abs() + wanted_OI[at].abs())
        assert ((found_OI[at] - wanted_OI[at]).abs() <= 1.1 * bound_N + 2**-24).all()
        found_OI[at] = wanted_OI[at]
    assert ((found_OI - wanted_OI).abs() <= 0.03 * scales_of(weight)).all()


def test_no_outliers_after_all():
    weight = typical(2, 2, 0, ordered=True)
    none = Outliers(torch.zeros(32, dtype=torch.int64), torch.empty(0, dtype=torch.int64), torch.empty(0).half())
    parts, wanted = pack(replace(weight, outliers=none)), pack(weight)
    assert all(torch.equal(parts[part], wanted[part]) and parts[part].dtype == wanted[part].dtype for part in PARTS)


def test_little_is_lost():
    for dtype, most in ((torch.float16, 4.5e-3), (torch.bfloat16, 4e-3)):
        weight = typical(16, 32, 0, dtype)
        error_OI = unpack(pack(weight)).float() - float_values(weight)
        share_OI = error_OI / scales_of(weight)
        assert share_OI.square().mean().sqrt() < most / 12**0.5  # of the error that rounding to a grid makes
        assert share_OI.abs().max() < 0.02


@pytest.mark.parametrize("low", [0.0, 0.0123, 4.7, -3.3])
@pytest.mark.parametrize("ratio", [0.0, 1e-7, 1e-5, 1e-3, 1e-1, 10.0])
def test_any_ratio_of_step_and_least_value(low, ratio):
    """Where the step is small next to the least value, −low / step may be beyond float16."""
    step = abs(low) * ratio if low else ratio
    second_TG4 = torch.tensor([step, low, 0.25, 1.0]).expand(1, 2, 4)
    weight = Quantized(two_level(16, 32, second_TG4, torch.Generator().manual_seed(0)), (16, 32), torch.float16)
    found_OI, wanted_OI = unpack(pack(weight)).float(), float_values(weight)
    # A code times a step that is half of float16's last place off, times up to 7.
    assert torch.allclose(found_OI, wanted_OI, rtol=2e-3, atol=49 * (step * 2**-11 + 2**-25))
    if not step:
        scale_half = replace(weight.codes, second_TG4=second_TG4.half())
        assert torch.equal(found_OI, Quantized(scale_half, (16, 32), torch.float16).dequantize().float())


# --- what the format does not hold


def codes_of(**changes):
    return replace(typical(2, 2, 0).codes, **changes)


SECOND = torch.tensor([0.001, 0.01, 0.3, 2.0]).expand(2, 2, 4)
REFUSED = {
    "bits": ({"codes": codes_of(bits=2)}, r"bits of scales and rows of a tile are \(2, 16, 3, 16\)"),
    "group": ({"codes": codes_of(group_size=32)}, r"\(3, 32, 3, 16\)"),
    "bits of scales": ({"codes": codes_of(scale_bits=4)}, r"\(3, 16, 4, 16\)"),
    "rows of a tile": ({"codes": codes_of(tile_rows=8)}, r"\(3, 16, 3, 8\)"),
    "one level": ({"codes": Uniform(3, 16, codes_of().code_OK, torch.ones(32, 2), None)}, "are Uniform"),
    "mask": ({"keep_OI": torch.ones(32, 32, dtype=torch.bool)}, "a mask of kept weights"),
    "rows": ({"shape": (40, 32)}, "40 × 32 features do not divide"),
    "columns": ({"shape": (32, 40)}, "32 × 40 features do not divide"),
    "too many columns": ({"shape": (32, 2**15 + 16)}, "has 32784 input features"),
    "an infinite step": ({"codes": codes_of(second_TG4=SECOND * 1e30)}, "values beyond float16"),
    "great weights": ({"codes": codes_of(second_TG4=SECOND * torch.tensor([0, 5e6, 1, 1]))}, "values beyond float16"),
    "no number": ({"codes": codes_of(second_TG4=SECOND * torch.nan)}, "values beyond float16"),
    "great sums": (
        {
            "codes": codes_of(code_OK=codes_of().code_OK * 0 + 7, second_TG4=SECOND * torch.tensor([0, 6e5, 0, 1])),
            "outliers": Outliers(torch.tensor([1] + [0] * 31), torch.tensor([3]), torch.tensor([6e4])),
        },
        "outliers beyond float16",
    ),
    "great outliers": (
        {"outliers": Outliers(torch.tensor([1] + [0] * 31), torch.tensor([3]), torch.tensor([1e6]))},
        "outliers beyond float16",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_the_format_does_not_hold_is_refused(what):
    changes, message = REFUSED[what]
    with pytest.raises(ValueError, match=message) as caught:
        pack(replace(typical(2, 2, 0), **changes))
    assert "\n" not in str(caught.value)


# --- checkpoints


NAMES = ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj")


def checkpoint():
    weights = [typical(2, 3, seed, outliers=True, ordered=seed == 1) for seed in range(2)]
    stored = {
        f"{name}.{part}": tensor
        for name, weight in zip(NAMES, weights, strict=True)
        for part, tensor in pack(weight).items()
    }
    section = config({name: tensor.numel() for name, tensor in stored.items()}, ["lm_head"])
    return {**stored, "lm_head.weight": torch.ones(4, 4)}, section, weights


def test_a_checkpoint_is_read():
    stored, section, weights = checkpoint()
    assert section == {
        "quant_method": "spqr",
        "bits": 3,
        "beta1": 16,
        "beta2": 16,
        "shapes": {f"{name}.shape": tensor.numel() for name, tensor in stored.items() if name != "lm_head.weight"},
        "modules_to_not_convert": ["lm_head", "lm_head.weight"],
    }
    read = DecodedWeights(stored, SpQRFormat.packed_weights(stored, section))
    assert set(read) == {"lm_head.weight", *(f"{name}.weight" for name in NAMES)}
    for name, weight in zip(NAMES, weights, strict=True):
        assert torch.equal(read[f"{name}.weight"], unpack(pack(weight)))
        assert set(pack(weight)) == set(read.packed[f"{name}.weight"].layout.parts)


def test_transformers_replaces_the_right_linears():
    found = SpQRConfig(**checkpoint()[1])
    assert all(should_convert_module(name, found.modules_to_not_convert) for name in NAMES)
    assert not should_convert_module("lm_head", found.modules_to_not_convert)
    assert "lm_head.weight" in found.modules_to_not_convert  # what transformers 4 looks for


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 4}, "with bits 4: it can only be 3"),
        ({"beta1": 32}, "with beta1 32"),
        ({"beta2": "16"}, "with beta2 '16'"),
        ({"shapes": None}, "no 'shapes'"),
        ({"shapes": {}}, r"do not have .*up_proj\.dense_weights"),
    ],
)
def test_a_config_that_makes_no_sense(changes, message):
    stored, section, _ = checkpoint()
    with pytest.raises(CheckpointError, match=message):
        SpQRFormat.packed_weights(stored, {**section, **changes})


@pytest.mark.parametrize("part", PARTS)
def test_a_missing_tensor_is_named(part):
    stored, section, _ = checkpoint()
    del stored[f"{NAMES[1]}.{part}"]
    read = DecodedWeights(stored, SpQRFormat.packed_weights(stored, section))
    with pytest.raises(CheckpointError, match=rf"1\.mlp\.up_proj\.weight cannot .*'spqr_quant': .*'{part}' is missing"):
        read[f"{NAMES[1]}.weight"]


def test_a_weight_that_only_the_config_knows_is_missed():
    stored, section, _ = checkpoint()
    stored = {name: tensor for name, tensor in stored.items() if not name.startswith(NAMES[0])}
    read = DecodedWeights(stored, SpQRFormat.packed_weights(stored, section))
    with pytest.raises(CheckpointError, match="'dense_weights' is missing"):
        read[f"{NAMES[0]}.weight"]


# --- damage


def set_shared(place, bits):
    """Another float16 in what the first tile shares."""

    def change(dense):
        for byte in range(2):
            for row in range(4 * place + 2 * byte, 4 * place + 2 * byte + 2):
                dense[row] = dense[row] & (1 << 54) - 1 | (bits >> 8 * byte & 0xFF) << 54

    return change


def put(index, value):
    def change(tensor):
        tensor[index] = value

    return change


def put_half(index, half, bits):
    def change(tensor):
        tensor.view(torch.int16)[2 * index + half] = bits

    return change


def swap(tensor):
    """The outliers of the first row that has two, in reverse."""
    tensor[:2] = tensor[:2].flip(0)


DAMAGE = {
    "unused bits": ("dense_weights", put(7, -1), "bits set that are not used"),
    "an unused bit": ("dense_weights", lambda dense: dense[3:4].add_(1 << 62), "bits set that are not used"),
    "two scales in a tile": ("dense_weights", lambda dense: dense[3:4].bitwise_xor_(1 << 60), "rows that disagree"),
    "a NaN step": ("dense_weights", set_shared(0, 0x7E01), "a scale step that is not finite"),
    "an infinite step": ("dense_weights", set_shared(1, 0xFC00), "a zero step that is not finite"),
    "a NaN zero": ("dense_weights", set_shared(2, 0xFFFF), "a scale zero that is not finite"),
    "an infinite zero": ("dense_weights", set_shared(3, 0x7C00), "a zero zero that is not finite"),
    "a great step": ("dense_weights", set_shared(0, 0x7BFF), "stands for values that are not finite"),
    "a late start": ("row_offsets", put(0, 1), "do not rise from 0"),
    "a negative start": ("row_offsets", put(0, -1), "do not rise from 0"),
    "a late end": ("row_offsets", put(-1, 10**6), "do not rise from 0 to the number of outliers"),
    "a dent": ("row_offsets", put(5, 10**6), "do not rise from 0"),
    "a column too far": ("col_vals", put_half(4, 0, 48), "a column outside the row of 48"),
    "a negative column": ("col_vals", put_half(4, 0, -1), "a column outside the row of 48"),
    "a NaN outlier": ("col_vals", put_half(4, 1, 0x7E00), "col_vals have a value that is not finite"),
    "no order": ("col_vals", swap, "out of order within a row"),
    "a column twice": ("col_vals", lambda col_vals: col_vals[:2].fill_(int(col_vals[0])), "out of order within a row"),
    "a feature twice": ("in_perm", put(0, 0), "does not have each of 48 input features once"),
    "a feature too many": ("in_perm", put_half(3, 1, 48), "does not have each of 48 input features once"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_named(what):
    part, change, message = DAMAGE[what]
    parts = pack(typical(2, 3, 3, outliers=True, ordered=True))
    assert parts["row_offsets"][1] >= 2
    unpack(parts)
    change(parts[part])
    with pytest.raises(ValueError, match=message):
        unpack(parts)


@pytest.mark.parametrize(("name", "place"), [("scale step", 0), ("zero step", 1), ("scale zero", 2), ("zero zero", 3)])
def test_the_places_of_what_a_tile_shares(name, place):
    parts = pack(typical(1, 1, 0))
    set_shared(place, 0x7C00)(parts["dense_weights"])
    with pytest.raises(ValueError, match=f"a {name} that"):
        unpack(parts)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("how", ["longer", "shorter", "another dtype", "another shape"])
def test_another_size_is_named(part, how):
    parts = pack(typical(2, 3, 3, outliers=True, ordered=True))
    wanted = sizes(parts)
    tensor = parts[part]
    parts[part] = {
        "longer": torch.cat([tensor, tensor[:1]]),
        "shorter": tensor[:-1],
        "another dtype": tensor.float(),
        "another shape": tensor[None],
    }[how]
    message = "the config says" if how in ("longer", "shorter") else "has dtype"
    with pytest.raises(ValueError, match=message.replace("the", "its")):
        SpQRQuant(wanted).unpack(parts)
    if how in ("longer", "shorter"):
        # A config that agrees does not help.
        with pytest.raises(ValueError, match=r"of no shape in tiles|do not rise"):
            unpack(parts)


def test_nothing_at_all_is_no_weight():
    empty = {part: torch.empty(0, dtype=torch.int64 if part == "dense_weights" else torch.int32) for part in PARTS}
    with pytest.raises(ValueError, match="of no shape"):
        unpack(empty)
    with pytest.raises(ValueError, match="of no shape"):
        unpack({**empty, "row_offsets": torch.zeros(17, dtype=torch.int32)})


@tries(150)
@given(data=st.data())
def test_bytes_at_random_are_refused_or_read(data):
    """No tensor makes it do anything but raise ValueError or give finite weights."""
    parts = pack(typical(1, 2, 0, outliers=True, ordered=data.draw(st.booleans())))
    part = data.draw(st.sampled_from([part for part in PARTS if parts[part].numel()]))
    raw = parts[part].view(torch.uint8)
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        W_OI = unpack(parts)
    except ValueError:
        return
    assert torch.isfinite(W_OI).all()


# --- the package's own code


HEADERS = {
    "cuda_fp16.h": r"""
        #pragma once
        #include <algorithm>
        #include <cmath>
        #include <cstdint>
        // To the nearest float16, ties to even. Sums and products of two float16 rounded to float32 first come out the same.
        struct __half {
          uint16_t bits;
          operator float() const {
            int exponent = bits >> 10 & 31, fraction = bits & 1023;
            float size = exponent == 31 ? (fraction ? NAN : INFINITY)
                       : exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24);
            return bits >> 15 ? -size : size;
          }
        };
        inline __half __float2half_rn(float x) {
          uint16_t sign = std::signbit(x) << 15;
          x = std::fabs(x);
          if (std::isnan(x)) return {0x7e00};
          if (x >= 65520) return {uint16_t(sign | 0x7c00)};
          int exponent = x == 0 ? -14 : std::max(std::ilogb(x), -14);
          int places = std::nearbyint(std::ldexp(x, 10 - exponent));
          return {uint16_t(sign | ((exponent + 14) * 1024 + places))};
        }
        inline __half __float2half_rd(float x) { return __float2half_rn(x); }  // used for codes, which are exact
        inline float __half2float(__half x) { return x; }
        inline __half operator*(__half a, __half b) { return __float2half_rn(float(a) * float(b)); }
        inline __half operator-(__half a, __half b) { return __float2half_rn(float(a) - float(b)); }
        using half = __half;
        struct half2 { half x, y; };
    """,
    "cuda_runtime_api.h": r"""
        #pragma once
        using cudaStream_t = void*;
        using cudaEvent_t = void*;
        inline void cudaEventCreate(cudaEvent_t*) {}
        inline void cudaEventDestroy(cudaEvent_t) {}
        inline void cudaEventRecord(cudaEvent_t, cudaStream_t) {}
        inline void cudaEventSynchronize(cudaEvent_t) {}
        inline void cudaEventElapsedTime(float*, cudaEvent_t, cudaEvent_t) {}
        inline void cudaDeviceSynchronize() {}
    """,
    "cuda_runtime.h": "#include <cuda_runtime_api.h>\n",
    "ATen/cuda/CUDAContext.h": "namespace at::cuda { inline void* getCurrentCUDAStream(int) { return nullptr; } }\n",
    "c10/util/Exception.h": "",
    "torch/python.h": r"""
        #pragma once
        #include <cstdint>
        #include <stdexcept>
        #include <vector>
        namespace torch {
          enum Type { kAny, kChar, kHalf };
          struct Tensor {
            void* data;
            int64_t size;
            Type type;
            void* data_ptr() const { return data; }
            template <class T> T* data_ptr() const { return static_cast<T*>(data); }
            std::vector<int64_t> sizes() const { return {size}; }
            Type dtype() const { return type; }
            int get_device() const { return -1; }
          };
          inline void mv_out(Tensor&, const Tensor&, const Tensor&) {}
        }
        #define TORCH_CHECK(holds, message) if (!(holds)) throw std::invalid_argument(message);
        struct Bindings { template <class F> void def(const char*, F, const char*) {} };
        #define PYBIND11_MODULE(name, module) void bind(Bindings& module)
    """,
    "torch/script.h": "",
}
WRAPPER = r"""
    #include SOURCE
    int spqr_matvec(int, int, int, int, int, const void*, const void*, int, void*, void*, int, void*, void*, cudaStream_t,
                    void*, uint32_t) { throw std::logic_error("no GPU"); }
    using torch::Tensor, torch::kAny, torch::kChar, torch::kHalf;
    extern "C" void decode(int m, int n, int bits, int beta1, int beta2, void* dense, void* offsets, int offsets_size,
                           void* col_vals, int nnz, void* out) {
      dequantize_compressed(m, n, bits, beta1, beta2, Tensor{dense}, Tensor{offsets, offsets_size, kAny}, Tensor{col_vals},
                            nnz, Tensor{out});
    }
    extern "C" void compress(int m, int n, int bits, void* w, int beta1, int beta2, void* s, void* z, void* ss, void* sz,
                             void* zs, void* zz, void* offsets, void* offsets_out, void* col_vals, void* col_vals_out,
                             int strategy, void* out) {
      tensor_compress_interleaved(m, n, bits, {w, 0, kChar}, beta1, beta2, {s, 0, kChar}, {z, 0, kChar}, {ss, 0, kHalf},
                                  {sz, 0, kHalf}, {zs, 0, kHalf}, {zz, 0, kHalf}, {offsets}, {offsets_out}, {col_vals},
                                  {col_vals_out}, strategy, {out});
    }
"""


def build(source, folder):
    """The package's C++ as a shared library."""
    for name, text in HEADERS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "wrapper.cpp").write_text(WRAPPER)
    command = ["g++", "-std=c++20", "-O1", "-w", "-shared", "-fPIC", f"-I{folder}", f'-DSOURCE="{source}"']
    subprocess.run([*command, str(folder / "wrapper.cpp"), "-o", str(folder / "spqr.so")], check=True)
    return ctypes.CDLL(str(folder / "spqr.so"))


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """`spqr_quant.inference`, whose calls into CUDA's extension go to the same C++ without CUDA."""
    spec = importlib.util.find_spec("spqr_quant")
    if spec is None:
        pytest.skip("the package spqr_quant is not installed")
    if shutil.which("g++") is None:
        pytest.skip("there is no g++ to compile the package's code with")
    source = Path(spec.submodule_search_locations[0]) / "inference_kernels" / "spqr_cuda.cpp"
    library = build(source, tmp_path_factory.mktemp("spqr"))

    def pointers(values):
        """What the library takes: a tensor's address, and numbers as they are."""
        assert all(v.is_contiguous() for v in values if isinstance(v, torch.Tensor))
        return [ctypes.c_void_p(v.data_ptr()) if isinstance(v, torch.Tensor) else ctypes.c_int(int(v)) for v in values]

    def decode(*values):
        """It takes the number of offsets, too, behind these."""
        front, offsets, rest = values[:6], values[6], values[7:]
        library.decode(*pointers([*front, offsets, offsets.numel(), *rest]))

    kernels = ModuleType("spqr_quant.inference_kernels.cuda_kernel")
    kernels.call_dequantize_compressed = decode
    kernels.call_tensor_compress_interleaved = lambda *values: library.compress(*pointers(values))
    kernels.call_spqr_mul = kernels.call_spqr_mul_fused = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, kernels.__name__, kernels)
        yield importlib.import_module("spqr_quant.inference")
    for name in [name for name in sys.modules if name.partition(".")[0] == "spqr_quant"]:
        del sys.modules[name]


def decoded_by(package, parts, O, I):
    """What the package makes of it; its columns are as stored, so they are put in order here."""
    layer = package.QuantizedLinear(O, I, 3, 16, 16, *(parts[part] for part in PARTS))
    W_OI = layer.dequantize()
    if not layer.should_reorder():
        return W_OI
    order_I = parts["in_perm"].view(torch.int16).long() & 0xFFFF
    return torch.empty_like(W_OI).index_copy_(1, order_I, W_OI)


def legacy(package, weight, step_TG2, zero_TG2, order_I=None):
    """The same weight as the package's converter takes it: every tensor flat, one column of tiles after the other."""
    codes = weight.codes
    O, I = weight.shape
    stored = weight.outliers
    if order_I is not None and stored is not None:
        W_OI = torch.zeros(O, I, dtype=torch.float16)
        W_OI[stored.row_N, stored.column_N] = stored.value_N
        again = Outliers.of(W_OI[:, order_I], W_OI[:, order_I] != 0, torch.float16)
        assert torch.equal(again.count_O, stored.count_O)
        stored = again
    if stored is not None:
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), stored.count_O.cumsum(0)])
        column_N, value_N = stored.column_N, stored.value_N
    else:
        offsets, column_N, value_N = torch.zeros(O + 1), torch.empty(0), torch.empty(0)
    return package.SPQRLegacy(
        m=O,
        n=I,
        bits=3,
        W=codes.code_OK.to(torch.int8).flatten(),
        beta1=16,
        beta2=16,
        W_s=codes.scale_code_OG.T.to(torch.int8).flatten(),
        W_z=codes.zero_code_OG.T.to(torch.int8).flatten(),
        W_s_s=step_TG2[..., 0].T.contiguous().flatten(),
        W_s_z=zero_TG2[..., 0].T.contiguous().flatten(),
        W_z_s=step_TG2[..., 1].T.contiguous().flatten(),
        W_z_z=zero_TG2[..., 1].T.contiguous().flatten(),
        row_offsets=offsets.int(),
        col_ids=column_N.short(),
        values=value_N.half(),
        in_perm=order_I,
    )


def converted_by(package, weight, step_TG2, zero_TG2, form):
    """The tensors that the package's converter makes, by name."""
    layer = package.QuantizedLinear.from_legacy(
        legacy(package, weight, step_TG2, zero_TG2, weight.order_I), package.ModelArgs(3, 16, 16, form), "cpu"
    )
    found = {part: getattr(layer, part) for part in PARTS}
    return {part: torch.empty(0, dtype=torch.int32) if t is None else t.detach() for part, t in found.items()}


EXTRAS = pytest.mark.parametrize(
    "extras",
    [{}, {"outliers": True}, {"outliers": True, "ordered": True}, {"ordered": True}],
    ids=["plain", "outliers", "both", "ordered"],
)


@EXTRAS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_package_decodes_what_is_written(package, extras, dtype):
    for seed, (tiles, groups) in enumerate([(1, 1), (2, 3), (5, 2), (16, 8)]):
        weight = typical(tiles, groups, seed, dtype, **extras)
        parts = pack(weight)
        found_OI = decoded_by(package, parts, *weight.shape)
        assert found_OI.dtype == torch.float16
        assert torch.equal(found_OI, unpack(parts))
        wanted_OI = float_values(weight)
        assert ((found_OI.float() - wanted_OI).abs() <= 0.03 * scales_of(weight) + 2**-10 * wanted_OI.abs()).all()


@EXTRAS
def test_the_package_writes_the_same_bits(package, extras):
    for seed, (tiles, groups) in enumerate([(1, 1), (2, 3), (5, 2), (16, 8)]):
        weight, step_TG2, zero_TG2 = exact(tiles, groups, seed, **extras)
        parts = pack(weight)
        theirs = converted_by(package, weight, step_TG2, zero_TG2, package.SparseStorageConfiguration.CSR)
        for part in PARTS:
            assert torch.equal(parts[part], theirs[part].to(parts[part].dtype)), part
        assert torch.equal(decoded_by(package, theirs, *weight.shape), weight.dequantize())
        assert torch.equal(unpack(theirs), weight.dequantize())


@EXTRAS
@pytest.mark.parametrize(("tiles", "groups"), [(1, 2), (2, 3), (5, 2), (16, 8)])
def test_the_other_form_of_outliers_is_read(package, extras, tiles, groups):
    weight, step_TG2, zero_TG2 = exact(tiles, groups, 1, **extras)
    theirs = converted_by(package, weight, step_TG2, zero_TG2, package.SparseStorageConfiguration.PTCSR)
    assert theirs["row_offsets"].numel() == tiles + 1
    if tiles == 16 and "ordered" not in extras:
        # As many row offsets as 16 rows have in the common form, and nothing else that tells: a weight of another shape.
        assert unpack({**theirs, "row_offsets": torch.zeros(17).int(), "col_vals": torch.empty(0)}).shape == (16, 2048)
        return
    assert torch.equal(unpack(theirs), weight.dequantize())


def test_damage_to_the_other_form_is_named(package):
    weight, step_TG2, zero_TG2 = exact(2, 3, 1, outliers=True)
    theirs = converted_by(package, weight, step_TG2, zero_TG2, package.SparseStorageConfiguration.PTCSR)
    offsets, col_vals = theirs["row_offsets"], theirs["col_vals"]
    with pytest.raises(ValueError, match="row_offsets are not multiples of 16"):
        unpack({**theirs, "row_offsets": offsets - torch.tensor([0, 1, 0]).int()})
    with pytest.raises(ValueError, match="do not rise"):
        unpack({**theirs, "row_offsets": offsets[[0, 2, 1]]})
    # The second outlier of a row before its first.
    row = next(row for row in range(16) if col_vals[16 + row])
    swapped = col_vals.clone()
    swapped[[row, 16 + row]] = col_vals[[16 + row, row]]
    with pytest.raises(ValueError, match="out of order within a row"):
        unpack({**theirs, "col_vals": swapped})


@tries(40)
@given(data=st.data())
def test_whatever_words_are_read_the_package_decodes_the_same(package, data):
    """Any bits that are not refused, far from what a quantizer makes."""
    draw = torch.Generator().manual_seed(data.draw(SEEDS))
    shared_TG4 = torch.randint(0, 2**16, (2, 2, 4), generator=draw).to(torch.int16)
    shared_TG4 = torch.where(torch.isfinite(shared_TG4.view(torch.float16)), shared_TG4, 0)
    byte_TGP = shared_TG4.view(torch.uint8).repeat_interleave(2, 2).long()
    words_TGP = torch.randint(0, 2**54, byte_TGP.shape, generator=draw) | byte_TGP << 54
    parts = {**pack(typical(2, 2, 0, outliers=data.draw(st.booleans()))), "dense_weights": words_TGP.flatten()}
    found_OI = decoded_by(package, parts, 32, 32)
    if torch.isfinite(found_OI).all():
        assert torch.equal(unpack(parts), found_OI)
    else:
        with pytest.raises(ValueError, match="stands for values that are not finite"):
            unpack(parts)
