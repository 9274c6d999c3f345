"""The sweep against the plain loop, and RTN, GPTQ and SpQR against slow float64 versions of their papers.

T: tokens, O: output features, I: input features, S: input features of one unit; weights of one group of one row.
"""

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from methods import quantize

from secateur.core.pruned import Pruned
from secateur.core.stats import InputStats, Level
from secateur.quant.error_feedback import useful_outliers
from secateur.quant.gptq import GPTQ
from secateur.quant.grid_options import ORDERS
from secateur.quant.rtn import RTN
from secateur.quant.spqr import SpQR
from secateur.solvers.column_sweep import sweep

FLAGS = [False, True]
SEEDS = st.integers(0, 2**16)


class Recorder:
    """Rounds the weights of every input but each seventh, and notes what it is shown."""

    def __init__(self):
        self.entered = []
        self.settled = []

    def enter(self, first, W_SO):
        self.entered.append((first, len(self.settled), W_SO.clone()))

    def settle(self, i, w_O):
        self.settled.append(i)
        return w_O.clone() if i % 7 == 3 else w_O.round()


def draw_factor(inputs, outputs, seed=0):
    generator = torch.Generator().manual_seed(seed)
    W_IO = 3 * torch.randn(inputs, outputs, generator=generator, dtype=torch.float64)
    U_II = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64).triu(1) / inputs**0.5
    U_II += torch.rand(inputs, generator=generator, dtype=torch.float64).add(0.5).diag()
    return W_IO, U_II


def naive(W_IO, U_II, unit):
    """Each input in turn: its error over U[i, i], times U[i, j], comes off every j that follows."""
    W_IO, settler = W_IO.clone(), Recorder()
    for i in range(len(W_IO)):
        if i % unit == 0:
            settler.enter(i, W_IO[i : i + unit])
        settled_O = settler.settle(i, W_IO[i])
        error_O = (W_IO[i] - settled_O) / U_II[i, i]
        W_IO[i + 1 :] -= U_II[i, i + 1 :, None] * error_O
        W_IO[i] = settled_O
    return W_IO, settler


def assert_as_naive(inputs, unit, outputs=3, seed=0):
    W_IO, U_II = draw_factor(inputs, outputs, seed)
    slow_IO, slow = naive(W_IO, U_II, unit)
    before_II, settler = U_II.clone(), Recorder()
    assert sweep(W_IO, U_II, settler, unit) is None
    assert settler.settled == list(range(inputs))
    torch.testing.assert_close(W_IO, slow_IO, rtol=0, atol=1e-9)
    assert torch.equal(U_II, before_II)
    assert [entry[0] for entry in settler.entered] == list(range(0, inputs, unit))
    for (first, settled, W_SO), (_, _, slow_SO) in zip(settler.entered, slow.entered, strict=True):
        assert settled == first  # not a weight of the unit has been settled, and every one before it has
        torch.testing.assert_close(W_SO, slow_SO, rtol=0, atol=1e-9)


@pytest.mark.thin(3)
@pytest.mark.parametrize("inputs", [1, 37, 512, 513, 1301])
@pytest.mark.parametrize("unit", [1, 2, 16, 24, 100, 257, 511, 512, 513, 600, 1100, 5000])
def test_as_the_plain_loop(inputs, unit):
    assert_as_naive(inputs, unit)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(inputs=st.integers(1, 700), unit=st.integers(1, 800), outputs=st.integers(1, 4), seed=st.integers(0, 2**16))
def test_any_size(inputs, unit, outputs, seed):
    assert_as_naive(inputs, unit, outputs, seed)


def test_the_error_goes_where_it_costs_least():
    """With Gram matrix G and UᵀU = G⁻¹, what the sweep leaves of ‖X(Ŵ−W)ᵀ‖² is Σ (error / U[i, i])², input by input."""
    W_IO, _ = draw_factor(90, 4)
    x_TI = torch.randn(300, 90, generator=torch.Generator().manual_seed(1), dtype=torch.float64).cumsum(1)
    U_II = torch.linalg.cholesky(torch.linalg.inv(x_TI.T @ x_TI), upper=True)
    new_IO, costs = W_IO.clone(), []

    class Rounding(Recorder):
        def settle(self, i, w_O):
            costs.append(((w_O.round() - w_O) / U_II[i, i]).square())
            return w_O.round()

    sweep(new_IO, U_II, Rounding(), 16)
    left_O = (x_TI @ (new_IO - W_IO)).square().sum(0)
    torch.testing.assert_close(left_O, torch.stack(costs).sum(0))
    assert (left_O < 0.5 * (x_TI @ (W_IO.round() - W_IO)).square().sum(0)).all()


def gather(x_TI):
    stats = InputStats.empty(x_TI.shape[1], Level.GRAM)
    stats.add(x_TI)
    return stats


def draw(outputs, inputs, tokens=None, seed=0, large=0.02):
    """Weights of which a share is large, and inputs that go together, have means and differ in scale."""
    generator = torch.Generator().manual_seed(seed)
    W_OI = torch.randn(outputs, inputs, generator=generator)
    W_OI *= 1 + 3 * (torch.rand(outputs, inputs, generator=generator) < large)
    mix_II = torch.eye(inputs) + torch.randn(inputs, inputs, generator=generator) / inputs**0.5
    scale_I = 0.3 + torch.rand(inputs, generator=generator)
    x_TI = torch.randn(tokens or 4 * inputs, inputs, generator=generator) + 0.3
    return W_OI, x_TI @ mix_II * scale_I


def draw_mask(outputs, inputs, seed=0):
    """Rows keep numbers of weights that differ."""
    generator = torch.Generator().manual_seed(seed)
    keep_OI = torch.rand(outputs, inputs, generator=generator) < 0.3 + 0.5 * torch.rand(outputs, 1, generator=generator)
    keep_OI[:, 0] = True
    return keep_OI


def output_error(W_OI, found, x_TI):
    """tr(ΔGΔᵀ): the squared change of all outputs over the calibration tokens."""
    new_OI = torch.cat([weight.dequantize() for weight in found]) if isinstance(found, list) else found
    return (x_TI.double() @ (W_OI.double() - new_OI.double()).T).square().sum().item()


def solve(method, W_OI, x_TI, sizes=None, dtype=torch.float32, pruned=None):
    return quantize(method, W_OI, gather(x_TI), sizes or (), dtype, pruned)


def slow_round(w, scale, zero, bits):
    """Code, and what it stands for."""
    code = np.clip(np.round((w / scale if scale > 0 else 0 * w) + zero), 0, 2**bits - 1)
    return code, (code - zero) * scale


def slow_error(w_S, importance_S, scale, zero, bits):
    return (importance_S * (slow_round(w_S, scale, zero, bits)[1] - w_S) ** 2).sum()


def half(x):
    return np.float64(np.float16(x))


def extremes(w_S, importance_S):
    """Of the weights that count, and zero."""
    return min([0, *w_S[importance_S > 0]]), max([0, *w_S[importance_S > 0]])


def shares(search):
    return [1 - 0.05 * k for k in range(14)] if search else [1]


def slow_grid(bits, symmetric, search):
    """For groups (weights, importances) their scales and zero points: from the least to the greatest weight."""

    def candidates(w_S, importance_S):
        low, high = extremes(w_S, importance_S)
        for share in shares(search):
            least, most = (
                (min(low, -high) * share, max(-low, high) * share) if symmetric else (low * share, high * share)
            )
            scale = half((most - least) / (2**bits - 1)) or 1.0
            zero = 2 ** (bits - 1) if symmetric else np.clip(np.round(-least / scale), 0, 2**bits - 1)
            yield slow_error(w_S, importance_S, scale, zero, bits), scale, zero

    return lambda groups: [min(candidates(*group), key=lambda found: found[0])[1:] for group in groups]


def slow_two_level(bits, scale_bits, tile_rows, search, sizes):
    """SpQR's: scales, then zero points, each rounded on the min-max grid of a tile of rows.

    Beyond the paper a scale is never rounded to less than half of it, and zero points stay near the grid.
    """
    levels, codes = 2**bits - 1, 2**scale_bits

    def min_max(values):
        low = half(min(values, default=0))
        return low, half((max(values, default=0) - low) / (codes - 1))

    def nearest(x, low, step):
        return low + step * np.clip(np.round((x - low) / step if step else 0), 0, codes - 1)

    def fit(groups):
        linears = np.split(np.arange(len(groups)), np.cumsum(sizes)[:-1])
        tiles = [rows[i : i + tile_rows] for rows in linears for i in range(0, len(rows), tile_rows)]
        return [grid for tile in tiles for grid in fit_tile([groups[o] for o in tile])]

    def fit_tile(groups):
        ranges = [extremes(*group) for group in groups]
        counted = [high > low for low, high in ranges]

        def zero_for(o, scale):
            zero = levels / 2 - sum(ranges[o]) / 2 / scale if scale > 0 else levels / 2
            return np.clip(zero, -levels, 2 * levels)

        def cheapest(o, grids):
            return min(grids, key=lambda grid: slow_error(*groups[o], *grid, bits))

        wanted = []
        for o, (low, high) in enumerate(ranges):
            tried = [(high - low) / levels * share for share in shares(search)]
            wanted.append(cheapest(o, [(scale, zero_for(o, scale)) for scale in tried])[0])
        low, step = min_max([scale for o, scale in enumerate(wanted) if counted[o]])
        found = [nearest(scale, low, step) for scale in wanted]
        scales = [s + step if s < scale / 2 else s for s, scale in zip(found, wanted, strict=True)]
        zero_grid = min_max([zero_for(o, scale) for o, scale in enumerate(scales) if counted[o] and scale > 0])
        offered = [[low + step * code for code in range(codes)] if search else [scale] for scale in scales]
        return [cheapest(o, [(s, nearest(zero_for(o, s), *zero_grid)) for s in offered[o]]) for o in range(len(groups))]

    return fit


def slow_saved(w_S, importance_S, bits):
    """For every weight: by how much less its group is rounded wrong without it, range and all (SpQR, `outliers`)."""

    def error(w_S, importance_S):
        low, high = extremes(w_S, importance_S)
        scale = (high - low) / (2**bits - 1)
        return slow_error(w_S, importance_S, scale, -low / scale if scale else 0, bits)

    rest = [np.arange(len(w_S)) != s for s in range(len(w_S))]
    return error(w_S, importance_S) - np.array([error(w_S[r], importance_S[r]) for r in rest])


def slow_sweep(W_OI, x_TI, fit, method, pruned=None, threshold=None, sizes=()):
    """GPTQ's and SpQR's algorithms, column by column, the inverse Hessian of what remains computed anew for each.

    Returns new weights, codes in stored order (−1: removed), and outliers.
    """
    bits, size, (O, I) = method.bits, method.group_size, W_OI.shape
    H_II = (x_TI.double().T @ x_TI.double()).numpy()
    falling_I, mean = np.argsort(-H_II.diagonal(), kind="stable"), H_II.diagonal().mean()
    H_II = H_II + np.diag(mean * (H_II.diagonal() == 0) + method.damping * mean)
    stored_I = falling_I if method.order == "permuted" else np.arange(I)
    swept_I = falling_I if method.order == "activation" else np.arange(I)
    W_OI, H_II = W_OI.double().numpy()[:, stored_I], H_II[np.ix_(stored_I, stored_I)]
    keep_OI = np.ones((O, I), bool) if pruned is None else pruned.keep_OI.numpy()[:, stored_I]
    guide_OI = W_OI if pruned is None else pruned.W_OI.double().numpy()[:, stored_I]
    inverse = {i: np.linalg.inv(H_II[np.ix_(swept_I[n:], swept_I[n:])]) for n, i in enumerate(swept_I)}
    pivot_I = np.array([inverse[i][0, 0] for i in range(I)])
    if threshold is not None:
        parts = np.split(W_OI**2 / pivot_I, np.cumsum(sizes)[:-1])
        limit_O = np.repeat([threshold * part_OI.mean() for part_OI in parts], sizes)
    group_OI = np.where(keep_OI, (keep_OI.cumsum(1) - 1) // size, -1)

    def fit_group(g, W_OI):
        groups = []
        for o in range(O):
            w_S, importance_S = W_OI[o, group_OI[o] == g], 1 / pivot_I[group_OI[o] == g]
            if threshold is not None:
                importance_S = np.where(slow_saved(w_S, importance_S, bits) > limit_O[o], 0, importance_S)
            groups.append((w_S, importance_S))
        return fit(groups)

    static = method.order == "activation" or pruned is not None
    grids = [fit_group(g, guide_OI) for g in range(group_OI.max() + 1)] if static else []
    code_OI, outlier_OI = np.full((O, I), -1), np.zeros((O, I), bool)
    for n, i in enumerate(swept_I):
        if not static and i % size == 0:
            grids.append(fit_group(i // size, W_OI))
        for o in range(O):
            w, settled = W_OI[o, i], 0.0
            if keep_OI[o, i]:
                code_OI[o, i], settled = slow_round(w, *grids[group_OI[o, i]][o], bits)
                if threshold is not None and (w - settled) ** 2 / pivot_I[i] > limit_O[o]:
                    outlier_OI[o, i] = True
                    settled += half(w - settled)
            W_OI[o, swept_I[n:]] -= (w - settled) / pivot_I[i] * inverse[i][0]
            W_OI[o, i] = settled
    natural_I = np.argsort(stored_I)
    return torch.from_numpy(W_OI[:, natural_I]), torch.from_numpy(code_OI), torch.from_numpy(outlier_OI[:, natural_I])


def dense_codes(found):
    """In stored order, −1 where nothing is stored."""
    rows = []
    for weight in found:
        for o, code_K in enumerate(weight.codes.code_OK.long()):
            keep_I = torch.ones(weight.shape[1], dtype=torch.bool) if weight.keep_OI is None else weight.keep_OI[o]
            rows.append(torch.full_like(keep_I, -1, dtype=torch.long))
            rows[-1][keep_I] = code_K[: int(keep_I.sum())]
    return torch.stack(rows)


def outlier_mask(found):
    masks = [torch.zeros(weight.shape, dtype=torch.bool) for weight in found]
    for mask_OI, weight in zip(masks, found, strict=True):
        if weight.outliers is not None:
            mask_OI[weight.outliers.row_N, weight.outliers.column_N] = True
    return torch.cat(masks)


def assert_same(one, other):
    """Weights, codes and outliers, but for one in a thousand, which the last bit may round to the other side."""
    for mine, others in zip(one, other, strict=True):
        assert torch.isclose(mine.double(), others.double(), rtol=5e-3, atol=2e-3).double().mean() >= 0.999


def assert_agrees(found, W_OI, x_TI, slow):
    new_OI = torch.cat([weight.dequantize() for weight in found])
    assert_same((new_OI, dense_codes(found), outlier_mask(found)), slow)
    assert output_error(W_OI, new_OI, x_TI) == pytest.approx(output_error(W_OI, slow[0], x_TI), rel=1e-3)


@pytest.mark.parametrize(
    ("outputs", "inputs", "size"), [(9, 70, 16), (5, 150, 128), (4, 33, 2), (6, 40, 200), (20, 300, "row")]
)
@pytest.mark.parametrize(("symmetric", "search", "masked"), list(product(FLAGS, FLAGS, FLAGS)))
def test_rtn_agrees_with_loops(outputs, inputs, size, symmetric, search, masked):
    W_OI, x_TI = draw(outputs, inputs)
    bits, W_OI = (2, W_OI**3) if size == "row" else (4, W_OI)  # the best range is a small part of the whole one
    if size == "row":
        W_OI[0], W_OI[0, 7] = 0.35 / 3, 1
    keep_OI = draw_mask(outputs, inputs) if masked else torch.ones(outputs, inputs, dtype=torch.bool)
    pruned = Pruned(W_OI * keep_OI * 1.1, keep_OI)
    slow_OI, code_OI = torch.zeros(outputs, inputs).double(), torch.full((outputs, inputs), -1.0).double()
    for o in range(outputs):
        for columns in keep_OI[o].nonzero()[:, 0].split(inputs if size == "row" else size):
            w_S = pruned.W_OI[o, columns].double().numpy()
            grid = slow_grid(bits, symmetric, search)([(w_S, np.ones(len(w_S)))])[0]
            code_OI[o, columns], slow_OI[o, columns] = map(torch.from_numpy, slow_round(w_S, *grid, bits))
    method = RTN(bits, size, symmetric, search)
    found = solve(method, W_OI if masked else pruned.W_OI, x_TI, pruned=pruned if masked else None)
    assert_agrees(found, W_OI, x_TI, (slow_OI, code_OI, torch.zeros(outputs, inputs)))


@pytest.mark.thin(2)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("bits", "symmetric", "search"), [(2, False, False), (4, False, True), (3, True, False), (8, True, True)]
)
@pytest.mark.parametrize("masked", FLAGS)
def test_gptq_agrees_with_loops(order, bits, symmetric, search, masked):
    outputs, inputs, size = (10, 140, 128) if search else (12, 70, 16)
    W_OI, x_TI = draw(outputs, inputs, seed=bits)
    x_TI[:, [2, 30]] = 0
    keep_OI = draw_mask(outputs, inputs)
    pruned = Pruned(W_OI * keep_OI * 1.1, keep_OI) if masked else None
    method = GPTQ(bits, size, symmetric, search, order, damping=0.05 if masked else 0.01)
    found = solve(method, W_OI, x_TI, pruned=pruned)
    assert_agrees(found, W_OI, x_TI, slow_sweep(W_OI, x_TI, slow_grid(bits, symmetric, search), method, pruned))


@pytest.mark.thin(2)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("search", "masked"), list(product(FLAGS, FLAGS)))
@pytest.mark.parametrize("threshold", [None, 0.1])
def test_spqr_agrees_with_loops(order, search, masked, threshold):
    """Of two linears at once, whose rows do not divide into tiles, and whose weights and rows differ in size."""
    sizes, keep_OI, (W_OI, x_TI) = [10, 7], draw_mask(17, 67), draw(17, 67, seed=5)
    W_OI[:10] *= 0.2
    W_OI[[1, 2, 5, 6]] *= torch.tensor([0.06, 0.02, 0.05, 0.001])[:, None]
    pruned = Pruned(W_OI * keep_OI * 1.1, keep_OI) if masked else None
    method = SpQR(3, 16, 3, 4, threshold, None if threshold else 0, search, order)
    found = solve(method, W_OI, x_TI, sizes, pruned=pruned)
    slow = slow_sweep(W_OI, x_TI, slow_two_level(3, 3, 4, search, sizes), method, pruned, threshold, sizes)
    assert threshold is None or 10 < slow[2].sum() < 200
    assert_agrees(found, W_OI, x_TI, slow)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(3, 20), st.sampled_from([2, 3, 4]), st.sampled_from([-2.0, -0.1, 0.5]), SEEDS)
def test_useful_outliers_are_those_that_leaving_one_out_finds(weights, bits, least, seed):
    """Whether signs differ or not, and where some weights do not count."""
    generator = torch.Generator().manual_seed(seed)
    w_SO = least + 2 * torch.rand(weights, 12, generator=generator) ** 3
    importance_SO = torch.rand(weights, 12, generator=generator) * (torch.rand(weights, 12, generator=generator) < 0.9)
    saved_SO = torch.zeros(weights, 12).double()
    for o in range(12):
        saved_SO[:, o] = torch.from_numpy(
            slow_saved(w_SO[:, o].double().numpy(), importance_SO[:, o].double().numpy(), bits)
        )
    limit_O = torch.tensor([0.003, 0.01, 0.03, 0.1]).repeat(3)
    clear_SO = (saved_SO - limit_O).abs() > 1e-5
    assert clear_SO.float().mean() > 0.95
    useful_SO = useful_outliers(w_SO, importance_SO, limit_O, 2**bits - 1)
    assert torch.equal(useful_SO & clear_SO, (saved_SO > limit_O) & clear_SO)
