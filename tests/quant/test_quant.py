"""RTN, GPTQ and SpQR: what must hold of whatever they make, of awkward input too, and which options they take.

`test_sweep.py` compares them with slow versions of their papers.

T: tokens, O: output features, I: input features, S: weights of one group, K: stored weights of one row.
"""

from dataclasses import replace
from itertools import pairwise, product
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from methods import quantize, sparsegpt, wanda
from test_sweep import (
    FLAGS,
    SEEDS,
    assert_same,
    dense_codes,
    draw,
    draw_mask,
    gather,
    outlier_mask,
    output_error,
    solve,
)

from secateur.core.patterns import Unstructured
from secateur.core.pruned import Pruned
from secateur.core.registry import QUANTIZERS
from secateur.core.stats import InputStats, Level
from secateur.errors import UsageError
from secateur.formats.layouts.packed_int import Uniform
from secateur.formats.layouts.two_level_int import TwoLevel
from secateur.quant.gptq import GPTQ
from secateur.quant.grid import Grid, squared_error
from secateur.quant.grid_options import ORDERS
from secateur.quant.rtn import RTN
from secateur.quant.spqr import SpQR, outlier_share
from secateur.quant.squeezellm import SqueezeLLM
from secateur.quant.two_level import TwoLevelGrid

FULL, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16
# Every kind of sweep and of grid, in groups that 70 inputs do not divide into.
METHODS = [
    *(RTN(4, 16, symmetric, search) for symmetric, search in product(FLAGS, FLAGS)),
    *(GPTQ(3, 16, symmetric, symmetric, order) for symmetric, order in product(FLAGS, ORDERS)),
    *(SpQR(3, 16, outlier_share=share, search_range=share is None, order=o) for share, o in product((None, 0), ORDERS)),
]


def named(method):
    return "-".join(str(value) for value in (method.name, *vars(method).values()) if value is not None)


every_method = pytest.mark.parametrize("method", METHODS, ids=named)


def lost(method, W_OI, x_TI, **options):
    return output_error(W_OI, solve(method, W_OI, x_TI, **options), x_TI)


def decode(weight):
    """What codes, scales, zero points and outliers stand for, group by group, in float32."""
    codes, (O, I) = weight.codes, weight.shape
    new_OI, outliers = torch.zeros(O, I), weight.outliers
    order_I = torch.arange(I) if weight.order_I is None else weight.order_I
    for o in range(O):
        column_K = order_I if weight.keep_OI is None else order_I[weight.keep_OI[o]]
        for g in range(-(-len(column_K) // codes.group_size)):
            if isinstance(codes, Uniform):
                scale = codes.scale_OG[o, g].float()
                zero = 2 ** (codes.bits - 1) if codes.zero_OG is None else codes.zero_OG[o, g].float()
            else:
                step, low, zero_step, zero_low = codes.second_TG4[o // codes.tile_rows, g].float()
                scale = low + step * codes.scale_code_OG[o, g]
                zero = zero_low + zero_step * codes.zero_code_OG[o, g]
            stored = range(g * codes.group_size, min((g + 1) * codes.group_size, len(column_K)))
            new_OI[o, column_K[list(stored)]] = (codes.code_OK[o, list(stored)].float() - zero) * scale
    if outliers is not None:
        rows = [o for o, count in enumerate(outliers.count_O.tolist()) for _ in range(count)]
        for o, column, value in zip(rows, outliers.column_N, outliers.value_N, strict=True):
            new_OI[o, column] += value.float()
    return new_OI.to(weight.dtype)


def assert_sound(found, sizes, method, dtype=FULL, stored=HALF, pruned=None):
    """What holds of every result, however nasty the input."""
    masks = [None] * len(sizes) if pruned is None else pruned.keep_OI.split(sizes)
    for weight, O, keep_OI in zip(found, sizes, masks, strict=True):
        codes, new_OI, I = weight.codes, weight.dequantize(), weight.shape[1]
        assert weight.shape == new_OI.shape == (O, I)
        assert weight.dtype == new_OI.dtype == dtype
        assert torch.isfinite(new_OI).all()
        assert torch.equal(new_OI, decode(weight))
        assert codes.bits == method.bits
        groups, limits = -(-codes.code_OK.shape[1] // codes.group_size), [(codes.code_OK, method.bits)]
        if isinstance(codes, TwoLevel):
            grids = codes.second_TG4
            limits += [(codes.scale_code_OG, method.scale_bits), (codes.zero_code_OG, method.scale_bits)]
            assert grids.shape == (-(-O // method.tile_rows), groups, 4)
            assert (grids[:, :, :3] >= 0)[:, :, [0, 1, 2]].all()
        else:
            grids = codes.scale_OG
            limits += [] if codes.zero_OG is None else [(codes.zero_OG, method.bits)]
            assert (codes.zero_OG is None) == method.symmetric
            assert (grids > 0).all()
        assert grids.dtype == stored
        assert torch.isfinite(grids).all()
        for code, bits in limits:
            assert code.dtype == torch.uint8
            assert int(code.max()) < 2**bits
            assert code is codes.code_OK or code.shape == (O, groups)
        assert (weight.order_I is not None) == (getattr(method, "order", "") == "permuted")
        order_I = torch.arange(I) if weight.order_I is None else weight.order_I
        assert torch.equal(order_I.sort().values, torch.arange(I))
        assert (weight.keep_OI is None) == (pruned is None)
        if keep_OI is not None:
            assert torch.equal(weight.keep_OI, keep_OI[:, order_I])
            assert not new_OI[~keep_OI].any()
            assert weight.stored == keep_OI.sum()
            assert not (outlier_mask([weight]) & ~keep_OI).any()
        assert (weight.outliers is None) == (method.name != "spqr" or method.outlier_share == 0)
        if weight.outliers is not None:
            assert weight.outliers.value_N.dtype == stored
            assert weight.outliers.count_O.sum() == outlier_mask([weight]).sum() == weight.outlier_count
            assert ((weight.outliers.row_N * I + weight.outliers.column_N).diff() > 0).all()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, 40), st.integers(2, 8), st.booleans(), SEEDS)
def test_searching_the_range_never_costs_more_in_any_group(weights, bits, symmetric, seed):
    generator = torch.Generator().manual_seed(seed)
    w_SO, importance_SO = (
        torch.randn(weights, 30, generator=generator) ** 3,
        torch.rand(weights, 30, generator=generator),
    )
    whole, best = (Grid(bits, 16, symmetric, search, HALF).fit(w_SO, importance_SO) for search in FLAGS)
    whole_O, best_O = (squared_error(fitted, w_SO, importance_SO, 2**bits - 1) for fitted in (whole, best))
    assert (best_O <= whole_O).all()
    assert bits > 3 or weights < 30 or (best_O < whole_O).float().mean() > 0.5


def test_searching_the_range_helps_two_levels():
    """Not in every group: the range that one row takes is not there for the others of its tile."""
    w_SO = torch.randn(16, 512, generator=torch.Generator().manual_seed(0))
    importance_SO = w_SO.roll(1).square()
    grids = (TwoLevelGrid(3, 16, 3, 16, search, HALF, (512,)) for search in FLAGS)
    whole, best = (squared_error(grid.fit(w_SO, importance_SO), w_SO, importance_SO, 7).sum() for grid in grids)
    assert best < 0.8 * whole


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(8, 24), st.integers(24, 140), st.sampled_from([8, 16, 64, "row"]), st.integers(0, 27), SEEDS)
def test_gptq_changes_outputs_less_than_rounding(outputs, inputs, size, flags, seed):
    """On the calibration inputs. A sweep is greedy, so that a row by itself may lose; eight or more together do not."""
    W_OI, x_TI = draw(outputs, inputs, seed=seed)
    grid = (2 + flags % 7, size, flags // 7 & 1 > 0, flags // 14 > 0)
    nearest = lost(RTN(*grid), W_OI, x_TI)
    for order in ORDERS:
        assert lost(GPTQ(*grid, order), W_OI, x_TI) < nearest


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.integers(8, 40), st.integers(32, 120), st.sampled_from(ORDERS), st.booleans(), SEEDS)
def test_outliers_and_bits_make_spqr_better(outputs, inputs, order, search, seed):
    W_OI, x_TI = draw(outputs, inputs, seed=seed)
    two, three, four = (
        lost(SpQR(bits, search_range=search, order=order, outlier_share=0), W_OI, x_TI) for bits in (2, 3, 4)
    )
    assert four < three < two
    assert lost(SpQR(3, search_range=search, order=order), W_OI, x_TI) < three
    assert lost(SpQR(3, search_range=search, order=order, outlier_share=0.05), W_OI, x_TI) < three


@pytest.mark.parametrize("method", [RTN(), *(GPTQ(order=order) for order in ORDERS)], ids=named)
@pytest.mark.parametrize("symmetric", FLAGS)
def test_more_bits_are_better(method, symmetric):
    W_OI, x_TI = draw(12, 96)
    errors = [lost(replace(method, bits=bits, symmetric=symmetric), W_OI, x_TI) for bits in (8, 4, 3, 2)]
    assert errors[0] < errors[1] / 50
    assert errors[1] < errors[2] < errors[3]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("prune", [wanda, sparsegpt])
def test_pruning_and_rounding_at_once_beats_one_after_the_other(order, prune):
    W_OI, x_TI = draw(16, 96)
    pruned = prune(W_OI, gather(x_TI), Unstructured(0.5))
    joint = lost(GPTQ(3, 16, order=order), W_OI, x_TI, pruned=pruned)
    if prune is wanda or order == "natural":  # SparseGPT's masks are for its own order
        assert joint < 0.95 * lost(RTN(3, 16), W_OI, x_TI, pruned=pruned)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.sampled_from(METHODS), st.integers(1, 20), st.integers(1, 80), st.sampled_from([0, 0.1, 0.5, 0.9]), SEEDS)
def test_a_mask_is_kept_whatever_it_is(method, outputs, inputs, share, seed):
    """Rows that lose everything and rows that lose nothing; and one that keeps all is as good as none."""
    W_OI, x_TI = draw(outputs, inputs, seed=seed)
    keep_OI = torch.rand(outputs, inputs, generator=torch.Generator().manual_seed(seed)) < share
    keep_OI[seed % outputs] = True
    pruned = Pruned(W_OI * keep_OI, keep_OI)
    found = solve(method, W_OI, x_TI, dtype=BRAIN, pruned=pruned)
    assert_sound(found, [outputs], method, BRAIN, BRAIN, pruned)
    if getattr(method, "order", "activation") == "activation":  # else grids are fitted at another time
        (whole,) = solve(method, W_OI, x_TI, pruned=Pruned(W_OI, torch.ones_like(keep_OI)))
        assert torch.equal(whole.dequantize(), solve(method, W_OI, x_TI)[0].dequantize())


@pytest.mark.thin(2)
@every_method
@pytest.mark.parametrize("masked", FLAGS)
def test_stacked_linears_come_out_as_alone(method, masked):
    """Their rows do not divide into tiles of 16, and one of them has much smaller weights."""
    sizes, keep_OI, (W_OI, x_TI) = [5, 20, 1, 7], draw_mask(33, 70), draw(33, 70)
    W_OI[5:25] *= 0.02
    parts = [Pruned(*part) for part in zip((W_OI * keep_OI).split(sizes), keep_OI.split(sizes), strict=True)]
    pruned = Pruned(W_OI * keep_OI, keep_OI) if masked else None
    stacked = solve(method, W_OI, x_TI, sizes, pruned=pruned)
    assert_sound(stacked, sizes, method, pruned=pruned)
    for weight, w_OI, part in zip(stacked, W_OI.split(sizes), parts, strict=True):
        alone = solve(method, w_OI, x_TI, pruned=part if masked else None)
        one, other = ((x[0].dequantize(), dense_codes(x), outlier_mask(x)) for x in ([weight], alone))
        assert_same(one, other)


@every_method
@pytest.mark.parametrize("masked", FLAGS)
def test_arguments_are_unchanged(method, masked):
    W_OI, x_TI = draw(6, 70)
    x_TI[:, 3] = 0
    stats, untouched, keep_OI = gather(x_TI), gather(x_TI), draw_mask(6, 70)
    pruned = Pruned(W_OI * keep_OI, keep_OI.clone())
    given = [W_OI, pruned.W_OI, pruned.keep_OI, stats.sum_I, stats.square_I, stats.upper_II]
    before = [x.clone() for x in given]
    quantize(method, W_OI, stats, (6,), FULL, pruned if masked else None)[0].dequantize().fill_(7)
    assert all(torch.equal(*pair) for pair in zip(given, before, strict=True))
    assert torch.equal(stats.gram(), untouched.gram())


def spoil(W_OI, x_TI, nasty):
    match nasty:
        case "dead inputs":
            x_TI[:, [0, 5, 33, 69]] = 0
        case "no live input":
            x_TI *= 0
        case "one token":
            x_TI = x_TI[:1]
        case "few tokens":
            x_TI = x_TI[:30]
        case "equal inputs":
            x_TI = x_TI[:, :1].expand(x_TI.shape)
        case "one row":
            W_OI = W_OI[:1]
        case "one column":
            W_OI, x_TI = W_OI[:, :1], x_TI[:, :1]
        case "two columns":
            W_OI, x_TI = W_OI[:3, :2], x_TI[:, :2]
        case "zero rows and groups":
            W_OI[[0, 18]], W_OI[2:4, 16:32], W_OI[5, 64:] = 0, 0, 0
        case "only zeros":
            W_OI *= 0
        case "constant groups":
            W_OI[:5, :32], W_OI[5:9, 32:] = 0.7, -0.2
        case "one sign":
            W_OI = -W_OI.abs()
        case "large weight" | "huge weight":
            W_OI[2, 17] = {"large weight": 1e4, "huge weight": 1e30}[nasty]
        case "tiny weights":
            W_OI *= 1e-30
    return W_OI, x_TI


NASTY = [
    "dead inputs",
    "no live input",
    "one token",
    "few tokens",
    "equal inputs",
    "one row",
    "one column",
    "two columns",
]
NASTY += [
    "zero rows and groups",
    "only zeros",
    "constant groups",
    "one sign",
    "large weight",
    "huge weight",
    "tiny weights",
]


def every_other_method(names, cases):
    """All methods in all cases; by default each in every other case, so that each case meets half of them."""
    found = [
        pytest.param(method, case, marks=[pytest.mark.slow] * ((i + j) % 2), id=f"{named(method)}-{case}")
        for i, method in enumerate(METHODS)
        for j, case in enumerate(cases)
    ]
    return pytest.mark.parametrize(names, found)


@every_other_method(("method", "nasty"), NASTY)
def test_awkward_input(method, nasty):
    W_OI, x_TI = spoil(*draw(20, 70), nasty)
    found = solve(method, W_OI, x_TI)
    assert_sound(
        found, [len(W_OI)], method, stored=BRAIN if nasty in ("only zeros", "huge weight", "tiny weights") else HALF
    )
    # A two-level grid whose tile has a weight like no other in it is coarse.
    coarse = {"large weight": 0.6, "huge weight": 2, "tiny weights": 0.6}
    bound = coarse.get(nasty, 0.1) if method.name == "spqr" else 0.1
    assert output_error(W_OI, found, x_TI) <= bound * output_error(W_OI, W_OI * 0, x_TI)
    (weight,), W_OI = found, W_OI.double()
    assert (weight.dequantize() - W_OI).square().sum() <= bound * 3 * W_OI.square().sum()
    if method.name != "spqr":  # whose rows have no zero point of their own
        assert not weight.dequantize()[~W_OI.any(1)].any()


@every_other_method(
    ("method", "case"), [(HALF, 1.0), (BRAIN, 1.0), (HALF, 1e-4), (FULL, 1e-4), (BRAIN, 1e6), (FULL, 1e6)]
)
def test_what_16_bits_store_suits_the_model(method, case):
    dtype, size = case
    W_OI, x_TI = draw(6, 40)
    W_OI = (W_OI * size).to(dtype).float()
    found = solve(method, W_OI, x_TI, dtype=dtype)
    assert_sound(found, [6], method, dtype, BRAIN if dtype == BRAIN or size != 1 else HALF)
    assert output_error(W_OI, found, x_TI) < 0.05 * output_error(W_OI, W_OI * 0, x_TI)


@every_method
def test_a_power_of_two_changes_nothing_else(method):
    W_OI, x_TI = draw(20, 70)
    plain = solve(method, W_OI, x_TI, dtype=BRAIN)
    for power in (-40, 40):
        scaled = solve(method, W_OI * 2.0**power, x_TI, dtype=BRAIN)
        assert torch.equal(scaled[0].dequantize(), plain[0].dequantize() * 2.0**power)
        assert torch.equal(dense_codes(scaled), dense_codes(plain))


@pytest.mark.parametrize(
    "method", [RTN(4, 128), SpQR(3, 128), *(GPTQ(4, 128, order=order) for order in ORDERS)], ids=named
)
@pytest.mark.parametrize("inputs", [576, 1100])
def test_the_last_group_may_be_short(method, inputs):
    W_OI, x_TI = draw(5, inputs, tokens=700)
    found = solve(method, W_OI, x_TI)
    assert_sound(found, [5], method)
    assert output_error(W_OI, found, x_TI) < 0.05 * output_error(W_OI, W_OI * 0, x_TI)


@pytest.mark.parametrize("kind", [RTN, GPTQ])
def test_a_group_may_be_a_whole_row(kind):
    W_OI, x_TI = draw(6, 700, tokens=800)
    row, same, larger = (solve(kind(4, size), W_OI, x_TI)[0] for size in ("row", 700, 5000))
    assert torch.equal(row.dequantize(), same.dequantize())
    assert torch.equal(row.dequantize(), larger.dequantize())
    assert (row.codes.group_size, row.codes.scale_OG.shape) == (700, (6, 1))


@pytest.mark.parametrize("dtype", [HALF, BRAIN])
@pytest.mark.parametrize(("search", "share"), list(product(FLAGS, (None, 0))))
def test_a_row_of_tiny_weights_does_not_spoil_its_tile(dtype, search, share):
    """Where a row's scale comes out near the least of its tile, its zero point must not go far from the grid."""
    W_OI, x_TI = draw(16, 64)
    W_OI[3], W_OI[4] = 1e-6 * W_OI[3], 0.05 * W_OI[4].abs()
    method, stats = SpQR(outlier_share=share, search_range=search), gather(x_TI)
    found = solve(method, W_OI, x_TI, dtype=dtype)
    assert_sound(found, [16], method, dtype, dtype)
    lost_O = stats.energy(found[0].dequantize().float() - W_OI) / stats.energy(W_OI)
    assert lost_O.median() < 0.05
    assert (lost_O < 1)[torch.arange(16) != 3].all()


@every_method
@pytest.mark.parametrize("lone", FLAGS)
def test_weights_too_small_for_their_inverse(method, lone):
    """1 / 1e-40 is infinite in float32."""
    W_OI, x_TI = draw(20, 70)
    W_OI[3] = 1e-39 * W_OI[3].sign() * (torch.arange(70) < (8 if lone else 70))
    W_OI *= (
        1 if method.name != "spqr" else (torch.arange(20) == 3)[:, None]
    )  # rows of one tile are not as small as can be
    found = solve(method, W_OI, x_TI, dtype=BRAIN)
    assert_sound(found, [20], method, BRAIN, BRAIN)
    assert found[0].dequantize()[3].abs().max() < 1e-37


def test_what_the_user_should_know_is_said():
    W_OI, x_TI = draw(4, 40)
    stats = gather(x_TI)
    mean = stats.square_I.mean().item()
    stats.upper_II = torch.full((40, 40), 1.05 * mean).fill_diagonal_(mean)
    for method in (GPTQ(), SpQR()):
        assert solve(method, W_OI, x_TI)[0].notes == ()
        assert "30 calibration tokens" in "".join(solve(method, W_OI, x_TI[:30])[0].notes)
        assert "damping raised from 0.01 to 0.1 " in "".join(quantize(method, W_OI, stats, [4], FULL)[0].notes)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", [method for method in METHODS if method.level == Level.GRAM], ids=named)
def test_statistics_that_are_not_finite_are_refused(method, bad):
    W_OI, x_TI = draw(4, 40)
    x_TI[3, 5] = bad
    with pytest.raises(ValueError, match="not finite"):
        solve(method, W_OI, x_TI)


def test_methods_are_registered_with_the_level_they_need():
    for kind, level in ((RTN, Level.NONE), (GPTQ, Level.GRAM), (SpQR, Level.GRAM)):
        assert QUANTIZERS[kind.name] is kind
        assert (kind().level, kind().needs_fisher) == (level, False)
        if level == Level.GRAM:
            with pytest.raises(ValueError, match="MOMENTS"):
                quantize(kind(), torch.ones(2, 4), InputStats.empty(4, Level.MOMENTS), [2], FULL)
    found = quantize(RTN(), torch.ones(2, 4), InputStats.empty(4, Level.NONE), [2], FULL)
    assert (found[0].dequantize() - 1).abs().max() < 1e-3


@pytest.mark.thin(4)
@pytest.mark.parametrize(("bits", "search", "large"), [(2, True, 0), (2, False, 0.02), (3, False, 0.02), (4, False, 0)])
@pytest.mark.parametrize("share", [0.003, 0.01, 0.05, 0.2])
def test_as_many_outliers_as_asked_for(bits, share, search, large):
    W_OI, x_TI = draw(256, 256, 512, 5, large)
    found = solve(SpQR(bits, outlier_share=share, search_range=search), W_OI, x_TI, [100, 156])
    count = sum(int(outlier_mask([weight]).sum()) for weight in found)
    assert outlier_share(found) == count / 256**2
    assert count == pytest.approx(share * 256**2, rel=0.03, abs=1)


@pytest.mark.parametrize(("many", "few"), [(0.02, 0.001), (0.05, 0.009), (0.015, 0.0002), (0.2, 0.008)])
def test_the_nearest_share_is_taken_where_none_is_near(many, few):
    """Their number may jump from one threshold to the next."""
    tried = []

    def with_threshold(threshold):
        tried.append(threshold)
        return [SimpleNamespace(outlier_count=(many if threshold < 3 else few) * 1e4, stored=1e4)]

    found = SpQR._with_share(with_threshold, 0.01)
    assert outlier_share(found) == pytest.approx(min(many, few, key=lambda share: abs(share - 0.01)))
    assert len(set(tried)) == len(tried) <= 10


def test_a_higher_threshold_leaves_fewer_outliers():
    W_OI, x_TI = draw(30, 100)
    weights = [solve(SpQR(outlier_threshold=threshold), W_OI, x_TI)[0] for threshold in (1e-9, 0.01, 0.05, 0.2, 1, 1e3)]
    counts = [weight.outlier_count for weight in weights]
    assert counts[0] > 0.9 * 3000
    assert counts[-1] == 0
    assert all(more > fewer for more, fewer in pairwise(counts))
    assert torch.equal(solve(SpQR(), W_OI, x_TI)[0].dequantize(), weights[3].dequantize())


@pytest.mark.parametrize(
    ("kinds", "option", "values"),
    [
        ((RTN, GPTQ), "bits", [0, 1, 9, 16]),
        ((SpQR,), "bits", [1, 9]),
        ((RTN, GPTQ, SpQR), "group_size", [1, 0, -64, "column"]),
        ((SpQR,), "group_size", ["row"]),
        ((GPTQ, SpQR), "order", ["random", ""]),
        ((GPTQ, SpQR), "damping", [0, -1, 1e4, float("nan")]),
        ((SpQR,), "scale_bits", [0, 9]),
        ((SpQR,), "tile_rows", [0, 1]),
        ((SpQR,), "outlier_share", [-0.01, 0.21, float("nan")]),
        ((SpQR,), "outlier_threshold", [0.0, -1.0, float("inf")]),
    ],
)
def test_options_that_make_no_sense_are_refused(kinds, option, values):
    for kind, value in product(kinds, values):
        text = value if isinstance(value, str) else f"{value:g}"
        with pytest.raises(UsageError, match=f"`{option}` {text} is not"):
            kind(**{option: value})


def test_options_that_exclude_each_other_are_refused():
    with pytest.raises(UsageError, match="`outlier_threshold` and `outlier_share`"):
        SpQR(outlier_threshold=0.2, outlier_share=0.01)
    with pytest.raises(UsageError, match="a table of 8 bits"):
        SqueezeLLM(bits=8)


@pytest.mark.parametrize(
    "method",
    [
        *(kind(bits) for kind, bits in product((RTN, GPTQ, SpQR), range(2, 9))),
        *(GPTQ(group_size=2, damping=100.0), SpQR(3, 2, scale_bits=1, tile_rows=2)),
        *(SpQR(3, 70, scale_bits=8, tile_rows=500), SpQR(outlier_share=0.2)),
    ],
    ids=named,
)
def test_extreme_options_work(method):
    W_OI, x_TI = draw(20, 70)
    assert_sound(solve(method, W_OI, x_TI), [20], method)
    assert lost(method, W_OI, x_TI) < (0.3 if method.bits == 2 else 0.1) * output_error(W_OI, W_OI * 0, x_TI)
