"""The backend `triton` computes with trellis codes what the dense weight does: in Triton's interpreter, and it compiles for an
H100.

O: output features, I: input features, T: tokens.
"""

import os

import processes
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_examples import tries
from random_weights import load_trellis
from test_triton import interpreter  # noqa: F401 - a fixture

from secateur.kernels import linear, prepare

pytest.importorskip("triton")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def check(weight, x_TI, bias_O=None):
    """Right but for what inputs, coded weights and products are rounded to, which a rotation spreads over its block."""
    y_TO = linear(prepare(weight, "triton", dtype=x_TI.dtype), x_TI, bias_O)
    assert y_TO.dtype == x_TI.dtype
    W_OI = weight.dense().double()
    want_TO = x_TI.double() @ W_OI.T + (0 if bias_O is None else bias_O.double())
    # Of what an output is added up of, if its terms are as large as those of its block on the whole.
    scale_O = weight.scale_out_O.double().abs()
    size_T = (x_TI.double() * weight.scale_in_I.double()).norm(dim=1)
    unit = 4 * torch.finfo(BF16).eps if x_TI.dtype == BF16 and len(x_TI) > 1 else 64 * torch.finfo(FP32).eps
    stored = torch.finfo(x_TI.dtype)
    allowed_TO = unit * size_T[:, None] * scale_O + 2 * stored.eps * want_TO.abs()
    assert ((y_TO.double() - want_TO).abs() <= allowed_TO + stored.smallest_normal * stored.eps).all()


def inputs(T, I, dtype=FP32, seed=0):
    return torch.randn(T, I, generator=torch.Generator().manual_seed(seed)).to(dtype)


# Triton's interpreter takes a fifth of a second for each.
@tries(30)
@given(
    rings=st.integers(1, 3),
    ring=st.sampled_from([1, 3, 5, 8, 15, 16, 17, 32, 48, 112]),
    I=st.sampled_from([1, 7, 16, 40, 96]),
    bits=st.integers(2, 4),
    state_bits=st.integers(2, 16),
    block=st.sampled_from([1, 2, 8, 128]),
    T=st.sampled_from([1, 2, 17, 33, 65, 257]),
    dtype=st.sampled_from([BF16, FP16, FP32]),
    biased=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_form(rings, I, T, dtype, biased, seed, **form):
    form["state_bits"] = min(max(form["state_bits"], form["bits"]), form["ring"] * form["bits"])
    O = rings * form["ring"]
    weight = load_trellis(O, I, seed=seed, **form)
    check(weight, inputs(T, I, dtype, seed), inputs(1, O, dtype, seed + 1)[0] if biased else None)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("ring", [15, 16])
def test_every_weight_of_every_ring(bits, ring):
    """One input at a time is not zero: without rotations that is one column."""
    weight = load_trellis(3 * ring, 24, bits, 12, ring, block=1)
    y_TO = linear(prepare(weight, "triton"), torch.eye(24))
    torch.testing.assert_close(y_TO, weight.dense().T, rtol=1e-5, atol=0)


@pytest.mark.parametrize("T", [1, 3, 40])
def test_inputs_are_split_and_added_up(T, monkeypatch):
    """And the weight is decoded some rows at a time."""
    from secateur.kernels.triton import triton_trellis

    monkeypatch.setattr(triton_trellis, "EXPANDED", 64 * 520)
    check(load_trellis(160, 520), inputs(T, 520), inputs(1, 160)[0])


@pytest.mark.parametrize("T", [0, 6])
def test_inputs_of_any_strides_and_none(T):
    weight = load_trellis(48, 40)
    x = inputs(2 * T, 80)[::2, ::2]
    y = linear(prepare(weight, "triton"), x)
    torch.testing.assert_close(y, x @ weight.dense().T, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("T", [1, 9])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_gradients(T, dtype):
    weight = load_trellis(48, 40)
    x_TI, bias_O = inputs(T, 40, dtype).requires_grad_(), inputs(1, 48, dtype)[0].requires_grad_()
    grad_TO = inputs(T, 48, dtype, seed=1)
    linear(prepare(weight, "triton", dtype=dtype), x_TI, bias_O).backward(grad_TO)
    want_TI = grad_TO.double() @ weight.dense().double()
    eps = torch.finfo(dtype).eps
    assert (x_TI.grad.double() - want_TI).norm() <= 4 * eps * want_TI.norm()
    assert (bias_O.grad.double() - grad_TO.double().sum(0)).abs().max() <= 8 * eps * grad_TO.abs().sum(0).max()


def test_codes_are_not_copied():
    weight = load_trellis(256, 64)
    ready = prepare(weight, "triton").weight
    assert ready.tensors["codes"].data_ptr() == ready.packed.codes_S.data_ptr()


# Arguments that are not named are compile-time constants; None unless they are given.
_COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from secateur.kernels.triton import triton_trellis as kernels

TYPES = {
    **dict.fromkeys(["x_TI", "y_TF", "W_OI"], "*bf16"), **dict.fromkeys(["x", "y"], "*fp32"), "factor": "fp32",
    **dict.fromkeys(["O", "I", "T", "F", "size", "first_row", "end_row"], "i32"), "codes": "*i32",
    **dict.fromkeys(["before_F", "after_F", "bias_F"], "*fp16"),
}
words = {"BITS": 3, "STATES": 12, "RING": 256, "WORDS": 24}
ragged = {"BITS": 3, "STATES": 12, "RING": 15, "WORDS": 0}
one = {"R": 64, "C": 32, "P": 1, "S": 8, "WIDE": False}
few = {"R": 64, "C": 64, "P": 16, "S": 2, "WIDE": False}
for name, constants in [
    ("_trellis_linear", {**words, **one}), ("_trellis_linear", {**words, **few}), ("_trellis_linear", {**ragged, **few}),
    ("_trellis_expand", {**words, **one}), ("_trellis_expand", {**ragged, **one}),
    ("_rotate", {"S": 8, "B": 128, "STEPS": 7, "N": 8}), ("_rotate", {"S": 1, "B": 1, "STEPS": 0, "N": 1024}),
]:
    kernel = getattr(kernels, name)
    types = {**TYPES, **({} if constants.get("WORDS", 1) else {"codes": "*u8"})}
    signature = {a: types.get(a, "constexpr") for a in kernel.arg_names}
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
