"""Codes of tables: the nearest levels of the best of the grids that are tried, against a plain loop in float64.

V: vocabulary, I: features.
"""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_examples import tries

from secateur.core.stats import InputStats, Level
from secateur.formats.layouts.choose import layout_for
from secateur.formats.layouts.packed_int import PackedInt
from secateur.quant import table_codes
from secateur.quant.grid import SHARES
from secateur.quant.table_codes import GROUP_SIZE, is_symmetric, quantize_table, table_bytes

CPU, BF16, FP16 = torch.device("cpu"), torch.bfloat16, torch.float16


def slowly(W_VI, bits, half):
    """Of each group the least squared error that a range reaches, one weight at a time."""
    last = 2**bits - 1
    errors = []
    for row in W_VI.double().numpy():
        for start in range(0, len(row), GROUP_SIZE):
            group = row[start : start + GROUP_SIZE]
            least = np.inf
            for share in SHARES:
                low, high = min(group.min(), 0) * share, max(group.max(), 0) * share
                if bits == 8:  # the zero point in the middle
                    low, high = -max(-low, high), max(-low, high)
                scale = float(torch.tensor((high - low) / last).to(half))
                scale = scale if scale > 0 else 1.0
                zero = 128 if bits == 8 else min(max(round(-low / scale), 0), last)
                error = 0.0
                for w in group:
                    code = min(max(round(w / scale + zero), 0), last)
                    error += ((code - zero) * scale - w) ** 2
                least = min(least, error)
            errors.append(least)
    return np.array(errors)


def error_of(weight, W_VI):
    """The squared error of each group."""
    difference = (weight.codes.values().double() - W_VI.double()).square()
    return (
        torch.cat([part.sum(1)[:, None] for part in difference.split(weight.codes.group_size, 1)], 1).flatten().numpy()
    )


@tries(25)
@given(
    V=st.integers(1, 4),
    I=st.sampled_from([1, 31, 33, 64, 70, 130]),
    bits=st.integers(2, 8),
    dtype=st.sampled_from([BF16, torch.float32]),
    nasty=st.sampled_from(["", "a row of zeros", "one far out", "all positive", "tiny"]),
    seed=st.integers(0, 2**20),
)
def test_every_group_has_the_best_grid_that_is_tried(V, I, bits, dtype, nasty, seed):
    W_VI = torch.randn(V, I, generator=torch.Generator().manual_seed(seed))
    if nasty == "a row of zeros":
        W_VI[0] = 0
    elif nasty == "one far out":
        W_VI[-1, I // 2] = 100
    elif nasty == "all positive":
        W_VI = W_VI.abs() + 1
    elif nasty == "tiny":
        W_VI *= 1e-3
    W_VI = W_VI.to(dtype)
    weight = quantize_table(W_VI, bits, dtype, CPU)
    wanted = slowly(W_VI.float(), bits, weight.codes.scale_OG.dtype)
    # Ties of the search, and a code where float32 rounds the other way.
    assert (error_of(weight, W_VI.float()) <= wanted * (1 + 1e-4) + 1e-12).all()
    assert (error_of(weight, W_VI.float()) >= wanted * (1 - 1e-4) - 1e-12).all()
    layout = layout_for(weight)
    assert layout == PackedInt(bits, GROUP_SIZE, is_symmetric(bits), dtype)
    parts = layout.pack(weight)
    assert {part: tensor.nbytes for part, tensor in parts.items()} == table_bytes(bits, (V, I))
    assert torch.equal(layout.unpack(parts), weight.dequantize())


def test_rows_in_pieces_are_the_same_rows(monkeypatch):
    W_VI = torch.randn(37, 40)
    W_VI[20, 3] = 1e6  # for all pieces alike, scales are then of bfloat16
    whole = quantize_table(W_VI, 6, torch.float32, CPU)
    monkeypatch.setattr(table_codes, "_ROUNDED", 3 * 40)
    pieces = quantize_table(W_VI, 6, torch.float32, CPU)
    assert torch.equal(whole.codes.code_OK, pieces.codes.code_OK)
    assert torch.equal(whole.codes.scale_OG, pieces.codes.scale_OG)
    assert whole.codes.scale_OG.dtype == BF16


@pytest.mark.parametrize("bits", [3, 4, 6])
def test_inputs_make_outputs_nearer(bits, monkeypatch):
    draw = torch.Generator().manual_seed(0)
    W_VI = torch.randn(200, 48, generator=draw)
    x_TI = torch.randn(400, 48, generator=draw) @ torch.randn(48, 48, generator=draw)
    x_TI[:, 7] = 0  # never anything else
    stats = InputStats.empty(48, Level.GRAM)
    stats.add(x_TI)

    def lost(weight):
        return ((weight.dequantize() - W_VI).double() @ x_TI.double().T).square().sum()

    rounded, solved = (
        quantize_table(W_VI, bits, torch.float32, CPU),
        quantize_table(W_VI, bits, torch.float32, CPU, stats),
    )
    assert lost(solved) < 0.8 * lost(rounded)
    monkeypatch.setattr(table_codes, "_SWEPT", 7 * 48)
    pieces = quantize_table(W_VI, bits, torch.float32, CPU, stats)
    assert (
        pieces.codes.code_OK != solved.codes.code_OK
    ).float().mean() < 0.01  # products of other sizes round otherwise
    assert lost(pieces) == pytest.approx(float(lost(solved)), rel=0.01)
