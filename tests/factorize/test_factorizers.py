"""CoSpaDi and truncated SVD against what their papers' equations say, written once more in float64, and on nasty input.

O: output features, I: input features, T: tokens, K: atoms.
"""

import pytest
import torch

from secateur.core.stack import Stack
from secateur.core.stats import InputStats, Level
from secateur.errors import UsageError
from secateur.factorize.cospadi import CoSpaDi
from secateur.factorize.truncated_svd import TruncatedSVD
from secateur.formats.layouts.choose import layout_for
from secateur.solvers.sparse_coding import pursue

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
BOTH = pytest.mark.parametrize("method", [CoSpaDi, TruncatedSVD])


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(I, T=300, seed=7):
    return draw(T, I, seed=seed) @ draw(I, I, seed=seed + 1) * torch.linspace(0.1, 3, I)


def stack_of(weights, x_TI, dtype=FP32):
    stats = InputStats.empty(x_TI.shape[1], Level.GRAM)
    stats.add(x_TI)
    return Stack.of(weights, stats, dtype)


def error(stack, found):
    change_OI = torch.cat([weight.dequantize().float() for weight in found]) - stack.W_OI
    return (stack.stats.energy(change_OI).sum() / stack.stats.energy(stack.W_OI).sum()).item()


def parts_of(weight):
    return layout_for(weight).pack(weight)


def damped_gram(x_TI, damping=0.01):
    """G + λ·mean(diag G), with that mean for inputs that are always zero."""
    gram_II = x_TI.double().T @ x_TI.double()
    diagonal_I = gram_II.diagonal()
    mean = diagonal_I.mean()
    return gram_II + torch.diag(torch.where(diagonal_I == 0, mean, 0) + damping * mean)


def test_svd_is_the_best_of_its_rank():
    """Eckart and Young in the metric of G = EΛEᵀ: SVD of W·EΛ^½, taken back."""
    W_OI, x_TI = draw(24, 16), inputs(16)
    stack = stack_of([W_OI], x_TI)
    [weight] = TruncatedSVD(size=0.6).factorize(stack)
    rank = len(parts_of(weight)["atoms_values"])
    assert rank == (0.6 * 2 * 24 * 16 - 48) // (2 * (24 + 16))
    value_I, E_II = torch.linalg.eigh(damped_gram(x_TI))
    root_II = E_II * value_I.sqrt()
    left, value_R, right = torch.linalg.svd(W_OI.double() @ root_II, full_matrices=False)
    twin_OI = (left[:, :rank] * value_R[:rank]) @ right[:rank] @ torch.linalg.inv(root_II)
    assert (weight.dequantize().double() - twin_OI).abs().max() < 4e-3 * W_OI.abs().max()


def test_cospadi_codes_what_it_stores_by_the_metric_of_the_inputs():
    """The atoms as they lie in the file, and for them OMP on Cholesky's factor L: G = LᵀL, signals WLᵀ, atoms DLᵀ."""
    W_OI, x_TI = draw(20, 14), inputs(14)
    stack = stack_of([W_OI], x_TI)
    method = CoSpaDi(size=0.6, iterations=3, rounds=0)
    [weight] = method.factorize(stack)
    parts = parts_of(weight)
    D_KI = parts["atoms_values"].double()
    L_II = torch.linalg.cholesky(damped_gram(x_TI)).T
    twin_OK = pursue(W_OI.double() @ L_II.T, D_KI @ L_II.T, method.used(len(D_KI)))
    found_OK = weight.codes.coefficients.values().double()
    assert ((found_OK != 0) == (twin_OK != 0)).float().mean() > 0.95  # a tie may go either way
    assert ((found_OK != 0).sum(1) <= method.used(len(D_KI))).all()
    twin = stack.stats.energy((twin_OK @ D_KI).float() - W_OI).sum() / stack.stats.energy(W_OI).sum()
    assert error(stack, [weight]) == pytest.approx(twin.item(), rel=0.02)
    torch.testing.assert_close(weight.dequantize(), (found_OK @ D_KI).float(), rtol=1e-5, atol=1e-5)


def test_cospadi_errs_less_than_svd_and_iterations_help():
    stack = stack_of([draw(64, 32) @ draw(32, 32, seed=3)], inputs(32))
    errors = [error(stack, method.factorize(stack)) for method in
              (TruncatedSVD(0.5), CoSpaDi(0.5, iterations=0), CoSpaDi(0.5))]  # fmt: skip
    assert errors[2] < errors[1]
    assert errors[2] < 0.85 * errors[0]
    one_at_a_time = error(stack, CoSpaDi(0.5, rounds=0).factorize(stack))
    assert errors[2] < 1.1 * one_at_a_time


@BOTH
@pytest.mark.parametrize("size", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("shape", [(48, 32), (16, 40), (40, 7)])
def test_the_size_is_met_and_used(method, size, shape):
    stack = stack_of([draw(*shape), draw(9, shape[1], seed=1)], inputs(shape[1]), BF16)
    for weight, rows in zip(method(size=size).factorize(stack), (shape[0], 9), strict=True):
        assert weight.shape == (rows, shape[1])
        assert weight.dtype == BF16
        room = size * 2 * rows * shape[1]
        taken = sum(tensor.nbytes for tensor in parts_of(weight).values())
        atom = 2 * (rows + shape[1]) + rows
        assert taken <= room or len(weight.codes.atoms.values()) == 1
        assert taken > room - 48 - 1.5 * atom


@pytest.mark.parametrize(("dictionary", "coefficients"), [(8, 16), (16, 8), (4, 3)])
def test_quantized_factors_leave_room_for_more_of_them(dictionary, coefficients):
    stack = stack_of([draw(64, 48) @ draw(48, 48, seed=3)], inputs(48))
    plain = CoSpaDi(0.4).factorize(stack)
    found = CoSpaDi(0.4, dictionary_bits=dictionary, coefficient_bits=coefficients).factorize(stack)
    assert sum(t.nbytes for t in parts_of(found[0]).values()) <= 0.4 * 2 * 64 * 48
    assert len(found[0].codes.atoms.values()) > len(plain[0].codes.atoms.values())
    if (dictionary, coefficients) != (4, 3):
        assert error(stack, found) < error(stack, plain)


@BOTH
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_nasty_linears(method, dtype):
    """Outputs that are always zero, one output, dead inputs, fewer tokens than inputs, one atom, and no weights at all."""
    x_TI = inputs(12, T=5)
    x_TI[:, [0, 7]] = 0
    W_OI = draw(10, 12)
    W_OI[[2, 9]] = 0
    stack = stack_of([W_OI, draw(1, 12, seed=2), torch.zeros(6, 12)], x_TI, dtype)
    found = method(size=0.8).factorize(stack)
    assert [weight.shape for weight in found] == [(10, 12), (1, 12), (6, 12)]
    assert "fewer than the 12 inputs" in " ".join(found[0].notes)
    for weight in found:
        dense = weight.dequantize()
        assert torch.isfinite(dense.float()).all()
        assert torch.equal(layout_for(weight).unpack(parts_of(weight)), dense)
    assert not found[2].dequantize().any()
    if method is CoSpaDi:
        assert not found[0].dequantize()[[2, 9]].any()
    one = method(size=0.05).factorize(stack)
    assert all(len(weight.codes.atoms.values()) == 1 for weight in one)
    if method is CoSpaDi:
        coded = method(size=0.5, coefficient_bits=4).factorize(stack)
        assert not coded[2].dequantize().any()


@BOTH
def test_what_is_not_finite_is_refused(method):
    x_TI = inputs(8)
    x_TI[3, 3] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        method().factorize(stack_of([draw(4, 8)], x_TI))


@pytest.mark.parametrize(
    "options",
    [
        {"size": 0.0},
        {"size": 1.0},
        {"ratio": 0.5},
        {"iterations": -1},
        {"dictionary_bits": 12},
        {"coefficient_bits": 1},
    ],
)
def test_options_that_make_no_sense(options):
    with pytest.raises(UsageError, match=f"`{next(iter(options))}`"):
        CoSpaDi(**options)


def test_as_many_atoms_as_outputs_give_all_back():
    stack = stack_of([draw(6, 200)], inputs(200))
    [weight] = CoSpaDi(size=0.95, dictionary_bits=8, ratio=1.0).factorize(stack)
    assert len(weight.codes.atoms.values()) == 6
    assert error(stack, [weight]) < 1e-4
