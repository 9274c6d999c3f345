"""Statistics of a linear's inputs, against plain float64 sums.

T: tokens, I: input features.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_examples import tries

from secateur.core.stats import InputStats, Level

GATHERING = [Level.MOMENTS, Level.GRAM]
# More than one panel of the Gram matrix, and the last one narrower than the others.
WIDE = 421


def gather(batches, level, features=None):
    """Statistics of the batches, added one after the other."""
    stats = InputStats.empty(features or batches[0].shape[1], level)
    for x_TI in batches:
        stats.add(x_TI)
    return stats


def correlated(tokens, features, seed=0):
    """Inputs whose features differ in scale, have means, and go together."""
    draw = torch.Generator().manual_seed(seed)
    mix_II = torch.randn(features, features, generator=draw) / features**0.5
    scale_I = torch.rand(features, generator=draw) * 3 + 0.1
    mean_I = torch.randn(features, generator=draw)
    return (torch.randn(tokens, features, generator=draw) @ mix_II + mean_I) * scale_I


def integers(tokens, features, seed):
    """Small whole numbers: every sum over them is exact in float32, so results can be compared to the bit."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 9, (tokens, features), generator=draw).float()


def assert_same(a, b):
    assert (a.level, a.tokens) == (b.level, b.tokens)
    assert torch.equal(a.sum_I, b.sum_I)
    assert torch.equal(a.square_I, b.square_I)
    if a.level >= Level.GRAM:
        assert torch.equal(a.gram(), b.gram())


@pytest.mark.parametrize("features", [1, 7, 192, 193, WIDE])
@pytest.mark.parametrize("level", GATHERING)
def test_sums_are_those_of_float64(level, features):
    x_TI = correlated(600, features)
    stats = gather(x_TI.split(250), level)
    exact_TI = x_TI.double()
    scale_I = exact_TI.square().sum(0)

    assert stats.tokens == 600
    assert stats.features == features
    torch.testing.assert_close(stats.sum_I.double(), exact_TI.sum(0), rtol=1e-5, atol=1e-2)
    torch.testing.assert_close(stats.square_I.double(), scale_I, rtol=1e-5, atol=0)
    torch.testing.assert_close(stats.mean().double(), exact_TI.mean(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stats.variance().double(), exact_TI.var(0, unbiased=False), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(stats.norm().double(), exact_TI.norm(dim=0) / 600**0.5, rtol=1e-5, atol=0)
    if level == Level.GRAM:
        allowed_II = 1e-5 * (scale_I[:, None] * scale_I).sqrt()
        assert ((stats.gram().double() - exact_TI.T @ exact_TI).abs() <= allowed_II).all()


def test_the_gram_matrix_is_symmetric_and_new_each_time():
    stats = gather([correlated(50, WIDE)], Level.GRAM)
    gram_II = stats.gram()
    before_II = gram_II.clone()
    assert torch.equal(gram_II, gram_II.T)
    assert torch.equal(gram_II.diagonal(), stats.square_I)
    gram_II.zero_()
    assert torch.equal(stats.gram(), before_II)


def test_a_level_holds_nothing_above_it():
    assert Level.NONE < Level.MOMENTS < Level.GRAM
    x_TI = correlated(20, 5)
    none, moments, gram = (gather([x_TI], level) for level in Level)
    assert none.tokens == 0
    assert not none.sum_I.any()
    assert not none.square_I.any()
    assert none.upper_II is None
    assert moments.upper_II is None
    assert gram.upper_II is not None
    assert moments.sum_I.shape == moments.square_I.shape == (5,)
    torch.testing.assert_close(moments.sum_I, gram.sum_I)
    torch.testing.assert_close(moments.square_I, gram.square_I)


@pytest.mark.parametrize("level", [Level.NONE, Level.MOMENTS])
def test_no_gram_matrix_below_its_level(level):
    with pytest.raises(ValueError, match=level.name):
        gather([correlated(20, 5)], level).gram()


@tries(40)
@given(
    level=st.sampled_from(list(Level)),
    features=st.integers(1, 12),
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    seed=st.integers(0, 2**16),
)
def test_batches_and_merges_do_not_matter(level, features, lengths, seed):
    """One batch, many batches, and the merge of one statistic per batch are the same, whatever the cuts."""
    x_TI = integers(sum(lengths), features, seed)
    batches = x_TI.split(lengths)
    whole = gather([x_TI], level)
    assert_same(gather(batches, level), whole)
    merged = InputStats.empty(features, level)
    for batch in batches:
        merged = merged + gather([batch], level)
    assert_same(merged, whole)
    if level != Level.NONE:
        assert torch.equal(whole.square_I.double(), x_TI.double().square().sum(0))


@pytest.mark.parametrize("level", GATHERING)
def test_a_wide_batch_may_be_cut_anywhere(level):
    x_TI = integers(40, WIDE, seed=3)
    assert_same(gather([x_TI[:1], x_TI[1:1], x_TI[1:]], level), gather([x_TI], level))


@pytest.mark.parametrize("level", GATHERING)
def test_a_merge_leaves_its_parts_alone(level):
    a, b = gather([integers(5, 4, 0)], level), gather([integers(6, 4, 1)], level)
    merged = a + b
    merged.add(integers(7, 4, 2))
    assert_same(a, gather([integers(5, 4, 0)], level))
    assert_same(b, gather([integers(6, 4, 1)], level))


def test_merging_different_statistics_is_refused():
    moments = InputStats.empty(4, Level.MOMENTS)
    with pytest.raises(ValueError, match=r"MOMENTS.*4.*GRAM.*4"):
        moments + InputStats.empty(4, Level.GRAM)
    with pytest.raises(ValueError, match=r"4.*5"):
        moments + InputStats.empty(5, Level.MOMENTS)


@pytest.mark.parametrize("level", GATHERING)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_summed_in_float32(dtype, level):
    x_TI = (correlated(4096, 3) * 100).to(dtype)
    kept_TI = x_TI.clone()
    stats = gather([x_TI], level)
    exact_TI = x_TI.double()
    assert stats.sum_I.dtype == stats.square_I.dtype == torch.float32
    assert torch.equal(x_TI, kept_TI)
    # 300² is beyond the range of float16, and 4096 + 1 beyond the precision of bfloat16.
    assert stats.finite
    torch.testing.assert_close(stats.square_I.double(), exact_TI.square().sum(0), rtol=1e-5, atol=0)
    torch.testing.assert_close(stats.mean().double(), exact_TI.mean(0), rtol=1e-5, atol=1e-3)
    if level == Level.GRAM:
        torch.testing.assert_close(stats.gram().double(), exact_TI.T @ exact_TI, rtol=1e-4, atol=1.0)


@pytest.mark.parametrize("level", GATHERING)
def test_inputs_need_not_be_contiguous(level):
    x_TI = integers(30, 6, 0)
    assert_same(gather([x_TI.T.contiguous().T], level), gather([x_TI], level))


@pytest.mark.parametrize("level", GATHERING)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 1e30])
@pytest.mark.parametrize("feature", [0, WIDE - 1])
def test_one_bad_value_is_never_forgotten(level, bad, feature):
    """A single NaN, infinity or value whose square overflows shows for good, in every merge too."""
    x_TI = correlated(4, WIDE)
    clean = gather([x_TI], level)
    assert clean.finite
    bad_TI = x_TI.clone()
    bad_TI[2, feature] = bad
    stats = gather([bad_TI, x_TI], level)
    assert not stats.finite
    assert not (stats + clean).finite
    assert not (clean + stats).finite


@pytest.mark.parametrize("level", GATHERING)
def test_a_dead_feature_has_no_norm_mean_or_variance(level):
    x_TI = correlated(30, 5)
    x_TI[:, 2] = 0
    stats = gather(x_TI.split(7), level)
    alive_I = torch.tensor([True, True, False, True, True])
    for of_feature_I in (stats.square_I, stats.norm(), stats.variance(), stats.mean()):
        assert torch.equal(of_feature_I != 0, alive_I)
    if level == Level.GRAM:
        gram_II = stats.gram()
        assert not gram_II[2].any()
        assert not gram_II[:, 2].any()


@pytest.mark.parametrize("level", GATHERING)
def test_a_variance_is_never_negative(level):
    """Σx² / T − mean² of a constant can come out below zero in float32."""
    x_TI = torch.tensor([0.1, 0.3, 7.7, 1e-4, 1e3, -3.3]).expand(1001, 6)
    stats = gather([x_TI], level)
    assert (stats.variance() >= 0).all()
    assert (stats.variance() <= 1e-4 * stats.mean().square()).all()


@pytest.mark.parametrize("level", list(Level))
def test_no_tokens_at_all(level):
    stats = gather([torch.empty(0, 3)], level)
    assert stats.tokens == 0
    assert stats.finite
    for of_feature_I in (stats.norm(), stats.mean(), stats.variance()):
        assert torch.equal(of_feature_I, torch.zeros(3))


@pytest.mark.parametrize("features", [5, 192, 200])
def test_energy_is_the_squared_output(features):
    """Exact with the Gram matrix; the diagonal's part of it without."""
    generator = torch.Generator().manual_seed(1)
    x_TI = torch.randn(300, features, generator=generator) + 0.5
    W_OI = torch.randn(7, features, generator=generator)
    gram, moments = InputStats.empty(features, Level.GRAM), InputStats.empty(features, Level.MOMENTS)
    gram.add(x_TI)
    moments.add(x_TI)
    outputs_TO = x_TI.double() @ W_OI.double().T
    torch.testing.assert_close(gram.energy(W_OI).double(), outputs_TO.square().sum(0), rtol=1e-4, atol=0)
    alone_O = (x_TI.double().square().sum(0) * W_OI.double().square()).sum(1)
    torch.testing.assert_close(moments.energy(W_OI).double(), alone_O, rtol=1e-5, atol=0)
