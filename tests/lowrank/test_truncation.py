"""The nearest matrix of low rank, its factors in 16 bits, and the methods that split one off, against slow float64 versions.

T: tokens, O: output features, I: input features, R: rank.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_examples import tries

from secateur.core.patterns import NM, Unstructured, keep_best
from secateur.core.registry import LOW_RANKERS, PRUNERS
from secateur.core.stack import Stack
from secateur.core.stats import InputStats, Level
from secateur.lowrank.admm import ITERATIONS
from secateur.lowrank.fitting import fit_factors
from secateur.prune.alps import penalties
from secateur.recipes.low_rank_part import LowRankPart
from secateur.solvers.truncation import Truncation


def draw(O, I, T=200, seed=0, dead=()):
    generator = torch.Generator().manual_seed(seed)
    x_TI = torch.randn(T, I, generator=generator) @ torch.randn(I, I, generator=generator)
    x_TI[:, list(dead)] = 0
    return torch.randn(O, I, generator=generator), x_TI


def gather(x_TI):
    stats = InputStats.empty(x_TI.shape[1], Level.GRAM)
    stats.add(x_TI)
    return stats


def least(E_OI, x_TI, R):
    """The least ‖X(E − L)ᵀ‖² over L of rank R: what the singular values of X·Eᵀ say, by Eckart and Young."""
    return torch.linalg.svdvals(x_TI.double() @ E_OI.double().T)[R:].square().sum().item()


def error(E_OI, L_OI, x_TI):
    return (x_TI.double() @ (E_OI.double() - L_OI.double()).T).square().sum().item()


@tries(60)
@given(O=st.integers(1, 30), I=st.integers(1, 30), T=st.integers(1, 60), R=st.integers(0, 32), seed=st.integers(0, 999))
def test_nothing_of_that_rank_is_nearer(O, I, T, R, seed):
    E_OI, x_TI = draw(O, I, T, seed, dead=[0] if seed % 3 == 0 else [])
    truncation = Truncation(gather(x_TI).gram(), [O], [min(R, O, I)])
    ((out_OR, in_RI),) = truncation.factors(E_OI)
    assert out_OR.shape == (O, min(R, O, I))
    assert in_RI.shape == (min(R, O, I), I)
    whole = error(E_OI, torch.zeros_like(E_OI), x_TI)
    assert error(E_OI, out_OR @ in_RI, x_TI) <= 1.002 * least(E_OI, x_TI, R) + 1e-5 * whole
    if min(O, I) <= R:
        assert torch.equal(out_OR @ in_RI, E_OI)


def test_a_flat_spectrum_of_many_values_is_cut_nearly_where_it_should_be():
    E_OI, x_TI = draw(120, 100, 400)
    ((out_OR, in_RI),) = Truncation(gather(x_TI).gram(), [120], [15]).factors(E_OI)
    assert error(E_OI, out_OR @ in_RI, x_TI) <= 1.01 * least(E_OI, x_TI, 15)


def test_linears_of_a_stack_have_ranks_of_their_own():
    E_OI, x_TI = draw(24, 16)
    gram_II = gather(x_TI).gram()
    together = Truncation(gram_II, [10, 6, 8], [3, 0, 5]).factors(E_OI)
    for rows, R, (out_OR, in_RI) in zip(E_OI.split([10, 6, 8]), (3, 0, 5), together, strict=True):
        assert out_OR.shape == (len(rows), R)
        assert error(rows, out_OR @ in_RI, x_TI) <= 1.002 * least(rows, x_TI, R)


def test_what_is_found_already_is_begun_from():
    E_OI, x_TI = draw(60, 40)
    truncation = Truncation(gather(x_TI).gram(), [60], [5])
    first = error(E_OI, truncation.nearest(E_OI, steps=1), x_TI)
    for _ in range(8):
        last = error(E_OI, truncation.nearest(E_OI, steps=1), x_TI)
    assert last < first
    assert last <= 1.001 * least(E_OI, x_TI, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6])
def test_factors_are_stored_in_16_bits_that_hold_them(dtype, scale):
    W_OI, x_TI = draw(20, 30)
    stack = Stack.of([scale * W_OI], gather(x_TI), dtype)
    ((out_OR, in_RI),) = fit_factors(stack, torch.zeros_like(W_OI), [4])
    assert out_OR.dtype == in_RI.dtype
    assert out_OR.dtype in (torch.float16, torch.bfloat16)
    assert dtype != torch.bfloat16 or out_OR.dtype == torch.bfloat16
    best = least(scale * W_OI, x_TI, 4)
    assert error(scale * W_OI, out_OR.float() @ in_RI.float(), x_TI) <= 1.01 * best


def test_nothing_to_make_up_for_gives_factors_of_zeros():
    W_OI, x_TI = draw(6, 8)
    ((out_OR, in_RI),) = fit_factors(Stack.of([W_OI], gather(x_TI)), W_OI, [2])
    assert torch.equal(out_OR.float() @ in_RI.float(), torch.zeros(6, 8))
    ((out_OR, in_RI),) = fit_factors(Stack.of([W_OI], gather(x_TI)), torch.zeros(6, 8), [0])
    assert not out_OR.numel()


def test_a_share_counts_the_numbers_of_both_factors():
    part = LowRankPart(LOW_RANKERS["eora"](), 0.05, None)
    for O, I in ((576, 576), (192, 576), (1536, 576), (7, 5000)):
        R = part.rank_of(O, I)
        assert R * (O + I) <= 0.05 * O * I < (R + 1) * (O + I)
    assert part.rank_of(3, 3) == 0
    assert LowRankPart(part.method, None, 64).rank_of(20, 30) == 20


def slow_admm(W_OI, x_TI, R, pattern):
    """The three blocks of arXiv:2603.01376 in float64, with the multiplier V and singular value decompositions; L.

    B ← (H + ρ)⁻¹(H(W − L) − V + ρD); D ← the largest of B + V/ρ; V ← V + ρ(B − D); L ← the nearest to W − B.
    """
    G_II = x_TI.double().T @ x_TI.double()
    mean = G_II.diagonal().mean()
    dead_I = G_II.diagonal() == 0
    G_II.diagonal()[dead_I] = mean
    G_II += 0.01 * mean * torch.eye(len(G_II))
    scale_I = G_II.diagonal().sqrt()
    H_II = G_II / scale_I / scale_I[:, None]
    root_II = torch.linalg.cholesky(H_II)
    W_OI = W_OI.double().masked_fill(dead_I, 0) * scale_I
    L_OI, V_OI = torch.zeros_like(W_OI), torch.zeros_like(W_OI)
    D_OI = W_OI * keep_best(W_OI.abs(), pattern)
    for penalty in penalties():
        for _ in range(ITERATIONS):
            right_OI = (W_OI - L_OI) @ H_II - V_OI + penalty * D_OI
            B_OI = torch.linalg.solve(H_II + penalty * torch.eye(len(H_II)), right_OI.T).T
            D_OI = B_OI + V_OI / penalty
            D_OI = D_OI * keep_best(D_OI.abs(), pattern)
            V_OI = V_OI + penalty * (B_OI - D_OI)
            U, S, Vh = torch.linalg.svd((W_OI - B_OI) @ root_II)
            L_OI = torch.linalg.solve_triangular(root_II.T, (U[:, :R] * S[:R] @ Vh[:R]).T, upper=True).T if R else L_OI
    return L_OI / scale_I


def test_admm_does_what_its_paper_says():
    # With a spectrum that falls steeply: where singular values are close, rounding chooses among them.
    W_OI, x_TI = draw(12, 16, dead=[5])
    W_OI = 0.2 * W_OI + 4 * torch.outer(W_OI[:, 0], W_OI[0])
    split_OI = LOW_RANKERS["admm"]().split(Stack.of([W_OI], gather(x_TI)), [1], NM(2, 4))
    slow_OI = slow_admm(W_OI, x_TI, 1, NM(2, 4))
    assert error(slow_OI, split_OI, x_TI) < 1e-3 * error(slow_OI, torch.zeros_like(split_OI), x_TI)
    assert torch.linalg.matrix_rank(split_OI, rtol=1e-4) == 1


@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.6)], ids=str)
def test_what_is_sparse_and_of_low_rank_is_told_apart(pattern):
    """A sum of both is found again more nearly than by giving back what was lost."""
    generator = torch.Generator().manual_seed(0)
    sparse_OI = torch.randn(40, 48, generator=generator)
    sparse_OI *= keep_best(sparse_OI.abs(), pattern)
    W_OI = sparse_OI + 2 * torch.randn(40, 3, generator=generator) @ torch.randn(3, 48, generator=generator)
    _, x_TI = draw(40, 48)
    stack = Stack.of([W_OI], gather(x_TI))
    errors = {}
    for name, method in LOW_RANKERS.items():
        rest = Stack.of([W_OI - method().split(stack, [3], pattern)], stack.stats)
        found_OI = PRUNERS["alps"]().prune(rest, pattern).W_OI
        ((out_OR, in_RI),) = fit_factors(stack, found_OI, [3])
        errors[name] = error(W_OI, found_OI + out_OR.float() @ in_RI.float(), x_TI)
    assert errors["admm"] < 0.4 * errors["eora"]


@pytest.mark.parametrize("name", sorted(LOW_RANKERS))
def test_splitting_changes_nothing_that_it_is_given_and_draws_nothing(name):
    W_OI, x_TI = draw(10, 12, T=4, dead=[0, 11])  # fewer tokens than inputs: a singular Gram matrix
    stack = Stack.of([W_OI[:6], W_OI[6:]], gather(x_TI))
    before = torch.get_rng_state()
    first, second = (LOW_RANKERS[name]().split(stack, [2, 0], NM(2, 4)) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(stack.W_OI, W_OI)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.isfinite(first).all()
    assert not first[6:].any()


def test_inputs_that_are_not_finite_are_refused():
    W_OI, x_TI = draw(4, 8)
    x_TI[0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        LOW_RANKERS["admm"]().split(Stack.of([W_OI], gather(x_TI)), [2], NM(2, 4))
    with pytest.raises(ValueError, match="not finite"):
        fit_factors(Stack.of([W_OI], gather(x_TI)), torch.zeros_like(W_OI), [2])


def test_new_weights_that_overflow_are_left_for_whoever_packs_them():
    W_OI, x_TI = draw(4, 8)
    ((out_OR, _),) = fit_factors(Stack.of([W_OI], gather(x_TI)), torch.full_like(W_OI, torch.inf), [2])
    assert not out_OR.numel()
