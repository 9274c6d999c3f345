"""Magnitude and Wanda against slow float64 versions of what their papers say.

T: tokens, O: output features, I: input features, M: inputs of one group, G: groups.
"""

import pytest
import torch
from methods import magnitude, wanda

from secateur.core.patterns import NM, Unstructured
from secateur.core.registry import PRUNERS
from secateur.core.stats import InputStats, Level
from secateur.prune.magnitude import Magnitude
from secateur.prune.wanda import Wanda

SHARES = [Unstructured(0.0), Unstructured(0.3), Unstructured(0.5), Unstructured(0.99)]
GROUPS = [NM(2, 4), NM(1, 4), NM(4, 8), NM(2, 3), NM(7, 16)]
PATTERNS = SHARES + GROUPS
METHODS = [magnitude, wanda]


def gather(x_TI, level):
    stats = InputStats.empty(x_TI.shape[1], level)
    stats.add(x_TI)
    return stats


def draw(outputs, inputs, tokens=64, seed=0):
    """Weights, and inputs whose features differ a hundredfold in scale: magnitude and Wanda then disagree."""
    generator = torch.Generator().manual_seed(seed)
    W_OI = torch.randn(outputs, inputs, generator=generator)
    scale_I = 10 ** (2 * torch.rand(inputs, generator=generator) - 1)
    x_TI = torch.randn(tokens, inputs, generator=generator) * scale_I
    return W_OI, x_TI


def slow_keep(score_OI, pattern):
    """One row (or group) after the other: sort, drop the lowest, keep the rest."""
    O, I = score_OI.shape
    keep_OI = torch.ones(O, I, dtype=torch.bool)
    for o in range(O):
        if isinstance(pattern, NM):
            units = [range(first, first + pattern.m) for first in range(0, I, pattern.m)]
            counts = [pattern.m - pattern.n] * len(units)
        else:
            units, counts = [range(I)], [round(pattern.sparsity * 100) * I // 100]
        for unit, count in zip(units, counts, strict=True):
            for i in sorted(unit, key=lambda i: score_OI[o, i].item())[:count]:
                keep_OI[o, i] = False
    return keep_OI


def slow_wanda_score(W_OI, x_TI):
    """S_ij = |W_ij| · ‖X_j‖₂, equation 1 of arXiv:2306.11695, in float64."""
    W_OI, x_TI = W_OI.double(), x_TI.double()
    score_OI = torch.empty_like(W_OI)
    for i in range(W_OI.shape[1]):
        norm = sum(value**2 for value in x_TI[:, i].tolist()) ** 0.5
        score_OI[:, i] = W_OI[:, i].abs() * norm
    return score_OI


def assert_exact_counts(keep_OI, pattern):
    O, I = keep_OI.shape
    if isinstance(pattern, NM):
        assert (keep_OI.view(O, -1, pattern.m).sum(2) == pattern.n).all()
    else:
        assert ((~keep_OI).sum(1) == round(pattern.sparsity * 100) * I // 100).all()


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_magnitude_keeps_the_largest_weights(pattern):
    W_OI, _ = draw(9, 96)
    pruned = magnitude(W_OI, InputStats.empty(96, Level.NONE), pattern)
    keep_OI = slow_keep(W_OI.double().abs(), pattern)
    assert torch.equal(pruned.keep_OI, keep_OI)
    assert torch.equal(pruned.W_OI, W_OI.where(keep_OI, torch.zeros(())))


@pytest.mark.parametrize("level", [Level.MOMENTS, Level.GRAM])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_wanda_keeps_the_best_of_equation_1(pattern, level):
    W_OI, x_TI = draw(9, 96)
    pruned = wanda(W_OI, gather(x_TI, level), pattern)
    keep_OI = slow_keep(slow_wanda_score(W_OI, x_TI), pattern)
    assert torch.equal(pruned.keep_OI, keep_OI)
    assert torch.equal(pruned.W_OI, W_OI.where(keep_OI, torch.zeros(())))


def test_the_two_methods_differ_where_inputs_do():
    W_OI, x_TI = draw(9, 96)
    stats = gather(x_TI, Level.MOMENTS)
    assert not torch.equal(wanda(W_OI, stats, NM(2, 4)).keep_OI, magnitude(W_OI, stats, NM(2, 4)).keep_OI)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pattern", SHARES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (5, 1), (3, 101), (33, 64)])
def test_sparsity_is_exact_in_every_row(method, pattern, shape):
    """Also where bfloat16 makes many scores equal."""
    W_OI, x_TI = draw(*shape)
    for dtype in (torch.float32, torch.bfloat16):
        pruned = method((W_OI * 4).round().to(dtype), gather(x_TI.sign(), Level.MOMENTS), pattern)
        assert_exact_counts(pruned.keep_OI, pattern)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pattern", GROUPS, ids=str)
@pytest.mark.parametrize("outputs", [1, 6])
def test_every_group_holds_n_of_m(method, pattern, outputs):
    W_OI, x_TI = draw(outputs, 5 * pattern.m)
    for weights_OI in (W_OI, torch.ones_like(W_OI), torch.zeros_like(W_OI)):
        assert_exact_counts(method(weights_OI, gather(x_TI, Level.MOMENTS), pattern).keep_OI, pattern)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kept_weights_are_the_same_and_removed_ones_zero(method, pattern, dtype):
    W_OI, x_TI = draw(8, 32)
    W_OI = W_OI.to(dtype)
    before_OI, stats = W_OI.clone(), gather(x_TI, Level.MOMENTS)
    pruned = method(W_OI, stats, pattern)
    assert pruned.W_OI.dtype == torch.float32
    assert pruned.keep_OI.dtype == torch.bool
    assert torch.equal(pruned.W_OI[pruned.keep_OI], W_OI.float()[pruned.keep_OI])
    assert (pruned.W_OI[~pruned.keep_OI] == 0).all()
    # And nothing that was handed in has changed.
    pruned.W_OI.fill_(7)
    assert torch.equal(W_OI, before_OI)
    assert torch.equal(stats.square_I, gather(x_TI, Level.MOMENTS).square_I)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pattern", [Unstructured(0.4), NM(2, 4)], ids=str)
def test_rows_are_solved_on_their_own(method, pattern):
    """Solving q, k and v stacked gives what solving each alone gives."""
    W_OI, x_TI = draw(12, 32)
    stats = gather(x_TI, Level.MOMENTS)
    stacked = method(W_OI, stats, pattern)
    for part in (slice(0, 1), slice(1, 5), slice(5, 12)):
        assert torch.equal(method(W_OI[part], stats, pattern).keep_OI, stacked.keep_OI[part])


def test_wanda_prunes_dead_inputs_first():
    """However large the weights on an input that is always zero, they are gone from every row."""
    W_OI, x_TI = draw(7, 40)
    dead = [0, 5, 6, 17, 39]
    x_TI[:, dead] = 0
    W_OI[:, dead] *= 1e6
    keep_OI = wanda(W_OI, gather(x_TI, Level.MOMENTS), Unstructured(0.15)).keep_OI
    assert not keep_OI[:, dead].any()
    assert_exact_counts(keep_OI, Unstructured(0.15))
    # No more than two of the dead inputs lie in one group of four.
    keep_OI = wanda(W_OI, gather(x_TI, Level.MOMENTS), NM(2, 4)).keep_OI
    assert not keep_OI[:, dead].any()
    assert_exact_counts(keep_OI, NM(2, 4))


@pytest.mark.parametrize("pattern", [Unstructured(0.3), NM(1, 4)], ids=str)
def test_wanda_without_a_live_input_still_prunes_exactly(pattern):
    W_OI, x_TI = draw(4, 32)
    assert_exact_counts(wanda(W_OI, gather(x_TI * 0, Level.MOMENTS), pattern).keep_OI, pattern)


@pytest.mark.parametrize("method", METHODS)
def test_groups_must_divide_the_inputs(method):
    W_OI, x_TI = draw(4, 30)
    with pytest.raises(ValueError, match=r"30 .*4"):
        method(W_OI, gather(x_TI, Level.MOMENTS), NM(2, 4))


@pytest.mark.parametrize("method", METHODS)
def test_a_parameter_is_a_tensor_too(method):
    W_OI, x_TI = draw(4, 32)
    stats = gather(x_TI, Level.MOMENTS)
    pruned = method(torch.nn.Parameter(W_OI), stats, Unstructured(0.5))
    assert torch.equal(pruned.keep_OI, method(W_OI, stats, Unstructured(0.5)).keep_OI)


def test_the_methods_are_registered_with_the_least_they_need():
    assert PRUNERS["magnitude"] is Magnitude
    assert PRUNERS["magnitude"].level == Level.NONE
    assert PRUNERS["wanda"] is Wanda
    assert PRUNERS["wanda"].level == Level.MOMENTS
