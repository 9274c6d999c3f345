"""The layout `ternary-dict`: codes say exactly what was coded, take what theory says, and nothing hostile is believed.

O: output features, I: input features, N: codes.
"""

import heapq
import math
import pickle
from copy import deepcopy

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
from secateur.formats.layouts.ternary_dict import TernaryCodes, TernaryDict
from secateur.kernels.backends import linear, prepare
from secateur.kernels.cpu import cpu_backend

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def drawn(O, I, zeros, seed=0):
    draw = torch.Generator().manual_seed(seed)
    other_OI = torch.randint(1, 3, (O, I), generator=draw)
    return torch.where(torch.rand(O, I, generator=draw) < zeros, 0, other_OI).to(torch.uint8)


def make(O, I, zeros=0.8, half=BF16, dtype=FP32, seed=0):
    draw = torch.Generator().manual_seed(seed)
    low_O, high_O = (torch.randn(O, generator=draw).abs().to(half) for _ in range(2))
    return Quantized(TernaryCodes(drawn(O, I, zeros, seed), -low_O, high_O), (O, I), dtype)


def sequences(z):
    """Those of a dictionary in the order of their codes, as docs/format.md has it."""
    zero, other = math.floor(4096 * math.log2(64 / z) + 0.5), math.floor(4096 * math.log2(128 / (64 - z)) + 0.5)
    there, open_ = {0: ""}, [(0, 0)]
    made = 1
    for _ in range(32767):
        cost, number = heapq.heappop(open_)
        said = there.pop(number)
        for letter in "0+-":
            there[made] = said + letter
            if len(said) + 1 < 255:
                heapq.heappush(open_, (cost + (zero if letter == "0" else other), made))
            made += 1
    return list(there.values())


@pytest.mark.parametrize("z", [1, 32, 57, 63])
def test_a_file_reads_as_the_docs_say(z):
    weight = make(5, 300, {1: 0.0, 63: 1.0}.get(z, z / 64))
    weight.codes.symbol_OI[2] = 0
    parts = layout_for(weight).pack(weight)
    assert abs(int(parts["zeros"]) - z) < 13
    said = sequences(int(parts["zeros"]))
    assert len(said) == 65535
    for o in range(5):
        first, last = parts["offsets"][o : o + 2].tolist()
        row = "".join(said[code] for code in parts["codes"][first:last].tolist())
        assert set(row[300:]) <= {"0"}
        assert len(row) - len(said[int(parts["codes"][last - 1])]) < 300 <= len(row)
        assert row[:300] == "".join("0+-"[symbol] for symbol in weight.codes.symbol_OI[o].tolist())


@tries(40)
@given(
    O=st.integers(1, 40),
    I=st.integers(1, 500),
    zeros=st.sampled_from([0, 0.4, 0.885, 0.99, 1]),
    half=st.sampled_from([FP16, BF16]),
    dtype=st.sampled_from([FP32, FP16, BF16]),
    seed=st.integers(0, 999),
)
@example(O=1, I=1, zeros=1, half=FP16, dtype=FP32, seed=0)
@example(O=3, I=5000, zeros=1, half=FP16, dtype=BF16, seed=0)  # many codes of zeros alone
def test_it_comes_back_to_the_bit(O, I, zeros, half, dtype, seed):
    weight = make(O, I, zeros, half, dtype, seed)
    layout = layout_for(weight)
    assert layout_from_config(layout.to_config()) == layout == TernaryDict(dtype)
    parts = layout.pack(weight)
    found = layout.read(parts)
    for name in ("symbol_OI", "low_O", "high_O"):
        assert torch.equal(getattr(found.codes, name), getattr(weight.codes, name))
    dense_OI = weight.dequantize()
    loaded = layout.load(parts)
    assert dense_OI.dtype == dtype
    for W in (layout.unpack(parts), loaded.dense(), loaded.expanded(), found.dequantize()):
        assert torch.equal(W, dense_OI)
    half_rows = loaded.rows(O // 2, O)
    assert torch.equal(half_rows.dense(), dense_OI[O // 2 :])
    assert torch.equal(half_rows.expanded(), dense_OI[O // 2 :])
    stored = layout.store(loaded)
    assert {part: (t.dtype, t.tolist()) for part, t in stored.items()} == {
        part: (t.dtype, t.tolist()) for part, t in parts.items()
    }
    told = layout.describe(parts)
    assert (told.layout, told.shape, told.count) == ("ternary-dict", (O, I), O * I)
    assert told.bytes == 2 * len(parts["codes"]) + 4 * (O + 1) + 4 * O + 1 + 16


@pytest.mark.parametrize("zeros", [0.5, 0.7, 0.885, 0.95])
def test_codes_take_little_more_than_the_entropy(zeros):
    symbol_OI = drawn(40, 8192, zeros)
    weight = Quantized(TernaryCodes(symbol_OI, *(torch.ones(40).half() for _ in range(2))), symbol_OI.shape, FP32)
    bits = 16 * len(layout_for(weight).pack(weight)["codes"]) / symbol_OI.numel()
    share = torch.bincount(symbol_OI.flatten().long(), minlength=3).double() / symbol_OI.numel()
    entropy = float(-(share * share.log2()).sum())
    assert entropy < bits < entropy * (1.05 if zeros < 0.9 else 1.1)


def test_there_is_one_dictionary_of_each():
    weight = make(4, 20)
    loaded = layout_for(weight).load(layout_for(weight).pack(weight))
    for copy in (deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
        assert copy.dictionary is loaded.dictionary
        assert torch.equal(copy.dense(), loaded.dense())


@pytest.mark.thin(3)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize(("O", "I", "T"), [(96, 64, 1), (48, 9, 5), (7, 300, 8), (7, 300, 9), (130, 70, 40)])
@pytest.mark.parametrize("backend", ["torch", "dense", "cpu"])
def test_backends_compute_with_it(backend, O, I, T, dtype):
    if backend == "cpu" and cpu_backend.missing():
        pytest.skip(cpu_backend.missing())
    weight = make(O, I, 0.6, dtype=dtype)
    layout = layout_for(weight)
    loaded = layout.load(layout.pack(weight))
    exact_OI = weight.dequantize().double()
    draw = torch.Generator().manual_seed(1)
    x_TI, bias_O = torch.randn(T, I, generator=draw).to(dtype), torch.randn(O, generator=draw).to(dtype)
    wanted_TO = x_TI.double() @ exact_OI.T + bias_O.double()
    size = (x_TI.double().abs() @ exact_OI.T.abs()).max() + bias_O.double().abs().max()
    prepared = prepare(loaded, backend, dtype=dtype)
    assert (prepared.backend.name, prepared.shape) == (backend, (O, I))
    found_TO = linear(prepared, x_TI, bias_O)
    assert found_TO.dtype == dtype
    assert (found_TO.double() - wanted_TO).abs().max() < 2 * torch.finfo(dtype).eps * size
    assert (linear(prepared, x_TI).double() - (wanted_TO - bias_O.double())).abs().max() < (
        2 * torch.finfo(dtype).eps * size
    )
    grad_TI = prepared.backend.gradient(prepared.weight, wanted_TO.to(dtype))
    assert (grad_TI.double() - wanted_TO.to(dtype).double() @ exact_OI).abs().max() < (
        2 * torch.finfo(dtype).eps * (wanted_TO.abs() @ exact_OI.abs()).max()
    )


@pytest.mark.skipif(cpu_backend.missing() is not None, reason="no compiled kernels")
def test_the_kernel_touches_nothing_outside_whatever_codes_say():
    weight = make(6, 50)
    loaded = layout_for(weight).load(layout_for(weight).pack(weight))
    features, codes_N, *rest = loaded.operands()
    for code in (-1, 0, 65534 - 2**16, 7):
        for operands in ((features, torch.full_like(codes_N, code), *rest), (1, codes_N, *rest)):
            W_OI = torch.ops.secateur.ternary_decode(*operands, torch.empty(0))
            assert W_OI.shape == (6, operands[0])
            assert torch.isfinite(W_OI).all()
            assert torch.isfinite(torch.ops.secateur.ternary_linear(torch.ones(3, operands[0]), *operands, None)).all()


# --- what hostile files say


def put(part, make_tensor):
    return lambda parts: parts.update({part: make_tensor(parts[part])})


def at(part, index, value):
    def change(parts):
        parts[part] = parts[part].clone()
        parts[part].view(torch.int16 if part == "codes" else parts[part].dtype)[index] = value

    return change


def reaching_beyond(parts):
    """The last code of a row is one of a sequence as long that does not end in zeros."""
    said = sequences(int(parts["zeros"]))
    last = int(parts["offsets"][1]) - 1
    begin = sum(len(said[code]) for code in parts["codes"][:last].tolist())
    code = next(k for k, each in enumerate(said) if len(each) > 50 - begin and each.rstrip("0")[50 - begin :])
    parts["codes"].view(torch.int16)[last] = code if code < 2**15 else code - 2**16


DAMAGES = {
    **{
        f"no {part}": (lambda parts, part=part: parts.pop(part), f"'{part}' is missing")
        for part in ("codes", "offsets", "low", "high", "zeros", "shape")
    },
    "codes of another dtype": (put("codes", lambda t: t.view(torch.int16)), "'codes' has dtype torch.int16"),
    "codes of two dimensions": (put("codes", lambda t: t[None]), "'codes' has"),
    "a code outside the dictionary": (
        at("codes", 3, -1),
        "its codes have 65535, which is not in a dictionary of 65535",
    ),
    "too few codes": (put("codes", lambda t: t[:-1]), "its offsets do not rise from 0"),
    "no codes": (put("codes", lambda t: t[:0]), "its offsets do not rise from 0"),
    "offsets out of order": (at("offsets", 3, 1), "its offsets do not rise from 0"),
    "offsets below zero": (at("offsets", 0, -1), "its offsets do not rise from 0"),
    "a row without codes": (put("offsets", lambda t: torch.cat([t[:3], t[2:3], t[4:]])), "its offsets do not rise"),
    "offsets beyond the codes": (put("offsets", lambda t: t + (t == t[-1])), "its offsets do not rise from 0"),
    "too few offsets": (put("offsets", lambda t: t[1:]), "'offsets' has"),
    "rows that do not add up": (put("offsets", lambda t: t + (torch.arange(7) == 3)), "row 2 do not add up to 50"),
    "rows that are too short": (at("shape", 1, 200), "row 0 do not add up to 200 weights"),
    "rows that are too long": (at("shape", 1, 3), "row 0 do not add up to 3 weights"),
    "weights beyond a row": (reaching_beyond, "not zero after the end of a row"),
    "other zeros": (put("zeros", lambda t: t - 40), "do not add up"),
    "no zeros": (at("zeros", 0, 0), "its zeros are 0"),
    "too many zeros": (at("zeros", 0, 64), "its zeros are 64"),
    "several zeros": (put("zeros", lambda t: t.repeat(2)), "'zeros' has"),
    "values of another dtype": (put("low", lambda t: t.float()), "'low' has dtype torch.float32"),
    "too many values": (put("high", lambda t: torch.cat((t, t))), "'high' has"),
    "NaN": (at("low", 3, torch.nan), "low holds values that are not finite"),
    "infinity": (at("high", 3, torch.inf), "high holds values that are not finite"),
    "no outputs": (at("shape", 0, 0), "not two positive sizes"),
    "huge": (at("shape", 1, 2**40), "not two positive sizes"),
    "a huge number of outputs": (at("shape", 0, 2**31 - 1), "'offsets' has"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_parts_are_refused(name):
    weight = make(6, 50)
    layout = layout_for(weight)
    parts = layout.pack(weight)
    change, says = DAMAGES[name]
    change(parts)
    for read in (layout.load, layout.unpack, layout.read, layout.describe):
        with pytest.raises(ValueError, match=says):
            read(parts)


def test_weights_beyond_their_dtype_are_refused():
    weight = make(6, 50, half=BF16, dtype=FP16)
    layout = layout_for(weight)
    parts = layout.pack(weight)
    parts["high"][1] = 1e9
    with pytest.raises(ValueError, match=r"beyond torch.float16"):
        layout.load(parts)


def test_parameters_that_make_no_sense_are_refused():
    for dtype in (None, "int8", "float64", 1, ["float32"]):
        with pytest.raises(CheckpointError, match="'ternary-dict' with parameters that make no sense"):
            layout_from_config({"layout": "ternary-dict", "dtype": dtype})


def test_what_it_does_not_hold_is_not_packed():
    weight = make(6, 50)
    with pytest.raises(ValueError, match="this layout is"):
        TernaryDict(BF16).pack(weight)
    with pytest.raises(ValueError, match="this layout is"):
        PackedInt(4, 8, False, FP32).pack(weight)
    with pytest.raises(ValueError, match="does not store"):
        TernaryDict(FP32).pack(Quantized(weight.codes, (6, 50), FP32, order_I=torch.arange(50)))


EXAMPLE = {
    "codes": torch.tensor([12944, 64209, 3428], dtype=torch.uint16),
    "offsets": torch.tensor([0, 2, 3], dtype=torch.int32),
    "low": torch.tensor([-0.25, -1.0], dtype=BF16),
    "high": torch.tensor([0.5, 2.0], dtype=BF16),
    "zeros": torch.tensor([57], dtype=torch.uint8),
    "shape": torch.tensor([2, 40]),
}
EXAMPLE_SAID = ["000+000-0000000000000+", 84 * "0", "-" + 38 * "0" + "+"]


def test_the_worked_example():
    """That of docs/format.md."""
    said = sequences(57)
    assert [said[code] for code in EXAMPLE["codes"].tolist()] == EXAMPLE_SAID
    layout = layout_from_config({"layout": "ternary-dict", "dtype": "float32"})
    W_OI = layout.unpack(EXAMPLE)
    assert W_OI.shape == (2, 40)
    assert W_OI.nonzero().tolist() == [[0, 3], [0, 7], [0, 21], [1, 0], [1, 39]]
    assert W_OI[W_OI != 0].tolist() == [0.5, -0.25, 0.5, -1, 2]
