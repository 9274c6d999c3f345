"""DSnoT against a slow float64 version of its paper, and the promises a refiner makes.

T: tokens, O: output features, I: input features, M: inputs of one group.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from methods import dsnot, wanda

from secateur.core.patterns import NM, Unstructured, keep_best
from secateur.core.registry import REFINERS
from secateur.core.stats import InputStats, Level
from secateur.prune.dsnot import DSnoT

PATTERNS = [Unstructured(0.5), Unstructured(0.8), NM(2, 4), NM(1, 4), NM(4, 8)]


def gather(x_TI):
    stats = InputStats.empty(x_TI.shape[1], Level.MOMENTS)
    stats.add(x_TI)
    return stats


def draw(outputs, inputs, tokens=200, seed=0, size=1.0):
    """Weights, and inputs whose features have means and spreads of their own."""
    generator = torch.Generator().manual_seed(seed)
    W_OI = torch.randn(outputs, inputs, generator=generator) * size
    mean_I = torch.randn(inputs, generator=generator)
    spread_I = 0.2 + 2 * torch.rand(inputs, generator=generator)
    return W_OI, torch.randn(tokens, inputs, generator=generator) * spread_I + mean_I


def random_keep(W_OI, pattern, seed=0):
    """A mask of the pattern that is far from good, so that there is much to refine."""
    generator = torch.Generator().manual_seed(seed)
    return keep_best(torch.rand(W_OI.shape, generator=generator), pattern)


def expected_change(W_OI, keep_OI, x_TI):
    """ε of each output: the sum of removed weight times expected input, in float64."""
    return (W_OI.double() * ~keep_OI * x_TI.double().mean(0)).sum(1)


def swaps(before_OI, after_OI):
    """How many weights of each row came back."""
    return (after_OI & ~before_OI).sum(1)


def sign(value):
    return (value > 0) - (value < 0)


def slow_dsnot(W_OI, keep_OI, x_TI, group):
    """Grow and prune of arXiv:2310.08915, one row and one swap after the other, in float64.

    While |ε| of a row is above 0.1, for 50 cycles at most: grow the removed weight whose return lowers |ε| most in relation
    to the variance of its input; prune, among the kept weights (of the same group) whose removal lowers |ε| as well, the one
    of lowest |w|·‖x‖₂. A swap that would turn the sign of ε is not made, and ends the row.
    """
    W_OI, keep_OI = W_OI.double().tolist(), keep_OI.tolist()
    x_TI = x_TI.double()
    mean_I = x_TI.mean(0).tolist()
    variance_I = x_TI.var(0, unbiased=False).tolist()
    norm_I = x_TI.norm(dim=0).tolist()
    for W_I, keep_I in zip(W_OI, keep_OI, strict=True):
        inputs = range(len(W_I))
        error = math.fsum(W_I[i] * mean_I[i] for i in inputs if not keep_I[i])
        tried = set()
        for _ in range(50):
            if abs(error) <= 0.1:
                break
            # By how much |ε| falls if the weight comes back; if it is removed, |ε| falls by as much the other way round.
            fall_I = [sign(error) * W_I[i] * mean_I[i] for i in inputs]
            growable = [i for i in inputs if not keep_I[i] and fall_I[i] > 0 and i not in tried]
            if not growable:
                break
            grow = max(growable, key=lambda i: fall_I[i] / variance_I[i])
            tried.add(grow)
            prunable = [i for i in inputs if keep_I[i] and fall_I[i] < 0 and i // group == grow // group]
            if not prunable:
                continue
            prune = min(prunable, key=lambda i: abs(W_I[i]) * norm_I[i])
            after = error - W_I[grow] * mean_I[grow] + W_I[prune] * mean_I[prune]
            if sign(after) != sign(error):
                break
            keep_I[grow], keep_I[prune] = True, False
            error = after
    return torch.tensor(keep_OI)


def assert_refined(W_OI, before_OI, after_OI, x_TI, pattern):
    """The promises: same counts, at most 50 swaps, no error larger or turned, and rows with little error untouched."""
    O, _ = W_OI.shape
    assert after_OI.dtype == torch.bool
    assert after_OI.shape == before_OI.shape
    assert torch.equal(after_OI.sum(1), before_OI.sum(1))
    if isinstance(pattern, NM):
        assert (after_OI.view(O, -1, pattern.m).sum(2) == pattern.n).all()
    assert (swaps(before_OI, after_OI) <= 50).all()
    error_O, after_O = expected_change(W_OI, before_OI, x_TI), expected_change(W_OI, after_OI, x_TI)
    slack = 1e-5 * (W_OI.double() * x_TI.double().mean(0)).abs().sum(1)
    assert (after_O.abs() <= error_O.abs() + slack).all()
    assert (after_O * error_O.sign() >= -slack).all()
    small_O = error_O.abs() <= 0.1 - slack
    assert torch.equal(after_OI[small_O], before_OI[small_O])
    changed_O = swaps(before_OI, after_OI) > 0
    assert (after_O.abs() < error_O.abs())[changed_O].all()


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("inputs", [8, 40, 240])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_agrees_with_the_paper_swap_by_swap(pattern, inputs, seed):
    W_OI, x_TI = draw(16, inputs, seed=seed)
    group = pattern.m if isinstance(pattern, NM) else inputs
    swapped = 0
    for keep_OI in (random_keep(W_OI, pattern, seed), wanda(W_OI, gather(x_TI), pattern).keep_OI):
        refined_OI = dsnot(W_OI, keep_OI, gather(x_TI), pattern)
        assert torch.equal(refined_OI, slow_dsnot(W_OI, keep_OI, x_TI, group))
        assert_refined(W_OI, keep_OI, refined_OI, x_TI, pattern)
        swapped += int(swaps(keep_OI, refined_OI).sum())
    assert swapped > 0


@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)], ids=str)
def test_no_more_than_50_cycles(pattern):
    """Many small weights, all of them with the same sign of error: there is more to do than 50 swaps."""
    W_OI, x_TI = draw(3, 1200, seed=5, size=0.02)
    # Removed weights all push the outputs up, kept ones all down.
    keep_OI = random_keep(W_OI, pattern)
    effect_OI = W_OI * x_TI.mean(0)
    W_OI = torch.where((effect_OI > 0) == keep_OI, -W_OI, W_OI)
    refined_OI = dsnot(W_OI, keep_OI, gather(x_TI), pattern)
    assert swaps(keep_OI, refined_OI).tolist() == [50, 50, 50]
    assert_refined(W_OI, keep_OI, refined_OI, x_TI, pattern)
    group = pattern.m if isinstance(pattern, NM) else 1200
    assert torch.equal(refined_OI, slow_dsnot(W_OI, keep_OI, x_TI, group))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    outputs=st.integers(1, 8),
    groups=st.integers(1, 12),
    pattern=st.sampled_from(PATTERNS),
    seed=st.integers(0, 2**16),
    size=st.sampled_from([0.01, 0.3, 10.0]),
    dead=st.booleans(),
)
def test_promises_hold_whatever_the_input(outputs, groups, pattern, seed, size, dead):
    inputs = groups * (pattern.m if isinstance(pattern, NM) else 5)
    W_OI, x_TI = draw(outputs, inputs, tokens=50, seed=seed, size=size)
    if dead:
        x_TI[:, :: 1 + seed % 3] = 0
    keep_OI = random_keep(W_OI, pattern, seed)
    assert_refined(W_OI, keep_OI, dsnot(W_OI, keep_OI, gather(x_TI), pattern), x_TI, pattern)


def two_point(mean_I, variance_I):
    """Two tokens for each feature that have exactly these means and variances."""
    mean_I, spread_I = torch.tensor(mean_I), torch.tensor(variance_I).sqrt()
    return torch.stack([mean_I - spread_I, mean_I + spread_I])


def test_one_swap_worked_out_by_hand():
    """ε = 2 + 1 = 3. Input 1 is grown (1/0.25 beats 2/4), 2 is pruned (lowest score with an effect below zero): ε = 1.5."""
    x_TI = two_point([1.0, 1.0, 1.0, 1.0, 1.0], [4.0, 0.25, 1.0, 1.0, 1.0])
    W_OI = torch.tensor([[2.0, 1.0, -0.5, -3.0, 0.25]])
    keep_OI = torch.tensor([[False, False, True, True, True]])
    refined_OI = dsnot(W_OI, keep_OI, gather(x_TI), Unstructured(0.4))
    # The next swap, 0 for 3, would turn the sign of ε: 1.5 − 2 − 3 < 0.
    assert refined_OI.int().tolist() == [[0, 1, 0, 1, 1]]
    # The mirror image: all signs turned, the same swap.
    assert torch.equal(dsnot(-W_OI, keep_OI, gather(x_TI), Unstructured(0.4)), refined_OI)


@pytest.mark.parametrize(("error", "moves"), [(0.09, False), (-0.09, False), (0.11, True), (-0.11, True)])
def test_the_threshold_is_a_tenth(error, moves):
    """Inputs 0 and 2 are removed, with half of ε each; 0 varies less, so that it is the one to come back, for 1."""
    x_TI = two_point([1.0, 1.0, 1.0], [1.0, 1.0, 100.0])
    W_OI = torch.tensor([[error / 2, -error / 10, error / 2]])
    keep_OI = torch.tensor([[False, True, False]])
    refined_OI = dsnot(W_OI, keep_OI, gather(x_TI), Unstructured(0.6))
    assert refined_OI.int().tolist() == ([[1, 0, 0]] if moves else [[0, 1, 0]])


def test_a_swap_stays_within_its_group():
    """Input 0 has most to give, but nothing in its group can go; the second group swaps instead."""
    x_TI = two_point([1.0] * 8, [0.5] + [1.0] * 7)
    W_OI = torch.tensor([[5.0, 4.0, 1.0, 1.0, 2.0, 0.1, -1.0, -2.0]])
    keep_OI = torch.tensor([[0, 0, 1, 1, 0, 0, 1, 1]]).bool()
    refined_OI = dsnot(W_OI, keep_OI, gather(x_TI), NM(2, 4))
    assert refined_OI.int().tolist() == [[0, 0, 1, 1, 1, 1, 0, 0]]


def test_rows_are_refined_on_their_own():
    W_OI, x_TI = draw(12, 64)
    keep_OI = random_keep(W_OI, NM(2, 4))
    refined_OI = dsnot(W_OI, keep_OI, gather(x_TI), NM(2, 4))
    for part in (slice(0, 1), slice(1, 5), slice(5, 12)):
        assert torch.equal(dsnot(W_OI[part], keep_OI[part], gather(x_TI), NM(2, 4)), refined_OI[part])


@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)], ids=str)
@pytest.mark.parametrize("strided", [False, True])
def test_arguments_are_unchanged(pattern, strided):
    W_OI, x_TI = draw(8, 64)
    keep_OI, stats = random_keep(W_OI, pattern), gather(x_TI)
    expected_OI = dsnot(W_OI, keep_OI, stats, pattern)
    if strided:
        W_OI, keep_OI = W_OI.T.contiguous().T, keep_OI.T.contiguous().T
    W_before_OI, keep_before_OI = W_OI.clone(), keep_OI.clone()
    refined_OI = dsnot(W_OI, keep_OI, stats, pattern)
    assert torch.equal(refined_OI, expected_OI)
    refined_OI.fill_(False)
    assert torch.equal(W_OI, W_before_OI)
    assert torch.equal(keep_OI, keep_before_OI)
    assert torch.equal(stats.sum_I, gather(x_TI).sum_I)
    assert torch.equal(stats.square_I, gather(x_TI).square_I)


def test_an_untouched_mask_is_still_a_new_one():
    W_OI, x_TI = draw(2, 8, size=1e-4)
    keep_OI = random_keep(W_OI, NM(2, 4))
    refined_OI = dsnot(W_OI, keep_OI, gather(x_TI), NM(2, 4))
    assert torch.equal(refined_OI, keep_OI)
    refined_OI.fill_(False)
    assert keep_OI.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_refined_in_float32(dtype):
    W_OI, x_TI = draw(8, 64)
    W_OI = W_OI.to(dtype)
    keep_OI = random_keep(W_OI, Unstructured(0.5))
    half_OI, single_OI = (dsnot(w, keep_OI, gather(x_TI), Unstructured(0.5)) for w in (W_OI, W_OI.float()))
    assert torch.equal(half_OI, single_OI)


@pytest.mark.parametrize("keeps", [False, True])
def test_a_row_kept_or_removed_as_a_whole_stays(keeps):
    W_OI, x_TI = draw(4, 20)
    keep_OI = torch.full_like(W_OI, keeps, dtype=torch.bool)
    assert torch.equal(dsnot(W_OI, keep_OI, gather(x_TI), Unstructured(0.5)), keep_OI)


def test_one_input():
    W_OI, x_TI = draw(4, 1)
    keep_OI = torch.tensor([[True], [False], [True], [False]])
    assert torch.equal(dsnot(W_OI, keep_OI, gather(x_TI), Unstructured(0.5)), keep_OI)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("value", [0.0, 0.5, 0.3, -7.7])
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_constant_inputs(pattern, value, share):
    """An input without variance divides by zero, or by what rounding has left of it: the promises hold all the same."""
    W_OI, x_TI = draw(8, 40, tokens=333)
    x_TI[:, : int(40 * share)] = value
    keep_OI = random_keep(W_OI, pattern)
    refined_OI = dsnot(W_OI, keep_OI, gather(x_TI), pattern)
    assert_refined(W_OI, keep_OI, refined_OI, x_TI, pattern)
    if value == 0:
        moved_I = (refined_OI != keep_OI).any(0)
        assert not moved_I[: int(40 * share)].any()


def test_two_constant_inputs_are_treated_alike():
    """No variance at all is the best reason to grow a weight, whichever value the input always has."""
    came_back = []
    for value in (0.5, 0.7, 1.1, 7.7):
        _, x_TI = draw(1, 8, tokens=333)
        x_TI = (x_TI - x_TI.mean(0)) + 1
        x_TI[:, 0] = value
        W_OI = torch.tensor([[1.0, 1.0, 1.0, 1.0, -0.1, -0.1, -0.1, -0.1]])
        keep_OI = torch.tensor([[False] * 4 + [True] * 4])
        came_back.append(bool(dsnot(W_OI, keep_OI, gather(x_TI), Unstructured(0.5))[0, 0]))
    assert came_back == [True] * 4


def test_one_token():
    W_OI, x_TI = draw(8, 40, tokens=1)
    keep_OI = random_keep(W_OI, NM(2, 4))
    assert_refined(W_OI, keep_OI, dsnot(W_OI, keep_OI, gather(x_TI), NM(2, 4)), x_TI, NM(2, 4))


def test_dsnot_is_registered_with_the_level_it_needs():
    assert REFINERS["dsnot"] is DSnoT
    assert REFINERS["dsnot"].level == Level.MOMENTS
