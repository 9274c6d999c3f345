"""QMoE's ternary rows: what is rounded to what, and the error that is carried on.

O: output features, I: input features, T: tokens.
"""

import numpy as np
import pytest
import torch

from secateur.core.pruned import Pruned
from secateur.core.stack import Stack
from secateur.core.stats import InputStats, Level
from secateur.errors import UsageError
from secateur.formats.layouts.choose import layout_for
from secateur.quant.ternary import Ternary, TernaryGrid
from secateur.recipes.plan import plan
from secateur.recipes.recipe import Recipe
from secateur.search.goals.target_size import TargetSize


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stack_of(W_OI, x_TI, rows=(), dtype=torch.float32):
    stats = InputStats.empty(W_OI.shape[1], Level.GRAM)
    stats.add(x_TI)
    return Stack(W_OI, stats, tuple(rows) or (len(W_OI),), dtype)


def twin(W_OI, x_TI, damping, half):
    """Algorithm 1 of GPTQ in float64, column by column, rounded to zero or to the ends of the row (QMoE, section 3.2)."""
    W = W_OI.double().numpy().copy()
    G = (x_TI.double().T @ x_TI.double()).numpy()
    dead = np.diag(G) == 0
    G[dead, dead] = 1
    G = G + damping * np.diag(G).mean() * np.eye(len(G))
    U = np.linalg.cholesky(np.linalg.inv(G)).T
    low, high = (torch.from_numpy(end).to(half).double().numpy() for end in (W.min(1), W.max(1)))
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    found = np.zeros_like(W)
    for i in range(W.shape[1]):
        w = W[:, i]
        found[:, i] = np.where(w < low / 2, low, np.where(w > high / 2, high, 0))
        W[:, i + 1 :] -= np.outer((w - found[:, i]) / U[i, i], U[i, i + 1 :])
    return found


@pytest.mark.parametrize(("O", "I", "T"), [(7, 24, 80), (1, 9, 30), (20, 33, 12)])
def test_it_is_the_papers(O, I, T):
    W_OI, x_TI = drawn(1, O, I), drawn(2, T, I) @ drawn(3, I, I)
    (weight,) = Ternary().quantize(stack_of(W_OI, x_TI))
    wanted = twin(W_OI, x_TI, 0.1, weight.codes.low_O.dtype)
    assert (weight.dequantize().double().numpy() == wanted).mean() > 0.98  # but where float32 is in doubt
    assert set(weight.codes.symbol_OI.unique().tolist()) <= {0, 1, 2}


def test_it_does_better_than_rounding_alone():
    W_OI, x_TI = drawn(1, 16, 48), drawn(2, 200, 48) @ drawn(3, 48, 48)
    for search_range in (False, True):
        (weight,) = Ternary(search_range=search_range).quantize(stack_of(W_OI, x_TI))
        fitted = TernaryGrid(48, search_range, torch.float16).fit(W_OI.T)
        alone_OI = fitted.round(W_OI.T, 2).T
        errors = [(x_TI @ (W - W_OI).T).square().sum() for W in (weight.dequantize(), alone_OI)]
        assert errors[0] < 0.9 * errors[1]


def test_values_by_squared_error_are_the_best_of_those_tried():
    w_IO = drawn(5, 200, 4)
    importance_I1 = torch.rand(200, 1, generator=torch.Generator().manual_seed(1))
    found = TernaryGrid(200, True, torch.float16).fit(w_IO, importance_I1)
    whole = TernaryGrid(200, False, torch.float16).fit(w_IO, importance_I1)
    errors = [((f.round(w_IO, 2) - w_IO).square() * importance_I1).sum(0) for f in (found, whole)]
    assert (errors[0] < 0.6 * errors[1]).all()
    assert (found.high_O < 0.8 * whole.high_O).all()


def test_each_linear_of_a_stack_is_as_it_is_alone():
    W_OI, x_TI = drawn(1, 10, 24), drawn(2, 60, 24)
    both = Ternary().quantize(stack_of(W_OI, x_TI, (4, 6)))
    alone = [Ternary().quantize(stack_of(W, x_TI))[0] for W in W_OI.split((4, 6))]
    for one, other in zip(both, alone, strict=True):
        assert torch.equal(one.dequantize(), other.dequantize())


@pytest.mark.parametrize(
    "W_OI", [torch.zeros(3, 8), torch.full((2, 8), 1e-30), drawn(1, 3, 8).abs(), -drawn(1, 3, 8).abs(), drawn(1, 1, 1)]
)
def test_rows_without_weights_of_one_sign(W_OI):
    x_TI = drawn(2, 30, W_OI.shape[1])
    x_TI[:, :1] = 0
    (weight,) = Ternary().quantize(stack_of(W_OI, x_TI, dtype=torch.bfloat16))
    parts = layout_for(weight).pack(weight)
    assert torch.equal(layout_for(weight).unpack(parts), weight.dequantize())
    assert torch.isfinite(weight.dequantize()).all()
    assert ((weight.dequantize() != 0).sum(1) <= W_OI.shape[1]).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_is_refused(bad):
    W_OI, x_TI = drawn(1, 4, 8), drawn(2, 30, 8)
    wrong_OI, wrong_TI = W_OI.clone(), x_TI.clone()
    wrong_OI[1, 2] = wrong_TI[1, 2] = bad
    for W, x in ((wrong_OI, x_TI), (W_OI, wrong_TI)):
        with pytest.raises(ValueError, match="not finite"):
            Ternary().quantize(stack_of(W, x))


def test_it_is_for_weights_that_are_not_pruned_and_reaches_no_target():
    W_OI = drawn(1, 4, 8)
    with pytest.raises(ValueError, match="does not go with pruned weights"):
        Ternary().quantize(stack_of(W_OI, W_OI), Pruned(W_OI, W_OI > 0))
    with pytest.raises(UsageError, match="`quantize` ternary does not go with `prune`"):
        plan(Recipe(quantize="ternary", prune="wanda", sparsity=0.5))
    with pytest.raises(UsageError, match="`quantize` ternary has no bits to choose among"):
        TargetSize.of(Recipe(quantize="ternary", target_size="30%"))
    with pytest.raises(UsageError, match="`bits` is not an option of ternary"):
        plan(Recipe(quantize="ternary", quantization={"bits": 2}))
