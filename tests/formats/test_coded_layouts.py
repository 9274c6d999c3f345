"""The layouts of quantized weights: what is packed lies in the files as it is said to and comes back to the bit, and nothing
hostile is believed.

Twins of the code under test go from weight to weight in plain Python, by the definitions in the docstrings.

O: output features, I: input features, K: stored weights of a row, G: groups of a row, Γ: groups of all rows, T: tiles of rows,
C: entries of a table, N: outliers.
"""

import json
import resource
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from random_examples import tries
from random_weights import kept, make, places
from safetensors.torch import load_file, save_file

from secateur.core.quantized import BITS, Outliers, Quantized
from secateur.errors import CheckpointError
from secateur.formats.layouts.choose import layout_for
from secateur.formats.layouts.codebook import Codebook, Table
from secateur.formats.layouts.layout import LAYOUTS, layout_from_config
from secateur.formats.layouts.packed_int import PackedInt, Uniform
from secateur.formats.layouts.sparse_int import SparseInt
from secateur.formats.layouts.two_level_int import SpQRLayout, TwoLevel
from secateur.kernels import packed
from secateur.kernels.bits import bytes_of, pack_bits, unpack_bits

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
KINDS = ["packed-int", "spqr", "codebook"]
OUTLIERS = ["outlier_count", "outlier_column", "outlier_value"]
HUGE = 2**31 - 1
SEEDS = st.integers(0, 2**32 - 1)


# --- streams


def twin_stream(codes, bits):
    """Written as one string of binary digits, the least significant first."""
    digits = "".join(format(code, f"0{bits}b")[::-1] for code in codes)
    digits += "0" * (-len(digits) % 8)
    return [int(digits[at : at + 8][::-1], 2) for at in range(0, len(digits), 8)]


@tries(150)
@given(bits=st.integers(1, 8), R=st.integers(1, 5), K=st.integers(0, 40), seed=SEEDS)
@example(bits=3, R=2, K=0, seed=0)
@example(bits=3, R=2, K=1, seed=0)
@example(bits=7, R=3, K=7, seed=0)
@example(bits=5, R=3, K=8, seed=0)
@example(bits=6, R=3, K=9, seed=0)
@example(bits=8, R=2, K=9, seed=0)
def test_streams_are_as_if_written_bit_by_bit(bits, R, K, seed):
    code_RK = torch.from_numpy(np.random.default_rng(seed).integers(0, 2**bits, (R, K), dtype=np.uint8))
    stream_RB = pack_bits(code_RK, bits)
    assert stream_RB.dtype == torch.uint8
    assert stream_RB.shape == (R, bytes_of(K, bits)) == (R, (K * bits + 7) // 8)
    assert stream_RB.tolist() == [twin_stream(row, bits) for row in code_RK.tolist()]
    assert same(unpack_bits(stream_RB, bits, K), code_RK)


# --- weights of every kind


def twin_values(codes):
    """A function of row and place that gives the stored weight, as a float32."""
    f, code = np.float32, codes.code_OK.tolist()
    if isinstance(codes, Table):
        table = codes.table_OC.tolist()
        return lambda row, k: f(table[row][code[row][k]])
    size = codes.group_size
    if isinstance(codes, Uniform):
        scale = codes.scale_OG.tolist()
        middle = [[2 ** (codes.bits - 1)] * len(groups) for groups in scale]
        zero = middle if codes.zero_OG is None else codes.zero_OG.tolist()
        return lambda row, k: f(code[row][k] - zero[row][k // size]) * f(scale[row][k // size])
    second, scale, zero = codes.second_TG4.tolist(), codes.scale_code_OG.tolist(), codes.zero_code_OG.tolist()

    def value(row, k):
        step, low, zero_step, zero_low = map(f, second[row // codes.tile_rows][k // size])
        exact_zero = zero_low + zero_step * f(zero[row][k // size])
        return (f(code[row][k]) - exact_zero) * (low + step * f(scale[row][k // size]))

    return value


def twin_dense(weight):
    """The dense weight, one element after the other."""
    W_OI = np.zeros(weight.shape, np.float32)
    value = twin_values(weight.codes)
    for row, columns in enumerate(places(weight)):
        for k, column in enumerate(columns):
            W_OI[row, column] = value(row, k)
    if weight.outliers is not None:
        left = iter(zip(weight.outliers.column_N.tolist(), weight.outliers.value_N.tolist(), strict=True))
        for row, count in enumerate(weight.outliers.count_O.tolist()):
            for column, more in (next(left) for _ in range(count)):
                W_OI[row, column] += np.float32(more)
    return torch.from_numpy(W_OI).to(weight.dtype)


def twin_parts(weight):
    """What is in the files: dtype and values of every part, a stream as the bytes that it has."""
    codes, I, K = weight.codes, weight.shape[1], [len(row) for row in places(weight)]
    index = torch.uint16 if I <= 65535 else torch.int32

    def rows(x, length):
        return [row[:n] for row, n in zip(x.tolist(), length, strict=True)]

    def flat(lists):
        return [x for row in lists for x in row]

    code_rows = (twin_stream(row, codes.bits) for row in rows(codes.code_OK, K))
    parts = {"codes": (torch.uint8, flat(code_rows)), "shape": (torch.int64, list(weight.shape))}
    if isinstance(codes, Table):
        parts["table"] = (codes.table_OC.dtype, codes.table_OC.tolist())
    else:
        G = [-(-n // codes.group_size) for n in K]
    if isinstance(codes, Uniform):
        parts["scale"] = (codes.scale_OG.dtype, flat(rows(codes.scale_OG, G)))
        if codes.zero_OG is not None:
            parts["zero"] = (torch.uint8, twin_stream(flat(rows(codes.zero_OG, G)), codes.bits))
    if isinstance(codes, TwoLevel):
        for part, x in (("scale_codes", codes.scale_code_OG), ("zero_codes", codes.zero_code_OG)):
            parts[part] = (torch.uint8, twin_stream(flat(rows(x, G)), codes.scale_bits))
        parts["second"] = (codes.second_TG4.dtype, [groups[: max(G)] for groups in codes.second_TG4.tolist()])
    if weight.order_I is not None:
        parts["order"] = (index, weight.order_I.tolist())
    if weight.outliers is not None:
        parts["outlier_count"] = (index, weight.outliers.count_O.tolist())
        parts["outlier_column"] = (index, weight.outliers.column_N.tolist())
        parts["outlier_value"] = (weight.outliers.value_N.dtype, weight.outliers.value_N.tolist())
    if weight.keep_OI is not None:
        parts["bitmask"] = (torch.uint8, [twin_stream(map(int, row), 1) for row in weight.keep_OI.tolist()])
    return parts


def contents(parts):
    return {part: (tensor.dtype, tensor.tolist()) for part, tensor in parts.items()}


def same(a, b):
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def same_besides_codes(a, b):
    found, wanted = ([x.keep_OI, x.order_I, *(vars(x.outliers).values() if x.outliers else ())] for x in (a, b))
    return (a.shape, a.dtype) == (b.shape, b.dtype) and len(found) == len(wanted) and all(map(same, found, wanted))


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("parts") / "weight.safetensors"


@st.composite
def weights(draw):
    kind, masked = draw(st.sampled_from(KINDS)), draw(st.sampled_from(["", "some", "hardly", "nothing"]))
    return make(
        kind, draw(st.integers(1, 7)), draw(st.integers(1, 30)),
        draw(st.sampled_from(BITS) if kind == "packed-int" else st.integers(1, 8)),
        draw(st.sampled_from([2, 3, 8, 16, 1000])), masked,
        draw(st.sampled_from([FP16, BF16])), draw(st.sampled_from([FP32, BF16, FP16])), draw(st.booleans()),
        draw(st.sampled_from(["", "none at all", "some", "a full row"])), draw(st.booleans()),
        draw(st.integers(1, 8)), draw(st.sampled_from([2, 3, 16, 1000])), draw(st.sampled_from([0, 1, 5])) if masked else 0,
        draw(SEEDS),
    )  # fmt: skip


@tries(300)
@given(weight=weights())
@example(weight=make("packed-int", 1, 1))
@example(weight=make("packed-int", 3, 17, 3, 5, "some", spare=3, seed=1, order=True))
@example(weight=make("spqr", 7, 19, 3, 2, "some", outliers="some", tile_rows=3, seed=2, order=True))
@example(weight=make("codebook", 4, 9, 8, masked="some", outliers="a full row", seed=3, dtype=BF16))
@example(weight=make("spqr", 5, 9, 2, 4, "nothing", outliers="none at all"))
def test_what_is_packed_lies_in_the_file_as_it_should_and_comes_back(weight, file):
    layout = layout_for(weight)
    parts = layout.pack(weight)
    assert contents(parts) == twin_parts(weight)
    assert set(parts) <= set(layout.parts)
    assert layout_from_config(json.loads(json.dumps(layout.to_config()))) == layout

    save_file({part: tensor.contiguous() for part, tensor in parts.items()}, file)
    stored = load_file(file)
    back = layout.read(stored)
    # Its parts hold all there is to a weight but the form of its codes.
    assert layout_for(back) == layout
    assert contents(layout.pack(back)) == contents(parts)
    assert same_besides_codes(back, weight)
    assert (back.stored, back.outlier_count) == (weight.stored, weight.outlier_count)
    assert back.codes.code_OK.shape == (weight.shape[0], max(map(len, places(weight))))

    dense_OI = twin_dense(weight)
    assert all(same(found_OI, dense_OI) for found_OI in (weight.dequantize(), back.dequantize(), layout.unpack(stored)))
    assert not dense_OI[~kept(weight)].any()
    assert weight.stored == kept(weight).sum()


@pytest.mark.parametrize("I", [65535, 65536])
def test_columns_take_16_bits_while_they_can(I):
    weight = make("codebook", 1, I, 2, order=True)
    weight = replace(weight, outliers=Outliers.of(torch.ones(1, I), torch.ones(1, I, dtype=torch.bool), FP16))
    parts = layout_for(weight).pack(weight)
    assert {parts[part].element_size() for part in ("order", *OUTLIERS[:2])} == {2 if I < 65536 else 4}
    assert same_besides_codes(layout_for(weight).read(parts), weight)
    # A reader takes 32 bits where 16 were enough.
    parts.update({part: parts[part].to(torch.int32) for part in ("order", *OUTLIERS[:2])})
    assert same_besides_codes(layout_for(weight).read(parts), weight)


def test_by_hand():
    """The worked example of docs/format.md, under a mask with a second row that keeps nothing."""
    code_OK = torch.tensor([[5, 0, 7, 2, 1, 6], [7] * 6], dtype=torch.uint8)
    scale_OG, zero_OG = torch.tensor([[0.5, 0.25], [1, 1]]).half(), torch.tensor([[3, 4], [7, 7]], dtype=torch.uint8)
    keep_OI = torch.tensor([[0, 1, 1, 0, 1, 1, 0, 0, 1, 1], [0] * 10]).bool()
    weight = Quantized(Uniform(3, 4, code_OK, scale_OG, zero_OG), (2, 10), BF16, keep_OI)
    parts = layout_for(weight).pack(weight)
    assert {part: tensor.tolist() for part, tensor in parts.items()} == {
        "bitmask": [[0b00110110, 0b11], [0, 0]],
        "codes": [0xC5, 0x15, 0x03],
        "scale": [0.5, 0.25],
        "zero": [0x23],
        "shape": [2, 10],
    }
    assert layout_for(weight).unpack(parts).tolist() == [[0, 1, -1.5, 0, 2, -0.5, 0, 0, -0.75, 0.5], [0] * 10]


@pytest.mark.parametrize(
    ("bits", "kind", "options"),
    [
        (4 + (16 + 4) / 64, "packed-int", {"group_size": 64}),
        (3 + 16 / 64, "packed-int", {"bits": 3, "group_size": 64, "symmetric": True}),
        (8 + (16 + 8) / 256, "packed-int", {"bits": 8, "group_size": 256}),
        (3 + (3 + 3) / 16 + 64 / (16 * 16), "spqr", {"bits": 3, "group_size": 16, "tile_rows": 16}),
        (4 + 16 * 16 / 256, "codebook", {}),
    ],
)
def test_bits_per_weight(bits, kind, options):
    """Besides these only the 128 bits of `shape`; an order is 16 an input, outliers 32 each and 16 a row, a mask 1 a weight."""
    weight, ones_OI = make(kind, 32, 256, **options), torch.ones(32, 256, dtype=torch.bool)
    added = {"": 0, "order_I": 16 * 256, "keep_OI": 32 * 256, "outliers": 32 * 5 * 32 + 16 * 32}
    five = Outliers.of(torch.ones(32, 256), ones_OI.cumsum(1) <= 5, FP16)
    some = {"order_I": torch.arange(256), "keep_OI": ones_OI, "outliers": five}
    for field, more in added.items():
        if (kind, field) != ("packed-int", "outliers"):
            changed = replace(weight, **({field: some[field]} if field else {}))
            size = sum(tensor.nbytes for tensor in layout_for(changed).pack(changed).values())
            assert 8 * size == 32 * 256 * bits + 128 + more


@pytest.mark.parametrize("kind", KINDS)
def test_parts_can_be_saved_as_they_are(kind):
    """Also where rows have one group more than any mask fills, as those of linears that were solved as one may have."""
    weight = replace(make(kind, 3, 8, masked="some", spare=2), keep_OI=torch.eye(3, 8).bool())
    assert all(tensor.is_contiguous() for tensor in layout_for(weight).pack(weight).values())


def test_layout_for():
    assert layout_for(make("packed-int", 2, 8, dtype=BF16)) == PackedInt(4, 4, False, BF16)
    assert layout_for(make("packed-int", 2, 8, 3, 5, symmetric=True)) == PackedInt(3, 5, True, FP32)
    assert layout_for(make("spqr", 2, 8, 3, 5)) == SpQRLayout(3, 5, 3, 2, FP32)
    assert layout_for(make("codebook", 2, 8, dtype=FP16)) == Codebook(4, FP16)
    assert layout_for(make("codebook", 2, 8, masked="some")) == SparseInt(Codebook(4, FP32))
    assert all(LAYOUTS[layout.name] is layout for layout in (PackedInt, SpQRLayout, Codebook, SparseInt))


def test_a_layout_refuses_what_it_has_no_room_for():
    uniform, masked = make("packed-int", 2, 8), make("packed-int", 2, 8, masked="some", seed=1)
    outliers = Outliers(torch.tensor([1, 0]), torch.tensor([3]), torch.ones(1).half())
    for layout, weight, words in (
        (PackedInt(4, 4, False, FP32), masked, "mask of kept weights, which only layout 'sparse-int'"),
        (PackedInt(4, 4, False, FP32), replace(uniform, outliers=outliers), "outliers, which layout 'packed-int'"),
        (PackedInt(4, 8, False, FP32), uniform, "'group_size': 4,.*this layout is .*'group_size': 8"),
        (PackedInt(3, 4, False, FP32), uniform, "'bits': 4,.*this layout is .*'bits': 3"),
        (SpQRLayout(4, 4, 3, 16, FP32), make("spqr", 2, 8), "'tile_rows': 2,.*this layout is .*'tile_rows': 16"),
        (SpQRLayout(4, 4, 3, 2, FP32), uniform, "'packed-int'.*this layout is .*'spqr'"),
        (Codebook(3, FP32), make("codebook", 2, 8), "'bits': 4,.*this layout is .*'bits': 3"),
        (SparseInt(PackedInt(4, 4, False, FP32)), uniform, "no mask of kept weights"),
    ):
        with pytest.raises(ValueError, match=words):
            layout.pack(weight)


# --- what strangers write


@contextmanager
def frugal(seconds=2.0, megabytes=512):
    """What is done here may not ask for more memory, nor take longer."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    statm = Path("/proc/self/statm")
    if statm.exists():
        used = int(statm.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + megabytes * 2**20, limits[1]))
    started = time.monotonic()
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert time.monotonic() - started < seconds


def sound(kind, masked):
    """A weight `[4, 12]` with all parts there may be; of 12, or of 5, 7, 0 and 9, stored weights a row: no whole bytes."""
    weight = make(kind, 4, 12, 3, 4, order=True, seed=7)
    if masked:
        weight = replace(weight, keep_OI=torch.arange(12).flip(0) < torch.tensor(KEPT)[:, None])
    if kind != "packed-int":
        chosen_OI = kept(weight) & (torch.arange(12) % 3 > 0)
        weight = replace(weight, outliers=Outliers.of(torch.randn(4, 12), chosen_OI, FP16))
    return layout_for(weight), layout_for(weight).pack(weight)


KEPT = [5, 7, 0, 9]
EACH = pytest.mark.parametrize(("kind", "masked"), [(kind, m) for kind in KINDS for m in (False, True)], ids=str)
WITH_OUTLIERS = pytest.mark.parametrize("kind", ["spqr", "codebook"])


def refused(layout, parts, words, **changes):
    with frugal(), pytest.raises(ValueError, match=words) as caught:
        layout.unpack({**parts, **changes})
    assert "\n" not in str(caught.value)


@EACH
def test_the_sound_weight_of_these_tests_is_read(kind, masked):
    layout, parts = sound(kind, masked)
    assert layout.unpack(parts).shape == (4, 12)
    assert layout.unpack({**parts, "shape": torch.tensor([[4], [12]], dtype=torch.int32)}).shape == (4, 12)
    assert len(parts) == {"packed-int": 5, "spqr": 9, "codebook": 7}[kind] + masked


@EACH
def test_a_part_that_is_missing_or_of_another_form_is_named(kind, masked):
    layout, parts = sound(kind, masked)
    for part, tensor in parts.items():
        if part != "order":  # without it, columns are in their natural order
            refused(layout, {p: t for p, t in parts.items() if p != part}, f"'{part}' is missing")
        named = rf"its (tensor ')?{part}'? has dtype"
        for dtype in (torch.int8, torch.int16, torch.bool, torch.float32, torch.float64, torch.complex64):
            refused(layout, parts, f"{named} {dtype}", **{part: tensor.to(dtype)})
        for wrong in (tensor.flatten()[0], torch.stack([tensor, tensor]), torch.stack([tensor, tensor], -1)):
            refused(layout, parts, named, **{part: wrong})
        for axis, n in enumerate(tensor.shape):
            longer = torch.cat([tensor, tensor.narrow(axis, 0, 1)], axis)
            for wrong in (longer, tensor.narrow(axis, 0, n - 1).contiguous(), tensor.narrow(axis, 0, 0)):
                refused(layout, parts, r"\boutlier_count\b" if part in OUTLIERS else rf"\b{part}\b", **{part: wrong})


@EACH
def test_bits_after_the_last_code_are_refused(kind, masked):
    layout, parts = sound(kind, masked)
    K = KEPT if masked else [12] * 4
    of_groups = {part: [sum(-(-n // 4) for n in K)] for part in parts if part in ("zero", "scale_codes", "zero_codes")}
    for part, counts in {"codes": K, **of_groups}.items():
        first, tried = 0, 0
        for count in counts:
            last = first + -(-3 * count // 8)
            for bit in range(3 * count, 8 * (last - first)):
                wrong = parts[part].clone()
                wrong[first + bit // 8] |= 1 << bit % 8
                refused(layout, parts, f"its {part} has bits set after the last code", **{part: wrong})
                tried += 1
            first = last
        assert tried


@EACH
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite_are_refused(value, kind, masked):
    layout, parts = sound(kind, masked)
    for part in parts.keys() & {"scale", "second", "table", "outlier_value"}:
        for place in range(parts[part].numel()):
            wrong = parts[part].clone()
            wrong.view(-1)[place] = value
            refused(layout, parts, f"its {part} holds values that are not finite", **{part: wrong})


@WITH_OUTLIERS
@pytest.mark.parametrize("masked", [False, True])
def test_outliers_that_make_no_sense_are_refused(kind, masked):
    layout, parts = sound(kind, masked)
    count, column = (parts[part].to(torch.int32) for part in OUTLIERS[:2])
    N = int(count.sum())
    for wrong in ([12, 12, 12, 0], [12, 11, 0, 0], [0] * 4):
        words = f"its outlier_count says {sum(wrong)} outliers, but there are {N} columns and {N} values"
        refused(layout, parts, words, outlier_count=torch.tensor(wrong).int())
    for wrong in (
        [13, 0, 0, N - 13],
        [N + 1, -1, 0, 0],
        [HUGE] * 4,
        [-(2**31)] * 4,
        [HUGE, -HUGE, N, 0],
        [12, 12, -1, 9],
    ):
        words = "its outlier_count is not one number from 0 to 12 for each of 4 rows"
        refused(layout, parts, words, outlier_count=torch.tensor(wrong).int())
    for place in range(N):
        for value in (12, 65535, -1, HUGE, -(2**31)):
            wrong = column.index_fill(0, torch.tensor(place), value)
            refused(layout, parts, "its outlier_column points outside the row of 12", outlier_column=wrong)
    row_N = torch.arange(4).repeat_interleave(count)
    for place in (row_N[1:] == row_N[:-1]).nonzero().flatten().tolist():
        swapped = column.index_copy(0, torch.tensor([place, place + 1]), column[[place + 1, place]])
        twice = column.index_copy(0, torch.tensor([place + 1]), column[[place]])
        for wrong in (swapped, twice):
            words = "its outlier_column is out of order within a row"
            refused(layout, parts, words, outlier_column=wrong.to(torch.uint16))


@WITH_OUTLIERS
def test_outliers_among_what_is_removed_are_refused(kind):
    layout, parts = sound(kind, masked=True)
    removed = (~kept(layout.read(parts))).nonzero().tolist()
    assert len(removed) == 48 - sum(KEPT)
    for row, column in removed:
        one = (torch.eye(4, dtype=torch.int32)[row], torch.tensor([column], dtype=torch.int32), torch.ones(1).half())
        words = "its outlier_column points at a weight that is not kept"
        refused(layout, parts, words, **dict(zip(OUTLIERS, one, strict=True)))


@EACH
def test_an_order_that_is_no_permutation_is_refused(kind, masked):
    layout, parts = sound(kind, masked)
    for place, value in [(0, None), (11, None), (3, 12), (3, 65535), (5, -1), (5, HUGE)]:
        wrong = parts["order"].to(torch.int32)
        wrong[place] = wrong[place - 1] if value is None else value
        refused(layout, parts, "its order does not name each of 12 input features once", order=wrong)


@pytest.mark.parametrize("kind", KINDS)
def test_masks_that_do_not_fit_are_refused(kind):
    layout, parts = sound(kind, masked=True)
    for row in range(4):
        for bit in range(4, 8):
            wrong = parts["bitmask"].clone()
            wrong[row, 1] |= 1 << bit
            refused(layout, parts, "bit mask has bits set beyond the last of its 12 columns", bitmask=wrong)
        wrong = parts["bitmask"].clone()
        wrong[row, 0] ^= 255
        refused(layout, parts, r"its (codes|scale|scale_codes|zero_codes) ha|'second'", bitmask=wrong)


@EACH
@pytest.mark.parametrize(
    "shape",
    [
        [4, 11], [4, 13], [3, 12], [5, 12], [12, 4], [0, 12], [4, 0], [0, 0], [-4, 12], [4, -12], [-4, -12], [4], [],
        [4, 12, 1], [HUGE, 12], [4, HUGE], [HUGE, HUGE], [1, HUGE], [20, HUGE], [2**31, 12], [2**62, 2**62], [-(2**63)] * 2,
    ],
    ids=str,
)  # fmt: skip
def test_a_shape_that_disagrees_is_refused_before_memory_is_asked_for(shape, kind, masked):
    layout, parts = sound(kind, masked)
    words = r"'shape'|its (codes|scale|scale_codes|zero) (has|are)|'(second|table|bitmask)' has|its order has|bit mask has bits"
    refused(layout, parts, words, shape=torch.tensor(shape, dtype=torch.int64))


@EACH
def test_huge_groups_take_no_memory(kind, masked):
    for bits in (2, 8):
        weight = make(kind, 4, 12, bits, HUGE, "some" if masked else "", tile_rows=HUGE, scale_bits=8)
        with frugal():
            layout = layout_from_config(layout_for(weight).to_config())
            assert same(layout.unpack(layout.pack(weight)), twin_dense(weight))
        refused(layout, layout.pack(weight), "its codes has|'bitmask'", shape=torch.tensor([4, HUGE]))


@EACH
@pytest.mark.parametrize("pieces", [1, 2, 13])
def test_a_weight_that_is_unpacked_in_pieces_is_the_same(pieces, kind, masked, monkeypatch):
    """Wherever rows, tiles of rows and the lists of outliers are cut."""
    O, I = 13, 22
    monkeypatch.setattr(packed, "_WEIGHTS_AT_ONCE", -(-O // pieces) * I)
    for tile_rows, order in ((2, False), (5, True), (100, False)):
        outliers = "" if kind == "packed-int" else "some"
        weight = make(
            kind,
            O,
            I,
            group_size=3,
            tile_rows=tile_rows,
            masked="some" if masked else "",
            order=order,
            outliers=outliers,
        )
        layout = layout_for(weight)
        assert same(layout.unpack(layout.pack(weight)), twin_dense(weight))


@pytest.mark.parametrize("row", [0, 7, 12])
def test_a_value_beyond_the_dtype_is_found_in_every_piece(row, monkeypatch):
    monkeypatch.setattr(packed, "_WEIGHTS_AT_ONCE", 4 * 22)
    weight = make("codebook", 13, 22, bits=1, half=BF16, dtype=FP16)
    layout = layout_for(weight)
    parts = {**layout.pack(weight), "table": torch.ones(13, 2, dtype=BF16)}
    assert layout.unpack(parts).eq(1).all()
    parts["table"][row] = 1e5
    for read in (layout.unpack, layout.load):
        with pytest.raises(ValueError, match=r"stand for values beyond torch\.float16"):
            read(parts)


# --- what a config says

WRONG = {
    "bits": [0, 9, True, "4", 4.0, None, -1, 2**40, [4], {}],
    "group_size": [0, 1, -2, "x", "row", 16.0, True, None, 2**31, 2**40, [16]],
    "symmetric": [0, 1, "true", None, []],
    "dtype": ["int8", "float64", "torch.float16", None, 5, ["float16"], {}],
    "scale_bits": [0, 9, True, "3", 3.0, None],
    "tile_rows": [0, 1, -1, True, 2**31, 2**40, "16", None],
}


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_that_make_no_sense_are_refused(kind):
    layout = layout_for(make(kind, 2, 4))
    config = layout.to_config()
    assert layout_from_config(config) == layout
    for key in config.keys() - {"layout"}:
        also = [1] if (kind, key) == ("packed-int", "bits") else []
        missing = {k: v for k, v in config.items() if k != key}
        wrong = [missing, *({**config, key: value} for value in WRONG[key] + also)]
        for entry in wrong:
            words = f"with parameters that make no sense: {key} is "
            with pytest.raises(CheckpointError, match=f"layout '{kind}' {words}"):
                layout_from_config(entry)
            with pytest.raises(CheckpointError, match=f"layout 'sparse-int' {words}"):
                layout_from_config({"layout": "sparse-int", "codes": entry})


@pytest.mark.parametrize("codes", [None, [], {}, *({"layout": name} for name in ("bitmap", "sparse-int", None, []))])
def test_sparse_int_of_what_has_no_codes_is_refused(codes):
    words = "'sparse-int' with parameters that make no sense: (codes is|the kept weights are said to have layout)"
    with pytest.raises(CheckpointError, match=words):
        layout_from_config({"layout": "sparse-int", "codes": codes})
