"""The layouts by input feature: they lie in the files as docs/format.md says, come back to the bit, and nothing hostile is
believed.

O: output features, I: input features, G: groups of inputs.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from random_examples import tries

from secateur.core.quantized import Outliers, Quantized
from secateur.errors import CheckpointError
from secateur.formats.layouts.bitmap import Bitmap
from secateur.formats.layouts.choose import layout_by_inputs, layout_for
from secateur.formats.layouts.columns import Columns
from secateur.formats.layouts.columns_bitmap import ColumnsBitmap
from secateur.formats.layouts.columns_int import ColumnsInt
from secateur.formats.layouts.layout import LAYOUTS, layout_from_config
from secateur.formats.layouts.packed_int import Uniform
from secateur.kernels.packed import nbytes

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SIZES = st.integers(1, 70)
DTYPES = st.sampled_from([BF16, FP16, FP32])


def dense(O, I, dtype, density=1.0, seed=0):
    """Weights of which about this share is not zero; some inputs have none, some have all."""
    draw = torch.Generator().manual_seed(seed)
    keep_OI = torch.rand(O, I, generator=draw) < density
    kind_I = torch.randint(0, 6, (1, I), generator=draw)
    keep_OI = (keep_OI | (kind_I == 0)) & ((kind_I != 1) | (density == 1))
    return torch.where(keep_OI, torch.randn(O, I, generator=draw), 0).to(dtype)


def coded(O, I, bits=4, group_size=8, symmetric=False, dtype=BF16, half=FP16, seed=0):
    draw = torch.Generator().manual_seed(seed)
    G = -(-I // group_size)
    code_OI = torch.randint(0, 2**bits, (O, I), generator=draw).to(torch.uint8)
    scale_OG = (torch.rand(O, G, generator=draw) + 0.1).to(half)
    zero_OG = None if symmetric else torch.randint(0, 2**bits, (O, G), generator=draw).to(torch.uint8)
    return Quantized(Uniform(bits, group_size, code_OI, scale_OG, zero_OG), (O, I), dtype)


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


def comes_back(layout, parts, W_OI, count):
    """All ways to read it find the same, and `store` gives back what was read."""
    assert layout_from_config(layout.to_config()) == layout
    loaded = layout.load(parts)
    assert same(layout.unpack(parts), W_OI)
    assert layout.unpack(parts).is_contiguous()
    assert same(loaded.dense(), W_OI)
    assert same(loaded.expanded(), W_OI)
    assert same(torch.cat([W_RI for _, W_RI in loaded.dense_rows()]), W_OI)
    some = slice(len(W_OI) // 3, len(W_OI) // 3 + 1)
    assert same(loaded.rows(some.start, some.stop).dense(), W_OI[some])
    back = layout.store(loaded)
    assert {part: tensor.reshape(parts[part].shape).tolist() for part, tensor in back.items()} == {
        part: tensor.tolist() for part, tensor in parts.items()
    }
    told = layout.describe(parts)
    assert (told.layout, told.shape, told.count, told.outliers) == (layout.name, tuple(W_OI.shape), count, 0)
    assert told.bytes == sum(tensor.nbytes for tensor in parts.values())
    assert told.finite
    assert layout.form(parts) == (tuple(W_OI.shape), W_OI.dtype)


@tries(40)
@given(O=SIZES, I=SIZES, dtype=DTYPES, seed=st.integers(0, 999))
def test_columns_come_back(O, I, dtype, seed):
    W_OI = dense(O, I, dtype, 0.7, seed)
    parts = Columns().pack(W_OI)
    assert set(parts) == {"columns"}
    assert torch.equal(parts["columns"], W_OI.T)
    assert parts["columns"].is_contiguous()
    comes_back(Columns(), parts, W_OI, int(torch.count_nonzero(W_OI)))


@tries(60)
@given(O=SIZES, I=SIZES, dtype=DTYPES, density=st.sampled_from([0.0, 0.02, 0.5, 1.0]), seed=st.integers(0, 999))
@example(O=515, I=3, dtype=BF16, density=0.5, seed=1)
@example(O=1, I=1, dtype=FP32, density=0.0, seed=0)
def test_bitmaps_come_back(O, I, dtype, density, seed):
    W_OI = dense(O, I, dtype, density, seed)
    parts = ColumnsBitmap().pack(W_OI)
    assert {part: tensor.dtype for part, tensor in parts.items()} == {
        "compressed": dtype,
        "bitmask": torch.uint8,
        "shape": torch.int64,
    }
    mask_IO = np.unpackbits(parts["bitmask"].numpy(), axis=1, bitorder="little")
    assert parts["bitmask"].shape == (I, -(-O // 8))
    assert np.array_equal(mask_IO[:, :O], (W_OI.T != 0).numpy())
    assert not mask_IO[:, O:].any()
    assert torch.equal(parts["compressed"], W_OI.T[W_OI.T != 0])
    assert parts["shape"].tolist() == [O, I]
    comes_back(ColumnsBitmap(), parts, W_OI, int(torch.count_nonzero(W_OI)))


def twin_dense(parts, config):
    """A coded weight in float64, bit by bit, as docs/format.md has it."""
    (O, I), bits, g = parts["shape"].tolist(), config["bits"], config["group_size"]

    def code(stream_B, rows, row, k):
        width = len(stream_B) // rows
        line = "".join(format(byte, "08b")[::-1] for byte in stream_B[row * width : (row + 1) * width].tolist())
        assert set(line[O * bits :]) <= {"0"}
        return int(line[k * bits : (k + 1) * bits][::-1], 2)

    G, W_OI = -(-I // g), np.zeros((O, I))
    for i in range(I):
        for o in range(O):
            zero = 2 ** (bits - 1) if config["symmetric"] else code(parts["zero"], G, i // g, o)
            W_OI[o, i] = (code(parts["codes"], I, i, o) - zero) * float(parts["scale"][i // g, o])
    return torch.from_numpy(W_OI)


@tries(40)
@given(
    O=st.integers(1, 20),
    I=st.integers(1, 20),
    bits=st.integers(2, 8),
    group_size=st.sampled_from([2, 3, 8, 64, 2**30]),
    symmetric=st.booleans(),
    dtype=DTYPES,
    half=st.sampled_from([FP16, BF16]),
    seed=st.integers(0, 999),
)
def test_codes_come_back(O, I, bits, group_size, symmetric, dtype, half, seed):
    weight = coded(O, I, bits, group_size, symmetric, dtype, half, seed)
    layout = layout_by_inputs(weight)
    assert layout == ColumnsInt(bits, group_size, symmetric, dtype)
    parts = layout.pack(weight)
    assert set(parts) == {"codes", "scale", "shape"} | (set() if symmetric else {"zero"})
    assert parts["scale"].shape == (-(-I // group_size), O)
    W_OI = weight.dequantize()
    assert same(twin_dense(parts, layout.to_config()).to(dtype), W_OI)
    assert same(layout.read(parts).dequantize(), W_OI)
    comes_back(layout, parts, W_OI, O * I)
    # The same weight by output feature is the same weight.
    rows = layout_for(weight)
    assert same(rows.unpack(rows.pack(weight)), W_OI)


def test_the_example_of_the_format():
    code_OI = torch.tensor([[5, 0, 7], [2, 1, 6]], dtype=torch.uint8)
    scale_OG = torch.tensor([[0.5, 1], [0.25, 2]], dtype=FP16)
    weight = Quantized(Uniform(3, 2, code_OI, scale_OG, None), (2, 3), FP32)
    parts = layout_by_inputs(weight).pack(weight)
    assert bytes(parts["codes"].tolist()) == bytes.fromhex("150837")
    assert bytes(parts["scale"].view(torch.uint8).flatten().tolist()) == bytes.fromhex("00380034003c0040")
    assert layout_by_inputs(weight).unpack(parts).tolist() == [[0.5, -2, 3], [-0.5, -0.75, 4]]


def test_pieces_of_inputs_make_the_whole(monkeypatch):
    monkeypatch.setattr("secateur.kernels.column_weight._WEIGHTS_AT_ONCE", 1)
    weight = coded(9, 21, 3, 4)
    layout = layout_by_inputs(weight)
    assert same(layout.load(layout.pack(weight)).dense(), weight.dequantize())


def test_which_layout():
    assert layout_by_inputs(torch.zeros(2, 3)) == Columns()
    assert layout_by_inputs(torch.zeros(2, 3), sparse=True) == ColumnsBitmap()
    weight = coded(4, 8)
    assert [name for name, layout in LAYOUTS.items() if layout.by_inputs] == [
        "columns",
        "columns-bitmap",
        "columns-int",
    ]
    with pytest.raises(ValueError, match="stored in another order"):
        layout_by_inputs(replace(weight, order_I=torch.arange(8)))
    with pytest.raises(ValueError, match="'sparse-int' has no form by input feature"):
        layout_by_inputs(replace(weight, keep_OI=torch.ones(4, 8, dtype=torch.bool)))
    outliers = Outliers(torch.zeros(4, dtype=torch.long), torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=FP16))
    with pytest.raises(ValueError, match="with outliers has no form by input feature"):
        layout_by_inputs(replace(weight, outliers=outliers))
    layout = layout_by_inputs(weight)
    for other in (
        replace(weight, order_I=torch.arange(8)),
        replace(weight, keep_OI=torch.ones(4, 8, dtype=torch.bool)),
        coded(4, 8, bits=3),
    ):
        with pytest.raises(ValueError, match=r"it has a mask, an order|its codes are stored as"):
            layout.pack(other)


def test_bytes_that_are_read():
    W_OI, codes = dense(64, 256, BF16, 0.5), coded(64, 256, 4, 64)
    for layout, weight in ((Columns(), W_OI), (ColumnsBitmap(), W_OI), (layout_by_inputs(codes), codes)):
        loaded = layout.load(layout.pack(weight))
        assert loaded.read_bytes(1.0) == nbytes(loaded)
        assert loaded.read_bytes(0.0) == 0
        assert 0.5 * nbytes(loaded) <= loaded.read_bytes(0.5) <= 0.6 * nbytes(loaded)
    assert Bitmap().load(Bitmap().pack(W_OI)).read_bytes(0.5) == nbytes(Bitmap().load(Bitmap().pack(W_OI)))


def test_values_that_are_not_finite_are_told():
    W_OI = dense(5, 6, FP16)
    W_OI[2, 3] = float("nan")
    for layout in (Columns(), ColumnsBitmap()):
        assert not layout.describe(layout.pack(W_OI)).finite


# --- hostile files

HUGE = 2**31 - 1


def good(layout):
    if layout.rounded:
        return layout.pack(coded(10, 12, layout.bits, layout.group_size, layout.symmetric, layout.dtype))
    return layout.pack(dense(10, 12, BF16, 0.5))


INT, SYMMETRIC = ColumnsInt(3, 5, False, BF16), ColumnsInt(3, 5, True, BF16)
BAD = [
    (Columns(), {"columns": None}, "'columns' is missing"),
    (Columns(), {"columns": torch.zeros(12, 10, dtype=torch.int16)}, "'columns' has dtype torch.int16"),
    (Columns(), {"columns": torch.zeros(12, dtype=BF16)}, "shape .12."),
    (Columns(), {"columns": torch.zeros(0, 10, dtype=BF16)}, "shape .0, 10."),
    (ColumnsBitmap(), {"shape": None}, "'shape' is missing"),
    (ColumnsBitmap(), {"shape": torch.tensor([12, 10])}, "'bitmask' has dtype"),
    (ColumnsBitmap(), {"shape": torch.tensor([HUGE, HUGE])}, "'bitmask' has dtype"),
    (ColumnsBitmap(), {"shape": torch.tensor([10, -12])}, "not two positive sizes"),
    (ColumnsBitmap(), {"shape": torch.tensor([10, 2**40])}, "not two positive sizes"),
    (ColumnsBitmap(), {"shape": torch.tensor([10.0, 12.0])}, "not an integer's"),
    (ColumnsBitmap(), {"bitmask": torch.full((12, 2), 255, dtype=torch.uint8)}, "bits set beyond"),
    (ColumnsBitmap(), {"bitmask": torch.zeros(12, 2, dtype=torch.uint8)}, "0 bits set but there are"),
    (ColumnsBitmap(), {"bitmask": torch.zeros(12, 2, dtype=torch.int8)}, "'bitmask' has dtype torch.int8"),
    (ColumnsBitmap(), {"compressed": torch.zeros(3, dtype=BF16)}, "but there are 3 values"),
    (ColumnsBitmap(), {"compressed": torch.zeros(3, dtype=torch.int32)}, "'compressed' has dtype torch.int32"),
    (INT, {"shape": torch.tensor([HUGE, HUGE])}, "'scale' has dtype"),
    (INT, {"shape": torch.tensor([HUGE, 1]), "scale": torch.ones(1, 2, dtype=FP16)}, "'scale' has dtype"),
    (INT, {"codes": torch.zeros(47, dtype=torch.uint8)}, "codes has 47 bytes, not 48"),
    (INT, {"codes": torch.full((48,), 255, dtype=torch.uint8)}, "bits set after the last code"),
    (INT, {"codes": torch.zeros(12, 4, dtype=torch.uint8)}, "'codes' has dtype"),
    (INT, {"scale": torch.ones(3, 9, dtype=FP16)}, "'scale' has dtype"),
    (INT, {"scale": torch.ones(3, 10)}, "'scale' has dtype torch.float32"),
    (INT, {"scale": torch.zeros(3, 10, dtype=FP16)}, "not positive"),
    (INT, {"scale": torch.full((3, 10), float("inf"), dtype=FP16)}, "not finite"),
    (INT, {"zero": None}, "'zero' is missing"),
    (INT, {"zero": torch.zeros(11, dtype=torch.uint8)}, "zero has 11 bytes, not 12"),
    (INT, {"zero": torch.full((12,), 255, dtype=torch.uint8)}, "zero has bits set after"),
    (SYMMETRIC, {"zero": torch.zeros(12, dtype=torch.uint8)}, "the config says that it is symmetric"),
    (ColumnsInt(3, 5, True, FP16), {"scale": torch.full((3, 10), 6e4, dtype=FP16)}, "beyond torch.float16"),
]


@pytest.mark.parametrize(("layout", "changes", "message"), BAD, ids=[f"{b[0].name}-{i}" for i, b in enumerate(BAD)])
def test_damage_is_found(layout, changes, message):
    parts = {**good(layout), **changes}
    parts = {part: tensor for part, tensor in parts.items() if tensor is not None}
    for use in (layout.load, layout.unpack, layout.describe):
        with pytest.raises(ValueError, match=message):
            use(parts)
    if layout.rounded and "beyond" not in message:
        with pytest.raises(ValueError, match=message):
            layout.read(parts)


@pytest.mark.parametrize(
    "config",
    [
        {"layout": "columns-int"},
        {"layout": "columns-int", "bits": 9, "group_size": 8, "symmetric": True, "dtype": "bfloat16"},
        {"layout": "columns-int", "bits": True, "group_size": 8, "symmetric": True, "dtype": "bfloat16"},
        {"layout": "columns-int", "bits": 4, "group_size": 0, "symmetric": True, "dtype": "bfloat16"},
        {"layout": "columns-int", "bits": 4, "group_size": 8, "symmetric": 1, "dtype": "bfloat16"},
        {"layout": "columns-int", "bits": 4, "group_size": 8, "symmetric": True, "dtype": "int8"},
        {"layout": "columns-float"},
    ],
)
def test_parameters_that_make_no_sense(config):
    with pytest.raises(CheckpointError, match=r"make no sense|not known to this version"):
        layout_from_config(config)
