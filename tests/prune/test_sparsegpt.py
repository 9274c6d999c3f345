"""SparseGPT against a slow float64 version of its paper, and what it must do with awkward inputs.

T: tokens, O: output features, I: input features, R: input features that remain, B: input features of one column block.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from methods import magnitude, sparsegpt, wanda

from secateur.core.patterns import NM, Unstructured
from secateur.core.registry import PRUNERS
from secateur.core.stats import InputStats, Level
from secateur.prune.sparsegpt import SparseGPT
from secateur.solvers.inverse_cholesky import DAMPING, inverse_cholesky


def gather(x_TI):
    stats = InputStats.empty(x_TI.shape[1], Level.GRAM)
    stats.add(x_TI)
    return stats


def draw(outputs, inputs, tokens=None, seed=0):
    """Weights, and inputs that go together, have means and differ in scale."""
    generator = torch.Generator().manual_seed(seed)
    W_OI = torch.randn(outputs, inputs, generator=generator)
    mix_II = torch.eye(inputs) + torch.randn(inputs, inputs, generator=generator) / inputs**0.5
    scale_I = 0.3 + torch.rand(inputs, generator=generator)
    x_TI = torch.randn(tokens or 4 * inputs, inputs, generator=generator) + 0.3
    return W_OI, x_TI @ mix_II * scale_I


def slow_sparsegpt(W_OI, x_TI, pattern):
    """Algorithm 1 of arXiv:2301.00774 in its optimal-brain-surgeon form, in float64: no Cholesky factor, no lazy updates.

    Column after column. The inverse Hessian of the columns that remain is computed anew for each. A removed weight w of
    column i moves the remaining ones of its row by −w / [H⁻¹]_ii · [H⁻¹]_i,: and its score is w² / [H⁻¹]_ii. The mask of a
    block of 128 columns (of a group for N:M) is chosen when the sweep reaches it.
    """
    W_OI, x_TI = W_OI.double().clone(), x_TI.double()
    O, I = W_OI.shape
    H_II = x_TI.T @ x_TI
    mean = H_II.diagonal().mean()
    for i in range(I):
        if H_II[i, i] == 0:
            H_II[i, i] = mean
            W_OI[:, i] = 0
    H_II += 0.01 * mean * torch.eye(I)
    inverse_RR = [torch.linalg.inv(H_II[i:, i:]) for i in range(I)]

    keep_OI = torch.ones(O, I, dtype=torch.bool)
    unit = pattern.m if isinstance(pattern, NM) else 128
    for i in range(I):
        if i % unit == 0:
            columns = range(i, min(i + unit, I))
            score_OB = torch.stack([W_OI[:, j] ** 2 / inverse_RR[j][0, 0] for j in columns], dim=1)
            if isinstance(pattern, NM):
                lowest_OB = score_OB.argsort(dim=1)[:, : pattern.m - pattern.n]
                keep_OI[:, i : i + unit].scatter_(1, lowest_OB, False)
            else:
                count = round(pattern.sparsity * 100) * score_OB.numel() // 100
                removed_OB = torch.zeros(score_OB.numel(), dtype=torch.bool)
                removed_OB[score_OB.flatten().argsort()[:count]] = True
                keep_OI[:, i : i + unit] = ~removed_OB.view_as(score_OB)
        for o in range(O):
            if not keep_OI[o, i]:
                W_OI[o, i:] -= W_OI[o, i].clone() / inverse_RR[i][0, 0] * inverse_RR[i][0]
                W_OI[o, i] = 0
    return W_OI, keep_OI


def output_error(W_OI, new_OI, x_TI):
    """tr(ΔGΔᵀ): the squared change of all outputs over the calibration tokens."""
    return (x_TI.double() @ (W_OI.double() - new_OI.double()).T).square().sum().item()


def assert_removed_exactly(keep_OI, pattern):
    if isinstance(pattern, NM):
        assert (keep_OI.view(len(keep_OI), -1, pattern.m).sum(2) == pattern.n).all()
        return
    for keep_OB in keep_OI.split(128, dim=1):
        assert (~keep_OB).sum() == round(pattern.sparsity * 100) * keep_OB.numel() // 100


def assert_well_formed(pruned):
    """What holds of the result of every pruner."""
    assert pruned.W_OI.dtype == torch.float32
    assert pruned.keep_OI.dtype == torch.bool
    assert torch.isfinite(pruned.W_OI).all()
    assert (pruned.W_OI[~pruned.keep_OI] == 0).all()


def assert_sound(pruned, pattern):
    """What holds of every result, however nasty the input."""
    assert_well_formed(pruned)
    assert_removed_exactly(pruned.keep_OI, pattern)


@pytest.mark.parametrize(
    ("outputs", "inputs", "pattern"),
    [
        (8, 48, Unstructured(0.5)),
        (5, 37, Unstructured(0.3)),
        (1, 45, Unstructured(0.6)),
        (6, 128, Unstructured(0.7)),
        (6, 129, Unstructured(0.5)),
        (7, 203, Unstructured(0.5)),
        (3, 277, Unstructured(0.25)),
        (8, 48, NM(2, 4)),
        (5, 200, NM(2, 4)),
        (6, 140, NM(1, 4)),
        (6, 152, NM(4, 8)),
        (4, 132, NM(2, 3)),
        (3, 160, NM(11, 20)),
    ],
    ids=str,
)
def test_agrees_with_optimal_brain_surgery(outputs, inputs, pattern):
    W_OI, x_TI = draw(outputs, inputs)
    pruned = sparsegpt(W_OI, gather(x_TI), pattern)
    slow_OI, keep_OI = slow_sparsegpt(W_OI, x_TI, pattern)
    assert_sound(pruned, pattern)
    assert torch.equal(pruned.keep_OI, keep_OI)
    torch.testing.assert_close(pruned.W_OI.double(), slow_OI, rtol=1e-3, atol=1e-4)
    assert pruned.notes == ()


@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)], ids=str)
def test_agrees_with_optimal_brain_surgery_when_inputs_are_dead(pattern):
    W_OI, x_TI = draw(6, 148)
    dead = [0, 1, 2, 50, 127, 128, 147]
    x_TI[:, dead] = 0
    pruned = sparsegpt(W_OI, gather(x_TI), pattern)
    slow_OI, keep_OI = slow_sparsegpt(W_OI, x_TI, pattern)
    assert_sound(pruned, pattern)
    alive_I = torch.ones(148, dtype=torch.bool)
    alive_I[dead] = False
    # Which of three dead weights in a group of four is kept does not matter.
    assert torch.equal(pruned.keep_OI[:, alive_I], keep_OI[:, alive_I])
    torch.testing.assert_close(pruned.W_OI.double(), slow_OI, rtol=1e-3, atol=1e-4)
    assert not pruned.W_OI[:, dead].any()
    assert [note for note in pruned.notes if "7 of 148 inputs are always zero" in note]
    assert len(pruned.notes) == 1


@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)], ids=str)
def test_the_scale_of_inputs_and_weights_does_not_matter(pattern):
    W_OI, x_TI = draw(6, 140)
    small = sparsegpt(W_OI / 64, gather(x_TI / 1024), pattern)
    plain = sparsegpt(W_OI, gather(x_TI), pattern)
    assert torch.equal(small.keep_OI, plain.keep_OI)
    torch.testing.assert_close(small.W_OI * 64, plain.W_OI)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    outputs=st.integers(1, 24),
    groups=st.integers(8, 48),
    pattern=st.sampled_from([Unstructured(0.25), Unstructured(0.5), NM(2, 4), NM(1, 4)]),
    seed=st.integers(0, 2**16),
)
def test_outputs_change_less_than_with_magnitude_and_wanda(outputs, groups, pattern, seed):
    """On the calibration inputs, with the same pattern, and as many weights removed."""
    W_OI, x_TI = draw(outputs, 4 * groups, seed=seed)
    stats = gather(x_TI)
    pruned = sparsegpt(W_OI, stats, pattern)
    error = output_error(W_OI, pruned.W_OI, x_TI)
    for other in (magnitude(W_OI, stats, pattern), wanda(W_OI, stats, pattern)):
        # The shares of blocks and of rows are rounded down alike: each width is a whole number of fours.
        assert other.keep_OI.sum() == pruned.keep_OI.sum()
        assert error <= output_error(W_OI, other.W_OI, x_TI)


@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)], ids=str)
def test_the_update_lies_between_nothing_and_the_best_there_is(pattern):
    """For the chosen mask: better than leaving the weights alone, no better than least squares, and near it."""
    W_OI, x_TI = draw(6, 96)
    pruned = sparsegpt(W_OI, gather(x_TI), pattern)
    error = output_error(W_OI, pruned.W_OI, x_TI)
    best_OI = torch.zeros_like(W_OI)
    y_TO = x_TI @ W_OI.T
    for o, keep_I in enumerate(pruned.keep_OI):
        best_OI[o, keep_I] = torch.linalg.lstsq(x_TI[:, keep_I], y_TO[:, o]).solution
    best = output_error(W_OI, best_OI, x_TI)
    assert best <= error
    assert error < 0.8 * output_error(W_OI, W_OI * pruned.keep_OI, x_TI)
    assert error < 1.6 * best


@pytest.mark.parametrize("inputs", [40, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sparsity_0_returns_the_weights(inputs, dtype):
    W_OI, x_TI = draw(5, inputs)
    W_OI = W_OI.to(dtype)
    pruned = sparsegpt(W_OI, gather(x_TI), Unstructured(0.0))
    assert torch.equal(pruned.W_OI, W_OI.float())
    assert pruned.keep_OI.all()


@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)], ids=str)
def test_half_precision_weights_are_solved_in_float32(pattern):
    W_OI, x_TI = draw(6, 140)
    W_OI = W_OI.bfloat16()
    half, single = (sparsegpt(weights_OI, gather(x_TI), pattern) for weights_OI in (W_OI, W_OI.float()))
    assert_sound(half, pattern)
    assert torch.equal(half.W_OI, single.W_OI)
    assert torch.equal(half.keep_OI, single.keep_OI)


@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)], ids=str)
@pytest.mark.parametrize("strided", [False, True])
def test_arguments_are_unchanged(pattern, strided):
    W_OI, x_TI = draw(6, 140)
    if strided:
        W_OI = W_OI.T.contiguous().T
    x_TI[:, 3] = 0
    stats, untouched, before_OI = gather(x_TI), gather(x_TI), W_OI.clone()
    pruned = sparsegpt(W_OI, stats, pattern)
    pruned.W_OI.fill_(7)
    pruned.keep_OI.fill_(True)
    assert torch.equal(W_OI, before_OI)
    assert torch.equal(stats.gram(), untouched.gram())
    assert torch.equal(stats.square_I, untouched.square_I)
    assert torch.equal(stats.sum_I, untouched.sum_I)


@pytest.mark.parametrize("pattern", [Unstructured(0.5), Unstructured(0.97), NM(2, 4), NM(1, 4)], ids=str)
@pytest.mark.parametrize(
    ("outputs", "inputs", "tokens"),
    [(1, 4, 64), (1, 8, 1), (2, 4, 64), (7, 132, 20), (33, 260, 260)],
)
def test_odd_sizes(outputs, inputs, tokens, pattern):
    W_OI, x_TI = draw(outputs, inputs, tokens)
    assert_sound(sparsegpt(W_OI, gather(x_TI), pattern), pattern)


@pytest.mark.parametrize("inputs", [1, 3, 15, 17, 127, 131, 257])
def test_any_number_of_inputs(inputs):
    W_OI, x_TI = draw(3, inputs)
    assert_sound(sparsegpt(W_OI, gather(x_TI), Unstructured(0.5)), Unstructured(0.5))


def test_a_group_wider_than_a_block():
    W_OI, x_TI = draw(2, 300)
    assert_sound(sparsegpt(W_OI, gather(x_TI), NM(75, 150)), NM(75, 150))


@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)], ids=str)
def test_fewer_tokens_than_inputs_are_said_and_solved(pattern):
    """The Gram matrix has no full rank; damping makes up for it, and the result is still better than Wanda's."""
    W_OI, x_TI = draw(8, 160, tokens=30)
    stats = gather(x_TI)
    pruned = sparsegpt(W_OI, stats, pattern)
    assert_sound(pruned, pattern)
    assert len(pruned.notes) == 1
    assert "30" in pruned.notes[0]
    assert "160" in pruned.notes[0]
    assert "token" in pruned.notes[0]
    assert output_error(W_OI, pruned.W_OI, x_TI) < output_error(W_OI, wanda(W_OI, stats, pattern).W_OI, x_TI)


@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)], ids=str)
def test_a_duplicated_input_can_stand_in_for_its_twin(pattern):
    """Of each pair of equal inputs one weight is enough: half the weights go at (nearly) no cost."""
    W_OI, x_TI = draw(4, 40)
    W_OI, x_TI = W_OI.repeat_interleave(2, 1), x_TI.repeat_interleave(2, 1)
    pruned = sparsegpt(W_OI, gather(x_TI), pattern)
    assert_sound(pruned, pattern)
    size = (x_TI @ W_OI.T).square().sum().item()
    if isinstance(pattern, NM):
        assert output_error(W_OI, pruned.W_OI, x_TI) < 0.01 * size
    assert output_error(W_OI, pruned.W_OI, x_TI) < 0.2 * output_error(
        W_OI, wanda(W_OI, gather(x_TI), pattern).W_OI, x_TI
    )


def test_equal_inputs_everywhere():
    """A Gram matrix of rank one."""
    W_OI = torch.ones(3, 132)
    pruned = sparsegpt(W_OI, gather(torch.randn(200, 1).expand(200, 132)), Unstructured(0.5))
    assert_sound(pruned, Unstructured(0.5))
    torch.testing.assert_close(pruned.W_OI.sum(1), W_OI.sum(1), rtol=0.02, atol=0)


@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)], ids=str)
@pytest.mark.parametrize("tokens", [0, 200])
def test_no_live_input_at_all(pattern, tokens):
    W_OI, x_TI = draw(4, 132)
    pruned = sparsegpt(W_OI, gather(x_TI[:tokens] * 0), pattern)
    assert_sound(pruned, pattern)
    assert not pruned.W_OI.any()
    assert [note for note in pruned.notes if "132 of 132 inputs are always zero" in note]


def draw_indefinite():
    """Weights, and statistics whose Gram matrix has a clearly negative eigenvalue."""
    W_OI, x_TI = draw(4, 24)
    stats = gather(x_TI)
    mean = stats.square_I.mean().item()
    stats.upper_II = torch.full((24, 24), 1.05 * mean).fill_diagonal_(mean)
    stats.square_I = stats.upper_II.diagonal().clone()
    return W_OI, stats


def test_a_gram_matrix_that_needs_more_damping():
    """One that rounding has left with a clearly negative eigenvalue: the note names the damping that was used."""
    W_OI, stats = draw_indefinite()
    _, damping = inverse_cholesky(stats.gram())
    assert damping == pytest.approx(0.1)
    pruned = sparsegpt(W_OI, stats, Unstructured(0.5))
    assert_sound(pruned, Unstructured(0.5))
    assert [note for note in pruned.notes if "damping raised from 0.01 to 0.1 " in note]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gram_matrix_that_is_not_finite_is_refused(bad):
    W_OI, x_TI = draw(4, 24)
    x_TI[3, 5] = bad
    with pytest.raises(ValueError, match="not finite"):
        sparsegpt(W_OI, gather(x_TI), Unstructured(0.5))


def test_stacked_linears_are_each_as_sparse_as_alone():
    """One sweep over several linears that read the same input does what a sweep over each of them does."""
    W_OI, x_TI = draw(24, 150)
    W_OI[:8] *= 0.1  # ranked together, the first linear would lose nearly everything
    stats, sizes = gather(x_TI), [8, 12, 4]
    stacked = sparsegpt(W_OI, stats, Unstructured(0.5), sizes)
    for part_OI, keep_OI, alone_OI in zip(
        stacked.W_OI.split(sizes), stacked.keep_OI.split(sizes), W_OI.split(sizes), strict=True
    ):
        alone = sparsegpt(alone_OI, stats, Unstructured(0.5))
        assert torch.equal(keep_OI, alone.keep_OI)
        torch.testing.assert_close(part_OI, alone.W_OI)


def test_groups_must_divide_the_inputs():
    W_OI, x_TI = draw(4, 30)
    with pytest.raises(ValueError, match="groups of 4"):
        sparsegpt(W_OI, gather(x_TI), NM(2, 4))


@pytest.mark.parametrize("inputs", [1, 5, 150])
@pytest.mark.parametrize("damping", [0.01, 0.5])
def test_inverse_cholesky_is_a_factor_of_the_inverse(inputs, damping):
    _, x_TI = draw(1, inputs)
    G_II = gather(x_TI).gram()
    before_II = G_II.clone()
    U_II, used = inverse_cholesky(G_II, damping)
    assert used == damping
    assert torch.equal(G_II, before_II)
    assert torch.equal(U_II, U_II.triu())
    assert (U_II.diagonal() > 0).all()
    damped_II = G_II.double() + damping * G_II.double().diagonal().mean() * torch.eye(inputs)
    U_II = U_II.double()
    torch.testing.assert_close(U_II.T @ U_II @ damped_II, torch.eye(inputs).double(), rtol=0, atol=1e-3)


def test_the_default_damping_is_a_hundredth_of_the_mean_diagonal():
    _, x_TI = draw(1, 20)
    G_II = gather(x_TI).gram()
    U_II, used = inverse_cholesky(G_II)
    assert used == DAMPING == 0.01
    assert torch.equal(U_II, inverse_cholesky(G_II, 0.01)[0])


def test_inverse_cholesky_gives_a_dead_input_the_mean_diagonal():
    _, x_TI = draw(1, 20)
    x_TI[:, 7] = 0
    G_II = gather(x_TI).gram()
    U_II, _ = inverse_cholesky(G_II)
    mean = G_II.double().diagonal().mean()
    damped_II = G_II.double() + 0.01 * mean * torch.eye(20)
    damped_II[7, 7] += mean
    U_II = U_II.double()
    torch.testing.assert_close(U_II.T @ U_II @ damped_II, torch.eye(20).double(), rtol=0, atol=1e-4)


def test_sparsegpt_is_registered_with_the_level_it_needs():
    assert PRUNERS["sparsegpt"] is SparseGPT
    assert PRUNERS["sparsegpt"].level == Level.GRAM
    with pytest.raises(ValueError, match="MOMENTS"):
        sparsegpt(torch.ones(2, 4), InputStats.empty(4, Level.MOMENTS), Unstructured(0.5))
