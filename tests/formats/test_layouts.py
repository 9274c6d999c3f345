"""The layouts: what is packed comes back to the bit, takes the room it is said to, and nothing hostile is believed.

O: output features, I: input features, B: bytes of a row's mask, G: groups of M weights.
"""

import time

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from random_examples import tries

from secateur.errors import CheckpointError
from secateur.formats.layouts.bitmap import Bitmap
from secateur.formats.layouts.layout import LAYOUTS, layout_from_config
from secateur.formats.layouts.nm import NMBits

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
# The least and the greatest subnormal, the least normal, one that is odd in every bit, infinity and a NaN with a payload.
CORNERS = {
    torch.bfloat16: [0x0001, 0x007F, 0x0080, 0x5555, 0x7F80, 0x7FC1],
    torch.float16: [0x0001, 0x03FF, 0x0400, 0x5555, 0x7C00, 0x7E01],
    torch.float32: [0x00000001, 0x007FFFFF, 0x00800000, 0x55555555, 0x7F800000, 0x7FC00001],
}
PATTERNS = [(1, 4), (2, 4), (4, 8), (3, 5), (1, 2), (1, 8), (7, 8), (2, 3), (5, 16), (1, 33)]
SEEDS = st.integers(0, 2**32 - 1)


def bits(tensor):
    """Its bits as integers, minus zero as zero: what two tensors must share to be the same weight."""
    found = tensor.contiguous().view(BITS[tensor.dtype])
    lowest = torch.iinfo(found.dtype).min
    return torch.where(found == lowest, 0, found)


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def random_weights(O, I, dtype, draw):
    """Weights of every magnitude and sign, corners of the dtype among them."""
    W_OI = torch.randn(O, I, generator=draw).to(dtype)
    corner = torch.tensor(CORNERS[dtype], dtype=torch.int64)
    negative = torch.randint(0, 2, (O, I), generator=draw) * torch.iinfo(BITS[dtype]).min
    corner_OI = (corner[torch.randint(0, len(corner), (O, I), generator=draw)] + negative).to(BITS[dtype]).view(dtype)
    return torch.where(torch.rand(O, I, generator=draw) < 0.2, corner_OI, W_OI)


def random_sparse(O, I, dtype, density, seed):
    """Weights of which about `density` are left, with rows that are empty, rows that are full, and minus zeros."""
    draw = torch.Generator().manual_seed(seed)
    keep_OI = torch.rand(O, I, generator=draw) < density
    row_O = torch.randint(0, 6, (O, 1), generator=draw)
    keep_OI = (keep_OI | (row_O == 0)) & (row_O != 1)
    zero_OI = torch.where(torch.rand(O, I, generator=draw) < 0.5, -0.0, 0.0).to(dtype)
    return torch.where(keep_OI, random_weights(O, I, dtype, draw), zero_OI)


def random_nm(O, groups, n, m, dtype, seed):
    """Weights with at most N of every M left, fewer in some groups."""
    draw = torch.Generator().manual_seed(seed)
    I = groups * m
    rank_OI = torch.rand(O, groups, m, generator=draw).argsort(2).argsort(2).view(O, I)
    left_OG = torch.where(
        torch.rand(O, groups, generator=draw) < 0.3, torch.randint(0, n + 1, (O, groups), generator=draw), n
    )
    keep_OI = rank_OI < left_OG.repeat_interleave(m, 1)
    return torch.where(keep_OI, random_weights(O, I, dtype, draw), torch.tensor(-0.0, dtype=dtype))


def is_packed(parts, dtype, O, I, values):
    """The parts are those that docs/format.md promises: dtypes, shapes, and no others."""
    assert set(parts) == {"compressed", "bitmask", "shape"}
    assert parts["compressed"].dtype == dtype
    assert tuple(parts["compressed"].shape) == values
    assert parts["bitmask"].dtype == torch.uint8
    assert tuple(parts["bitmask"].shape) == (O, (I + 7) // 8)
    assert parts["shape"].dtype == torch.int64
    assert parts["shape"].tolist() == [O, I]


def bit_at(bitmask_OB, row, column):
    return int(bitmask_OB[row, column // 8]) >> column % 8 & 1


# --- there and back


@tries(80)
@given(
    O=st.integers(1, 12),
    I=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    density=st.sampled_from([0.0, 0.02, 0.5, 0.98, 1.0]),
    seed=SEEDS,
)
@example(O=1, I=1, dtype=torch.bfloat16, density=0.0, seed=0)
@example(O=3, I=515, dtype=torch.float32, density=0.5, seed=1)
def test_bitmap_comes_back_to_the_bit(O, I, dtype, density, seed):
    W_OI = random_sparse(O, I, dtype, density, seed)
    parts = Bitmap().pack(W_OI)
    is_packed(parts, dtype, O, I, (int((bits(W_OI) != 0).sum()),))
    back_OI = Bitmap().unpack(parts)
    assert same(back_OI, W_OI)
    assert not torch.signbit(back_OI)[back_OI == 0].any()


@tries(120)
@given(
    pattern=st.sampled_from(PATTERNS),
    O=st.integers(1, 9),
    groups=st.integers(1, 11),
    dtype=st.sampled_from(DTYPES),
    seed=SEEDS,
)
@example(pattern=(2, 4), O=1, groups=1, dtype=torch.float16, seed=0)
@example(pattern=(3, 5), O=5, groups=103, dtype=torch.float32, seed=1)
def test_nm_comes_back_to_the_bit(pattern, O, groups, dtype, seed):
    n, m = pattern
    W_OI = random_nm(O, groups, n, m, dtype, seed)
    parts = NMBits(n, m).pack(W_OI)
    is_packed(parts, dtype, O, groups * m, (O, groups * n))
    back_OI = NMBits(n, m).unpack(parts)
    assert same(back_OI, W_OI)
    assert not torch.signbit(back_OI)[back_OI == 0].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_zero_weights(dtype):
    W_OI = torch.full((3, 20), -0.0, dtype=dtype)
    zero_OI = torch.zeros(3, 20, dtype=dtype)
    packed = Bitmap().pack(W_OI)
    assert packed["compressed"].numel() == 0
    assert not packed["bitmask"].any()
    assert torch.equal(Bitmap().unpack(packed).view(torch.uint8), zero_OI.view(torch.uint8))
    packed = NMBits(2, 4).pack(W_OI)
    assert torch.equal(packed["compressed"], torch.zeros(3, 10, dtype=dtype))
    assert torch.equal(NMBits(2, 4).unpack(packed).view(torch.uint8), zero_OI.view(torch.uint8))


@pytest.mark.parametrize("codec", [Bitmap(), NMBits(1, 2)], ids=["bitmap", "nm"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_subnormals_survive_where_the_processor_flushes_them(codec, dtype):
    """A library built with -ffast-math turns the flushing on for the whole process."""
    W_OI = torch.zeros(2, 8, dtype=BITS[dtype])
    W_OI[:, 1::2] = CORNERS[dtype][0]
    W_OI = W_OI.view(dtype)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    try:
        back_OI = codec.unpack(codec.pack(W_OI))
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(back_OI.view(BITS[dtype]), W_OI.view(BITS[dtype]))


def test_bitmap_on_disk_is_as_described():
    """The page on the format shows such bytes: rows of a mask start on a byte, the first column is its lowest bit."""
    W_OI = torch.zeros(2, 9)
    W_OI[0, 0], W_OI[0, 3], W_OI[1, 8] = 1.5, -2.0, 3.0
    parts = Bitmap().pack(W_OI)
    assert parts["compressed"].tolist() == [1.5, -2.0, 3.0]
    assert parts["bitmask"].tolist() == [[0b1001, 0], [0, 1]]


def test_nm_on_disk_is_as_described():
    """Where a group has fewer than N nonzero weights, the first of its zeros are stored."""
    W_OI = torch.tensor([[0.0, 5.0, 0.0, 6.0, 0.0, 0.0, 7.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    parts = NMBits(2, 4).pack(W_OI)
    assert parts["compressed"].tolist() == [[5.0, 6.0, 0.0, 7.0, 0.0, 0.0]]
    assert parts["bitmask"].tolist() == [[0b0101_1010, 0b0011]]


@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_nm_mask_has_n_bits_in_every_group(n, m):
    parts = NMBits(n, m).pack(random_nm(4, 6, n, m, torch.float32, seed=3))
    for row in range(4):
        set_I = [bit_at(parts["bitmask"], row, column) for column in range(6 * m)]
        assert [sum(set_I[g * m : (g + 1) * m]) for g in range(6)] == [n] * 6


@pytest.mark.parametrize(("n", "m", "row"), [(2, 4, 1), (1, 3, 2)])
def test_nm_refuses_a_group_that_is_too_full(n, m, row):
    W_OI = torch.zeros(4, 3 * m)
    W_OI[row, m : m + n + 1] = 1
    with pytest.raises(ValueError, match=rf"row {row} has a group of {m} with more than {n} nonzero"):
        NMBits(n, m).pack(W_OI)


def test_nm_refuses_features_that_do_not_divide():
    with pytest.raises(ValueError, match="10 input features do not divide into groups of 4"):
        NMBits(2, 4).pack(torch.zeros(2, 10))


# --- sizes


@pytest.mark.parametrize(("dtype", "b"), [(torch.bfloat16, 16), (torch.float16, 16), (torch.float32, 32)])
def test_bits_per_weight(dtype, b):
    """density·b + 1 for bitmap, N/M·b + 1 for N:M: besides these only the 16 bytes of `shape`."""
    O, I = 32, 240
    W_OI = torch.ones(O, I, dtype=dtype)
    W_OI.view(-1)[torch.randperm(O * I, generator=torch.Generator().manual_seed(0))[: O * I // 4]] = 0
    assert sum(t.nbytes for t in Bitmap().pack(W_OI).values()) * 8 == O * I * (0.75 * b + 1) + 128
    for n, m in [(1, 4), (2, 4), (4, 8), (3, 5)]:
        packed = NMBits(n, m).pack(random_nm(O, I // m, n, m, dtype, seed=0))
        assert sum(t.nbytes for t in packed.values()) * 8 == O * I * (n / m * b + 1) + 128


# --- what strangers write


def fresh(codec):
    """Parts of a sound weight [4, 12]: 24 values in other places in each row, and 12 of its mask's 16 columns are used."""
    W_OI = torch.tensor(
        [
            [1, 2, 0, 0, 3, 0, 4, 0, 0, 0, 5, 6],
            [0, 1, 0, 2, 0, 3, 4, 0, 5, 0, 0, 6],
            [1, 0, 0, 2, 0, 0, 3, 4, 0, 5, 6, 0],
            [0, 0, 1, 2, 3, 4, 0, 0, 5, 6, 0, 0],
        ]
    )
    return codec.pack(W_OI.bfloat16())


def damaged(codec, **changes):
    parts = {**fresh(codec), **changes}
    return {part: tensor for part, tensor in parts.items() if tensor is not None}


def with_bit(codec, row, column, value):
    bitmask_OB = fresh(codec)["bitmask"].clone()
    byte = int(bitmask_OB[row, column // 8])
    bitmask_OB[row, column // 8] = byte | 1 << column % 8 if value else byte & ~(1 << column % 8)
    return bitmask_OB


BOTH = pytest.mark.parametrize("codec", [Bitmap(), NMBits(2, 4)], ids=["bitmap", "nm"])


@BOTH
def test_the_sound_weight_of_these_tests_is_read(codec):
    assert codec.unpack(fresh(codec)).shape == (4, 12)
    assert codec.unpack(damaged(codec, shape=torch.tensor([[4], [12]], dtype=torch.int32))).shape == (4, 12)


@BOTH
@pytest.mark.parametrize("part", ["compressed", "bitmask", "shape"])
def test_a_missing_part_is_named(codec, part):
    with pytest.raises(ValueError, match=f"'{part}' is missing"):
        codec.unpack(damaged(codec, **{part: None}))


@BOTH
@pytest.mark.parametrize(
    ("part", "wrong"),
    [
        ("compressed", torch.int16),
        ("compressed", torch.float64),
        ("compressed", torch.float8_e4m3fn),
        ("compressed", torch.complex64),
        ("bitmask", torch.int8),
        ("bitmask", torch.bool),
        ("bitmask", torch.int64),
        ("shape", torch.float32),
        ("shape", torch.float8_e4m3fn),
        ("shape", torch.complex64),
        ("shape", torch.bool),
    ],
    ids=str,
)
def test_a_part_of_the_wrong_dtype_is_named(codec, part, wrong):
    tensor = fresh(codec)[part].float().to(wrong)
    with pytest.raises(ValueError, match=f"'{part}'"):
        codec.unpack(damaged(codec, **{part: tensor}))


@BOTH
@pytest.mark.parametrize("part", ["compressed", "bitmask", "shape"])
@pytest.mark.parametrize("form", ["scalar", "cube", "none"])
def test_a_part_of_the_wrong_rank_is_named(codec, part, form):
    tensor = fresh(codec)[part]
    tensor = {"scalar": tensor.flatten()[0], "cube": tensor[..., None, None], "none": tensor[:0]}[form]
    if (codec, part, form) == (Bitmap(), "compressed", "none"):
        message = "24 bits set but there are 0 values"
    elif part == "shape" and form == "cube":
        codec.unpack(damaged(codec, shape=tensor))  # two numbers all the same
        return
    else:
        message = part
    with pytest.raises(ValueError, match=message):
        codec.unpack(damaged(codec, **{part: tensor}))


@BOTH
@pytest.mark.parametrize(
    "shape",
    [
        [4, 11], [4, 8], [4, 20], [5, 12], [3, 12], [12, 4], [0, 12], [4, 0], [0, 0], [-4, 12], [4, -12], [-4, -12],
        [4], [4, 12, 1], [], [2**31, 12], [4, 2**62], [2**62, 2**62], [2**63 - 1, 2**63 - 1], [-(2**63), -(2**63)],
        [2**31 - 1, 2**31 - 4], [1, 2**31 - 4], [2**31 - 1, 12],
    ],
    ids=str,
)  # fmt: skip
def test_a_shape_that_disagrees_is_refused_before_memory_is_asked_for(codec, shape):
    """Some of these weights would take exabytes: an attempt to allocate one would not end in a ValueError."""
    started = time.monotonic()
    with pytest.raises(
        ValueError, match=r"its tensor .shape.|its bitmask is|its compressed is|bits set|does not divide"
    ):
        codec.unpack(damaged(codec, shape=torch.tensor(shape, dtype=torch.int64)))
    assert time.monotonic() - started < 1


@pytest.mark.parametrize("delta", [-1, 1], ids=["too few", "too many"])
def test_bitmap_needs_as_many_values_as_bits(delta):
    values = fresh(Bitmap())["compressed"]
    values = values[:-1] if delta < 0 else torch.cat([values, values[:1]])
    with pytest.raises(ValueError, match=f"24 bits set but there are {24 + delta} values"):
        Bitmap().unpack(damaged(Bitmap(), compressed=values))


@BOTH
@pytest.mark.parametrize("row", [0, 3])
@pytest.mark.parametrize("column", [12, 15])
def test_bits_beyond_the_last_column_are_refused(codec, row, column):
    bitmask_OB = with_bit(codec, row, column, 1)
    # One value more, so that the count alone does not give it away.
    values = fresh(codec)["compressed"]
    more = {"compressed": torch.cat([values, values[:1]])} if codec == Bitmap() else {}
    with pytest.raises(ValueError, match=r"bits set beyond the last|without exactly 2 bits"):
        codec.unpack(damaged(codec, bitmask=bitmask_OB, **more))


def test_bits_beyond_the_last_column_are_refused_where_groups_straddle_bytes():
    parts = sound_nm(3, 5, 3)
    parts["bitmask"][1, 1] |= 1 << 7
    with pytest.raises(ValueError, match="bits set beyond the last of its 15 columns"):
        NMBits(3, 5).unpack(parts)


@pytest.mark.parametrize("change", ["swapped", "shifted", "negative", "huge", "too few", "too many", "not a number"])
def test_row_offsets_must_agree_where_they_are_stored(change):
    parts = fresh(Bitmap())
    count_O = torch.tensor([sum(bit_at(parts["bitmask"], row, i) for i in range(12)) for row in range(4)])
    offsets = count_O.cumsum(0) - count_O
    assert Bitmap().unpack({**parts, "row_offsets": offsets}).shape == (4, 12)
    wrong = {
        "swapped": offsets[[1, 0, 2, 3]],
        "shifted": offsets + 1,
        "negative": offsets * -1,
        "huge": offsets + 2**62,
        "too few": offsets[:-1],
        "too many": torch.cat([offsets, offsets[-1:]]),
        "not a number": offsets.float() * float("nan"),
    }[change]
    with pytest.raises(ValueError, match="row_offsets are out of order"):
        Bitmap().unpack({**parts, "row_offsets": wrong})


def sound_nm(n, m, groups):
    return NMBits(n, m).pack(random_nm(2, groups, n, m, torch.float16, seed=5))


@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (4, 8), (3, 5), (5, 16)])
@pytest.mark.parametrize("groups", [3, 4])
def test_nm_group_with_the_wrong_count_is_refused(n, m, groups):
    """A bit moved to the next group: as many in all as there should be."""
    parts = sound_nm(n, m, groups)
    for group in range(groups - 1):
        bitmask_OB = parts["bitmask"].clone()
        first = next(c for c in range(group * m, (group + 1) * m) if bit_at(bitmask_OB, 1, c))
        second = next(c for c in range((group + 1) * m, (group + 2) * m) if not bit_at(bitmask_OB, 1, c))
        bitmask_OB[1, first // 8] -= 1 << first % 8
        bitmask_OB[1, second // 8] += 1 << second % 8
        with pytest.raises(ValueError, match=f"group of {m} without exactly {n} bits set"):
            NMBits(n, m).unpack({**parts, "bitmask": bitmask_OB})


def test_nm_of_another_pattern_is_refused():
    parts = sound_nm(2, 4, 4)
    with pytest.raises(ValueError, match="group of 2 without exactly 1 bits set"):  # as many values, in other groups
        NMBits(1, 2).unpack(parts)
    with pytest.raises(ValueError, match=r"its compressed is \[2, 8\], but 1:4 of \[2, 16\] has \[2, 4\]"):
        NMBits(1, 4).unpack(parts)
    with pytest.raises(ValueError, match="does not divide into groups of 5"):
        NMBits(3, 5).unpack(parts)


# --- what a config says


@pytest.mark.parametrize("layout", [Bitmap(), NMBits(2, 4), NMBits(3, 5)], ids=str)
def test_a_layout_is_found_by_what_it_says_of_itself(layout):
    assert layout_from_config(layout.to_config()) == layout
    assert LAYOUTS[layout.to_config()["layout"]] is type(layout)


@pytest.mark.parametrize(
    "config", [None, [], "bitmap", 3, {}, {"layout": None}, {"layout": ["bitmap"]}, {"layout": {}}, {"layout": "zip"}],
    ids=str,
)  # fmt: skip
def test_an_unknown_layout_is_refused_with_those_that_are_known(config):
    with pytest.raises(CheckpointError, match=r"layout .* is not known to this version .*bitmap, .*nm"):
        layout_from_config(config)


@pytest.mark.parametrize(
    "params",
    [
        {}, {"n": 2}, {"m": 4}, {"n": 4, "m": 2}, {"n": 4, "m": 4}, {"n": 0, "m": 4}, {"n": -1, "m": 4}, {"n": 2, "m": -4},
        {"n": "2", "m": "4"}, {"n": 2.0, "m": 4.0}, {"n": None, "m": None}, {"n": [2], "m": [4]}, {"n": True, "m": 4},
    ],
    ids=str,
)  # fmt: skip
def test_parameters_that_make_no_sense_are_refused(params):
    with pytest.raises(CheckpointError, match=r"layout 'nm' with parameters that make no sense: N:M is"):
        layout_from_config({"layout": "nm", **params})


def test_an_enormous_pattern_fails_fast():
    layout = layout_from_config({"layout": "nm", "n": 1, "m": 10**30})
    with pytest.raises(ValueError, match="does not divide into groups"):
        layout.unpack(sound_nm(2, 4, 4))
