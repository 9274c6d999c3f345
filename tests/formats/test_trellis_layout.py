"""The layout `trellis`: what is packed lies in the files as docs/format.md says and comes back to the bit, and nothing hostile
is believed.

O: output features, I: input features, T: weights of a ring, B: bytes of a ring.
"""

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from random_examples import tries

from secateur.core.quantized import Quantized
from secateur.errors import CheckpointError
from secateur.formats.layouts.choose import layout_for
from secateur.formats.layouts.layout import layout_from_config
from secateur.formats.layouts.packed_int import PackedInt
from secateur.formats.layouts.trellis_rings import Trellis, TrellisCodes
from secateur.kernels.backends import linear, prepare
from secateur.solvers.hadamard import block_of
from secateur.solvers.trellis import ring_of

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def make(O, I, K=3, L=12, block=128, half=FP16, dtype=FP32, seed=0):
    draw = torch.Generator().manual_seed(seed)
    T, L = ring_of(O, K, L)
    symbol_OI = torch.randint(0, 2**K, (O, I), generator=draw).to(torch.uint8)
    scales = (torch.randn(n, generator=draw).to(half) for n in (O, I))
    return Quantized(TrellisCodes(K, L, T, block, symbol_OI, *scales), (O, I), dtype)


def hadamard(n):
    return np.array([[(-1) ** (i & j).bit_count() for j in range(n)] for i in range(n)]) / n**0.5


def twin_dense(parts, config):
    """The weight in float64, bit by bit, as docs/format.md has it."""
    O, I = parts["shape"].tolist()
    K, T, L = config["bits"], config["ring"], config["states"].bit_length() - 1
    Q_OI = np.zeros((O, I))
    for ring in range(O // T):
        for i in range(I):
            stream = "".join(format(byte, "08b")[::-1] for byte in parts["codes"][ring, i].tolist())
            assert set(stream[T * K :]) <= {"0"}
            circle = stream[: T * K] * 2
            for t in range(T):
                while len(circle) < t * K + L:
                    circle += circle
                state = int(circle[t * K : t * K + L][::-1], 2)
                Q_OI[ring * T + t, i] = (sum((state * 0x83DCD12D % 2**32).to_bytes(4, "little")) - 510) / 147.8
    blocks = [block_of(n, config["block"]) for n in (O, I)]
    R_out, R_in = (np.kron(np.eye(n // block), hadamard(block)) for n, block in zip((O, I), blocks, strict=True))
    scale_out, scale_in = (parts[part].double().numpy() for part in ("scale_out", "scale_in"))
    return scale_out[:, None] * (R_out @ Q_OI @ R_in) * scale_in


@tries(60)
@given(
    O=st.integers(1, 70),
    I=st.integers(1, 40),
    K=st.integers(2, 4),
    L=st.integers(4, 16),
    block=st.sampled_from([1, 8, 128]),
    half=st.sampled_from([FP16, BF16]),
    dtype=st.sampled_from([FP32, FP16, BF16]),
    seed=st.integers(0, 999),
)
@example(O=1, I=1, K=2, L=12, block=128, half=FP16, dtype=FP32, seed=0)
@example(O=7, I=3, K=3, L=16, block=128, half=FP16, dtype=FP32, seed=0)  # a ring ends within a byte
@example(O=256, I=2, K=2, L=12, block=128, half=BF16, dtype=BF16, seed=0)
@example(O=514, I=2, K=3, L=12, block=2, half=BF16, dtype=BF16, seed=0)
def test_a_weight_lies_in_the_files_as_it_is_said_to(O, I, K, L, block, half, dtype, seed):
    weight = make(O, I, K, L, block, half, dtype, seed)
    layout = layout_for(weight)
    config = layout.to_config()
    assert layout_from_config(config) == layout
    parts = layout.pack(weight)
    assert {part: tensor.dtype for part, tensor in parts.items()} == {
        "codes": torch.uint8,
        "scale_in": half,
        "scale_out": half,
        "shape": torch.int64,
    }
    T = config["ring"]
    assert parts["codes"].shape == (O // T, I, -(-T * K // 8))
    dense_OI = weight.dequantize()
    exact_OI = torch.from_numpy(twin_dense(parts, config))
    step = torch.finfo(dtype).eps * exact_OI.abs().max() + 1e-5
    assert (dense_OI.double() - exact_OI).abs().max() <= step
    # All ways to read it find the same bits.
    loaded = layout.load(parts)
    assert torch.equal(layout.unpack(parts), dense_OI)
    assert torch.equal(loaded.dense(), dense_OI)
    assert torch.equal(layout.read(parts).dequantize(), dense_OI)
    assert {part: tensor.reshape(parts[part].shape).tolist() for part, tensor in layout.store(loaded).items()} == {
        part: tensor.tolist() for part, tensor in parts.items()
    }
    stored = layout.describe(parts)
    assert (stored.layout, stored.shape, stored.count, stored.outliers) == ("trellis", (O, I), O * I, 0)
    assert stored.bytes == parts["codes"].numel() + 2 * (O + I) + 16


@pytest.mark.parametrize(("O", "I"), [(192, 64), (96, 40), (30, 7), (257, 8)])
def test_a_piece_is_as_the_whole_has_it(O, I, monkeypatch):
    weight = make(O, I)
    loaded = layout_for(weight).load(layout_for(weight).pack(weight))
    monkeypatch.setattr("secateur.kernels.trellis_weight._WEIGHTS_AT_ONCE", 1)
    monkeypatch.setattr("secateur.kernels.trellis_weight._WEIGHTS_OF_A_PIECE", 1)
    dense_OI = weight.dequantize()
    starts = []
    for start, W in loaded.dense_rows():
        assert torch.equal(W, dense_OI[start : start + len(W)])
        starts.append(start)
    assert starts == list(range(0, O, loaded.unit))
    assert torch.equal(loaded.dense(), dense_OI)
    with pytest.raises(ValueError, match="belong together"):
        loaded.rows(0, 1)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize(("O", "I", "T"), [(96, 64, 5), (48, 9, 1), (7, 5, 3)])
def test_backends_without_kernels_of_its_own_compute_with_it(O, I, T, dtype):
    weight = make(O, I, dtype=dtype)
    layout = layout_for(weight)
    loaded = layout.load(layout.pack(weight))
    exact_OI = weight.codes.values().double()
    draw = torch.Generator().manual_seed(1)
    x_TI, bias_O = torch.randn(T, I, generator=draw).to(dtype), torch.randn(O, generator=draw).to(dtype)
    wanted_TO = x_TI.double() @ exact_OI.T + bias_O.double()
    size = (x_TI.double().abs() @ exact_OI.T.abs()).max() + bias_O.double().abs().max()
    for backend in ("torch", "dense"):
        found_TO = linear(prepare(loaded, backend, dtype=dtype), x_TI, bias_O)
        assert found_TO.dtype == dtype
        assert (found_TO.double() - wanted_TO).abs().max() < 2 * torch.finfo(dtype).eps * size
        grad_TI = prepare(loaded, backend, dtype=dtype).backend.gradient(
            prepare(loaded, backend, dtype=dtype).weight, wanted_TO.to(dtype)
        )
        exact_TI = wanted_TO.to(dtype).double() @ exact_OI
        size_TI = wanted_TO.abs() @ exact_OI.abs()
        assert (grad_TI.double() - exact_TI).abs().max() < 2 * torch.finfo(dtype).eps * size_TI.max()


def test_the_worked_example():
    """That of docs/format.md."""
    layout = layout_from_config(
        {"layout": "trellis", "bits": 2, "states": 16, "ring": 4, "block": 2, "dtype": "float32"}
    )
    parts = {
        "codes": torch.tensor([[[0x36], [0x9C]]], dtype=torch.uint8),
        "scale_in": torch.tensor([1.0, -0.5], dtype=FP16),
        "scale_out": torch.tensor([2.0, 1.0, 1.0, -1.0], dtype=FP16),
        "shape": torch.tensor([4, 2]),
    }
    wanted = torch.tensor([[-488, 0], [-95, 28.5], [20, 0], [-95, -28.5]]) / 147.8
    assert torch.allclose(layout.unpack(parts), wanted, atol=1e-6)


# --- what hostile files say


def damaged(change):
    weight = make(24, 10)
    layout = layout_for(weight)
    parts = layout.pack(weight)
    change(parts)
    return layout, parts


def without(part):
    return lambda parts: parts.pop(part)


def put(part, make_tensor):
    return lambda parts: parts.update({part: make_tensor(parts[part])})


def at(part, index, value):
    def change(parts):
        parts[part][index] = value

    return change


DAMAGES = {
    **{f"no {part}": (without(part), f"'{part}' is missing") for part in ("codes", "scale_in", "scale_out", "shape")},
    "codes of another dtype": (put("codes", lambda t: t.to(torch.int16)), "'codes' has dtype torch.int16"),
    "too few codes": (put("codes", lambda t: t[:, 1:]), r"'codes' has dtype torch.uint8 and shape \[1, 9, 9\]"),
    "short rings": (put("codes", lambda t: t[:, :, 1:]), "'codes' has"),
    "flat codes": (put("codes", lambda t: t.flatten()), "'codes' has"),
    "scales of another dtype": (put("scale_in", lambda t: t.float()), "'scale_in' has dtype torch.float32"),
    "too many scales": (put("scale_out", lambda t: torch.cat((t, t))), "'scale_out' has"),
    "NaN": (at("scale_in", 3, torch.nan), "scale_in holds values that are not finite"),
    "infinity": (at("scale_out", 3, torch.inf), "scale_out holds values that are not finite"),
    "outputs that rings do not divide": (at("shape", 0, 25), "25 outputs, which do not divide into rings of 24"),
    "other outputs": (at("shape", 0, 48), "'codes' has"),
    "other inputs": (at("shape", 1, 11), "'codes' has"),
    "no outputs": (at("shape", 0, 0), "not two positive sizes"),
    "huge": (at("shape", 1, 2**40), "not two positive sizes"),
    "a huge number of inputs": (at("shape", 1, 2**31 - 1), "'codes' has"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_parts_are_refused(name):
    change, says = DAMAGES[name]
    layout, parts = damaged(change)
    for read in (layout.load, layout.unpack, layout.read, layout.describe):
        with pytest.raises(ValueError, match=says):
            read(parts)


def test_bits_after_a_rings_last_symbol_are_refused():
    weight = make(7, 3)  # 21 bits
    layout = layout_for(weight)
    parts = layout.pack(weight)
    parts["codes"][0, 1, -1] |= 1 << 5
    with pytest.raises(ValueError, match="bits set after a ring's last symbol"):
        layout.load(parts)


def test_weights_beyond_their_dtype_are_refused():
    weight = make(24, 10, dtype=FP16)
    layout = layout_for(weight)
    parts = layout.pack(weight)
    parts["scale_out"].fill_(60000)
    parts["scale_in"].fill_(60000)
    with pytest.raises(ValueError, match=r"beyond torch.float16"):
        layout.load(parts)


ENTRY = {"layout": "trellis", "bits": 3, "states": 4096, "ring": 24, "block": 128, "dtype": "float32"}


@pytest.mark.parametrize(
    ("key", "values"),
    {
        "bits": (None, 1, 5, 8, 3.0, "3", True, -3, 2**63),
        "states": (None, 0, 2, 12, 4095, 2**17, 2**64, 4096.0, "4096", True, [4096]),
        "ring": (None, 0, -1, 3, 2.5, "24", True, 2**31, 2**70),
        "block": (None, 0, 3, 96, 2048, -128, 128.0, "128", True),
        "dtype": (None, "int8", "float64", 1, ["float32"]),
    }.items(),
)
def test_parameters_that_make_no_sense_are_refused(key, values):
    assert layout_from_config(ENTRY) == Trellis(3, 12, 24, 128, FP32)
    for value in values:
        with pytest.raises(CheckpointError, match="'trellis' with parameters that make no sense"):
            layout_from_config({**ENTRY, key: value})
    with pytest.raises(CheckpointError, match="'trellis' with parameters that make no sense"):
        layout_from_config({name: value for name, value in ENTRY.items() if name != key})


def test_what_it_does_not_hold_is_not_packed():
    weight = make(24, 10)
    with pytest.raises(ValueError, match="this layout is"):
        Trellis(2, 12, 24, 128, FP32).pack(weight)
    with pytest.raises(ValueError, match="this layout is"):
        PackedInt(4, 8, False, FP32).pack(weight)
    for more in ({"keep_OI": torch.ones(24, 10, dtype=torch.bool)}, {"order_I": torch.arange(10)}):
        with pytest.raises(ValueError, match="does not store"):
            layout_for(weight).pack(Quantized(weight.codes, (24, 10), FP32, **more))
