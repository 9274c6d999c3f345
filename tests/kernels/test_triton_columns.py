"""The backend `triton` computes with weights by input feature what the dense weight does: in Triton's interpreter, and it
compiles for an H100.

O: output features, I: input features, T: tokens.
"""

import os

import processes
import pytest
import torch
from column_weights import BF16, FP16, FP32, close, inputs, load
from hypothesis import given
from hypothesis import strategies as st
from random_examples import tries
from test_triton import interpreter  # noqa: F401 - a fixture

from secateur.kernels import linear, prepare

pytest.importorskip("triton")

FORMS = [("dense", 16), ("bitmap", 16), *(("int", bits) for bits in (2, 3, 4, 8))]


def check(weight, W_OI, terms_OI, x_TI, kept_TI=None, bias_O=None):
    y_TO = linear(prepare(weight, "triton", dtype=x_TI.dtype), x_TI, bias_O, kept_TI)
    close(y_TO, x_TI, W_OI, terms_OI, kept_TI, bias_O, rounded=len(x_TI) > 4 and x_TI.dtype != FP32)


# Triton's interpreter takes a fifth of a second for each.
@tries(25)
@given(
    form=st.sampled_from(FORMS),
    O=st.sampled_from([1, 7, 64, 255, 257, 300]),
    I=st.sampled_from([1, 7, 16, 40, 70]),
    T=st.integers(1, 4),
    share=st.sampled_from([0.0, 0.3, 1.0]),
    dtype=st.sampled_from([BF16, FP16, FP32]),
    x_dtype=st.sampled_from([BF16, FP16, FP32]),
    group_size=st.sampled_from([2, 5, 16, 64, 1000]),
    symmetric=st.booleans(),
    biased=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_some_inputs(form, O, I, T, share, x_dtype, biased, **options):
    weight, *right = load(form[0], O, I, bits=form[1], **options)
    seed = options["seed"]
    x_TI, kept_TI = inputs(T, I, share, x_dtype, seed)
    check(weight, *right, x_TI, kept_TI, torch.linspace(-2, 2, O).to(x_dtype) if biased else None)


@pytest.mark.thin(2)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("T", [1, 9])
def test_all_inputs(form, T):
    """Few tokens and so many that the weight is expanded."""
    weight, *right = load(form[0], 70, 40, BF16, form[1], group_size=16)
    bias_O = torch.linspace(-2, 2, 70)
    check(weight, *right, inputs(T, 40, 1.0, FP32)[0], None, bias_O)
    check(weight, *right, inputs(T, 40, 1.0, BF16)[0], None, bias_O.bfloat16())


@pytest.mark.parametrize("form", FORMS)
def test_gradients(form, monkeypatch):
    """In more than one piece."""
    from secateur.kernels.triton import triton_columns

    monkeypatch.setattr(triton_columns, "EXPANDED", 16 * 70)
    weight, W_OI, _ = load(form[0], 70, 40, FP32, form[1], group_size=16)
    x_TI = torch.randn(2, 40, requires_grad=True)
    grad_TO = torch.randn(2, 70)
    linear(prepare(weight, "triton"), x_TI).backward(grad_TO)
    torch.testing.assert_close(x_TI.grad.double(), grad_TO.double() @ W_OI, rtol=1e-4, atol=1e-3)


# Arguments that are not named are compile-time constants; None unless they are given.
_COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from secateur.kernels.triton import triton_columns as kernels

TYPES = {
    **dict.fromkeys(["x_TI", "W_IO", "bias_O"], "*bf16"), "y": "*fp32", "kept_TI": "*u8",
    **dict.fromkeys(["O", "I", "T", "first_input", "end_input"], "i32"),
}
OPERANDS = {
    "dense": {"values_V": "*bf16"},
    "bitmap": {"values_V": "*bf16", "bitmask_OB": "*u8", "start_OW": "*i32"},
    "by input": {"codes_S": "*u8", "scale": "*fp16", "zero": "*u8"},
    "by input, symmetric": {"codes_S": "*u8", "scale": "*fp16"},
}
sizes = {"C": kernels.INPUTS, "R": kernels.OUTPUTS}
for form, operands in OPERANDS.items():
    own = {**sizes, "FORM": form, "BITS": 4, "GROUP": 64}
    # One token in splits, or a few without: of two forms each.
    few = {"P": 1, "S": 8} if form in ("dense", "by input") else {"P": 4, "S": 1}
    for name, constants in [("_columns_linear", {**own, **few}), ("_columns_expand", own)]:
        kernel = getattr(kernels, name)
        signature = {a: {**TYPES, **operands}.get(a, "constexpr") for a in kernel.arg_names}
        constexprs = {a: constants.get(a) for a, kind in signature.items() if kind == "constexpr"}
        compiled = triton.compile(ASTSource(kernel, signature, constexprs), target=GPUTarget("cuda", 90, 32))
        assert compiled.asm["cubin"], (name, form)
"""


def test_the_kernels_compile(tmp_path):
    """For an H100, which need not be there: the interpreter takes much that the compiler does not."""
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    env.pop("TRITON_INTERPRET")
    done = processes.script(_COMPILE, env=env)
    assert done.returncode == 0, done.stderr
