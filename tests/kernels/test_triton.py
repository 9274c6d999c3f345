"""The backend `triton` computes what the dense weight in float64 does: in Triton's interpreter, and it compiles for an H100.

O: output features, I: input features, T: tokens, M: what a grid spans.
"""

import os
from dataclasses import replace

import processes
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_examples import tries
from random_weights import load_coded, load_sparse

from secateur.errors import UsageError
from secateur.formats.layouts.bitmap import Bitmap
from secateur.kernels import linear, prepare
from secateur.kernels.packed import CodedWeight

triton = pytest.importorskip("triton")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# One token, a few in one tile and in several, and so many that the weight is expanded into memory.
TOKENS = st.sampled_from([1, 2, 16, 17, 40, 65, 257])
SEEDS = st.integers(0, 2**32 - 1)


@pytest.fixture(autouse=True, scope="module")
def interpreter():
    """Kernels are interpreted that are decorated from here on. Triton's own were not if something imported it before."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        for name in ("sum", "cumsum", "max"):
            own = getattr(triton.language, name)
            if isinstance(own, triton.JITFunction):
                patch.setattr(triton.language, name, triton.jit(own.fn))
        yield


def span(weight):
    """The largest that a weight of each group could be, and so what float32 rounds while it goes from code to weight."""
    if not isinstance(weight, CodedWeight):
        return weight.dense().double().abs()
    codes = weight.codes_S
    ends = [replace(weight, dtype=FP32, codes_S=end) for end in (torch.zeros_like(codes), torch.full_like(codes, 255))]
    return sum(end.dense().double().abs() for end in ends)


def check(weight, x, bias_O=None):
    """What the backend computes is off by no more than its roundings, each of which is there once.

    Those of dtypes: of the dense weight to its own and to that of x, of outliers and bias too, and of the output. Those of
    float32, with room for the sums: eight units of what is added up.
    """
    y = linear(prepare(weight, "triton", dtype=x.dtype), x, bias_O)
    assert y.dtype == x.dtype
    W_OI, M_OI = weight.dense().double(), span(weight)
    x_TI = x.double()
    wanted = x_TI @ W_OI.T + (0 if bias_O is None else bias_O.double())
    eps = max(torch.finfo(x.dtype).eps, torch.finfo(weight.dtype).eps)
    magnitude = x_TI.abs() @ W_OI.abs().T + (0 if bias_O is None else bias_O.double().abs())
    allowed = eps * (magnitude + wanted.abs()) + 8 * torch.finfo(FP32).eps * (x_TI.abs() @ M_OI.T)
    assert y.shape == wanted.shape
    assert ((y.double() - wanted).abs() <= allowed).all()


def inputs(T, I, dtype=FP32, seed=0):
    return torch.randn(T, I, generator=torch.Generator().manual_seed(seed)).to(dtype)


@tries(60)
@given(
    O=st.integers(1, 9),
    I=st.sampled_from([1, 7, 8, 63, 255, 256, 257, 600]),
    T=TOKENS,
    density=st.sampled_from([0.0, 0.02, 0.5, 0.9, 1.0]),
    dtype=st.sampled_from([BF16, FP16, FP32]),
    biased=st.booleans(),
    seed=SEEDS,
)
def test_pruned_weights(O, I, T, density, dtype, biased, seed):
    weight, _ = load_sparse(O, I, density, dtype, seed=seed)
    check(weight, inputs(T, I, dtype, seed), inputs(1, O, dtype, seed + 1)[0] if biased else None)


@pytest.mark.parametrize("T", [1, 5])
def test_rows_of_nothing_and_rows_of_everything(T):
    W_OI = torch.randn(40, 300)
    W_OI[::3] = 0
    weight = Bitmap().load(Bitmap().pack(W_OI))
    check(weight, inputs(T, 300))


@pytest.mark.parametrize("pattern", [(1, 4), (2, 4), (4, 8), (5, 12)])
@pytest.mark.parametrize("T", [1, 5])
def test_patterns(pattern, T):
    weight, _ = load_sparse(6, 480, dtype=BF16, pattern=pattern)
    check(weight, inputs(T, 480, BF16))


@pytest.mark.thin(2)
@pytest.mark.parametrize("T", [1, 3, 257])
def test_long_rows_are_split_and_added_up(T):
    """Longer than a tile of any size, in rows that do not fill one."""
    bias_O = inputs(1, 19)[0]
    check(load_sparse(19, 2600, dtype=BF16)[0], inputs(T, 2600, BF16), bias_O.bfloat16())
    check(
        load_coded("spqr", 19, 2600, bits=3, group_size=16, tile_rows=16, outliers="some")[0], inputs(T, 2600), bias_O
    )


# Triton's interpreter takes a fifth of a second for each.
@tries(50)
@given(
    kind=st.sampled_from(["packed-int", "spqr", "spqr", "codebook"]),
    O=st.integers(1, 40),
    I=st.integers(1, 70),
    T=TOKENS,
    bits=st.integers(2, 8),
    group_size=st.sampled_from([2, 3, 8, 12, 16, 99]),
    tile_rows=st.sampled_from([2, 3, 4, 16]),
    scale_bits=st.sampled_from([1, 3, 4, 5, 8]),
    symmetric=st.booleans(),
    outliers=st.sampled_from(["", "none at all", "some", "a full row"]),
    order=st.booleans(),
    half=st.sampled_from([FP16, BF16]),
    biased=st.booleans(),
    seed=SEEDS,
)
def test_quantized_weights(O, I, T, biased, seed, **options):
    weight, _ = load_coded(O=O, I=I, seed=seed, **options)
    check(weight, inputs(T, I, FP32, seed), inputs(1, O, FP32, seed + 1)[0] if biased else None)


@pytest.mark.parametrize("bits", [1, 5, 6, 7])
@pytest.mark.parametrize("T", [1, 5])
def test_codes_of_other_widths(bits, T):
    check(load_coded("spqr", 9, 43, bits=bits, outliers="some", order=True)[0], inputs(T, 43))


@pytest.mark.thin(3)
@pytest.mark.parametrize("kind", ["packed-int", "spqr", "codebook"])
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("T", [1, 5, 40, 65, 257])
def test_inputs_of_16_bits(kind, dtype, T):
    weight, _ = load_coded(kind, 9, 70, bits=3, group_size=16, outliers="some", dtype=dtype)
    check(weight, inputs(T, 70, dtype), inputs(1, 9, dtype)[0])


def test_what_follows_a_row_is_not_part_of_it():
    """The last word of a row goes on into the next, whose codes would be infinite weights in the dtype of the inputs."""
    weight, _ = load_coded("packed-int", 2, 3, bits=8, group_size=99, symmetric=True)
    grid = replace(weight.grid, scale_Γ=torch.tensor([1000.0, 0.1]).half())
    weight = replace(weight, dtype=FP16, codes_S=weight.codes_S.clone(), grid=grid)
    weight.codes_S[:6] = torch.tensor([128, 129, 130, 0, 255, 1])
    check(weight, inputs(5, 3, FP16))


@pytest.mark.parametrize("make", [lambda: load_sparse(11, 32), lambda: load_coded("spqr", 11, 32, outliers="some")])
def test_expanded_some_rows_at_a_time(make, monkeypatch):
    from secateur.kernels.triton import triton_linear

    monkeypatch.setattr(triton_linear, "EXPANDED", 5 * 32)
    check(make()[0], inputs(300, 32), inputs(1, 11)[0])


def test_inputs_of_any_strides_and_none():
    weight, W_OI = load_sparse(7, 40)
    ready = prepare(weight, "triton")
    x = inputs(12, 80).view(2, 6, 80)[:, ::2, ::2]
    torch.testing.assert_close(linear(ready, x), x @ W_OI.T)
    assert linear(ready, x[:0]).shape == (0, 3, 7)


def test_starts_of_chunks_are_small():
    weight, _ = load_sparse(8, 4096, 0.5, BF16)
    ready = prepare(weight, "triton", dtype=BF16).weight
    packed = ready.tensors["values_V"].nbytes + ready.tensors["bitmask_OB"].nbytes
    assert ready.tensors["start_OW"].nbytes < 0.02 * packed


def refusal(weight, device="cpu", dtype=FP32):
    with pytest.raises(UsageError) as refused:
        prepare(weight, "triton", device=device, dtype=dtype)
    return str(refused.value)


def test_what_it_cannot_do_it_says(monkeypatch):
    weight, _ = load_sparse(2, 8)
    both, _ = load_coded("packed-int", 2, 8, masked="some")
    assert "'sparse-int'" in refusal(both)
    assert "'torch'" in refusal(both)
    assert "not on meta" in refusal(weight, "meta")
    monkeypatch.delenv("TRITON_INTERPRET")
    assert "CUDA devices, not on cpu, where backends 'dense' and 'torch' do" in refusal(weight)
    monkeypatch.setattr("secateur.kernels.triton.triton_backend.find_spec", lambda name: None)
    assert "triton is not installed" in refusal(weight, "cuda")


@pytest.mark.thin(3)
@pytest.mark.parametrize("T", [1, 8, 9, 40])
@pytest.mark.parametrize(
    "make",
    [
        lambda: load_sparse(35, 300, dtype=BF16),
        lambda: load_sparse(12, 64, pattern=(2, 4)),
        lambda: load_coded("packed-int", 35, 70, group_size=16, order=True),
        lambda: load_coded("spqr", 35, 70, bits=3, tile_rows=16, outliers="some", order=True),
        lambda: load_coded("codebook", 35, 70, bits=3, outliers="some"),
    ],
)
def test_gradients(make, T, monkeypatch):
    monkeypatch.setattr("secateur.kernels.triton.triton_linear.EXPANDED", 1 << 10)  # in several pieces
    weight, W_OI = make()
    dtype = weight.dtype
    O, I = weight.shape
    x_TI, bias_O = inputs(T, I, dtype).requires_grad_(), inputs(1, O, dtype)[0].requires_grad_()
    grad_TO = inputs(T, O, dtype, seed=1)
    linear(prepare(weight, "triton", dtype=dtype), x_TI, bias_O).backward(grad_TO)
    for found, wanted in ((x_TI.grad, grad_TO.double() @ W_OI.double()), (bias_O.grad, grad_TO.double().sum(0))):
        allowed = 8 * torch.finfo(dtype).eps * (grad_TO.double().abs() @ W_OI.double().abs()).max()
        assert (found.double() - wanted).abs().max() <= allowed


def test_it_is_there_where_triton_is_not():
    code = "import sys; sys.modules['triton'] = None; from secateur.kernels import BACKENDS; BACKENDS['triton']"
    done = processes.script(code)
    assert done.returncode == 0, done.stderr


# Of each kernel, what its arguments are; all others are compile-time constants, None unless they are named.
_COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from secateur.kernels.triton import triton_linear as kernels

TYPES = {
    **dict.fromkeys(["x_TI", "x_IT", "y", "bias_O", "W_OI", "values_V", "y_TO"], "*bf16"), "part_STO": "*fp32",
    **dict.fromkeys(["O", "I", "T", "first_row", "end_row", "size"], "i32"), "start_OW": "*i32", "start_O1": "*i32",
    **dict.fromkeys(["codes_S", "bitmask_OB", "scale"], "*u8"), "second": "*fp16",
    **dict.fromkeys(["outlier_start_O1", "outlier_column_N", "column_N"], "*i32"),
    **dict.fromkeys(["outlier_value_N", "value_N"], "*fp16"),
}
GRID = {"BITS": 3, "GRID": "two-level", "GROUP": 16, "TILE_ROWS": 16, "RAGGED": True}
one = {"R": 4, "C": 256, "P": 1, "S": 1, "N": 32, "WIDE": False}
few = {"R": 16, "C": 256, "P": 16, "S": 2, "N": 8, "WIDE": False}
for name, constants in [
    ("_sparse_linear", one), ("_sparse_linear", few), ("_coded_linear", {**GRID, **one}), ("_coded_linear", {**GRID, **few}),
    ("_coded_linear", {**GRID, **one, "GRID": "table", "BITS": 8}), ("add_splits", {"S": 2, "BLOCK": 1024}),
    ("_sparse_expand", one), ("_coded_expand", {**GRID, **one}), ("_expand_outliers", {"N": 128}),
]:
    kernel = getattr(kernels, name)
    signature = {a: TYPES.get(a, "constexpr") for a in kernel.arg_names}
    constexprs = {a: constants.get(a) for a, kind in signature.items() if kind == "constexpr"}
    compiled = triton.compile(ASTSource(kernel, signature, constexprs), target=GPUTarget("cuda", 90, 32))
    assert compiled.asm["cubin"], name
"""


def test_the_kernels_compile(tmp_path):
    """For an H100, which need not be there: the interpreter takes much that the compiler does not."""
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    env.pop("TRITON_INTERPRET")
    done = processes.script(_COMPILE, env=env)
    assert done.returncode == 0, done.stderr
