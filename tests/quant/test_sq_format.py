"""SQ-format: what is rounded to what, against the paper's loop written once more in float64; its layout; and hostile files.

O: output features, I: input features, T: tokens.
"""

import numpy as np
import pytest
import torch

from secateur.core.quantized import Quantized
from secateur.core.stack import Stack
from secateur.core.stats import InputStats, Level
from secateur.errors import CheckpointError, UsageError
from secateur.formats.layouts.choose import layout_for
from secateur.formats.layouts.layout import layout_from_config
from secateur.formats.layouts.packed_weight import StoredForm
from secateur.formats.layouts.two_precisions import Banks, TwoPrecisions, high_count
from secateur.kernels.backends import linear, prepare
from secateur.quant.gptq import GPTQ
from secateur.quant.sq_format import SQFormat, emulated_inputs, static_order
from secateur.recipes.plan import plan
from secateur.recipes.recipe import Choice, Recipe

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stack_of(weights, x_TI, dtype=FP32):
    stats = InputStats.empty(x_TI.shape[1], Level.GRAM)
    stats.add(x_TI)
    return Stack.of(weights, stats, dtype)


def inputs(I, T=200, seed=7):
    return draw(T, I, seed=seed) @ draw(I, I, seed=seed + 1) * torch.linspace(0.1, 3, I)


def twin(W_OI, x_TI, method):
    """Input by input in falling energy; the inverse of what remains is computed anew each time."""
    W_OI, gram_II = W_OI.double().clone(), x_TI.double().T @ x_TI.double()
    O, I = W_OI.shape
    H_II = gram_II + method.damping * gram_II.diagonal().mean() * torch.eye(I)
    order = gram_II.diagonal().argsort(descending=True, stable=True).tolist()
    inverses, pivot_I = [], torch.zeros(I).double()
    for step, i in enumerate(order):
        rest = order[step:]
        inverses.append(torch.linalg.inv(H_II[rest][:, rest]))
        pivot_I[i] = inverses[-1][0, 0]
    high_OI = torch.zeros(O, I, dtype=torch.bool)
    scale_OI = torch.zeros(O, I).double()
    for first in range(0, I, method.bank):
        bank = slice(first, min(first + method.bank, I))
        size = bank.stop - first
        score = W_OI[:, bank] ** 2 / pivot_I[bank]
        for o in range(O):
            best = score[o].argsort(descending=True)[: size * method.high // method.bank]
            high_OI[o, first + best] = True
            low = W_OI[o, bank][~high_OI[o, bank]]
            scale = (2 * low.abs().max() / (2**method.low_bits - 1)).half().double()
            scale_OI[o, bank] = scale if scale else 1
    fine_O = (2 * W_OI.abs().amax(1) / (2**method.high_bits - 1)).half().double()
    scale_OI = torch.where(high_OI, fine_O[:, None], scale_OI)
    bits_OI = torch.where(high_OI, method.high_bits, method.low_bits)
    for step, i in enumerate(order):
        rest, inverse = order[step:], inverses[step]
        half = 2.0 ** (bits_OI[:, i] - 1)
        code = (W_OI[:, i] / scale_OI[:, i]).round().clamp(-half, half - 1)
        away = W_OI[:, i] - code * scale_OI[:, i]
        W_OI[:, rest] -= away[:, None] * inverse[0] / inverse[0, 0]
        W_OI[:, i] = code * scale_OI[:, i]
    return W_OI, high_OI


@pytest.mark.parametrize("shape", [(6, 32), (5, 21), (3, 7)])
@pytest.mark.parametrize("options", [{}, {"high_bits": 6, "low_bits": 3, "high_share": 0.5}])
def test_it_is_the_papers_loop(shape, options):
    W_OI, x_TI = draw(*shape), inputs(shape[1])
    method = SQFormat(bank=8, **{"high_share": 0.25, "search_range": False, **options})
    [weight] = method.quantize(stack_of([W_OI], x_TI))
    wanted_OI, high_OI = twin(W_OI, x_TI, method)
    assert torch.equal(weight.codes.high_OI, high_OI)
    found_OI = weight.dequantize().double()
    # Where a rounding is a tie in float32, all that follow may differ.
    assert ((found_OI - wanted_OI).abs() < 1e-5).all(1).float().mean() > 0.6
    stats = stack_of([W_OI], x_TI).stats
    errors = [stats.energy((each - W_OI).float()).sum().item() for each in (found_OI, wanted_OI)]
    assert errors[0] == pytest.approx(errors[1], rel=0.05)


def test_high_bits_help_and_more_of_them_more():
    W_OI = draw(32, 64) * (1 + 4 * (draw(32, 64, seed=5).abs() > 2))
    stack = stack_of([W_OI], inputs(64))

    def error(method):
        return stack.stats.energy(method.quantize(stack)[0].dequantize() - W_OI).sum().item()

    errors = [error(SQFormat(bank=32, high_share=share)) for share in (0.04, 0.25, 0.5)]
    assert errors == sorted(errors, reverse=True)
    assert errors[1] < 0.7 * error(GPTQ(group_size=32, symmetric=True))


def test_stacked_linears_and_the_static_mask():
    x_TI = inputs(24) + torch.linspace(-3, 3, 24)
    weights = [draw(6, 24), draw(3, 24, seed=1)]
    stack = stack_of(weights, x_TI, BF16)
    found = SQFormat(bank=16, static_mask=True).quantize(stack)
    assert [weight.shape for weight in found] == [(6, 24), (3, 24)]
    gives_I = (x_TI.double().mean(0) * torch.cat(weights).double().sum(0)).abs()
    for weight in found:
        assert torch.equal(weight.order_I, static_order(stack))
        assert (gives_I[weight.order_I].diff() <= 1e-9).all()
        assert weight.dtype == BF16
    plain = SQFormat(bank=16).quantize(stack)
    errors = [stack.stats.energy(torch.cat([w.dequantize().float() for w in each]) - stack.W_OI).sum() for each in
              (found, plain)]  # fmt: skip
    assert errors[0] < 2 * errors[1]


@pytest.mark.parametrize("static", [False, True])
def test_nasty_linears(static):
    x_TI = inputs(11, T=4)
    x_TI[:, 3] = 0
    W_OI = draw(5, 11)
    W_OI[2] = 0
    found = SQFormat(bank=8, high_share=0.3, static_mask=static).quantize(stack_of([W_OI, torch.zeros(2, 11)], x_TI))
    assert torch.isfinite(found[0].dequantize()).all()
    assert not found[1].dequantize().any()
    assert not found[0].dequantize()[2].any()
    [tiny] = SQFormat().quantize(stack_of([draw(3, 1)], inputs(1)))  # less than a bank has no weight in high bits
    assert not tiny.codes.high_OI.any()


def test_options_that_make_no_sense():
    with pytest.raises(UsageError, match="`high_bits` 4 is not more than `low_bits` 4"):
        SQFormat(high_bits=4)
    with pytest.raises(UsageError, match=r"`high_share` 0\.01 of banks of 16 is none of them"):
        SQFormat(high_share=0.01, bank=16)
    with pytest.raises(UsageError, match="is all of them"):
        SQFormat(high_share=0.99, bank=16)
    with pytest.raises(UsageError, match="`bank`"):
        SQFormat(bank=512)
    with pytest.raises(UsageError, match="`quantize` sq does not go with `prune`"):
        plan(Recipe(quantize="sq", prune="wanda", sparsity=0.5))
    with pytest.raises(UsageError, match="bits are chosen for x, and `quantize` sq has no `bits`"):
        plan(Recipe(quantize="sq", linears={"x": Choice(bits=4)}))
    with pytest.raises(UsageError, match="`quantize` sq has no `bits` for a search"):
        plan(Recipe(quantize="sq", target_size="0.4x"))


def test_emulated_inputs():
    x_TI, order_I = draw(3, 10), torch.randperm(10, generator=torch.Generator().manual_seed(0))
    found_TI = emulated_inputs(x_TI, order_I, 0.5, (8, 3), 4)
    for t in range(3):
        for first in range(0, 10, 4):
            columns = order_I[first : first + 4]
            for at, i in enumerate(columns.tolist(), first):
                levels = 127 if at < 5 else 3
                scale = x_TI[t, columns].abs().max().item() / levels
                assert found_TI[t, i].item() == pytest.approx(round(x_TI[t, i].item() / scale) * scale, abs=1e-6)
    assert not emulated_inputs(torch.zeros(2, 10), order_I, 0.5, (8, 3), 4).any()


# --- the layout


def make(O, I, high=2, bank=16, bits=(8, 4), dtype=FP32, half=FP16, ordered=False):
    generator = torch.Generator().manual_seed(0)
    high_OI = torch.zeros(O, I, dtype=torch.bool)
    for row in high_OI:
        for first in range(0, I, bank):
            size = min(bank, I - first)
            row[first + torch.randperm(size, generator=generator)[: size * high // bank]] = True
    codes = [torch.randint(0, 2**b, (O, I), generator=generator).to(torch.uint8) for b in bits]
    scales = [(torch.rand(*shape, generator=generator) + 0.1).to(half) for shape in ((O,), (O, -(-I // bank)))]
    order_I = torch.randperm(I, generator=generator) if ordered else None
    return Quantized(
        Banks(*bits, bank, high, high_OI, torch.where(high_OI, *codes), *scales), (O, I), dtype, order_I=order_I
    )


def stream(row, bits, count):
    bits_of = "".join(format(byte, "08b")[::-1] for byte in row.tolist())
    assert set(bits_of[count * bits :]) <= {"0"}
    return [int(bits_of[k * bits : k * bits + bits][::-1], 2) for k in range(count)]


def twin_dense(parts, config):
    """The weight in float64, bit by bit, as docs/format.md has it."""
    O, I = parts["shape"].tolist()
    bank, high = config["bank"], config["high"]
    sizes = [min(bank, I - first) for first in range(0, I, bank)]
    counts = [size * high // bank for size in sizes]
    H = sum(counts)
    width = (bank - 1).bit_length()
    W_OI = np.zeros((O, I))
    for o in range(O):

        def codes(part, bits, count, o=o):
            length = -(-count * bits // 8)
            return iter(stream(parts[part][o * length : (o + 1) * length], bits, count))

        fine, coarse = codes("high_codes", config["high_bits"], H), codes("low_codes", config["low_bits"], I - H)
        if "positions" in parts:
            positions = codes("positions", width, H)
            is_high = {g * bank + next(positions) for g, count in enumerate(counts) for _ in range(count)}
        else:
            bits = stream(parts["bitmask"][o], 1, I)
            is_high = {i for i, bit in enumerate(bits) if bit}
        for i in range(I):
            if i in is_high:
                value = (next(fine) - 2 ** (config["high_bits"] - 1)) * parts["high_scale"][o].item()
            else:
                scale = parts["low_scale"][o * len(sizes) + i // bank].item()
                value = (next(coarse) - 2 ** (config["low_bits"] - 1)) * scale
            W_OI[o, parts["order"][i].item() if "order" in parts else i] = value
    return W_OI


CASES = [(5, 32, 2, 16), (3, 37, 2, 16), (4, 20, 8, 16), (2, 70, 9, 64), (7, 9, 3, 7), (1, 1, 1, 2), (6, 3, 1, 64)]


@pytest.mark.parametrize(("O", "I", "high", "bank"), CASES)
@pytest.mark.parametrize("bits", [(8, 4), (5, 3)])
@pytest.mark.parametrize("ordered", [False, True])
def test_a_weight_lies_in_the_files_as_it_is_said_to(O, I, high, bank, bits, ordered):
    weight = make(O, I, high, bank, bits, ordered=ordered)
    layout = layout_for(weight)
    config = layout.to_config()
    assert layout_from_config(config) == layout
    parts = layout.pack(weight)
    assert ("positions" in parts) == (high * (bank - 1).bit_length() < bank) != ("bitmask" in parts)
    found = layout.unpack(parts)
    assert np.abs(found.double().numpy() - twin_dense(parts, config)).max() < 1e-4
    assert torch.equal(found, weight.dequantize())
    assert torch.equal(layout.read(parts).dequantize(), found)
    form = StoredForm(layout, {part: (tensor.dtype, tensor.shape) for part, tensor in parts.items()})
    again = form(layout.load(parts))
    assert again.keys() == parts.keys()
    assert all(torch.equal(again[part].long(), parts[part].long()) for part in parts if "scale" not in part)
    assert all(torch.equal(again[part], parts[part]) for part in parts if "scale" in part)
    assert layout.describe(parts).count == O * I


def test_bits_a_weight():
    """8/4 bits with one in 32 in high bits and positions of six bits, scales for banks of 64 and rows: 4.59 bits."""
    weight = make(64, 512, 2, 64)
    parts = layout_for(weight).pack(weight)
    assert 8 * sum(t.nbytes for t in parts.values()) / (64 * 512) == pytest.approx(
        4 + (4 + 6) / 32 + 16 / 64 + 16 / 512 + 128 / (64 * 512)
    )


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("T", [1, 3, 12])
@pytest.mark.parametrize(("O", "I", "high", "bank"), [(48, 192, 8, 64), *CASES[1:]])
def test_backends_compute_with_it(O, I, high, bank, T, dtype):
    weight = make(O, I, high, bank, dtype=dtype, half=BF16 if dtype == BF16 else FP16, ordered=I % 2 == 1)
    layout = layout_for(weight)
    loaded = layout.load(layout.pack(weight))
    exact_OI = weight.dequantize().double()
    x_TI, bias_O = draw(T, I, seed=1).to(dtype), draw(O, seed=2).to(dtype)
    wanted_TO = x_TI.double() @ exact_OI.T + bias_O.double()
    # Kernels take the zero points of groups off at the end.
    codes = weight.codes
    zero_OI = torch.where(
        codes.high_OI, 128 * codes.high_scale_O[:, None], 8 * codes.low_scale_OG.amax(1, keepdim=True)
    )
    size = (x_TI.double().abs() @ (exact_OI.abs().amax(0) + zero_OI.double().amax(0))).max() + bias_O.abs().max()
    for backend in ("torch", "cpu", "dense"):
        ready = prepare(loaded, backend, dtype=dtype)
        found_TO = linear(ready, x_TI, bias_O)
        assert found_TO.dtype == dtype
        assert (found_TO.double() - wanted_TO).abs().max() < 2 * torch.finfo(dtype).eps * size, backend
        x = x_TI.clone().requires_grad_()
        linear(ready, x).sum().backward()
        bound = 4 * torch.finfo(dtype).eps * exact_OI.abs().sum(0).max()
        assert (x.grad.double() - exact_OI.sum(0)).abs().max() <= bound
    assert torch.equal(loaded.rows(0, 1).dense(), weight.dequantize()[:1])


def put(part, change):
    return lambda parts: parts.update({part: change(parts[part])})


def at(part, index, value):
    def change(parts):
        parts[part][index] = value

    return change


PARTS = ("high_codes", "low_codes", "high_scale", "low_scale", "shape")
DAMAGES = {
    **{f"no {part}": (2, lambda parts, part=part: parts.pop(part), f"'{part}' is missing") for part in PARTS},
    "no positions": (2, lambda parts: parts.pop("positions"), "'positions' is missing"),
    "no bitmask": (8, lambda parts: parts.pop("bitmask"), "'bitmask' is missing"),
    "both": (2, lambda parts: parts.update(bitmask=torch.zeros(5, 5, dtype=torch.uint8)), "it has a part 'bitmask'"),
    "positions too": (8, lambda parts: parts.update(positions=parts["low_codes"]), "it has a part 'positions'"),
    "too few codes": (2, put("low_codes", lambda t: t[1:]), "low_codes has"),
    "too many codes": (2, put("high_codes", lambda t: torch.cat((t, t))), "high_codes has"),
    "codes of integers": (2, put("low_codes", lambda t: t.int()), "'low_codes' has dtype torch.int32"),
    "positions twice": (2, put("positions", torch.zeros_like), "positions are out of order"),
    "positions beyond the end": (2, put("positions", lambda t: torch.full_like(t, 255)), "positions"),
    "a bank without its share": (8, put("bitmask", torch.zeros_like), "banks that have not 8 bits set of 16"),
    "a bitmask of other rows": (8, put("bitmask", lambda t: t[1:]), "'bitmask' has dtype"),
    "NaN": (2, at("low_scale", 3, torch.nan), "low_scale holds values that are not finite"),
    "infinity": (2, at("high_scale", 3, torch.inf), "high_scale holds values that are not finite"),
    "no scale at all": (2, at("high_scale", 1, 0), "high_scale holds values that are not positive"),
    "too few scales": (2, put("low_scale", lambda t: t[1:]), "'low_scale' has dtype"),
    "other outputs": (2, at("shape", 0, 6), "has"),
    "other inputs": (2, at("shape", 1, 64), "has"),
    "huge": (2, at("shape", 1, 2**40), "not two positive sizes"),
    "a huge number of inputs": (2, at("shape", 1, 2**31 - 1), "'low_scale' has"),
    "a strange order": (2, lambda parts: parts.update(order=torch.zeros(37, dtype=torch.int32)), "each of 37 input"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_parts_are_refused(name):
    high, change, says = DAMAGES[name]
    weight = make(5, 37, high)
    layout = layout_for(weight)
    parts = layout.pack(weight)
    change(parts)
    for read in (layout.load, layout.unpack, layout.read, layout.describe):
        with pytest.raises(ValueError, match=says):
            read(parts)


def test_bits_beyond_the_last_column_are_refused():
    layout = layout_for(make(5, 37, 8))
    parts = layout.pack(make(5, 37, 8))
    parts["bitmask"][2, -1] |= 1 << 5
    with pytest.raises(ValueError, match="beyond the last column"):
        layout.load(parts)


def test_weights_beyond_their_dtype_are_refused():
    weight = make(5, 37, dtype=FP16)
    layout = layout_for(weight)
    parts = layout.pack(weight)
    parts["low_scale"].fill_(60000)
    with pytest.raises(ValueError, match=r"beyond torch.float16"):
        layout.load(parts)


ENTRY = {"layout": "sq", "high_bits": 8, "low_bits": 4, "bank": 64, "high": 8, "dtype": "float32"}


@pytest.mark.parametrize(
    ("key", "values"),
    {
        "high_bits": (None, 1, 9, 8.0, "8", True, 2**63),
        "low_bits": (None, 0, -4, [4]),
        "bank": (None, 0, 1, 8, 257, 2**40, -64, "64", True),
        "high": (None, 0, 64, 65, -1, 2.5),
        "dtype": (None, "int8", 1),
    }.items(),
)
def test_parameters_that_make_no_sense_are_refused(key, values):
    assert layout_from_config(ENTRY) == TwoPrecisions(8, 4, 64, 8, FP32)
    for value in values:
        with pytest.raises(CheckpointError, match="'sq' with parameters that make no sense"):
            layout_from_config({**ENTRY, key: value})


def test_what_it_does_not_hold_is_not_packed():
    weight = make(5, 37)
    with pytest.raises(ValueError, match="this layout is"):
        TwoPrecisions(8, 3, 16, 2, FP32).pack(weight)
    kept = Quantized(weight.codes, (5, 37), FP32, keep_OI=torch.ones(5, 37, dtype=torch.bool))
    with pytest.raises(ValueError, match="does not store"):
        layout_for(weight).pack(kept)
    assert high_count(37, 16, 2) == 4
