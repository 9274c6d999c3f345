"""Quantizers on the grids of GGUF's blocks: against the package's own rounding, the slow sweep, and awkward input."""

import pytest
import torch
from gguf_blocks_of import TYPES, slowly
from test_sweep import output_error

from secateur.core.pruned import Pruned
from secateur.core.stack import Stack
from secateur.core.stats import InputStats, Level
from secateur.errors import UsageError
from secateur.formats.layouts.block_types import BLOCK_TYPES
from secateur.formats.layouts.choose import layout_for
from secateur.quant.block_fit import Coded, fit_block
from secateur.quant.block_grid import BlockGrid
from secateur.quant.gptq import GPTQ
from secateur.quant.rtn import RTN
from secateur.recipes.plan import plan
from secateur.recipes.recipe import Recipe
from secateur.search.target import check_target

I = 512
METHODS = {"rtn": RTN, "gptq": GPTQ, "natural": lambda grid: GPTQ(grid=grid, order="natural")}


def inputs(seed=0, tokens=700):
    draw = torch.Generator().manual_seed(seed)
    x_TI = torch.randn(tokens, I, generator=draw) @ (torch.eye(I) + 0.15 * torch.randn(I, I, generator=draw))
    return x_TI * (1 + 3 * torch.rand(I, generator=draw).square())


def weights(O=24, seed=1):
    draw = torch.Generator().manual_seed(seed)
    return 0.02 * torch.randn(O, I, generator=draw) * (0.2 + torch.rand(O, 1, generator=draw))


def quantized(method, W_OI, x_TI, rows=None, dtype=torch.float32):
    stats = InputStats.empty(I, Level.GRAM)
    stats.add(x_TI)
    return method.quantize(Stack.of(list(W_OI.split(rows or len(W_OI))), stats, dtype))


@pytest.mark.thin(2)
@pytest.mark.parametrize("name", TYPES)
def test_what_is_promised_is_what_is_stored(name):
    for make in METHODS.values():
        for weight in quantized(make(grid=name.lower()), weights(12), inputs(), rows=6):
            assert weight.codes.type == name
            assert torch.equal(weight.dequantize(), torch.from_numpy(slowly(weight.codes)).float())
            layout = layout_for(weight)
            assert torch.equal(layout.unpack(layout.pack(weight)), weight.dequantize())


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_rounding_is_better_than_the_package(name):
    gguf = pytest.importorskip("gguf")
    W_OI, number = weights(), gguf.GGMLQuantizationType[name]
    theirs_OI = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(W_OI.numpy(), number), number))
    (weight,) = quantized(RTN(grid=name.lower()), W_OI, inputs())
    assert (weight.dequantize() - W_OI).square().sum() < 0.97 * (theirs_OI - W_OI).square().sum()


@pytest.mark.thin(2)
@pytest.mark.parametrize("name", TYPES)
def test_carrying_the_error_on_is_better_than_rounding(name):
    W_OI, x_TI = weights(), inputs()
    errors = {
        key: output_error(W_OI, quantized(make(grid=name.lower()), W_OI, x_TI)[0].dequantize(), x_TI)
        for key, make in METHODS.items()
    }
    assert errors["gptq"] < 0.9 * errors["rtn"]
    assert errors["natural"] < 0.9 * errors["rtn"]


@pytest.mark.parametrize("name", TYPES)
def test_the_fit_is_near_the_best_of_many(name):
    """A random search over what can be stored finds nothing that is much better."""
    form, draw = BLOCK_TYPES[name], torch.Generator().manual_seed(3)
    w_GSO = torch.randn(form.groups, form.group_size, 6, generator=draw)
    importance = torch.rand(form.groups, form.group_size, 6, generator=draw)

    def error(coded):
        return coded.groups(form).error(w_GSO, importance).sum(0)

    coded = fit_block(form, w_GSO, importance)
    best_O = found_O = error(coded)
    for _ in range(300):
        scale_O, offset_O = (
            None if x_O is None else (x_O * (0.8 + 0.4 * torch.rand(6, generator=draw))).half().float()
            for x_O in (coded.scale_O, coded.offset_O)
        )
        moved = [
            None if x is None else (x + torch.randint(-2, 3, x.shape, generator=draw)).clamp(0, 2**form.scale_bits - 1)
            for x in (coded.c_GO, coded.m_GO)
        ]
        best_O = torch.minimum(best_O, error(Coded(scale_O, offset_O, *moved)))
    # 300 draws find what chance makes better where one scale serves few weights, of which few count.
    assert (found_O <= (1.1 if form.scale_bits else 2) * best_O).all()


@pytest.mark.thin(3)
@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("case", ["zeros", "equal", "negative", "one outlier", "tiny", "huge"])
def test_awkward_weights(name, case):
    W_OI = {
        "zeros": torch.zeros(3, I),
        "equal": torch.full((3, I), 0.7),
        "negative": torch.full((3, I), -0.7),
        "one outlier": torch.full((3, I), 1e-3).index_fill_(1, torch.tensor([5]), 50.0),
        "tiny": weights(3) * 1e-6,
        "huge": weights(3) * 1e8,
    }[case]
    (weight,) = quantized(GPTQ(grid=name.lower()), W_OI, inputs())
    found_OI = weight.dequantize()
    assert torch.isfinite(found_OI).all()
    assert torch.isfinite(weight.codes.scale_OB).all()
    layout = layout_for(weight)
    assert torch.equal(layout.unpack(layout.pack(weight)), found_OI)
    if case in ("zeros", "equal", "negative"):
        (rounded,) = quantized(RTN(grid=name.lower()), W_OI, inputs())
        assert (rounded.dequantize() - W_OI).abs().max() <= 0.03 * W_OI.abs().max()


def test_dead_inputs_and_a_type_in_its_place():
    x_TI, W_OI = inputs(), weights(8)
    x_TI[:, 100:140] = 0
    (weight,) = quantized(GPTQ(grid="q4_k"), W_OI, x_TI)
    assert torch.isfinite(weight.dequantize()).all()
    stats = InputStats.empty(96, Level.GRAM)
    stats.add(x_TI[:, :96])
    (narrow,) = GPTQ(grid="q4_k").quantize(Stack.of([W_OI[:, :96]], stats))
    assert narrow.codes.type == "Q5_0"


def test_importance_counts():
    form = BLOCK_TYPES["Q3_K"]
    draw = torch.Generator().manual_seed(5)
    w_BO = torch.randn(256, 40, generator=draw)
    importance_B1 = torch.where(torch.arange(256)[:, None] % 2 == 0, 100.0, 0.01)
    even = importance_B1[:, 0] > 1
    grid = BlockGrid(form)

    def error(fitted):
        found = torch.stack([fitted.at(i).round(w_BO[i], grid.levels) for i in range(256)])
        return (found - w_BO)[even].square().sum()

    assert error(grid.fit(w_BO, importance_B1)) < 0.8 * error(grid.fit(w_BO))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: GPTQ(grid="q4_k", bits=3), "`bits` is decided by `grid` q4_k: leave `bits` out"),
        (lambda: RTN(grid="q8_0", group_size=128), "`group_size` is decided by `grid` q8_0"),
        (lambda: RTN(grid="q8_0", symmetric=True), "`symmetric` is decided by `grid` q8_0"),
        (lambda: GPTQ(grid="q4_0", order="permuted"), "`order` permuted has to be stored"),
        (lambda: GPTQ(grid="q9"), "`grid` q9 is not possible with gptq: give uniform, q4_0, "),
    ],
)
def test_options_that_contradict_it_are_refused(make, said):
    with pytest.raises(UsageError, match=said):
        make()


def test_what_does_not_fit_is_refused():
    W_OI = weights(4)
    stack = Stack.of([W_OI], InputStats.isotropic(I, Level.GRAM))
    with pytest.raises(UsageError, match="`grid` q4_0 has a code for every weight"):
        GPTQ(grid="q4_0").quantize(stack, Pruned(W_OI, torch.ones_like(W_OI, dtype=torch.bool)))
    with pytest.raises(UsageError, match="`grid` q4_k has a code for every weight"):
        plan(Recipe(prune="wanda", sparsity=0.5, quantize="rtn", quantization={"grid": "q4_k"}))
    with pytest.raises(UsageError, match="`target_size` finds sparsity and bits of every linear: leave `grid` out"):
        check_target(Recipe(quantize="gptq", quantization={"grid": "q4_k"}, target_size="30%"), "target_size")
    odd = Stack.of([W_OI[:, :100]], InputStats.isotropic(100, Level.GRAM))
    with pytest.raises(UsageError, match="does not fit a linear of 100 inputs"):
        RTN(grid="q4_0").quantize(odd)
