"""SqueezeLLM against the best clusters there are and round-to-nearest, on awkward input, and the Fisher information it uses.

O: output features, I: input features, K: weights of a row, C: entries of a table, N: outliers, S: tokens of a window,
P: predictions.
"""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from methods import quantize
from transformers import AutoModelForCausalLM

from secateur.calibration.fisher import fisher
from secateur.core.pruned import Pruned
from secateur.core.quantized import place_kept
from secateur.core.registry import QUANTIZERS
from secateur.core.stats import InputStats, Level
from secateur.errors import SecateurError, UsageError
from secateur.quant import squeezellm
from secateur.quant.squeezellm import SqueezeLLM
from secateur.solvers.kmeans import weighted_kmeans

DENSE = {"outlier_share": 0, "sensitive_share": 0}


def draw(outputs, inputs, seed=0, tail=1.0):
    """Weights, and squared gradients of many orders of magnitude, the more the heavier their tail."""
    generator = torch.Generator().manual_seed(seed)
    W_OI, gradient_OI, row_O1, column_I = (
        torch.randn(*shape, generator=generator)
        for shape in ((outputs, inputs), (outputs, inputs), (outputs, 1), (inputs,))
    )
    return 0.05 * W_OI, 1e-4 * (gradient_OI * row_O1 * column_I.abs() ** tail).square()


def no_inputs(inputs):
    return InputStats.empty(inputs, Level.NONE)


def solve(W_OI, fisher_OI, dtype=torch.float32, pruned=None, **options):
    """One linear, by its squared gradients."""
    found = quantize(SqueezeLLM(**options), W_OI, no_inputs(W_OI.shape[1]), [len(W_OI)], dtype, pruned, fisher_OI)
    assert len(found) == 1
    return found[0]


def error_of_rows(W_OI, new_OI, sensitivity_OI):
    return ((new_OI.double() - W_OI.double()).square() * sensitivity_OI.double()).sum(1)


def least_error(w_K, sensitivity_K, clusters):
    """The weighted k-means error of the best clusters of one row, float64.

    In one dimension clusters are intervals. The best c + 1 clusters of the first j weights are the best c of the first i,
    for the best i, and one of the rest.
    """
    order_K = w_K.argsort()
    w_K, sensitivity_K = w_K[order_K].double(), sensitivity_K[order_K].double()
    K = len(w_K)
    cost = torch.full((K + 1, K + 1), math.inf, dtype=torch.float64)
    for i in range(K + 1):
        cost[i, i] = 0
        mass = sensitivity_K[i:].cumsum(0)
        mean = (sensitivity_K[i:] * w_K[i:]).cumsum(0) / mass
        # Welford's way: what a weight adds to the error of those before it.
        before = torch.cat([mean.new_zeros(1), mean[:-1]])
        cost[i, i + 1 :] = (sensitivity_K[i:] * (w_K[i:] - before) * (w_K[i:] - mean)).cumsum(0)
    least = cost[0]
    for _ in range(1, clusters):
        least = (least[:, None] + cost).amin(0)
    return least[K].item()


def round_to_nearest(W_OI, bits):
    """On 2^bits levels at equal distances from the least to the greatest weight of each row."""
    low_O1, high_O1 = W_OI.double().amin(1, keepdim=True), W_OI.double().amax(1, keepdim=True)
    scale_O1 = (high_O1 - low_O1) / (2**bits - 1)
    scale_O1[scale_O1 == 0] = 1
    return low_O1 + ((W_OI - low_O1) / scale_O1).round() * scale_O1


def assert_sound(weight, W_OI, dtype, bits, keep_OI=None):
    """What holds of every result, however nasty the input."""
    assert weight.shape == tuple(W_OI.shape)
    assert weight.dtype == dtype
    assert weight.codes.bits == bits
    assert weight.codes.code_OK.dtype == torch.uint8
    assert weight.codes.table_OC.shape == (len(W_OI), 2**bits)
    assert weight.codes.table_OC.dtype in (torch.float16, torch.bfloat16)
    table_OC = weight.codes.table_OC.double()
    assert torch.isfinite(table_OC).all()
    assert (table_OC.diff(dim=1) >= 0).all()
    stored_OI = W_OI.double() if keep_OI is None else W_OI.double().masked_fill(~keep_OI, 0)
    slack = 1 + torch.finfo(weight.codes.table_OC.dtype).eps
    assert (table_OC.amin(1) >= slack * stored_OI.amin(1).clamp(max=0) - 1e-7).all()
    assert (table_OC.amax(1) <= slack * stored_OI.amax(1).clamp(min=0) + 1e-7).all()
    new_OI = weight.dequantize()
    assert new_OI.dtype == dtype
    assert torch.isfinite(new_OI).all()

    longest = W_OI.shape[1] if keep_OI is None else int(keep_OI.sum(1).max())
    assert weight.codes.code_OK.shape == (len(W_OI), longest)
    if weight.outliers is not None:
        assert weight.outliers.value_N.dtype == weight.codes.table_OC.dtype
        assert len(weight.outliers.value_N) == len(weight.outliers.column_N) == weight.outliers.count_O.sum() > 0
    outlier_OI = outlier_mask(weight)
    for o in range(len(W_OI)):
        columns = range(W_OI.shape[1]) if keep_OI is None else keep_OI[o].nonzero()[:, 0].tolist()
        code_K = weight.codes.code_OK[o, : len(columns)].long()
        w_K, entry_K = W_OI[o, columns].double(), table_OC[o, code_K]
        # The nearest entry, as float32 tells them apart.
        nearest_K = (w_K[:, None] - table_OC[o]).abs().amin(1)
        assert ((w_K - entry_K).abs() <= nearest_K + 1e-6 * w_K.abs()).all()
        expected_I = torch.zeros(W_OI.shape[1])
        expected_I[columns] = entry_K.float()
        if weight.outliers is not None:
            mine_N = weight.outliers.row_N == o
            expected_I[weight.outliers.column_N[mine_N]] += weight.outliers.value_N[mine_N].float()
        assert torch.equal(new_OI[o], expected_I.to(dtype))
    if keep_OI is not None:
        assert torch.equal(weight.keep_OI, keep_OI)
        assert not new_OI[~keep_OI].any()
        assert not outlier_OI[~keep_OI].any()


def outlier_mask(weight):
    mask_OI = torch.zeros(weight.shape, dtype=torch.bool)
    if weight.outliers is not None:
        mask_OI[weight.outliers.row_N, weight.outliers.column_N] = True
        assert mask_OI.sum() == len(weight.outliers.column_N)
        assert torch.equal(mask_OI.nonzero()[:, 1], weight.outliers.column_N)
    return mask_OI


def assert_same(weight, other):
    assert torch.equal(weight.codes.code_OK, other.codes.code_OK)
    assert torch.equal(weight.codes.table_OC, other.codes.table_OC)
    assert (weight.shape, weight.dtype) == (other.shape, other.dtype)
    assert (weight.outliers is None) == (other.outliers is None)
    if weight.outliers is not None:
        for part in ("count_O", "column_N", "value_N"):
            assert torch.equal(getattr(weight.outliers, part), getattr(other.outliers, part))


def centred(W_OI, sensitivity_OI, clusters):
    """Every weight as the centre of its cluster."""
    centre_OC = weighted_kmeans(W_OI, sensitivity_OI, torch.ones_like(W_OI, dtype=torch.bool), clusters)
    return centre_OC.gather(1, (W_OI[:, :, None] - centre_OC[:, None]).abs().argmin(2))


@pytest.mark.thin(3)
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("tail", [0.0, 1.0, 2.0, 4.0])
@pytest.mark.parametrize(("outputs", "inputs"), [(5, 90), (6, 260), (14, 577)])
def test_the_error_is_nearly_the_least_there_is(outputs, inputs, tail, bits):
    W_OI, fisher_OI = draw(outputs, inputs, seed=inputs, tail=tail)
    best_O = torch.tensor([least_error(w, f, 2**bits) for w, f in zip(W_OI, fisher_OI, strict=True)])
    weight = solve(W_OI, fisher_OI, bits=bits, **DENSE)
    for new_OI, most in ((centred(W_OI, fisher_OI, 2**bits), 1.006), (weight.dequantize(), 1.01)):
        ratio_O = error_of_rows(W_OI, new_OI, fisher_OI) / best_O
        assert (ratio_O > 1 - 1e-6).all()
        assert ratio_O.mean() < most


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("inputs", [20, 40, 63])
def test_the_error_of_a_short_row_is_the_least_there_is(inputs, bits):
    W_OI, fisher_OI = draw(6, inputs, seed=inputs)
    W_OI, fisher_OI = W_OI.repeat(1, 3), fisher_OI.repeat(1, 3)  # each weight thrice: as many different ones
    best_O = torch.tensor([least_error(w, f, 2**bits) for w, f in zip(W_OI, fisher_OI, strict=True)])
    error_O = error_of_rows(W_OI, centred(W_OI, fisher_OI, 2**bits), fisher_OI)
    torch.testing.assert_close(error_O, best_O.double(), rtol=1e-4, atol=1e-6 * float(best_O.max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_every_entry_is_the_weighted_mean_of_its_cluster(bits, dtype):
    W_OI, fisher_OI = draw(6, 900)
    weight = solve(W_OI, fisher_OI, dtype, bits=bits, outlier_share=0.02, sensitive_share=0.01)
    assert_sound(weight, W_OI, dtype, bits)
    half = torch.float16 if dtype == torch.float32 else torch.bfloat16
    assert weight.codes.table_OC.dtype == half
    # Outliers belong to no cluster.
    mass_OI = fisher_OI.double().masked_fill(outlier_mask(weight), 0)
    middle = 0
    for o in range(6):
        w_I, mass_I, code_I = W_OI[o].double(), mass_OI[o], weight.codes.code_OK[o]
        exact_C = torch.stack(
            [(w_I * mass_I)[code_I == c].sum() / mass_I[code_I == c].sum().clamp(min=1e-300) for c in range(2**bits)]
        )
        used_C = torch.stack([mass_I[code_I == c].sum() > 0 for c in range(2**bits)])
        entry_C = weight.codes.table_OC[o].double()
        # A weight halfway between two entries may change sides when they are rounded: few rows, and none in float16.
        close_C = (entry_C - exact_C).abs() <= torch.finfo(half).eps * exact_C.abs() + 1e-4 * float(w_I.abs().max())
        assert used_C.all()
        middle += int(close_C.sum())
    assert middle >= (1 if half == torch.float16 else 0.95) * 6 * 2**bits


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    outputs=st.integers(1, 12),
    inputs=st.integers(1, 200),
    bits=st.sampled_from([2, 3, 4]),
    tail=st.sampled_from([0.0, 1.0, 2.0]),
    even=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_no_row_is_worse_than_rounded_to_nearest(outputs, inputs, bits, tail, even, seed):
    W_OI, fisher_OI = draw(outputs, inputs, seed, tail)
    if even:  # what suits a grid best
        W_OI = torch.rand(W_OI.shape, generator=torch.Generator().manual_seed(seed)) - 0.5
    weight = solve(W_OI, fisher_OI, bits=bits, **DENSE)
    ours_O = error_of_rows(W_OI, weight.dequantize(), fisher_OI)
    theirs_O = error_of_rows(W_OI, round_to_nearest(W_OI, bits), fisher_OI)
    # Rounding an entry to float16 moves it by 2^-11 of itself at most.
    rounding_O = (fisher_OI.double() * (2**-11 * W_OI.double()).square()).sum(1)
    assert (ours_O <= theirs_O + rounding_O).all()
    if inputs >= 64:
        assert ours_O.sum() < 0.95 * theirs_O.sum()


def spoil(kind, W_OI, fisher_OI):
    """What real weights hardly ever look like, in the last row or column or everywhere."""
    if kind == "dead features":
        fisher_OI[:, ::2] = 0
    elif kind == "no sensitivity":
        fisher_OI[-1] = 0
    elif kind == "one sensitive weight":
        fisher_OI[-1, 1:] = 0
    elif kind == "zero row":
        W_OI[-1] = 0
    elif kind == "zeros":
        W_OI.zero_()
    elif kind == "constant row":
        W_OI[-1] = -0.37
    elif kind == "one huge weight":
        W_OI[-1, 0] = -1e30
    elif kind == "very large weights":
        W_OI[-1] = 1e38 * W_OI[-1].sign()
    elif kind == "tiny weights":
        W_OI *= 1e-36
    elif kind == "huge sensitivities":
        fisher_OI.div_(fisher_OI.max().clone()).mul_(1e38)
    elif kind == "tiny sensitivities":
        fisher_OI.mul_(1e-44)
    elif kind == "few values":
        W_OI.copy_((100 * W_OI).round() / 8)
    return W_OI, fisher_OI


KINDS = [
    "plain",
    "dead features",
    "no sensitivity",
    "one sensitive weight",
    "zero row",
    "zeros",
    "constant row",
    "one huge weight",
    "very large weights",
    "tiny weights",
    "huge sensitivities",
    "tiny sensitivities",
    "few values",
]


@pytest.mark.thin(3)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    outputs=st.integers(1, 5),
    inputs=st.integers(1, 150),
    bits=st.sampled_from([2, 3, 4]),
    shares=st.sampled_from([(0, 0), (0.01, 0.01), (0.2, 0), (0, 0.2), (0.004, 0.0005)]),
    kept=st.sampled_from([None, 0.0, 0.1, 0.5, 1.0]),
    seed=st.integers(0, 2**16),
)
def test_awkward_weights(outputs, inputs, bits, kind, dtype, shares, kept, seed):
    W_OI, fisher_OI = spoil(kind, *draw(outputs, inputs, seed))
    if dtype == torch.float16:
        W_OI = W_OI.clamp(-6e4, 6e4)
    W_OI = W_OI.to(dtype).float().clamp(torch.finfo(dtype).min, torch.finfo(dtype).max)
    pruned = keep_OI = None
    if kept is not None:
        keep_OI = torch.rand(W_OI.shape, generator=torch.Generator().manual_seed(seed)) < kept
        pruned = Pruned(W_OI * keep_OI, keep_OI)
    weight = solve(W_OI, fisher_OI, dtype, pruned, bits=bits, outlier_share=shares[0], sensitive_share=shares[1])
    assert_sound(weight, W_OI, dtype, bits, keep_OI)
    assert weight.order_I is None
    stored = W_OI.numel() if keep_OI is None else int(keep_OI.sum())
    counts = [math.floor(share * stored + 1e-9) for share in shares]
    assert max(counts) <= weight.outlier_count <= sum(counts)
    assert (weight.outliers is None) == (max(counts) == 0)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("distinct", [1, 2, 4, 7, 16])
@pytest.mark.parametrize("sensitive", [0.0, 1e-6, 1.0])
def test_rows_of_few_different_weights_are_exact(distinct, bits, sensitive):
    """Even where nothing depends on some of them."""
    distinct = min(distinct, 2**bits)
    generator = torch.Generator().manual_seed(distinct)
    # In float16 already, some next to each other and one far away.
    value_C = (1 + torch.arange(distinct) / 1024) * torch.tensor([1.0, -1.0]).repeat(8)[:distinct]
    value_C[-1] = 100
    W_OI = value_C[torch.randint(distinct, (4, 500), generator=generator)]
    fisher_OI = torch.rand(4, 500, generator=generator)
    fisher_OI[W_OI < 0] *= sensitive
    weight = solve(W_OI, fisher_OI, bits=bits, **DENSE)
    assert torch.equal(weight.dequantize(), W_OI)


@pytest.mark.parametrize("huge", [-(2.0**50), 2.0**50])
def test_beside_a_huge_weight_entries_are_still_among_the_weights(huge):
    """Though the sums that their means are computed from have lost all digits."""
    W_OI = torch.rand(4, 300, generator=torch.Generator().manual_seed(0)) + 1
    W_OI[:, 0] = huge
    centre_OC = weighted_kmeans(W_OI, torch.rand(4, 300), torch.ones_like(W_OI, dtype=torch.bool), 8)
    assert (centre_OC.diff(dim=1) >= 0).all()
    assert ((centre_OC >= 1) & (centre_OC <= 2) | (centre_OC == huge)).all()


def test_outliers_are_the_largest_and_the_most_sensitive_weights():
    W_OI, fisher_OI = draw(4, 500)
    order_N = torch.randperm(2000, generator=torch.Generator().manual_seed(1))
    W_OI.view(-1)[order_N[:30]] = torch.linspace(3, 9, 30) * torch.tensor([1, -1]).repeat(15)
    fisher_OI.view(-1)[order_N[20:60]] = torch.linspace(1, 2, 40)
    weight = solve(W_OI, fisher_OI, outlier_share=0.015, sensitive_share=0.02)
    expected_OI = torch.zeros(2000, dtype=torch.bool)
    expected_OI[order_N[:60]] = True  # 30 and 40, ten of them both
    assert torch.equal(outlier_mask(weight), expected_OI.view(4, 500))
    # Entry and difference are both rounded to 16 bits.
    mask_OI = outlier_mask(weight)
    torch.testing.assert_close(weight.dequantize()[mask_OI], W_OI[mask_OI], rtol=2**-10, atol=1e-4)
    # What they are does not matter to the tables.
    table_OC = weight.codes.table_OC
    W_OI.view(-1)[order_N[:30]] *= -1.5
    fisher_OI.view(-1)[order_N[20:60]] *= 1e12
    assert torch.equal(solve(W_OI, fisher_OI, outlier_share=0.015, sensitive_share=0.02).codes.table_OC, table_OC)
    assert table_OC.abs().max() < 1


def test_entries_that_are_left_over_are_not_spent_on_outliers():
    W_OI = torch.tensor([-0.5, 0.25, 0.75]).repeat(1, 40)
    W_OI[0, 17] = 50
    weight = solve(W_OI, torch.ones_like(W_OI), bits=3, outlier_share=0.01, sensitive_share=0)
    assert weight.codes.table_OC.unique().tolist() == [-0.5, 0.25, 0.75]
    assert torch.equal(weight.dequantize(), W_OI)


@pytest.mark.parametrize(("share", "count"), [(0.004, 8), (0.0049, 9), (0.07, 140), (0.035, 70), (0.2, 400), (1e-5, 0)])
@pytest.mark.parametrize("option", ["outlier_share", "sensitive_share"])
def test_so_many_weights_are_outliers(option, share, count):
    W_OI, fisher_OI = draw(20, 100)
    weight = solve(W_OI, fisher_OI, **{**DENSE, option: share})
    assert weight.outlier_count == count
    assert (weight.outliers is None) == (count == 0)
    chosen_OI = W_OI.abs() if option == "outlier_share" else fisher_OI
    mask_OI = outlier_mask(weight)
    if count:
        assert chosen_OI[mask_OI].min() >= chosen_OI[~mask_OI].max()


def test_shares_are_counted_without_rounding_errors():
    """0.07 · 100 is 7.000000000000001 in floating point, and 0.035 · 200 … some products fall just short."""
    short = [
        (share, count)
        for count in range(10, 400)
        for share in (0.01, 0.07, 0.15, 0.035, 0.145)
        if math.floor(share * count) != math.floor(share * count + 1e-9)
    ]
    assert short
    for share, count in short[:3]:
        W_OI, fisher_OI = draw(1, count)
        assert solve(W_OI, fisher_OI, outlier_share=share, sensitive_share=0).outlier_count == round(share * count)


def test_outliers_bring_the_weights_nearer():
    W_OI, fisher_OI = draw(16, 200, tail=2)
    error = [
        error_of_rows(W_OI, solve(W_OI, fisher_OI, bits=3, **shares).dequantize(), fisher_OI).sum()
        for shares in (
            DENSE,
            {"outlier_share": 0.02, "sensitive_share": 0},
            {"outlier_share": 0, "sensitive_share": 0.02},
        )
    ]
    assert error[1] < 0.9 * error[0]
    assert error[2] < 0.5 * error[0]


@pytest.mark.parametrize("sensitivity", ["fisher", "hessian"])
def test_pruned_weights_are_as_if_they_had_never_been(sensitivity):
    """Each row as the linear that consists of its kept weights, as the pruner left them."""
    W_OI, fisher_OI = draw(7, 600)
    fisher_OI[4] = 0
    stats = InputStats.empty(600, Level.MOMENTS)
    stats.add(torch.randn(50, 600, generator=torch.Generator().manual_seed(0)))
    keep_OI = torch.rand(7, 600, generator=torch.Generator().manual_seed(1)) < 0.4
    keep_OI[2] = False
    keep_OI[3] = True
    pruned = Pruned(1.5 * W_OI * keep_OI, keep_OI)
    method = SqueezeLLM(bits=3, sensitivity=sensitivity, **DENSE)
    (weight,) = quantize(method, W_OI, stats, [7], torch.float32, pruned, fisher_OI)
    assert_sound(weight, pruned.W_OI, torch.float32, 3, keep_OI)
    assert not weight.codes.table_OC[2].any()
    for o in (0, 1, 3, 4, 5, 6):
        keep_I = keep_OI[o]
        own = copy.copy(stats)
        own.sum_I, own.square_I = stats.sum_I[keep_I], stats.square_I[keep_I]
        (alone,) = quantize(
            method, pruned.W_OI[o : o + 1, keep_I], own, [1], torch.float32, None, fisher_OI[o : o + 1, keep_I]
        )
        assert torch.equal(weight.codes.table_OC[o], alone.codes.table_OC[0])
        assert torch.equal(weight.dequantize()[o, keep_I], alone.dequantize()[0])


def test_shares_are_of_the_kept_weights():
    W_OI, fisher_OI = draw(10, 200)
    keep_OI = torch.zeros(10, 200, dtype=torch.bool)
    keep_OI[:, ::2] = True
    fisher_OI[:, 1::2] += 100  # the most sensitive weights are not kept
    weight = solve(W_OI, fisher_OI, pruned=Pruned(W_OI * keep_OI, keep_OI), outlier_share=0.02, sensitive_share=0.01)
    mask_OI = outlier_mask(weight)
    assert not mask_OI[~keep_OI].any()
    kept_N, outlier_N = W_OI.abs()[keep_OI], mask_OI[keep_OI]
    assert outlier_N[kept_N.argsort(descending=True)[:20]].all()
    assert outlier_N[fisher_OI[keep_OI].argsort(descending=True)[:10]].all()
    assert weight.outlier_count <= 30
    near_OI = place_kept(weight.codes.values(), keep_OI)
    torch.testing.assert_close(weight.dequantize()[mask_OI], W_OI[mask_OI], rtol=2**-9, atol=1e-5)
    assert not torch.equal(near_OI[mask_OI], weight.dequantize()[mask_OI])


@pytest.mark.parametrize("masked", [False, True])
def test_stacked_linears_are_each_as_alone(masked):
    W_OI, fisher_OI = draw(24, 150)
    W_OI[:8] *= 0.1  # ranked together, the first linear would have no outliers
    fisher_OI[8:] *= 0.01
    sizes = [8, 12, 4]
    keep_OI = torch.rand(24, 150, generator=torch.Generator().manual_seed(1)) < 0.5
    pruned = Pruned(W_OI * keep_OI, keep_OI) if masked else None
    method = SqueezeLLM(outlier_share=0.02, sensitive_share=0.02)
    stacked = quantize(method, W_OI, no_inputs(150), sizes, torch.float32, pruned, fisher_OI)
    assert [weight.shape for weight in stacked] == [(8, 150), (12, 150), (4, 150)]
    for weight, W, f, keep in zip(
        stacked, W_OI.split(sizes), fisher_OI.split(sizes), keep_OI.split(sizes), strict=True
    ):
        alone = solve(W, f, pruned=Pruned(W * keep, keep) if masked else None, outlier_share=0.02, sensitive_share=0.02)
        assert_same(weight, alone)
        assert weight.outlier_count >= 0.02 * weight.stored - 1


def test_the_hessian_is_the_sum_of_squared_inputs():
    W_OI, _ = draw(6, 80)
    x_TI = torch.randn(100, 80, generator=torch.Generator().manual_seed(0)) * torch.linspace(0, 3, 80)
    stats = InputStats.empty(80, Level.MOMENTS)
    stats.add(x_TI)
    method = SqueezeLLM(bits=3, sensitivity="hessian", outlier_share=0.01, sensitive_share=0.02)
    (weight,) = quantize(method, W_OI, stats, [6], torch.float32)
    assert_same(
        weight,
        solve(W_OI, stats.square_I.expand(6, 80).clone(), bits=3, outlier_share=0.01, sensitive_share=0.02),
    )
    assert_sound(weight, W_OI, torch.float32, 3)


def test_a_row_without_sensitivities_is_clustered_as_if_they_were_equal():
    W_OI, fisher_OI = draw(3, 90)
    fisher_OI[1] = 0
    weight = solve(W_OI, fisher_OI, bits=3, **DENSE)
    equal = solve(W_OI, torch.ones_like(W_OI), bits=3, **DENSE)
    assert torch.equal(weight.codes.values()[1], equal.codes.values()[1])
    assert not torch.equal(weight.codes.values()[0], equal.codes.values()[0])


def test_dead_features_take_only_the_entries_that_are_left():
    """The rest is represented as if they were not there (nearly), and they get the nearest entries."""
    W_OI, fisher_OI = draw(4, 140)
    fisher_OI[:, 70:] = 0
    weight = solve(W_OI, fisher_OI, bits=3, **DENSE)
    assert_sound(weight, W_OI, torch.float32, 3)
    without = solve(W_OI[:, :70].contiguous(), fisher_OI[:, :70].contiguous(), bits=3, **DENSE)
    torch.testing.assert_close(
        error_of_rows(W_OI, weight.dequantize(), fisher_OI),
        error_of_rows(W_OI[:, :70], without.dequantize(), fisher_OI[:, :70]),
        rtol=0.01,
        atol=0,
    )


@pytest.mark.parametrize("dead", [20, 300])
def test_weights_that_nothing_depends_on_share_the_entries_that_are_left(dead):
    """Four of sixteen entries are taken: the dead weights have the best twelve others."""
    W_OI = torch.rand(3, dead + 200, generator=torch.Generator().manual_seed(0))
    W_OI[:, dead:] = 0.25 * torch.arange(-4, 0).repeat(50)
    fisher_OI = torch.ones_like(W_OI)
    fisher_OI[:, :dead] = 0
    error_O = error_of_rows(W_OI, solve(W_OI, fisher_OI, **DENSE).dequantize(), torch.ones_like(W_OI))
    best_O = torch.tensor([least_error(w, torch.ones(dead), 12) for w in W_OI[:, :dead]])
    assert (error_O < 1.02 * best_O + 1e-6).all()


@pytest.mark.parametrize("power", [-100, 100])
def test_clusters_do_not_depend_on_the_size_of_weights(power):
    W_OI, fisher_OI = draw(6, 300)
    dense_OI = torch.ones_like(W_OI, dtype=torch.bool)
    plain_OC = weighted_kmeans(W_OI, fisher_OI, dense_OI, 16)
    assert torch.equal(weighted_kmeans(W_OI * 2.0**power, fisher_OI, dense_OI, 16), plain_OC * 2.0**power)


def test_the_scale_of_sensitivities_and_weights_does_not_matter():
    W_OI, fisher_OI = draw(6, 140)
    plain = solve(W_OI, fisher_OI)
    scaled = solve(16 * W_OI, fisher_OI * 2.0**-60)
    assert torch.equal(scaled.dequantize(), 16 * plain.dequantize())


@pytest.mark.parametrize(
    ("scale", "dtype", "half"),
    [
        (1, torch.float32, torch.float16),
        (1, torch.float16, torch.float16),
        (1, torch.bfloat16, torch.bfloat16),
        (2**20, torch.float32, torch.bfloat16),
        (2**-20, torch.float32, torch.bfloat16),
    ],
)
def test_tables_and_outliers_are_stored_in_16_bits(scale, dtype, half):
    W_OI, fisher_OI = draw(6, 140)
    weight = solve(W_OI * scale, fisher_OI, dtype, outlier_share=0.1)
    assert weight.codes.table_OC.dtype == weight.outliers.value_N.dtype == half
    if dtype == torch.float32:
        assert_sound(weight, W_OI * scale, dtype, 4)


def test_rows_are_solved_alike_however_many_are_taken_at_a_time(monkeypatch):
    W_OI, fisher_OI = draw(130, 40)
    plain = solve(W_OI, fisher_OI)
    monkeypatch.setattr(squeezellm, "_CHUNK_VALUES", 1)
    assert_same(solve(W_OI, fisher_OI), plain)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_arguments_are_unchanged(strided, masked):
    W_OI, fisher_OI = draw(6, 140)
    plain = W_OI.clone(), fisher_OI.clone()
    keep_OI = W_OI > 0
    pruned = Pruned(W_OI * keep_OI, keep_OI) if masked else None
    if strided:
        W_OI, fisher_OI = W_OI.T.contiguous().T, fisher_OI.T.contiguous().T
    weight = solve(W_OI, fisher_OI, pruned=pruned)
    assert_same(weight, solve(*plain, pruned=pruned))
    weight.codes.table_OC.fill_(7)
    weight.codes.code_OK.fill_(7)
    assert torch.equal(W_OI, plain[0])
    assert torch.equal(fisher_OI, plain[1])
    assert torch.equal(keep_OI, plain[0] > 0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["weights", "fisher", "hessian"])
def test_what_is_not_finite_is_refused(where, bad):
    W_OI, fisher_OI = draw(4, 24)
    stats = InputStats.empty(24, Level.MOMENTS)
    if where == "weights":
        W_OI[3, 5] = bad
    elif where == "fisher":
        fisher_OI[3, 5] = bad
    else:
        stats.square_I[5] = bad
    method = SqueezeLLM(sensitivity="hessian" if where == "hessian" else "fisher")
    with pytest.raises(ValueError, match=f"{where}.* not finite") as caught:
        quantize(method, W_OI, stats, [4], torch.float32, None, fisher_OI)
    assert "\n" not in str(caught.value)


def test_what_the_pruner_made_not_finite_is_refused():
    W_OI, fisher_OI = draw(4, 24)
    keep_OI = torch.ones_like(W_OI, dtype=torch.bool)
    with pytest.raises(ValueError, match="not finite"):
        solve(W_OI, fisher_OI, pruned=Pruned(torch.full_like(W_OI, math.nan), keep_OI))


def test_without_the_gradients_it_wants_it_says_so():
    with pytest.raises(ValueError, match="squared gradients"):
        solve(torch.ones(2, 4), None)


def test_it_is_registered_and_says_what_it_needs():
    assert QUANTIZERS["squeezellm"] is SqueezeLLM
    assert (SqueezeLLM().level, SqueezeLLM().needs_fisher) == (Level.NONE, True)
    assert SqueezeLLM() == SqueezeLLM(4, "fisher", 0.004, 0.0005)
    other = SqueezeLLM(sensitivity="hessian")
    assert (other.level, other.needs_fisher) == (Level.MOMENTS, False)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"bits": 5}, "`bits` 5 is not possible with squeezellm: .*2, 3 or 4"),
        ({"bits": 1}, "`bits` 1 is not possible "),
        ({"bits": 8}, "`bits` 8 is not possible .*table of 8"),
        ({"sensitivity": "magnitude"}, "`sensitivity` magnitude .*fisher or hessian"),
        ({"outlier_share": 0.3}, "`outlier_share` 0.3 is not possible .*0.2"),
        ({"outlier_share": -0.01}, "`outlier_share` -0.01 is not possible "),
        ({"outlier_share": math.nan}, "`outlier_share` nan is not possible "),
        ({"sensitive_share": 0.21}, "`sensitive_share` 0.21 is not possible "),
        ({"sensitive_share": -1}, "`sensitive_share` -1 is not possible "),
    ],
)
def test_options_that_make_no_sense(options, says):
    with pytest.raises(UsageError, match=says):
        SqueezeLLM(**options)


# --- the Fisher information


def load(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def windows(count=3, length=12):
    return torch.randint(2, 320, (count, length), generator=torch.Generator().manual_seed(0))


LINEARS = {
    "llama": ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "model.layers.1.self_attn.o_proj"],
    "gpt2": ["transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj"],
}


def slow_fisher(model, ids_NS, names):
    """A loop over windows and weights, float64: E[(∂loss/∂w)²], with the loss written out."""
    model = model.double()
    total = dict.fromkeys(names, 0)
    for ids_S in ids_NS:
        log_p_SV = model(input_ids=ids_S[None]).logits[0].double().log_softmax(1)
        loss = -sum(log_p_SV[i, ids_S[i + 1]] for i in range(len(ids_S) - 1)) / (len(ids_S) - 1)
        for name in names:
            (gradient,) = torch.autograd.grad(loss, model.get_submodule(name).weight, retain_graph=True)
            total[name] += gradient.square()
    transposed = type(model).__name__.startswith("GPT2")
    return {name: (x.T if transposed else x) / len(ids_NS) for name, x in total.items()}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_fisher_is_the_mean_square_of_the_gradients(model_of, family):
    names = LINEARS[family]
    with torch.no_grad():  # as the pipeline runs
        found = fisher(load(model_of(family)).train(), windows(), names)
    expected = slow_fisher(load(model_of(family)), windows(), names)
    assert list(found) == names
    for name in names:
        assert found[name].dtype == torch.float32
        assert found[name].device.type == "cpu"
        assert found[name].is_contiguous()
        assert not found[name].requires_grad
        scale = float(expected[name].mean())
        torch.testing.assert_close(found[name].double(), expected[name], rtol=1e-3, atol=1e-4 * scale)


def test_fisher_of_tied_weights_is_that_of_all_their_uses(model_of):
    model = load(model_of("llama-tied"))
    found = fisher(model, windows(), ["lm_head"])["lm_head"]
    expected = slow_fisher(load(model_of("llama-tied")), windows(), ["lm_head"])["lm_head"]
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4 * float(expected.mean()))


def test_fisher_tells_how_far_it_is(model_of):
    calls = []
    fisher(load(model_of("llama")), windows(4), LINEARS["llama"], lambda done, total: calls.append((done, total)))
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.parametrize("fails", [False, True])
def test_fisher_leaves_the_model_as_it_was(model_of, fails):
    model = load(model_of("llama")).train()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    frozen = model.model.layers[0].self_attn.q_proj.weight.requires_grad_(False)
    model.model.layers[1].mlp.down_proj.weight.grad = torch.ones(32, 64)

    def progress(done, total):
        if fails:
            raise KeyboardInterrupt

    try:
        found = fisher(model, windows(1), LINEARS["llama"], progress)
    except KeyboardInterrupt:
        assert fails
    else:
        assert not fails
        # A gradient from before is not counted in.
        assert found["model.layers.1.mlp.down_proj"].max() < 1
    assert not frozen.requires_grad
    for name, parameter in model.named_parameters():
        assert parameter.grad is None
        assert parameter.requires_grad == (parameter is not frozen)
        assert torch.equal(parameter, before[name])
        assert not parameter._post_accumulate_grad_hooks


def test_fisher_holds_one_gradient_at_a_time(model_of, monkeypatch):
    model = load(model_of("llama"))
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and "layers" in name]
    held = []
    original = torch.Tensor.addcmul_

    def counting(self, *args, **kwargs):
        held.append(sum(parameter.grad is not None for parameter in model.parameters()))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "addcmul_", counting)
    fisher(model, windows(2), names)
    assert len(held) == 2 * len(names)
    assert max(held) <= 1


@pytest.mark.parametrize("bad", [math.nan, 1e25])
def test_fisher_names_the_linear_whose_gradient_is_not_finite(model_of, bad):
    """Or so large that its square is not."""
    model = load(model_of("llama"))
    name = "model.layers.0.self_attn.q_proj"
    model.get_submodule(name).weight.register_hook(lambda gradient: gradient * bad)
    with pytest.raises(SecateurError, match=rf"gradient of {name} is not finite"):
        fisher(model, windows(), LINEARS["llama"])
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("shape", [(0, 8), (3, 1)])
def test_fisher_of_windows_without_predictions(model_of, shape):
    with pytest.raises(UsageError, match="no prediction"):
        fisher(load(model_of("llama")), torch.ones(shape, dtype=torch.long), LINEARS["llama"])
