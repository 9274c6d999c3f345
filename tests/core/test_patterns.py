"""Which weights a pattern keeps: counts are exact, ties included, and wrong patterns are refused with useful words.

O: output features, I: input features, R: rows, C: columns, G: groups, M: inputs of one group.
"""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from random_examples import tries

from secateur.core import patterns
from secateur.core.patterns import NM, Unstructured, drop_lowest, keep_best, keep_in_groups, parse_pattern
from secateur.errors import UsageError
from secateur.memory.live_bytes import LiveBytes

quickly = tries(60)


def scores(rows, columns, seed, kinds):
    """Scores of only so many different values: 1 makes all equal, 0 makes (nearly) all different."""
    draw = torch.Generator().manual_seed(seed)
    if kinds:
        return torch.randint(0, kinds, (rows, columns), generator=draw).float()
    return torch.randn(rows, columns, generator=draw)


def lowest(row, count):
    """Positions of the `count` lowest scores of a list, the first ones of equals."""
    return set(sorted(range(len(row)), key=lambda i: (row[i], i))[:count])


@pytest.mark.parametrize("sparsity", [-0.1, 1, 1.5, 50, float("nan"), float("inf")])
def test_sparsity_outside_0_to_1_is_refused(sparsity):
    with pytest.raises(UsageError, match=r"\[0, 1\)") as error:
        Unstructured(sparsity)
    assert f"{sparsity:g}" in str(error.value)
    with pytest.raises(UsageError, match="sparsity"):
        parse_pattern(None, sparsity)


@pytest.mark.parametrize(("n", "m"), [(5, 4), (4, 4), (0, 4), (0, 0), (-1, 4)])
def test_impossible_patterns_are_refused(n, m):
    with pytest.raises(UsageError, match="2:4") as error:
        NM(n, m)
    assert f"{n}:{m}" in str(error.value)


@pytest.mark.parametrize("pattern", ["5:4", "4:4", "0:4", "00:00"])
def test_impossible_patterns_are_refused_as_text(pattern):
    with pytest.raises(UsageError, match="not possible"):
        parse_pattern(pattern, None)


@pytest.mark.parametrize(
    "pattern", ["", "2", "2:", ":4", "2:4:8", "2/4", "a:b", "-2:4", "2.0:4", " 2:4", "2:4\n", "99999:100000", "block"]
)
def test_garbage_is_refused_with_an_example(pattern):
    with pytest.raises(UsageError, match="not understood") as error:
        parse_pattern(pattern, None)
    assert repr(pattern) in str(error.value)
    assert "2:4" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("pattern", [None, "unstructured"])
def test_a_pattern_without_an_amount_names_both_flags(pattern):
    with pytest.raises(UsageError, match=r"`sparsity`.*`pattern`"):
        parse_pattern(pattern, None)


@pytest.mark.parametrize(("pattern", "sparsity"), [("2:4", 0.4), ("2:4", 0.0), ("1:4", 0.25), ("4:8", 2.0)])
def test_a_contradiction_names_both_sides(pattern, sparsity):
    with pytest.raises(UsageError) as error:
        parse_pattern(pattern, sparsity)
    message = str(error.value)
    assert pattern in message
    assert f"{sparsity:g}" in message
    assert f"{NM(*map(int, pattern.split(':'))).sparsity:g}" in message


def test_a_sparsity_that_is_no_number_contradicts_every_pattern():
    with pytest.raises(UsageError):
        parse_pattern("2:4", float("nan"))


def test_a_usage_error_is_exit_code_2():
    with pytest.raises(UsageError) as error:
        parse_pattern("5:4", None)
    assert error.value.exit_code == 2


def test_patterns_that_make_sense():
    assert parse_pattern("2:4", None) == NM(2, 4)
    assert parse_pattern("2:4", 0.5) == NM(2, 4)
    assert parse_pattern("1:4", 0.75) == NM(1, 4)
    assert parse_pattern("16:32", None) == NM(16, 32)
    assert parse_pattern(None, 0.3) == Unstructured(0.3)
    assert parse_pattern("unstructured", 0.3) == Unstructured(0.3)
    assert NM(1, 4).sparsity == 0.75
    assert str(NM(4, 8)) == "4:8"
    assert str(Unstructured(0.5)) == "0.5 unstructured"


@quickly
@given(thousandths=st.integers(0, 999), count=st.integers(0, 2_000_000))
@example(thousandths=290, count=100)
@example(thousandths=570, count=100)
@example(thousandths=999, count=1)
def test_the_number_removed_is_the_share_rounded_down(thousandths, count):
    """As in exact arithmetic, though 0.29 · 100 is a little less than 29 in floating point."""
    assert Unstructured(thousandths / 1000).pruned(count) == thousandths * count // 1000


@quickly
@given(
    rows=st.integers(1, 7),
    columns=st.integers(1, 40),
    seed=st.integers(0, 2**16),
    kinds=st.sampled_from([0, 1, 2, 5]),
    data=st.data(),
)
def test_drop_lowest_is_the_head_of_a_stable_sort(rows, columns, seed, kinds, data):
    count = data.draw(st.integers(0, columns))
    score_RC = scores(rows, columns, seed, kinds)
    before_RC = score_RC.clone()
    drop_RC = drop_lowest(score_RC, count)
    assert drop_RC.dtype == torch.bool
    assert torch.equal(score_RC, before_RC)
    for score, drop in zip(score_RC.tolist(), drop_RC.tolist(), strict=True):
        assert {i for i, gone in enumerate(drop) if gone} == lowest(score, count)


@pytest.mark.parametrize("kinds", [0, 1, 3])
def test_rows_are_compared_some_at_a_time(kinds, monkeypatch):
    score_RC = scores(301, 64, 5, kinds)
    whole_RC = drop_lowest(score_RC, 20)
    monkeypatch.setattr(patterns, "_PIECE", 64 * 10)
    with LiveBytes() as live:
        pieces_RC = drop_lowest(score_RC, 20)
    assert torch.equal(pieces_RC, whole_RC)
    # Twice the mask, and a few times a piece.
    assert live.peak < 2 * whole_RC.nbytes + 20 * 64 * 10


def test_drop_lowest_in_half_precision():
    """Where many scores are equal."""
    score_RC = scores(4, 999, 0, 0).bfloat16()
    assert torch.equal(drop_lowest(score_RC, 500), drop_lowest(score_RC.float(), 500))
    assert (drop_lowest(score_RC, 500).sum(1) == 500).all()


def test_drop_lowest_in_double_precision():
    assert (drop_lowest(scores(4, 101, 0, 0).double() / 3, 50).sum(1) == 50).all()


def test_drop_lowest_with_infinite_scores():
    score_RC = torch.tensor([[torch.inf, 1.0, torch.inf, -torch.inf, 2.0], [torch.inf] * 5])
    assert drop_lowest(score_RC, 4).int().tolist() == [[1, 1, 0, 1, 1], [1, 1, 1, 1, 0]]


@quickly
@given(
    outputs=st.integers(1, 6),
    inputs=st.integers(1, 40),
    percent=st.integers(0, 99),
    seed=st.integers(0, 2**16),
    kinds=st.sampled_from([0, 1, 3]),
)
def test_every_row_keeps_its_best(outputs, inputs, percent, seed, kinds):
    score_OI = scores(outputs, inputs, seed, kinds)
    keep_OI = keep_best(score_OI, Unstructured(percent / 100))
    assert keep_OI.dtype == torch.bool
    assert keep_OI.shape == score_OI.shape
    for score, keep in zip(score_OI.tolist(), keep_OI.tolist(), strict=True):
        removed = {i for i, kept in enumerate(keep) if not kept}
        assert removed == lowest(score, percent * inputs // 100)


@quickly
@given(
    outputs=st.integers(1, 5),
    groups=st.integers(1, 6),
    m=st.integers(2, 17),
    seed=st.integers(0, 2**16),
    kinds=st.sampled_from([0, 1, 3]),
    data=st.data(),
)
def test_every_group_keeps_its_best(outputs, groups, m, seed, kinds, data):
    n = data.draw(st.integers(1, m - 1))
    score_OI = scores(outputs, groups * m, seed, kinds)
    keep_OI = keep_best(score_OI, NM(n, m))
    assert keep_OI.shape == score_OI.shape
    score_GM, keep_GM = score_OI.reshape(-1, m), keep_OI.reshape(-1, m)
    for score, keep in zip(score_GM.tolist(), keep_GM.tolist(), strict=True):
        assert {i for i, kept in enumerate(keep) if not kept} == lowest(score, m - n)


@pytest.mark.parametrize("m", [2, 3, 4, 7, 8, 9, 16])
@pytest.mark.parametrize("kinds", [0, 1, 2])
@pytest.mark.parametrize("strided", [False, True])
def test_every_column_keeps_its_best(m, kinds, strided):
    score_MG = scores(m, 50, m, kinds)
    if strided:
        score_MG = score_MG.T.contiguous().T
    score_MG[0, 0] = score_MG[m - 1, 1] = torch.inf
    for n in range(1, m):
        keep_MG = keep_in_groups(score_MG, n)
        assert keep_MG.dtype == torch.bool
        for score, keep in zip(score_MG.T.tolist(), keep_MG.T.tolist(), strict=True):
            assert {i for i, kept in enumerate(keep) if not kept} == lowest(score, m - n)


@pytest.mark.parametrize("pattern", [Unstructured(0.3), NM(2, 4), NM(1, 8)])
def test_scores_need_not_be_contiguous(pattern):
    score_OI = scores(16, 24, 0, 4)
    strided_OI = score_OI.T.contiguous().T
    assert not strided_OI.is_contiguous()
    assert torch.equal(keep_best(strided_OI, pattern), keep_best(score_OI, pattern))


def test_groups_must_divide_the_inputs():
    with pytest.raises(ValueError, match=r"10 .*4"):
        keep_best(torch.zeros(3, 10), NM(2, 4))
