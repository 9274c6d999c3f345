"""Intervals and p-values against slow loops, brute force and what is known of the normal distribution."""

import itertools
import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur.evaluation import uncertainty
from secateur.evaluation.uncertainty import fewest_windows, interval, p_of_rise


def slow_interval(sum_K, count_K, draws_RK, confidence):
    """Percentiles of the ratios that given resamples have, each window taken one by one."""
    ratios = []
    for times_K in draws_RK:
        numerator = denominator = 0.0
        for times, total, count in zip(times_K, sum_K, count_K, strict=True):
            for _ in range(times):
                numerator += total
                denominator += count
        ratios.append(numerator / denominator)
    ratios.sort()

    def quantile(q):
        place = q * (len(ratios) - 1)
        below = math.floor(place)
        above = min(below + 1, len(ratios) - 1)
        return ratios[below] + (place - below) * (ratios[above] - ratios[below])

    return quantile((1 - confidence) / 2), quantile((1 + confidence) / 2)


@pytest.mark.parametrize("confidence", [0.5, 0.95])
def test_the_interval_is_that_of_a_slow_loop_over_the_same_draws(confidence, monkeypatch):
    monkeypatch.setattr(uncertainty, "_RESAMPLES", 200)
    monkeypatch.setattr(uncertainty, "_AT_A_TIME", 50)
    sum_K, count_K = [3.0, -1.0, 8.5, 2.25, 40.0], [1, 7, 2, 30, 4]
    draw = np.random.default_rng(0)
    draws_RK = [row for _ in range(4) for row in draw.multinomial(5, np.full(5, 1 / 5), size=50).tolist()]
    assert interval(sum_K, count_K, confidence) == pytest.approx(
        slow_interval(sum_K, count_K, draws_RK, confidence), rel=1e-12
    )


def test_the_interval_of_normal_data_is_that_of_theory():
    K = 400
    x_K = np.random.default_rng(1).normal(5, 2, K)
    half = 1.96 * x_K.std() / math.sqrt(K)
    low, high = interval(x_K, np.ones(K))
    assert (low, high) == pytest.approx((x_K.mean() - half, x_K.mean() + half), abs=0.05 * half)
    narrow = interval(x_K, np.ones(K), 0.6827)
    assert narrow == pytest.approx((x_K.mean() - half / 1.96, x_K.mean() + half / 1.96), abs=0.05 * half)


def test_the_interval_of_a_ratio_with_unequal_counts_is_that_of_the_delta_method():
    K = 400
    draw = np.random.default_rng(2)
    count_K = draw.integers(10, 100, K)
    sum_K = 3 * count_K + draw.normal(0, 20, K)
    ratio = sum_K.sum() / count_K.sum()
    half = 1.96 * math.sqrt(((sum_K - ratio * count_K) ** 2).sum()) / count_K.sum()
    assert interval(sum_K, count_K) == pytest.approx((ratio - half, ratio + half), abs=0.05 * half)


def test_one_window_has_no_interval():
    assert interval([3.0], [2]) is None


def test_equal_windows_have_an_interval_of_no_width():
    assert interval([2.0] * 6, [4] * 6) == pytest.approx((0.5, 0.5))


def brute_force(differences):
    """The share of all ways to set the signs whose sum is at least the one that was seen."""
    ways = list(itertools.product((1, -1), repeat=len(differences)))
    observed = math.fsum(differences)
    slack = 1e-12 * sum(map(abs, differences))
    sums = [math.fsum(s * d for s, d in zip(signs, differences, strict=True)) for signs in ways]
    return sum(total >= observed - slack for total in sums) / len(ways)


# Of so many decimals that no two sums are equal but for rounding.
NUMBERS = st.floats(-10, 10).map(lambda x: round(x, 6))


@given(st.lists(NUMBERS, min_size=1, max_size=9))
def test_the_p_value_is_that_of_all_sign_flips(differences):
    assert p_of_rise(differences) == brute_force(differences)


@given(st.lists(NUMBERS, min_size=1, max_size=9), st.randoms())
def test_the_p_value_does_not_hang_on_the_order(differences, order):
    shuffled = list(differences)
    order.shuffle(shuffled)
    assert p_of_rise(shuffled) == p_of_rise(differences)


@pytest.mark.parametrize("K", [1, 5, 16, 17, 40])
def test_no_difference_is_no_rise(K):
    assert p_of_rise([0.0] * K) == 1


@pytest.mark.parametrize("K", [1, 5, 16])
def test_a_rise_in_every_window_is_the_least_likely(K):
    assert p_of_rise([0.1 * (k + 1) for k in range(K)]) == 2**-K
    assert p_of_rise([-0.1 * (k + 1) for k in range(K)]) == 1


@pytest.mark.parametrize("shift", [0.0, 0.2, 0.5])
def test_random_sign_flips_come_near_all_of_them(shift, monkeypatch):
    draw = random.Random(3)
    differences = [draw.gauss(shift, 1) for _ in range(16)]
    exact = p_of_rise(differences)
    monkeypatch.setattr(uncertainty, "_MOST_EXACT", 15)
    monkeypatch.setattr(uncertainty, "_AT_A_TIME", 250)
    drawn = p_of_rise(differences)
    # 2^15 draws: four standard errors.
    assert drawn == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 2**15))
    assert drawn != exact


def test_many_windows_are_as_the_normal_distribution_has_it():
    draw = random.Random(4)
    differences = [draw.gauss(0.05, 1) for _ in range(200)]
    z = math.fsum(differences) / math.sqrt(math.fsum(d * d for d in differences))
    assert p_of_rise(differences) == pytest.approx(math.erfc(z / math.sqrt(2)) / 2, rel=0.1)
    # The random ways are never all against it.
    assert 0 < p_of_rise([1.0] * 200) < 2e-5


@pytest.mark.parametrize("confidence", [0.5, 0.75, 0.9, 0.9375, 0.95, 0.99, 0.999])
def test_the_fewest_windows_are_just_enough(confidence):
    K = fewest_windows(confidence)
    assert p_of_rise([1.0] * K) <= 1 - confidence
    if K > 1:
        assert p_of_rise([1.0] * (K - 1)) > 1 - confidence


def test_the_highest_confidence_can_be_reached_with_many_windows():
    assert p_of_rise([1.0] * 40) < 1 - 0.9999
