"""The layout `low-rank`: what is packed lies in the files as docs/format.md says and comes back to the bit, every backend
computes with it, and nothing hostile is believed.

O: output features, I: input features, R: rank, T: tokens.
"""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_examples import tries
from random_weights import make

from secateur import kernels
from secateur.composite_layouts.low_rank import LowRank
from secateur.core.factors import WithFactors
from secateur.errors import CheckpointError, UsageError
from secateur.formats.layouts.bitmap import Bitmap
from secateur.formats.layouts.choose import layout_for
from secateur.formats.layouts.layout import layout_from_config
from secateur.formats.layouts.nm import NMBits
from secateur.kernels.backends import why_not
from secateur.kernels.chosen_rows import chosen_rows
from secateur.kernels.packed import map_tensors

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
KINDS = ["bitmap", "nm", "packed-int", "spqr", "codebook", "sparse-int"]


def main_part(kind, O, I, dtype, seed=0):
    """A random weight of another layout, dense or in codes, with that layout."""
    if kind not in ("bitmap", "nm"):
        masked = {"masked": "some"} if kind == "sparse-int" else {}
        weight = make("packed-int" if masked else kind, O, I, dtype=dtype, seed=seed, **masked)
        return weight, layout_for(weight)
    W_OI = torch.randn(O, I, generator=torch.Generator().manual_seed(seed)).to(dtype)
    W_OI[:, ::2] = 0
    return W_OI, Bitmap() if kind == "bitmap" else NMBits(1, 2)


def weight_of(kind="packed-int", O=6, I=10, R=2, half=FP16, dtype=FP32, seed=0):
    draw = torch.Generator().manual_seed(seed)
    main, layout = main_part(kind, O, I, dtype, seed)
    factors = torch.randn(O, R, generator=draw).to(half), torch.randn(R, I, generator=draw).to(half)
    return WithFactors(main, *factors), LowRank(layout)


@tries(80)
@given(
    kind=st.sampled_from(KINDS),
    O=st.integers(1, 20),
    I=st.integers(1, 12).map(lambda n: 2 * n),
    R=st.integers(1, 30),
    half=st.sampled_from([FP16, BF16]),
    dtype=st.sampled_from([FP32, FP16, BF16]),
    seed=st.integers(0, 999),
)
def test_a_weight_lies_in_the_files_as_it_is_said_to(kind, O, I, R, half, dtype, seed):
    weight, layout = weight_of(kind, O, I, R, half, dtype, seed)
    config = layout.to_config()
    assert config == {"layout": "low-rank", "main": layout.main.to_config()}
    assert layout_from_config(config) == layout
    parts = layout.pack(weight)
    mine = {part: tensor for part, tensor in parts.items() if part.startswith("low_")}
    assert {part: (tensor.dtype, tuple(tensor.shape)) for part, tensor in mine.items()} == {
        "low_out": (half, (O, R)),
        "low_in": (half, (R, I)),
    }
    rest = {part: tensor for part, tensor in parts.items() if part not in mine}
    main_OI = layout.main.unpack(rest)
    exact_OI = main_OI.double() + weight.out_OR.double() @ weight.in_RI.double()
    found_OI = layout.unpack(parts)
    assert found_OI.dtype == dtype
    size = main_OI.abs().max() + (weight.out_OR.double().abs() @ weight.in_RI.double().abs()).max()
    assert (found_OI.double() - exact_OI).abs().max() <= (torch.finfo(dtype).eps + 1e-6) * size
    loaded = layout.load(parts)
    assert torch.equal(loaded.dense(), found_OI)
    again = layout.store(loaded)
    for part, tensor in parts.items():
        assert torch.equal(again[part].reshape(tensor.shape).to(tensor.dtype), tensor)
    stored, main = layout.describe(parts), layout.main.describe(rest)
    assert stored == replace(main, layout="low-rank", bytes=sum(tensor.nbytes for tensor in parts.values()))
    assert stored.bytes == main.bytes + 2 * R * (O + I)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("backend", ["torch", "dense", "cpu"])
@pytest.mark.parametrize("kind", KINDS)
def test_products_are_those_of_float64(kind, backend, dtype):
    weight, layout = weight_of(kind, 24, 40, 3)
    parts = layout.pack(weight)
    exact_OI = layout.main.unpack(parts).double() + weight.out_OR.double() @ weight.in_RI.double()
    loaded = layout.load(parts)
    problem = why_not(backend, loaded, torch.device("cpu"), dtype)
    if problem is not None:
        pytest.skip(problem)
    draw = torch.Generator().manual_seed(1)
    bias_O = torch.randn(24, generator=draw).to(dtype)
    ready = kernels.prepare(loaded, backend, dtype=dtype)
    assert ready.backend.name == backend
    for shape in ((1, 40), (3, 5, 40), (0, 40), (20, 40)):
        x = torch.randn(*shape, generator=draw).to(dtype).requires_grad_()
        y = kernels.linear(ready, x, bias_O)
        wanted = x.double() @ exact_OI.T + bias_O.double()
        low = weight.out_OR.double().abs() @ weight.in_RI.double().abs()
        magnitude = x.double().abs() @ (exact_OI.abs() + 2 * low).T + bias_O.double().abs()
        assert y.dtype == dtype
        assert ((y - wanted).abs() <= 6 * torch.finfo(dtype).eps * magnitude).all()
        grad = torch.randn(y.shape, generator=draw).to(dtype)
        y.backward(grad)
        exact = grad.double() @ exact_OI
        size = grad.double().abs() @ (exact_OI.abs() + 2 * low)
        assert ((x.grad - exact).abs() <= 6 * torch.finfo(dtype).eps * size + 1e-12).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_piece_is_as_the_whole_has_it(kind):
    weight, layout = weight_of(kind, 9, 12)
    loaded = layout.load(layout.pack(weight))
    dense_OI = loaded.dense()
    assert torch.allclose(loaded.rows(2, 7).dense(), dense_OI[2:7], atol=1e-5)
    assert torch.allclose(chosen_rows(loaded, torch.tensor([8, 0, 8])), dense_OI[[8, 0, 8]], atol=1e-5)
    for start, W_RI in loaded.dense_rows():
        assert torch.allclose(W_RI, dense_OI[start : start + len(W_RI)], atol=1e-5)


def test_what_a_backend_is_given_comes_back():
    weight, layout = weight_of("nm", dtype=BF16, half=BF16)
    parts = layout.pack(weight)
    ready = kernels.prepare(layout.load(parts), "torch", dtype=FP32)
    stored = layout.store(ready.backend.packed(ready.weight))
    for part, tensor in parts.items():
        assert torch.equal(stored[part].to(tensor.dtype).reshape(tensor.shape), tensor)
    cpu = kernels.BACKENDS["cpu"]
    if cpu.why_not(layout.load(parts).bare, torch.device("cpu"), FP32) is None:
        ready = kernels.prepare(layout.load(parts), "cpu", dtype=FP32)
        stored = layout.store(map_tensors(ready.backend.packed(ready.weight), lambda t: t))
        for part, tensor in parts.items():
            assert torch.equal(stored[part].to(tensor.dtype).reshape(tensor.shape), tensor)


def test_a_backend_is_chosen_by_the_other_part():
    weight, layout = weight_of("nm", dtype=BF16)
    loaded = layout.load(layout.pack(weight))
    with pytest.raises(UsageError, match=r"its kernels run on CUDA devices|triton is not installed"):
        kernels.prepare(loaded, "triton")
    auto = kernels.choose(loaded, "auto", torch.device("cpu"), BF16).name
    assert auto == kernels.choose(loaded.bare, "auto", torch.device("cpu"), BF16).name


# --- what hostile files say


def put(part, make_tensor):
    return lambda parts: parts.update({part: make_tensor(parts[part])})


def set_first(value):
    def change(tensor):
        tensor = tensor.clone()
        tensor[0, 0] = value
        return tensor

    return change


DAMAGES = {
    "no low_out": (lambda parts: parts.pop("low_out"), "'low_out' is missing"),
    "no low_in": (lambda parts: parts.pop("low_in"), "'low_in' is missing"),
    "no codes": (lambda parts: parts.pop("codes"), "'codes' is missing"),
    "no shape": (lambda parts: parts.pop("shape"), "'shape' is missing"),
    "float32": (put("low_in", torch.Tensor.float), "'low_in' has dtype torch.float32"),
    "two dtypes": (put("low_in", torch.Tensor.bfloat16), "'low_in' has dtype torch.bfloat16"),
    "integers": (put("low_out", torch.Tensor.short), "'low_out' has dtype torch.int16"),
    "other outputs": (put("low_out", lambda t: t[1:]), r"'low_out' has dtype torch.float16 and shape \[5, 2\]"),
    "other inputs": (put("low_in", lambda t: t[:, 1:]), r"'low_in' has dtype torch.float16 and shape \[2, 9\]"),
    "other ranks": (put("low_in", lambda t: t[1:]), r"'low_out' has dtype torch.float16 and shape \[6, 2\]"),
    "rank 0": (
        lambda parts: (put("low_in", lambda t: t[:0])(parts), put("low_out", lambda t: t[:, :0])(parts)),
        "shape",
    ),
    "a vector": (put("low_in", torch.Tensor.flatten), "'low_in' has dtype"),
    "NaN": (put("low_in", set_first(torch.nan)), "low_in holds values that are not finite"),
    "infinity": (put("low_out", set_first(torch.inf)), "low_out holds values that are not finite"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_parts_are_named(damage):
    change, what = DAMAGES[damage]
    weight, layout = weight_of()
    parts = layout.pack(weight)
    change(parts)
    for read in (layout.load, layout.unpack, layout.describe):
        with pytest.raises(ValueError, match=what):
            read(parts)


def test_a_sum_that_overflows_is_told():
    weight, layout = weight_of("nm", dtype=FP16)
    parts = layout.pack(replace(weight, out_OR=torch.full((6, 2), 3e4).half(), in_RI=torch.full((2, 10), 3e4).half()))
    assert not layout.describe(parts).finite


@pytest.mark.parametrize(
    "main",
    [
        None,
        3,
        "nm",
        {},
        {"layout": None},
        {"layout": "nope"},
        {"layout": "nm"},
        {"layout": "low-rank", "main": {}},
        [1],
    ],
    ids=repr,
)
def test_parameters_that_make_no_sense_are_refused(main):
    with pytest.raises(CheckpointError, match="layout 'low-rank' with parameters that make no sense"):
        layout_from_config({"layout": "low-rank", "main": main})


def test_there_are_no_codes_to_be_read_alone():
    weight, layout = weight_of()
    with pytest.raises(ValueError, match="a part of low rank besides its codes"):
        layout.read(layout.pack(weight))
