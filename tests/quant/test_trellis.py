"""Trellis codes: the rotation, the search for symbols, and the quantizer, against slow versions written from the definitions.

N: rings, T: weights of one, K: bits of a symbol, L: bits of a state, O: output features, I: input features.
"""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from methods import quantize, stack
from random_examples import tries

from secateur.core.pruned import Pruned
from secateur.core.stats import InputStats, Level
from secateur.errors import UsageError
from secateur.quant.gptq import GPTQ
from secateur.quant.rotated_trellis import RotatedTrellis
from secateur.recipes.plan import plan
from secateur.recipes.recipe import Recipe
from secateur.solvers import trellis
from secateur.solvers.hadamard import block_of, rotate
from secateur.solvers.trellis import code_values, decode, encode, encode_torch, ring_of, windows

FP64 = torch.float64
ISAS = range(trellis._isa + 1)
needs_native = pytest.mark.skipif(not trellis.HAVE_NATIVE, reason="installed without a compiler")
# Mean squared error of standard normal weights in rings of 256, each scaled before for the least of it.
GAIN = {2: 1.0, 3: 0.93, 4: 0.9}
GAUSSIAN = {(2, 12): 0.0728, (3, 12): 0.0190, (4, 12): 0.0050, (2, 16): 0.0683, (3, 16): 0.0177, (4, 16): 0.0046}
FORMS = st.integers(2, 4).flatmap(
    lambda K: st.tuples(st.just(K), st.integers(K, 10)).flatmap(
        lambda form: st.tuples(st.just(form[0]), st.just(form[1]), st.integers(-(-form[1] // form[0]), 40))
    )
)
SEEDS = st.integers(0, 2**32 - 1)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def symbols(N, T, K, seed=0):
    return torch.randint(0, 2**K, (N, T), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def error(x_NT, value_NT):
    return (value_NT.double() - x_NT.double()).square().mean().item()


# --- the rotation


def hadamard(n):
    H = torch.ones(1, 1, dtype=FP64)
    while len(H) < n:
        H = torch.cat((torch.cat((H, H), 1), torch.cat((H, -H), 1)))
    return H / n**0.5


@pytest.mark.parametrize(("features", "block"), [(1, 1), (2, 2), (24, 8), (40, 4), (576, 64), (256, 128)])
def test_rotation_is_by_blocks_of_hadamard_and_undoes_itself(features, block):
    R = torch.block_diag(*[hadamard(block)] * (features // block))
    assert torch.allclose(R @ R, torch.eye(features, dtype=FP64))
    x = normal(3, features)
    assert torch.allclose(rotate(x, block).double(), x.double() @ R, atol=1e-5)
    assert torch.equal(rotate(x.T.contiguous(), block, 0), rotate(x, block).T)
    assert torch.equal(rotate(x[1:2], block), rotate(x, block)[1:2])  # whatever else there is
    assert torch.allclose(rotate(rotate(x, block), block), x, atol=1e-5)


def test_blocks_are_powers_of_two_that_divide():
    assert [block_of(n, 128) for n in (1, 7, 10, 576, 1536, 4096, 11008)] == [1, 1, 2, 64, 128, 128, 128]
    assert block_of(4096, 16) == 16


# --- states


def test_code_values_are_sums_of_the_bytes_of_a_hash():
    for L in (2, 7, 12):
        sums = [sum((s * 0x83DCD12D % 2**32).to_bytes(4, "little")) for s in range(2**L)]
        wanted = (np.array(sums) - 510).astype(np.float32) / np.float32(147.8)
        assert torch.equal(code_values(L), torch.from_numpy(wanted))
    values = code_values(16).double()
    assert abs(values.mean()) < 0.01
    assert abs(values.std() - 1) < 0.01


@tries(100)
@given(form=FORMS, seed=SEEDS)
@example(form=(3, 12, 4), seed=0)  # a state is the whole ring
@example(form=(2, 2, 1), seed=0)
@example(form=(4, 10, 3), seed=0)
def test_states_are_windows_of_the_ring(form, seed):
    K, L, T = form
    ring = symbols(1, T, K, seed)
    bits = [symbol >> k & 1 for symbol in ring[0].tolist() for k in range(K)]
    wanted = [sum(bits[(t * K + k) % (T * K)] << k for k in range(L)) for t in range(T)]
    found = windows(ring, K, L)[0].tolist()
    assert found == wanted
    for t, state in enumerate(found):  # each is the next one with its own symbol below
        assert state == (found[(t + 1) % T] << K | ring[0, t].item()) % 2**L
    assert torch.equal(decode(ring, K, L)[0], code_values(L)[wanted])


@pytest.mark.parametrize(
    ("outputs", "K", "T", "L"),
    [
        *((576, 3, 192, 12), (1536, 2, 256, 12), (192, 4, 192, 12), (11008, 3, 256, 12), (320, 3, 160, 12)),
        *((24, 3, 24, 12), (15, 2, 15, 12), (36, 4, 36, 12), (7, 2, 7, 12), (4, 2, 4, 8), (1, 3, 1, 3)),
        *((257, 2, 257, 12), (514, 3, 514, 12)),  # 2 is too short for a ring, 257 too long
    ],
)
def test_rings_divide_the_outputs(outputs, K, T, L):
    assert ring_of(outputs, K) == (T, L)


# --- the search


def every_ring(T, K):
    return torch.tensor(list(itertools.product(range(2**K), repeat=T)), dtype=torch.uint8)


@pytest.mark.parametrize(("K", "L", "T"), [(2, 4, 5), (2, 5, 5), (3, 5, 4), (3, 3, 4), (4, 5, 3)])
def test_the_best_ring_of_all_is_found_or_nearly(K, L, T):
    x_NT = normal(200, T, seed=L)
    values = decode(every_ring(T, K), K, L).double()
    least_N = torch.stack([(values - x).square().sum(1).min() for x in x_NT.double()])
    for _, value_NT in (encode_torch(x_NT, K, L), encode(x_NT, K, L)):
        cost_N = (value_NT.double() - x_NT.double()).square().sum(1)
        assert (cost_N >= least_N - 1e-5).all()
        # What is fixed by the first of two searches is the best for most rings, and never far from it.
        assert cost_N.sum() < 1.25 * least_N.sum()
        assert (cost_N < least_N + 1e-3).float().mean() > 0.6


@pytest.mark.parametrize(("K", "L", "T"), [(2, 4, 5), (2, 7, 5), (3, 5, 4), (4, 6, 3)])
def test_with_its_seam_given_the_best_ring_is_found(K, L, T):
    """Viterbi's search is exact: of all rings with that seam none is better."""
    x_NT = normal(50, T, seed=T)
    rings = every_ring(T, K)
    states = windows(rings, K, L)
    seam_N = torch.randint(0, 2 ** (L - K), (50,), generator=torch.Generator().manual_seed(0))
    path_NT = trellis._search(x_NT.flip(1), code_values(L), K, seam_N).flip(1)
    found_N = (code_values(L)[path_NT].double() - x_NT.double()).square().sum(1)
    values = decode(rings, K, L).double()
    for x, seam, found in zip(x_NT.double(), seam_N, found_N, strict=True):
        fits = states[:, 0] & 2 ** (L - K) - 1 == seam
        assert abs((values[fits] - x).square().sum(1).min() - found) < 1e-5


@pytest.mark.parametrize(("K", "L"), GAUSSIAN)
def test_the_error_of_normal_weights_is_as_published(K, L):
    if L == 16 and not trellis.HAVE_NATIVE:
        pytest.skip("takes minutes without a compiler")
    x_NT = normal(96 if L == 12 else 48, 256, seed=1)
    x_NT = x_NT / x_NT.square().mean().sqrt()
    found = error(x_NT, encode(x_NT * GAIN[K], K, L)[1] / GAIN[K])
    assert abs(found / GAUSSIAN[K, L] - 1) < 0.03, found


@pytest.mark.thin(3)
@needs_native
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("K", [2, 3, 4])
def test_compiled_searches_find_what_torch_finds_in_squares(isa, K, monkeypatch):
    monkeypatch.setattr(trellis, "_isa", isa)
    x_NT = normal(32, 192, seed=2)
    found, wanted = (error(x_NT, search(x_NT, K, 12)[1]) for search in (encode, encode_torch))
    assert abs(found / wanted - 1) < 0.005


@needs_native
@tries(80)
@given(form=FORMS, N=st.integers(1, 5), seed=SEEDS, scale=st.sampled_from([1e-30, 0.1, 1, 3, 1e30]))
@example(form=(2, 2, 1), N=1, seed=0, scale=1)
@example(form=(4, 10, 3), N=2, seed=0, scale=3)
def test_every_instruction_set_finds_the_same(form, N, seed, scale):
    K, L, T = form
    x_NT = normal(N, T, seed=seed % 1000) * scale
    found = []
    for isa in ISAS:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trellis, "_isa", isa)
            symbol_NT, value_NT = encode(x_NT, K, L)
        assert int(symbol_NT.max()) < 2**K
        assert torch.equal(value_NT, decode(symbol_NT, K, L))
        found.append(symbol_NT)
    assert all(torch.equal(other, found[0]) for other in found)


@pytest.mark.parametrize("search", [encode, encode_torch])
@pytest.mark.parametrize(("K", "L", "T"), [(2, 12, 64), (3, 12, 48), (4, 12, 32), (3, 10, 17), (2, 8, 4)])
def test_weights_that_rings_stand_for_come_back_exactly(search, K, L, T):
    x_NT = decode(symbols(6, T, K), K, L)
    assert torch.equal(search(x_NT, K, L)[1], x_NT)


@needs_native
def test_threads_share_the_rings(monkeypatch):
    x_NT = normal(9, 64)
    wanted = encode(x_NT, 3, 12)[0]
    monkeypatch.setattr(trellis, "_STATES_PER_PIECE", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert torch.equal(encode(x_NT, 3, 12)[0], wanted)


# --- the quantizer


def inputs(T, I, seed=0, dead=()):
    x_TI = (
        normal(T, I, seed=seed)
        @ normal(I, I, seed=seed + 1)
        * torch.rand(I, generator=torch.Generator().manual_seed(seed))
    )
    x_TI[:, list(dead)] = 0
    return x_TI


def gram_of(x_TI):
    stats = InputStats.empty(x_TI.shape[1], Level.GRAM)
    stats.add(x_TI)
    return stats


def relative(W_OI, stats, found_OI):
    return (stats.energy(found_OI.float() - W_OI).sum() / stats.energy(W_OI).sum()).item()


def twin(W_OI, G_II, K):
    """The same in float64, by explicit matrices and one column at a time; symbols are those of `encode`."""
    O, I = W_OI.shape
    method = RotatedTrellis(bits=K)
    found = quantize(method, W_OI, gram_of(torch.linalg.cholesky(G_II).T.float()))[0].codes
    a_O, b_I = found.scale_out_O.double(), found.scale_in_I.double()
    R_out, R_in = (torch.block_diag(*[hadamard(block_of(n, 128))] * (n // block_of(n, 128))) for n in (O, I))
    H_II = R_in @ (b_I[:, None] * G_II.double() * b_I) @ R_in
    order_I = H_II.diagonal().argsort(descending=True)
    H_II = H_II[order_I][:, order_I]
    H_II += 0.01 * H_II.diagonal().mean() * torch.eye(I, dtype=FP64)
    W_OI = (R_out @ (W_OI.double() / a_O[:, None] / b_I) @ R_in)[:, order_I]
    Q_OI = W_OI.clone()
    for i in range(I):
        # What is best for the column, given those before it as they are, the others free: the least squares of the rest.
        rest = slice(i, None)
        pull_OI = (Q_OI - W_OI)[:, :i] @ H_II[:i, rest] @ torch.linalg.inv(H_II[rest, rest])
        column_O = W_OI[:, i] - pull_OI[:, 0]
        Q_OI[:, i] = encode(column_O.float().view(-1, found.ring), K, found.state_bits)[1].view(-1)
    back_I = order_I.argsort()
    return a_O[:, None] * (R_out @ Q_OI[:, back_I] @ R_in) * b_I


@pytest.mark.parametrize("K", [2, 3])
def test_the_error_is_that_of_a_twin_in_float64(K):
    W_OI, stats = normal(48, 40) * 0.1, gram_of(inputs(300, 40))
    G_II = stats.gram().double()
    slow = relative(W_OI, stats, twin(W_OI, G_II, K))
    fast = relative(W_OI, stats, quantize(RotatedTrellis(bits=K), W_OI, stats)[0].dequantize())
    assert 0.9 < fast / slow < 1.05


@pytest.mark.parametrize(("K", "times"), [(2, 0.5), (3, 0.65), (4, 0.75)])
def test_less_is_lost_than_by_rounding_in_groups(K, times):
    """GPTQ's grids take 0.3 bits more."""
    W_OI, stats = normal(192, 96) * 0.1, gram_of(inputs(1000, 96))
    W_OI[3] *= 20
    W_OI[:, 5] *= 20
    ours, theirs = (
        relative(W_OI, stats, quantize(method(bits=K), W_OI, stats)[0].dequantize())
        for method in (RotatedTrellis, GPTQ)
    )
    assert ours < times * theirs


def test_more_states_lose_less():
    W_OI, stats = normal(64, 64), gram_of(inputs(500, 64))
    losses = [
        relative(W_OI, stats, quantize(RotatedTrellis(bits=2, states=n), W_OI, stats)[0].dequantize())
        for n in (256, 1024, 4096)
    ]
    assert losses == sorted(losses, reverse=True)


def test_rows_are_scaled_for_the_least_error():
    W_OI, stats = normal(48, 64), gram_of(inputs(400, 64))
    found_OI = quantize(RotatedTrellis(bits=2), W_OI, stats)[0].dequantize()
    G_II = stats.gram().double()
    G_II += 0.01 * G_II.diagonal().mean() * torch.eye(64, dtype=FP64)
    own_OI = found_OI.double() @ G_II
    factor_O = (own_OI * W_OI.double()).sum(1) / (own_OI * found_OI.double()).sum(1)
    assert (factor_O - 1).abs().max() < 2**-10


@pytest.mark.parametrize("rows", [(1,), (7, 5), (48, 16, 16), (30,), (257,)])
@pytest.mark.parametrize("I", [1, 9, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_shape_goes(rows, I, dtype):
    W_OI, stats = (normal(sum(rows), I) * 0.05).to(dtype).float(), gram_of(inputs(60, I))
    found = quantize(RotatedTrellis(bits=3), W_OI, stats, rows, dtype)
    assert [weight.shape for weight in found] == [(size, I) for size in rows]
    for weight in found:
        assert weight.dequantize().dtype == dtype
        assert torch.isfinite(weight.dequantize()).all()
    if min(rows) > 4:
        whole_OI = torch.cat([weight.dequantize() for weight in found])
        assert relative(W_OI, stats, whole_OI) < 0.3


def test_nasty_statistics_go():
    """Dead inputs, fewer tokens than inputs, weights that are zero, one that is large; and zeros stay zeros."""
    W_OI = normal(32, 24)
    W_OI[5], W_OI[:, 7], W_OI[9, 9] = 0, 0, 300
    for stats in (gram_of(inputs(8, 24, dead=(3, 4))), InputStats.isotropic(24, Level.GRAM)):
        (found,) = quantize(RotatedTrellis(bits=4), W_OI, stats)
        W = found.dequantize()
        assert torch.isfinite(W).all()
        assert not W[5].any()
        assert not W[:, 7].any()
        assert relative(W_OI, stats, W) < 0.02
    assert any(
        "fewer than the 24 inputs" in note for note in quantize(RotatedTrellis(), W_OI, gram_of(inputs(8, 24)))[0].notes
    )
    assert not quantize(RotatedTrellis(), torch.zeros(8, 24), stats)[0].dequantize().any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_refused(value):
    W_OI, stats = normal(8, 8), gram_of(inputs(50, 8))
    W_OI[2, 3] = value
    with pytest.raises(ValueError, match="not finite"):
        quantize(RotatedTrellis(), W_OI, stats)
    x_TI = inputs(50, 8)
    x_TI[3, 4] = value
    with pytest.raises(ValueError, match="not finite"):
        quantize(RotatedTrellis(), normal(8, 8), gram_of(x_TI))


def test_the_same_comes_of_the_same():
    W_OI, stats = normal(48, 32), gram_of(inputs(100, 32))
    first, second = (quantize(RotatedTrellis(), W_OI, stats)[0].dequantize() for _ in range(2))
    assert torch.equal(first, second)
    assert np.array_equal(stack(W_OI, stats).W_OI, normal(48, 32))  # and nothing that is given is changed


def test_pruned_weights_are_refused_with_what_to_do():
    with pytest.raises(UsageError, match=r"`quantize` trellis does not go with `prune`: .* gptq or spqr"):
        plan(Recipe(prune="wanda", sparsity=0.5, quantize="trellis"))
    W_OI = normal(8, 8)
    with pytest.raises(ValueError, match="rotation"):
        quantize(RotatedTrellis(), W_OI, gram_of(inputs(50, 8)), pruned=Pruned(W_OI, W_OI > 0))


def test_options_that_it_has_not_are_refused():
    for name, value in (("group_size", 64), ("order", "natural"), ("outlier_share", 0.1)):
        with pytest.raises(UsageError, match=f"`{name}` is not an option of trellis"):
            plan(Recipe(quantize="trellis", quantization={name: value}))
    with pytest.raises(UsageError, match="gptq and rtn have 8"):
        plan(Recipe(quantize="trellis", quantization={"bits": 8}))
