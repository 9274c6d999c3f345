"""MC#'s programme: the least sum that there is, against trying everything."""

import itertools

import numpy as np
import pytest

from secateur.experts.bit_programme import costs_of, least_cost


def by_trying(cost_EB, bits_B, budget, each_of=()):
    """The least cost of all ways that keep to the budget and have each number of bits once."""
    found = np.inf
    for way in itertools.product(range(len(bits_B)), repeat=len(cost_EB)):
        bits = [bits_B[b] for b in way]
        if sum(bits) <= budget and set(each_of) <= set(bits):
            found = min(found, sum(cost_EB[e][b] for e, b in enumerate(way)))
    return found


@pytest.mark.parametrize("seed", range(30))
def test_it_is_the_best_there_is(seed):
    draw = np.random.default_rng(seed)
    bits = list(draw.permutation([[1, 2, 3], [2, 3, 4], [2, 4, 8], [3]][seed % 4]))
    E = int(draw.integers(1, 7))
    cost_EB = draw.random((E, len(bits))) ** 3
    budget = E * min(bits) + int(draw.integers(0, E * 4 + 1))
    each_of = sorted(bits)[-2:] if seed % 3 == 0 else []
    found = least_cost(cost_EB, bits, budget, each_of)
    assert sum(found) <= budget
    wanted = by_trying(cost_EB, bits, budget, each_of)
    cost = sum(cost_EB[e, bits.index(b)] for e, b in enumerate(found))
    if np.isfinite(wanted):
        assert set(each_of) <= set(found)
        assert cost == pytest.approx(wanted, rel=1e-12)
    else:  # as many of those wanted as there is room for
        assert cost <= by_trying(cost_EB, bits, budget, sorted(each_of)[:0]) + cost_EB.sum()


def test_it_agrees_with_an_integer_programme():
    optimize = pytest.importorskip("scipy.optimize")
    draw = np.random.default_rng(0)
    cost_EB, bits, budget = draw.random((64, 3)), [1, 2, 3], 150
    E, B = cost_EB.shape
    one = np.kron(np.eye(E), np.ones(B))
    spent = np.tile(bits, E)[None]
    limits = [optimize.LinearConstraint(one, 1, 1), optimize.LinearConstraint(spent, 0, budget)]
    solved = optimize.milp(cost_EB.ravel(), constraints=limits, integrality=np.ones(E * B), bounds=(0, 1))
    found = least_cost(cost_EB, bits, budget)
    assert sum(cost_EB[e, bits.index(b)] for e, b in enumerate(found)) == pytest.approx(solved.fun, rel=1e-6)


def test_costs_are_the_papers():
    cost_EB = costs_of([30, 10], [0.6, 0.2], [[4.0, 1.0], [2.0, 1.0]])
    wanted = [[0.75 * 0.75**1.5 * 16, 0.75 * 0.75**1.5], [0.25 * 0.25**1.5 * 4, 0.25 * 0.25**1.5]]
    np.testing.assert_allclose(cost_EB, wanted)
    np.testing.assert_allclose(costs_of([1, 3], [1, 1], [[2.0], [2.0]], 2, 0, 1), [[0.125], [1.125]])


def test_fewer_bits_than_there_are_do_not_fit():
    with pytest.raises(ValueError, match="3 experts of 2 bits take 6, more than 5"):
        least_cost(np.ones((3, 2)), [2, 3], 5)
