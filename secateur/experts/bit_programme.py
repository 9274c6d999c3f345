"""Bits for each expert of a layer: the integer programme of MC# ("Mixture Compressor", arXiv:2410.06270 and 2510.10962,
section on pre-loading mixed-precision quantization), solved exactly. What MC# trains besides (its token-wise pruning) is left
out.

    min Σ_e φ_e^α · w_e^β · ε_eb^γ,   Σ_e b_e ≤ B,   at least one expert of each of the greatest two numbers of bits

φ is how often the router chooses an expert, w the mean of the weights that it then gives it, each as a share of all of the
layer's; ε_eb is by how much the layer's output is off when expert e alone has b bits.

E: experts, B: numbers of bits that one may have.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

#: Exponents of φ, w and ε: those of the authors' paper.
ALPHA, BETA, GAMMA = 1.0, 1.5, 2.0


def costs_of(
    frequency_E: Sequence[float],
    weight_E: Sequence[float],
    error_EB: Sequence[Sequence[float]],
    alpha: float = ALPHA,
    beta: float = BETA,
    gamma: float = GAMMA,
) -> np.ndarray:
    """φ^α · w^β · ε^γ `[E, B]`. Frequencies and weights need not sum to 1."""
    shares = [np.asarray(x, np.float64) / max(float(np.sum(x)), 1e-300) for x in (frequency_E, weight_E)]
    importance_E = shares[0] ** alpha * shares[1] ** beta
    found: np.ndarray = importance_E[:, None] * np.asarray(error_EB, np.float64) ** gamma
    return found


def least_cost(cost_EB: np.ndarray, bits_B: Sequence[int], budget: int, each_of: Sequence[int] = ()) -> list[int]:
    """For each expert how many bits, so that costs sum to the least there is. By dynamic programming over the bits spent.

    Args:
        cost_EB: finite.
        bits_B: whole numbers, in any order.
        budget: the most that all may sum to.
        each_of: bits that at least one expert is to have each, as far as that many experts and bits are there.

    Raises:
        ValueError: the fewest bits exceed the budget.
    """
    E, bits = len(cost_EB), [int(b) for b in bits_B]
    low = min(bits)
    room = budget - E * low
    if room < 0:
        raise ValueError(f"{E} experts of {low} bits take {E * low}, more than {budget}")
    wanted = _affordable(each_of, bits, E, room)
    # States: bits spent beyond the fewest, and which of those wanted have been met.
    met = 1 << len(wanted)
    best = np.full((met, room + 1), np.inf)
    best[0, 0] = 0.0
    chosen = np.zeros((E, met, room + 1), np.int16)
    came = np.zeros((E, met, room + 1), np.int16)
    for e in range(E):
        after = np.full_like(best, np.inf)
        for b, each in enumerate(bits):
            more = each - low
            if more > room:
                continue
            flag = 1 << wanted.index(each) if each in wanted else 0
            for state in range(met):
                cost = best[state, : room + 1 - more] + cost_EB[e, b]
                to = state | flag
                better = cost < after[to, more:]
                after[to, more:][better] = cost[better]
                chosen[e, to, more:][better] = b
                came[e, to, more:][better] = state
        best = after
    spent, state = int(best[-1].argmin()), met - 1
    found = []
    for e in reversed(range(E)):
        b = int(chosen[e, state, spent])
        found.append(bits[b])
        state, spent = int(came[e, state, spent]), spent - (bits[b] - low)
    return found[::-1]


def _affordable(each_of: Sequence[int], bits: Sequence[int], experts: int, room: int) -> list[int]:
    """Of the bits that are wanted once each, the fewest first, as many as there is room for."""
    low = min(bits)
    wanted: list[int] = []
    for each in sorted(set(each_of) & set(bits)):
        if len(wanted) < experts and each - low <= room:
            wanted.append(each)
            room -= each - low
    return wanted
