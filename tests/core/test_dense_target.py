"""The dense model's outputs as the target, against minimisation by brute force in float64; and what held-out windows promise.

T: tokens, I: input features, O: output features.
"""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from secateur.core import dense_target
from secateur.core.dense_target import DAMPINGS, Correction, towards_dense
from secateur.core.stack import Stack
from secateur.core.stats import InputStats, Level


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gather(x_TI, dense_TI, dtype=torch.float32):
    stats = InputStats.empty(x_TI.shape[1], Level.GRAM).with_drift()
    stats.add(x_TI.to(dtype), dense_TI=dense_TI.to(dtype))
    return stats


def in_halves(even, odd):
    """Statistics of two pairs of inputs, the compressed model's and the dense one's."""
    halves = gather(*even), gather(*odd)
    whole = halves[0] + halves[1]
    whole.halves = halves
    return whole


def stack(W_OI, stats, rows=()):
    return Stack(W_OI, stats, tuple(rows) or (len(W_OI),))


def damped(G_II, damping):
    """G + λ·1 as `Stack.damped_gram` has it, in the dtype of G."""
    diagonal_I = G_II.diagonal()
    mean = diagonal_I.mean()
    return G_II + torch.diag(torch.where(diagonal_I <= 0, mean, torch.zeros_like(mean)) + damping * mean)


def correction(W_OI, x_TI, dense_TI, damping):
    """The minimiser of ‖XŴᵀ − X̃Wᵀ‖² + λ‖Ŵ − W‖² over Ŵ − W, from the normal equations, in float64."""
    W_OI, x_TI, dense_TI = W_OI.double(), x_TI.double(), dense_TI.double()
    return torch.linalg.solve(damped(x_TI.T @ x_TI, damping), x_TI.T @ (dense_TI - x_TI) @ W_OI.T).T


@pytest.fixture
def fixed(monkeypatch):
    """`fixed(0.1, 0.5)`: every linear is corrected so."""
    return lambda *said: monkeypatch.setattr(
        dense_target, "_choose", lambda stack: [Correction(*said)] * len(stack.rows)
    )


def test_the_drift_is_additive_and_that_of_float64():
    x_TI, dense_TI, weight_T = drawn(0, 90, 7), drawn(1, 90, 7), drawn(2, 90).abs()
    stats = InputStats.empty(7, Level.GRAM).with_drift()
    stats.add(x_TI[:40], weight_T[:40], dense_TI=dense_TI[:40])
    more = InputStats.empty(7, Level.GRAM).with_drift()
    more.add(x_TI[40:], weight_T[40:], dense_TI=dense_TI[40:])
    exact_II = ((dense_TI - x_TI).double() * weight_T.double()[:, None]).T @ x_TI.double()
    torch.testing.assert_close((stats + more).drift_II.double(), exact_II, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="only some"):
        stats + InputStats.empty(7, Level.GRAM)


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_inputs_of_the_dense_model_that_are_not_finite_are_seen(bad):
    x_TI = drawn(0, 5, 3)
    stats = gather(x_TI, torch.where(torch.arange(15).view(5, 3) == 7, bad, x_TI))
    assert not stats.finite


@given(st.integers(1, 9), st.integers(1, 5), st.integers(1, 40), st.sampled_from(DAMPINGS), st.integers(0, 1000))
def test_the_target_is_the_minimiser(features, outputs, tokens, damping, seed):
    """Of the error against the dense model's outputs: no other weights come nearer, by the completed square."""
    x_TI, dense_TI, W_OI = (
        drawn(seed, tokens, features),
        drawn(seed + 1, tokens, features),
        drawn(seed + 2, outputs, features),
    )
    stats = gather(x_TI, dense_TI)
    found = dense_target._correction(dense_target._lost(W_OI, stats), stats, damping)
    wanted = correction(W_OI, x_TI, dense_TI, damping)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-2, atol=1e-2 * wanted.abs().max().item() + 1e-5)


def test_completing_the_square_brute_force():
    """For any weights, the error against the dense outputs is the one against W* and a constant."""
    x_TI, W_OI = drawn(0, 60, 6).double(), drawn(2, 4, 6).double()
    dense_TI = x_TI + 0.3 * drawn(1, 60, 6).double()
    target_OI = W_OI + correction(W_OI, x_TI, dense_TI, 0.0)
    constants = []
    for seed in range(5):
        any_OI = drawn(seed + 10, 4, 6).double()
        to_dense = (x_TI @ any_OI.T - dense_TI @ W_OI.T).square().sum()
        to_target = (x_TI @ (any_OI - target_OI).T).square().sum()
        constants.append((to_dense - to_target).item())
    assert constants == pytest.approx([constants[0]] * 5, rel=1e-9)
    # Gradient descent from elsewhere ends there too.
    free_OI = torch.zeros(4, 6, dtype=torch.float64)
    G_II, rate = x_TI.T @ x_TI, 1 / torch.linalg.matrix_norm(x_TI, 2) ** 2
    for _ in range(3000):
        free_OI -= rate * (free_OI @ G_II - W_OI @ dense_TI.T @ x_TI)
    torch.testing.assert_close(free_OI, target_OI, rtol=1e-6, atol=1e-8)


def test_equal_inputs_change_nothing_to_the_bit():
    x_TI = drawn(0, 64, 8)
    W_OI = drawn(1, 5, 8)
    found, chosen = towards_dense(stack(W_OI, in_halves((x_TI[:32], x_TI[:32]), (x_TI[32:], x_TI[32:])), (2, 3)))
    assert torch.equal(found.W_OI, W_OI)
    assert [each.share for each in chosen] == [0.0, 0.0]


def test_a_systematic_drift_is_undone():
    """Inputs that are 0.8 of the dense model's: the weights grow by as much, and nothing is lost on either half."""
    dense_TI = drawn(0, 4000, 8)
    W_OI = drawn(1, 5, 8)
    stats = in_halves((0.8 * dense_TI[:2000], dense_TI[:2000]), (0.8 * dense_TI[2000:], dense_TI[2000:]))
    found, (chosen,) = towards_dense(stack(W_OI, stats))
    assert chosen.damping == DAMPINGS[0]
    assert chosen.share > 0.99
    torch.testing.assert_close(found.W_OI, W_OI / 0.8, rtol=1e-2, atol=1e-3)


def held_out_error(W_OI, step_OI, x_TI, dense_TI):
    return (x_TI.double() @ (W_OI + step_OI).double().T - dense_TI.double() @ W_OI.double().T).square().sum().item()


@given(
    st.integers(1, 12),
    st.lists(st.integers(1, 4), min_size=1, max_size=3),
    st.integers(1, 30),
    st.floats(0, 2),
    st.integers(0, 999),
)
def test_held_out_windows_never_lose(features, rows, tokens, drift, seed):
    """The chosen damping and share, computed from one half, are no worse on the other than none, both ways together; and no
    other damping and share that are tried are better.
    """
    pairs = []
    for half in range(2):
        x_TI = drawn(seed + half, tokens, features)
        pairs.append((x_TI, x_TI + drift * (0.5 * x_TI + drawn(seed + 2 + half, tokens, features))))
    W_OI = drawn(seed + 7, sum(rows), features)
    _, chosen = towards_dense(stack(W_OI, in_halves(*pairs), rows))

    def lost(W_RI, damping, share):
        steps = [share * correction(W_RI, *pair, damping) for pair in pairs]
        return sum(held_out_error(W_RI, step, *pair) for step, pair in zip(steps, pairs[::-1], strict=True))

    for W_RI, each in zip(W_OI.split(rows), chosen, strict=True):
        nothing = lost(W_RI, 1.0, 0.0)
        found = lost(W_RI, each.damping, each.share)
        assert 0 <= each.share <= 1
        assert found <= nothing * (1 + 1e-3) + 1e-6
        for damping in DAMPINGS:
            for share in (0.0, 0.25, 0.5, 0.75, 1.0):
                assert found <= lost(W_RI, damping, share) * (1 + 1e-2) + 1e-4


def test_each_linear_has_its_own():
    """One whose weights see the drift only, beside one whose weights see nothing of it."""
    x_TI = drawn(0, 400, 2)
    dense_TI = x_TI * torch.tensor([1.5, 1.0])
    W_OI = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    found, chosen = towards_dense(
        stack(W_OI, in_halves((x_TI[:200], dense_TI[:200]), (x_TI[200:], dense_TI[200:])), (1, 1))
    )
    assert chosen[0].share > 0.9
    assert chosen[1].share == 0
    assert torch.equal(found.W_OI[1], W_OI[1])
    alone, _ = towards_dense(stack(W_OI[:1], found.stats))
    torch.testing.assert_close(alone.W_OI[0], found.W_OI[0])


def test_the_share_that_was_chosen_is_gone_on_all_windows(fixed):
    x_TI, dense_TI, W_OI = drawn(0, 80, 6), drawn(1, 80, 6), drawn(2, 3, 6)
    fixed(0.1, 0.5)
    found, _ = towards_dense(stack(W_OI, gather(x_TI, dense_TI)))
    wanted = W_OI.double() + 0.5 * correction(W_OI, x_TI, dense_TI, 0.1)
    torch.testing.assert_close(found.W_OI.double(), wanted, rtol=1e-4, atol=1e-5)


# --- nasty inputs


def test_dead_inputs_and_a_singular_gram_matrix():
    x_TI = drawn(0, 40, 6)
    x_TI[:, 2] = 0  # dead in the compressed model
    x_TI[:, 4] = x_TI[:, 3]  # singular
    dense_TI = 1.3 * x_TI
    dense_TI[:, 2] = drawn(1, 40)
    W_OI = drawn(2, 3, 6)
    found, (chosen,) = towards_dense(stack(W_OI, in_halves((x_TI[:20], dense_TI[:20]), (x_TI[20:], dense_TI[20:]))))
    assert chosen.share > 0
    assert torch.isfinite(found.W_OI).all()
    torch.testing.assert_close(found.W_OI[:, 2], W_OI[:, 2], msg="nothing is known of an input that is always zero")


@pytest.mark.parametrize("tokens", [0, 1])
def test_with_one_window_nothing_is_held_out_and_nothing_changed(tokens):
    x_TI, W_OI = drawn(0, tokens + 5, 4), drawn(1, 3, 4)
    stats = in_halves((x_TI[:5], 2 * x_TI[:5]), (x_TI[:0], x_TI[:0]))
    found, (chosen,) = towards_dense(stack(W_OI, stats))
    assert chosen.share == 0
    assert torch.equal(found.W_OI, W_OI)


def test_statistics_without_a_drift_are_refused():
    stats = InputStats.empty(3, Level.GRAM)
    with pytest.raises(ValueError, match="the drift was not gathered"):
        towards_dense(stack(drawn(0, 2, 3), stats))


def test_half_precision_inputs():
    x_TI, W_OI = drawn(0, 200, 8), drawn(1, 3, 8)
    dense_TI = 1.25 * x_TI
    half = gather(x_TI, dense_TI, torch.bfloat16)
    whole = half + half
    whole.halves = (half, replace(half))
    found, (chosen,) = towards_dense(stack(W_OI, whole))
    assert chosen.share > 0.95
    torch.testing.assert_close(found.W_OI, 1.25 * W_OI, rtol=2e-2, atol=1e-2)
