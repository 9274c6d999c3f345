"""Damping that held-out windows choose, against a slow and obvious choice in float64.

T: tokens, I: input features, O: output features.
"""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from secateur.core import damping as damping_module
from secateur.core.damping import TRIED, choose_damping, number, with_damping
from secateur.core.patterns import NM, Unstructured
from secateur.core.registry import PRUNERS, QUANTIZERS
from secateur.core.stack import Stack
from secateur.core.stats import InputStats, Level
from secateur.errors import UsageError
from secateur.solvers.inverse_cholesky import DAMPING

METHODS = ["sparsegpt", "alps", "gptq", "spqr"]


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gather(x_TI):
    stats = InputStats.empty(x_TI.shape[1], Level.GRAM)
    stats.add(x_TI)
    return stats


def stack_of(W_OI, even_TI, odd_TI, rows=()):
    halves = gather(even_TI), gather(odd_TI)
    whole = halves[0] + halves[1]
    whole.halves = halves
    return Stack(W_OI, whole, tuple(rows) or (len(W_OI),))


def made(name, damping):
    method = (PRUNERS.get(name) or QUANTIZERS[name])(damping=damping)
    return replace(method, bits=2, group_size=8) if name in QUANTIZERS else method


def solved(name, stack, damping):
    method = made(name, damping)
    if name in QUANTIZERS:
        return torch.cat([weight.dequantize() for weight in method.quantize(stack)])
    return method.prune(stack, NM(2, 4)).W_OI


@pytest.mark.parametrize("name", METHODS)
def test_no_damping_that_is_tried_has_less_error_on_held_out_windows(name):
    rows, W_OI = (6, 3, 5), drawn(1, 14, 16)
    even_TI, odd_TI = drawn(2, 24, 16), drawn(3, 24, 16)
    even_TI[:, 5] *= 6
    chosen = choose_damping(stack_of(W_OI, even_TI, odd_TI, rows), lambda part, each: solved(name, part, each))
    assert len(chosen) == 3
    errors = []
    for damping in TRIED:
        found_OI = solved(name, Stack(W_OI, gather(even_TI), rows), damping)
        away_TO = odd_TI.double() @ (found_OI - W_OI).double().T
        errors.append([part.square().sum().item() for part in away_TO.split(rows, 1)])
    for i, damping in enumerate(chosen):
        assert errors[TRIED.index(damping)][i] <= min(each[i] for each in errors) * (1 + 1e-4)


def test_few_tokens_want_more_damping_than_many():
    """Twenty tokens for sixteen inputs say little of the next twenty."""
    W_OI, mix_II = drawn(1, 30, 16), drawn(4, 3, 16)
    chosen = {}
    for tokens in (20, 20000):
        # Inputs that go together, so that others can make up for one that is removed.
        even_TI, odd_TI = (drawn(seed, tokens, 3) @ mix_II + 0.1 * drawn(seed + 5, tokens, 16) for seed in (2, 3))
        stack = stack_of(W_OI, even_TI, odd_TI)
        (chosen[tokens],) = choose_damping(stack, lambda part, each: solved("sparsegpt", part, each))
    assert chosen[20] > chosen[20000]


def test_only_some_rows_of_a_linear_are_tried(monkeypatch):
    monkeypatch.setattr(damping_module, "_ROWS", 4)
    seen = []

    def solve(part, damping):
        seen.append((part.rows, part.W_OI[:, 0].tolist()))
        return part.W_OI

    W_OI = torch.arange(15.0)[:, None].expand(15, 3).contiguous()
    choose_damping(stack_of(W_OI, drawn(2, 9, 3), drawn(3, 9, 3), (12, 3)), solve)
    assert seen == [((4, 3), [0, 3, 6, 9, 12, 13, 14])] * len(TRIED)


@given(st.integers(1, 700), st.integers(1, 300))
def test_rows_are_spread_evenly_and_none_is_taken_twice(first, second):
    W_OI = torch.arange(float(first + second))[:, None]
    few = damping_module._few_rows(Stack(W_OI, InputStats.empty(1, Level.GRAM), (first, second)))
    assert few.rows == (min(first, 256), min(second, 256))
    taken = few.W_OI[:, 0].int().tolist()
    assert len(set(taken)) == len(taken)
    assert taken == sorted(taken)
    assert taken[0] == 0
    assert taken[few.rows[0]] == first


def test_a_solution_that_is_not_finite_is_never_chosen():
    stack = stack_of(drawn(1, 4, 3), drawn(2, 9, 3), drawn(3, 9, 3))
    chosen = choose_damping(stack, lambda part, each: part.W_OI * (torch.nan if each < 0.1 else 1 + each))
    assert chosen == [0.1]
    assert choose_damping(stack, lambda part, _: part.W_OI * torch.nan) == [DAMPING]


@pytest.mark.parametrize("tokens", [0, 7])
def test_without_two_windows_it_is_the_default(tokens):
    stack = stack_of(drawn(1, 4, 3), drawn(2, 7, 3), drawn(3, tokens, 3)[:0])
    assert choose_damping(stack, lambda part, _: part.W_OI) == [DAMPING]
    alone = replace(stack, stats=gather(drawn(2, 7, 3)))
    assert choose_damping(alone, lambda part, _: part.W_OI) == [DAMPING]


def test_what_halves_find_out_is_not_kept():
    """Six factorisations as large as the Gram matrix would be."""
    stack = stack_of(drawn(1, 6, 8), drawn(2, 30, 8), drawn(3, 30, 8))
    choose_damping(stack, lambda part, each: solved("sparsegpt", part, each))
    assert all(not stats._found for stats in (stack.stats, *stack.stats.halves))


@pytest.mark.parametrize("name", METHODS)
def test_a_method_does_not_solve_with_a_word(name):
    method = made(name, "auto")
    stack = stack_of(drawn(1, 4, 8), drawn(2, 30, 8), drawn(3, 30, 8))
    with pytest.raises(ValueError, match="has to be chosen"):
        method.quantize(stack) if name in QUANTIZERS else method.prune(stack, Unstructured(0.5))
    assert with_damping(method, 0.3).damping == 0.3
    assert with_damping(made(name, 0.05), 0.3).damping == 0.05
    with pytest.raises(UsageError, match=r"give more than 0 and less than 10000 or 'auto'"):
        made(name, "often")


def test_a_number_is_itself():
    assert number(0.25) == 0.25
