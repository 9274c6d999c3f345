"""Products of factors rounded to bfloat16 are those that float64 makes of the rounded factors.

T: tokens, I: input features, O: output features.
"""

from contextlib import contextmanager

import pytest
import torch
from torch import nn

from secateur.core.stats import InputStats, Level
from secateur.kernels import rounded
from secateur.kernels.cpu import cpu_backend

FP32 = torch.float32

pytestmark = pytest.mark.skipif(cpu_backend.missing() is not None, reason=str(cpu_backend.missing()))


# What products are called where they are in use, and where they are chosen.
NAMES = {"AMX": "amx", "AVX-512 BF16": "avx512bf16", "torch": "torch"}


@contextmanager
def multiplying_by(name):
    """Within the context the kernels multiply by these instructions; whether this processor has them."""
    before = torch.ops.secateur.products()
    try:
        yield torch.ops.secateur.use_products(NAMES[name])
    finally:
        torch.ops.secateur.use_products(NAMES[before])


@pytest.fixture(params=("AMX", "AVX-512 BF16"))
def instructions(request):
    with multiplying_by(request.param) as there:
        if not there:
            pytest.skip(f"this processor does not run {request.param}")
        yield request.param


@pytest.fixture
def without_instructions():
    with multiplying_by("torch"):
        yield


def random(*shape, seed=0):
    # Of many sizes, so that what is rounded wrongly is seen.
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=draw) * torch.logspace(-2, 2, shape[-1])


def as_rounded(x):
    return x.bfloat16().double()


def check_sums(found, factors, others):
    """Sums of products over the last dimension of both are those, but for what float32 rounds off."""
    want = as_rounded(factors) @ as_rounded(others).T
    size = as_rounded(factors).abs() @ as_rounded(others).abs().T
    assert found.dtype is FP32
    assert ((found.double() - want).abs() <= 1e-5 * size).all()


@pytest.mark.parametrize("T", [0, 1, 15, 33, 600])
@pytest.mark.parametrize(("O", "I"), [(1, 1), (16, 64), (33, 31), (70, 700), (3, 9000)])
def test_linears(instructions, T, O, I):
    x_TI, W_OI, b_O = random(T, I), random(O, I, seed=1), random(O, seed=2)
    check_sums(torch.ops.secateur.rounded_linear(x_TI, W_OI, None), x_TI, W_OI)
    with_bias = torch.ops.secateur.rounded_linear(x_TI, W_OI, b_O)
    assert torch.equal(with_bias, torch.ops.secateur.rounded_linear(x_TI, W_OI, None) + b_O)


@pytest.mark.parametrize("I", [16, 32, 48, 176, 1040])
@pytest.mark.parametrize("T", [0, 1, 31, 64, 513, 1100])
def test_gram_matrices(instructions, T, I):
    before_II, x_TI = random(I, I), random(T, I, seed=1)
    upper_II = before_II.clone()
    torch.ops.secateur.add_gram(upper_II, x_TI)
    want_II = before_II.double() + as_rounded(x_TI).T @ as_rounded(x_TI)
    size_II = before_II.double().abs() + as_rounded(x_TI).abs().T @ as_rounded(x_TI).abs()
    assert ((upper_II.double() - want_II).abs() <= 1e-5 * size_II).triu().sum() == I * (I + 1) // 2


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_leave_traces(instructions, bad):
    x_TI = random(40, 64)
    x_TI[7, 3] = bad
    y_TO = torch.ops.secateur.rounded_linear(x_TI, random(5, 64, seed=1), None)
    assert not y_TO[7].isfinite().any()
    assert y_TO[torch.arange(40) != 7].isfinite().all()
    stats = InputStats.empty(64, Level.GRAM)
    stats.add(x_TI, add_products=rounded.products_of_rounded())
    assert not stats.finite


def test_operators_refuse_what_does_not_fit(instructions):
    linear, gram, x_TI = torch.ops.secateur.rounded_linear, torch.ops.secateur.add_gram, random(4, 32)
    for W_OI in (random(3, 31), random(32), random(3, 32).bfloat16(), random(32, 3).T):
        with pytest.raises(RuntimeError, match="the weight"):
            linear(x_TI, W_OI, None)
    with pytest.raises(RuntimeError, match="the bias is not"):
        linear(x_TI, random(3, 32), random(4))
    for upper_II in (random(16, 16), random(32, 16), random(32, 32).bfloat16(), random(32, 64)[:, ::2]):
        with pytest.raises(RuntimeError, match="the Gram matrix"):
            gram(upper_II, x_TI)
    with pytest.raises(RuntimeError, match="whole groups of 16"):
        gram(random(20, 20), random(4, 20))
    with pytest.raises(RuntimeError, match=r"\[tokens, features\]"):
        linear(random(2, 4, 32), random(3, 32), None)


def test_operators_refuse_where_there_are_no_instructions(without_instructions):
    with pytest.raises(RuntimeError, match="no products of bfloat16"):
        torch.ops.secateur.rounded_linear(random(4, 32), random(3, 32), None)
    with pytest.raises(RuntimeError, match="no products of bfloat16"):
        torch.ops.secateur.add_gram(random(32, 32), random(4, 32))


@torch.no_grad()
def test_modules_within_the_context(instructions):
    if instructions == "AMX":
        pytest.skip("torch rounds by itself there")
    linear, x_NSI = nn.Linear(48, 20), random(2, 7, 48)
    with rounded.rounded_linears():
        y_NSO, of_a_vector = linear(x_NSI), linear(x_NSI[0, 0])
        strided = nn.functional.linear(x_NSI.transpose(0, 1), linear.weight[:, ::2].repeat(1, 2))
    check_sums(y_NSO.view(-1, 20) - linear.bias, x_NSI.view(-1, 48), linear.weight)
    assert y_NSO.shape == (2, 7, 20)
    assert torch.equal(of_a_vector, y_NSO[0, 0])
    check_sums(strided.reshape(-1, 20), x_NSI.transpose(0, 1).reshape(-1, 48), linear.weight[:, ::2].repeat(1, 2))
    assert torch.equal(linear(x_NSI), nn.functional.linear(x_NSI, linear.weight, linear.bias))
    assert not torch.equal(linear(x_NSI), y_NSO)


def test_others_are_left_to_torch(instructions):
    double, x_TI = nn.Linear(8, 4, dtype=torch.float64), random(3, 8).double()
    trained = nn.Linear(8, 4)
    with rounded.rounded_linears():
        assert torch.equal(double(x_TI), nn.functional.linear(x_TI, double.weight, double.bias))
        assert trained(x_TI.float()).requires_grad


@pytest.mark.parametrize("features", [20, 32])
def test_statistics_of_any_width(features, instructions):
    x_TI, stats = random(50, features), InputStats.empty(features, Level.GRAM)
    stats.add(x_TI, add_products=rounded.products_of_rounded())
    taken_TI = x_TI.double() if features % 16 else as_rounded(x_TI)
    assert torch.allclose(stats.gram().double(), taken_TI.T @ taken_TI, rtol=1e-4, atol=1e-5)
    assert torch.equal(stats.square_I, stats.gram().diagonal())


def test_without_instructions_nothing_is_rounded(without_instructions):
    linear, x_TI = nn.Linear(32, 4), random(9, 32)
    with torch.no_grad(), rounded.rounded_linears():
        found = linear(x_TI)
    assert torch.allclose(found, nn.functional.linear(x_TI, linear.weight, linear.bias), rtol=1e-6, atol=1e-4)
    stats, plain = (InputStats.empty(32, Level.GRAM) for _ in range(2))
    stats.add(x_TI, add_products=rounded.products_of_rounded())
    plain.add(x_TI)
    assert torch.equal(stats.gram(), plain.gram())
