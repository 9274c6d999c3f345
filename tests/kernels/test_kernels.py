"""Every backend computes what the dense weight in float64 does.

O: output features, I: input features, T: tokens.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_examples import tries
from random_weights import load_coded, load_sparse

from secateur import kernels
from secateur.errors import UsageError

KINDS = ["packed-int", "spqr", "codebook"]
SEEDS = st.integers(0, 2**32 - 1)


@tries(200)
@given(
    kind=st.sampled_from(KINDS),
    O=st.integers(1, 9),
    I=st.integers(1, 70),
    bits=st.integers(2, 8),
    group_size=st.sampled_from([2, 3, 16, 99]),
    masked=st.sampled_from(["", "some", "hardly"]),
    symmetric=st.booleans(),
    outliers=st.sampled_from(["", "none at all", "some", "a full row"]),
    order=st.booleans(),
    scale_bits=st.integers(1, 8),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=SEEDS,
)
def test_what_kernels_take_is_what_the_layout_unpacks_to(kind, O, I, **options):
    weight, W_OI = load_coded(kind, O, I, **options)
    # The order in which outliers are added may differ in the last bit.
    torch.testing.assert_close(weight.dense(), W_OI, rtol=0 if W_OI.dtype == torch.float32 else 0.01, atol=0)


@pytest.mark.parametrize("pattern", [None, (2, 4), (4, 8)])
def test_pruned_weights_too(pattern):
    weight, W_OI = load_sparse(7, 40, 0.3, torch.bfloat16, pattern)
    assert torch.equal(weight.dense(), W_OI)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["torch", "dense"])
@pytest.mark.parametrize("kind", ["bitmap", *KINDS])
def test_products_are_those_of_float64(kind, backend, dtype):
    weight, W_OI = (
        load_sparse(5, 19, 0.4)
        if kind == "bitmap"
        else load_coded(kind, 5, 19, order=True, outliers="some", masked="some")
    )
    bias_O = torch.randn(5).to(dtype)
    x_I3 = torch.randn(19, 3).to(dtype)
    for x in (x_I3.T, x_I3.T[:0], torch.randn(2, 3, 19).to(dtype), torch.randn(19).to(dtype)):
        y = kernels.linear(kernels.prepare(weight, backend, dtype=dtype), x, bias_O)
        wanted = x.double() @ W_OI.T.double() + bias_O.double()
        magnitude = x.double().abs() @ W_OI.T.double().abs() + bias_O.double().abs()
        assert y.dtype == dtype
        assert y.shape == wanted.shape
        # The weight, the sum and the result are rounded to the dtype of the inputs.
        assert ((y - wanted).abs() <= 4 * torch.finfo(dtype).eps * magnitude).all()


def test_bad_input_is_refused():
    weight, _ = load_sparse(4, 8)
    ready = kernels.prepare(weight, "torch")
    with pytest.raises(UsageError, match="the input has 7 features, but the weight takes 8"):
        kernels.linear(ready, torch.ones(1, 7))
    with pytest.raises(UsageError, match="the input is on meta, but the weight on cpu: move one of them"):
        kernels.linear(ready, torch.ones(1, 8, device="meta"))
    with pytest.raises(
        UsageError, match=r"the input is torch\.float64: packed weights take float32, bfloat16 or float16"
    ):
        kernels.linear(ready, torch.ones(1, 8, dtype=torch.float64))
    with pytest.raises(
        UsageError, match="backend 'nope' is not known: it can be auto, cpu, cuda-2:4, dense, torch, triton"
    ):
        kernels.prepare(weight, "nope")
    with pytest.raises(
        UsageError, match=r"no backend computes in torch\.float64: it can be float32, bfloat16 or float16"
    ):
        kernels.prepare(weight, dtype=torch.float64)
    for backend in ("triton", "cuda-2:4"):  # their own tests have every reason
        with pytest.raises(UsageError, match=f"backend {backend!r} cannot be used: .*(dense|triton)"):
            kernels.prepare(weight, backend)
    with pytest.raises(
        UsageError, match="backend 'cpu' cannot be used: it computes on the CPU, not on meta: use triton"
    ):
        kernels.prepare(weight, "cpu", device="meta")


def test_auto_makes_weights_dense_where_nothing_better_is_known():
    weight, _ = load_sparse(4, 8)
    assert kernels.choose(weight, "auto", torch.device("meta"), torch.float32).name == "dense"
