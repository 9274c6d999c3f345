"""The compiled kernels: each instruction set computes what the dense weight in float64 does, and operators refuse what would
make them read elsewhere.

O: output features, I: input features, T: tokens, K: stored weights of a row, G: groups of a row.
"""

import re
import shutil
import subprocess
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_examples import tries
from random_weights import load_coded, load_sparse, load_ternary, load_trellis, make
from torch import nn

from secateur import kernels
from secateur.formats.layouts.bitmap import Bitmap
from secateur.formats.layouts.choose import layout_for
from secateur.formats.layouts.codebook import TableGrid
from secateur.formats.layouts.nm import NMBits
from secateur.formats.layouts.two_level_int import TwoLevelGrid
from secateur.kernels import linear, prepare
from secateur.kernels.cpu import cpu_backend
from secateur.kernels.packed import SparseWeight

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = st.sampled_from([FP32, BF16, FP16])
# One token, the few that take one pass over the weight, and so many that rows are unpacked: from nine on.
TOKENS = st.sampled_from([1, 2, 3, 4, 7, 8, 9, 64])
# Around the widths of vectors, of bytes of the mask and of what is done at a time.
COLUMNS = st.sampled_from([1, 2, 7, 8, 9, 31, 33, 63, 64, 65, 100, 128, 200, 333])
SEEDS = st.integers(0, 2**32 - 1)
# What instruction sets are called where one is chosen, and where one is in use.
NAMES = {"plain": "plain C++", "avx2": "AVX2", "avx512vnni": "AVX-512 VNNI", "avx512": "AVX-512"}

pytestmark = pytest.mark.skipif(cpu_backend.missing() is not None, reason=str(cpu_backend.missing()))


@pytest.fixture(scope="module", params=("plain", "avx2", "avx512"))
def instructions(request):
    """One after the other, those that this processor has; AVX-512 without VBMI is AVX2 for all that is tested here."""
    before = torch.ops.secateur.instructions()
    if not torch.ops.secateur.use_instructions(request.param):
        pytest.skip(f"this processor does not run {request.param}")
    assert torch.ops.secateur.instructions() == NAMES[request.param]
    yield request.param
    torch.ops.secateur.use_instructions(next(name for name, shown in NAMES.items() if shown == before))


every_set = pytest.mark.usefixtures("instructions")


def terms(weight):
    """The absolute values, added up, of what float32 arithmetic adds up to become each weight, in float64.

    Kernels sum code · scale and zero · scale apart, and scale and zero may be sums themselves. Where AVX-512 multiplies
    codes of 2 to 7 bits where they stand, it reads them as 1 + code / 2^bits, and takes the ones away with the zeros.
    """
    if isinstance(weight, SparseWeight):
        return weight.dense().double().abs()
    whole = replace(weight, dtype=FP32)
    bare = replace(whole, outliers=None)
    added = (whole.dense() - bare.dense()).double().abs()
    if isinstance(bare.grid, TableGrid):
        return bare.dense().double().abs() + added
    zeros, full = (replace(bare, codes_S=torch.full_like(bare.codes_S, bits)).dense().double() for bits in (0, 255))
    if torch.ops.secateur.instructions() == NAMES["avx512"] and 2 <= bare.bits <= 7 and not bare.masked:
        added += 2 * 2**bare.bits * (full - zeros).abs() / (2**bare.bits - 1)
    if isinstance(bare.grid, TwoLevelGrid):
        same_sign = bare.grid.second_TG4.abs() * torch.tensor([1, 1, -1, -1], dtype=bare.grid.second_TG4.dtype)
        return replace(bare, grid=replace(bare.grid, second_TG4=same_sign)).dense().double() + added
    return bare.dense().double().abs() + 2 * zeros.abs() + added


def check(weight, W_OI, x, bias_O=None):
    """The output is off by no more than its roundings, whatever the order of the sums.

    In float32, each of the terms of an output is rounded at most once for each term, and a few times on its way there.
    From nine tokens on, weights are rounded to bfloat16 for inputs that are. Then the output to its dtype, where torch adds
    the bias twice.
    """
    y = linear(prepare(weight, "cpu", dtype=x.dtype), x, bias_O)
    assert y.dtype == x.dtype
    x_TI = x.double()
    want = x_TI @ W_OI.double().T
    size = x_TI.abs() @ terms(weight).T
    if bias_O is not None:
        want, size = want + bias_O.double(), size + bias_O.double().abs()
    tolerance = 2**-24 * (2 * W_OI.shape[1] + 16) * size
    unit, roundings = torch.finfo(x.dtype).eps / 2, 1 if bias_O is None else 2
    if x.dtype == BF16 and len(x) > 8:
        tolerance += unit * x_TI.abs() @ W_OI.double().abs().T
    tolerance += roundings * unit * (want.abs() + tolerance) + torch.finfo(x.dtype).smallest_normal * unit
    overflows = want.abs() + tolerance > torch.finfo(x.dtype).max
    right = (y.double() - want).abs() <= tolerance
    assert (right | (overflows & y.isinf())).all()


def inputs(T, I, dtype, seed):
    """Random ones; of float16 small, so that few outputs are beyond it."""
    draw = torch.Generator().manual_seed(seed)
    return (torch.randn(T, I, generator=draw) * (2**-8 if dtype == FP16 else 1)).to(dtype)


def bias_of(O, dtype, wanted):
    return torch.linspace(-2, 2, O).to(dtype) if wanted else None


# --- what is computed


@every_set
@tries(120)
@given(
    densities=st.lists(st.sampled_from([0.0, 0.02, 0.3, 0.5, 0.8, 1.0]), min_size=1, max_size=9),
    I=COLUMNS,
    T=TOKENS,
    dtype=DTYPES,
    x_dtype=DTYPES,
    bias=st.booleans(),
    seed=SEEDS,
)
def test_sparse(densities, I, T, dtype, x_dtype, bias, seed):
    draw = torch.Generator().manual_seed(seed)
    O = len(densities)
    keep_OI = torch.rand(O, I, generator=draw) < torch.tensor(densities)[:, None]
    W_OI = (torch.randn(O, I, generator=draw) * keep_OI).to(dtype)
    layout = Bitmap()
    check(layout.load(layout.pack(W_OI)), W_OI, inputs(T, I, x_dtype, seed), bias_of(O, x_dtype, bias))


@every_set
@pytest.mark.parametrize("T", [1, 9])
@pytest.mark.parametrize("pattern", [(2, 4), (4, 8), (1, 3)])
def test_patterns(pattern, T):
    weight, W_OI = load_sparse(5, 96, pattern=pattern, dtype=BF16)
    check(weight, W_OI, inputs(T, 96, BF16, 0))


@every_set
@tries(250)
@given(
    kind=st.sampled_from(["packed-int", "spqr", "codebook"]),
    O=st.integers(1, 9),
    I=COLUMNS,
    T=TOKENS,
    bits=st.integers(1, 8),
    group_size=st.sampled_from([2, 3, 5, 16, 32, 48, 64, 96, 99, 128, 1000]),
    masked=st.sampled_from(["", "", "some", "hardly", "nothing"]),
    symmetric=st.booleans(),
    outliers=st.sampled_from(["", "none at all", "some", "a full row"]),
    order=st.booleans(),
    scale_bits=st.integers(1, 8),
    half=st.sampled_from([FP16, BF16]),
    x_dtype=DTYPES,
    bias=st.booleans(),
    seed=SEEDS,
)
def test_coded(kind, O, I, T, bits, x_dtype, bias, seed, **options):
    if kind == "packed-int":
        bits = {1: 2, 5: 3, 6: 4, 7: 8}.get(bits, bits)  # what the layout has
    weight, W_OI = load_coded(kind, O, I, bits=bits, seed=seed, **options)
    check(weight, W_OI, inputs(T, I, x_dtype, seed), bias_of(O, x_dtype, bias))


@every_set
@pytest.mark.parametrize("T", [1, 2, 7])
@pytest.mark.parametrize(("O", "I"), [(1, 17), (5, 250), (37, 256), (23, 530)])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_groups_of_16(bits, O, I, T):
    """A lane a group: some whole vectors of groups and one with few, and tiles that do not begin where rows are shared out."""
    two_levels = {"group_size": 16, "outliers": "some", "order": True}
    for weight, W_OI in (
        load_coded("packed-int", O, I, bits, group_size=16),
        load_coded("packed-int", O, I, bits, group_size=16, symmetric=True),
        load_coded("spqr", O, I, bits, tile_rows=16, **two_levels),
        load_coded("spqr", O, I, bits, tile_rows=3, scale_bits=7, **two_levels),
    ):
        check(weight, W_OI, inputs(T, I, BF16, T))


LARGE = [
    (FP32, {}),
    (BF16, {}),
    (FP16, {}),
    ("packed-int", {"bits": 2, "group_size": 128}),
    ("packed-int", {"bits": 3, "group_size": 32}),
    ("packed-int", {"bits": 4, "group_size": 64}),
    ("packed-int", {"bits": 4, "group_size": 64, "masked": "some"}),
    ("packed-int", {"bits": 8, "group_size": 9999}),
    ("spqr", {"bits": 3, "group_size": 16, "tile_rows": 16, "outliers": "some", "order": True}),
    ("codebook", {"bits": 4}),
]


@cache
def large(number):
    kind, options = LARGE[number]
    return load_coded(kind, 280, 520, **options) if isinstance(kind, str) else load_sparse(280, 520, 0.5, kind)


@pytest.mark.thin(2)
@every_set
@pytest.mark.parametrize("number", range(len(LARGE)))
def test_threads_share_rows(number):
    """More rows than a thread takes at once, and the number of threads does not show."""
    weight, W_OI = large(number)
    prepared = prepare(weight, "cpu")
    before = torch.get_num_threads()
    try:
        for T in (1, 3, 8, 9):
            x = inputs(T, W_OI.shape[1], FP32, T)
            found = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                found.append(linear(prepared, x))
            check(weight, W_OI, x)
            if T <= 8:  # for more it is torch that multiplies
                assert torch.equal(found[0], found[1])
                assert torch.equal(found[0], found[2])
    finally:
        torch.set_num_threads(before)


@every_set
@pytest.mark.parametrize("T", [3, 9])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_reaches_its_token_only(value, T):
    sparse = (load_sparse(6, 70, 0.5, dtype)[0] for dtype in (FP32, BF16, FP16))
    coded = (load_coded(kind, 6, 70, group_size=16)[0] for kind in ("packed-int", "spqr", "codebook"))
    for weight in (*sparse, *coded):
        prepared, touched_OI = prepare(weight, "cpu"), weight.dense() != 0
        x = inputs(T, 70, FP32, 0)
        clean = linear(prepared, x)
        for column in (0, 33, 63, 64, 69):
            spoilt = x.clone()
            spoilt[1, column] = value
            y = linear(prepared, spoilt)
            assert not y[1][touched_OI[:, column]].isfinite().any()
            others = torch.arange(T) != 1
            assert torch.equal(y[others], clean[others])


@pytest.fixture(params=("amx", "avx512bf16", "torch"))
def products(request):
    """One after the other, what many tokens may be multiplied by."""
    use, before = torch.ops.secateur.use_products, torch.ops.secateur.products()
    if not use(request.param):
        pytest.skip(f"this processor does not run {request.param}")
    shown = {"amx": "AMX", "avx512bf16": "AVX-512 BF16", "torch": "torch"}
    assert torch.ops.secateur.products() == shown[request.param]
    yield request.param
    use(next(name for name in shown if shown[name] == before))


@pytest.mark.thin(3)
@pytest.mark.parametrize("T", [9, 16, 33, 530])
@pytest.mark.parametrize(("O", "I"), [(1, 31), (16, 64), (70, 700)])
def test_many_tokens(products, O, I, T):
    bias_O = bias_of(O, BF16, T != 16)
    for weight, W_OI in (
        load_sparse(O, I, 0.5, BF16),
        load_sparse(O, I, 0.5, FP16),
        *(
            load_coded("packed-int", O, I, bits, group_size=size)
            for bits, size in ((1, 8), (3, 64), (4, 64), (5, 16), (7, 32))
        ),
        load_coded("packed-int", O, I, 4, group_size=5),
        load_coded("packed-int", O, I, 4, group_size=16, order=True, symmetric=True),
        load_coded("spqr", O, I, 4, group_size=32),
        load_coded("spqr", O, I, 3, group_size=16, outliers="some"),
        load_coded("codebook", O, I, 3),
    ):
        check(weight, W_OI, inputs(T, I, BF16, O), bias_O)


def test_more_columns_than_are_multiplied_at_a_time(products):
    weight, W_OI = load_coded("packed-int", 3, 9000, 4, group_size=64)
    check(weight, W_OI, inputs(9, 9000, BF16, 0))
    check(weight, W_OI, inputs(300, 9000, BF16, 1))


def test_products_that_there_are_not():
    before = torch.ops.secateur.products()
    assert not torch.ops.secateur.use_products("abacus")
    assert torch.ops.secateur.products() == before


@every_set
@pytest.mark.parametrize("T", [0, 1, 9])
def test_inputs_and_bias_of_any_strides(T):
    wide, bias_O = inputs(2 * T, 140, FP32, 0), torch.randn(12)[::2]
    for weight, W_OI in (load_sparse(6, 70, 0.5), load_coded("packed-int", 6, 70)):
        for x in (wide[::2, ::2], wide[::2, 70:], wide[:T, :70].T.contiguous().T, wide[:1, :70].expand(T, 70)):
            check(weight, W_OI, x, bias_O)
        prepared = prepare(weight, "cpu")
        stacked = torch.stack([wide[:T, :70], wide[T:, :70]])
        assert linear(prepared, stacked).shape == (2, T, 6)
        # Of many tokens BLAS makes the sums, by their number.
        torch.testing.assert_close(linear(prepared, stacked)[1], linear(prepared, wide[T:, :70].contiguous()))


# --- the operators


def operators():
    """The arguments with which the backend calls its operators, by name, for weights that have all parts that there are."""
    found = {}

    class Recorder:
        def __getattr__(self, name):
            return lambda *args: found.setdefault(name, []).append(args)

    weights = [
        load_sparse(5, 70, 0.5, BF16)[0],
        load_coded("packed-int", 5, 70, group_size=16)[0],
        load_coded("packed-int", 5, 70, group_size=16, masked="some", order=True)[0],
        load_coded("spqr", 5, 70, masked="some", outliers="some", order=True)[0],
        load_coded("spqr", 5, 70, scale_bits=6)[0],
        load_coded("codebook", 5, 70, outliers="some")[0],
        load_trellis(16, 70),
        load_ternary(5, 70),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_backend.torch.ops, "secateur", Recorder())
        for weight in weights:
            cpu_backend.Cpu().linear(weight, torch.randn(2, 70), torch.randn(weight.shape[0]))
    return [(getattr(torch.ops.secateur, name).default, args) for name, calls in found.items() for args in calls]


def test_operators_are_as_torch_wants_them():
    for operator, args in operators():
        torch.library.opcheck(operator, args)


class Call(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.prepared = prepare(weight, "cpu")

    def forward(self, x):
        return linear(self.prepared, x.tanh()).relu()


@pytest.mark.parametrize(
    "load",
    [
        lambda: load_sparse(5, 70)[0],
        lambda: load_coded("spqr", 5, 70, outliers="some")[0],
        lambda: load_trellis(16, 70),
        lambda: load_ternary(5, 70),
    ],
)
def test_compile_and_export(load):
    module, x = Call(load()), torch.randn(3, 70)
    want = module(x)
    assert torch.equal(torch.compile(module, fullgraph=True, backend="eager")(x), want)
    assert torch.equal(torch.export.export(module, (x,)).module()(x), want)


def test_operators_refuse_what_does_not_fit():
    """Every tensor of another dtype, shorter, of strides, or elsewhere: never what lies behind it in memory."""
    for operator, args in operators():
        names = [argument.name for argument in operator._schema.arguments]
        for at, (name, tensor) in enumerate(zip(names, args, strict=True)):
            if not isinstance(tensor, torch.Tensor):
                continue

            def refused(wrong, at=at, args=args, operator=operator):
                with pytest.raises(RuntimeError):
                    operator(*args[:at], wrong, *args[at + 1 :])

            if name != "bias":  # of any dtype
                refused(tensor.to(torch.int16 if tensor.dtype != torch.int16 else torch.int8))
                refused(tensor.to(torch.complex64))
            if torch.cuda.is_available():
                refused(tensor.cuda())
            if name not in ("x", "bias"):
                refused(torch.stack([tensor, tensor], -1)[..., 0])
            if name == "x":
                refused(tensor[0])
                refused(torch.randn(2, 700))
            elif name == "second":
                refused(tensor[:-1])
                refused(tensor[:, :, :3].contiguous())
            elif name != "start":  # which itself says how much of the others there has to be
                refused(tensor[:-1])


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("bits", 0, "1 to 8 bits"),
        ("bits", 9, "1 to 8 bits"),
        ("group_size", 0, "groups of 0"),
        ("tile_rows", 0, "tiles of 0 rows"),
        ("tile_rows", 1, "second is not"),
        ("second", None, "one grid"),
        ("count", None, "counts of its rows"),
        ("mask", None, "counts of its rows"),
        ("outlier_value", None, "columns and values"),
    ],
)
def test_arguments_that_contradict_each_other(name, value, words):
    operator, args = operators()[3]
    at = [argument.name for argument in operator._schema.arguments].index(name)
    with pytest.raises(RuntimeError, match=words):
        operator(*args[:at], value, *args[at + 1 :])


def test_instructions_that_there_are_not():
    before = torch.ops.secateur.instructions()
    assert not torch.ops.secateur.use_instructions("avx1024")
    assert torch.ops.secateur.instructions() == before


def test_the_library_is_not_loaded_by_a_torch_that_is_too_old(monkeypatch):
    monkeypatch.setattr(cpu_backend, "_VERSION", "2.9.1+cpu")
    assert "need torch 2.10 or later, and this is 2.9.1+cpu: pip install -U torch" in cpu_backend.missing.__wrapped__()


def test_the_library_needs_nothing_of_torch_but_its_stable_abi():
    """Its symbols are those of C functions that torch promises to keep, and none of C++ classes of torch's."""
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("no nm")
    library = next(Path(kernels.__file__).parent.glob("_cpu.*so"))
    listed = subprocess.run([nm, "-D", "--undefined-only", library], capture_output=True, text=True, check=True).stdout
    wanted = {line.split()[-1].partition("@")[0] for line in listed.splitlines()}
    assert any(name.startswith("aoti_torch_") for name in wanted)
    assert [
        name for name in wanted if re.search("at6Tensor|c10|torch", name) and not re.match("(aoti_)?torch_", name)
    ] == []


# --- what strangers write


def stored_parts():
    """A layout and the parts of a weight in it, of every layout and of every form of its parts."""
    W_OI = load_sparse(5, 44, pattern=(2, 4), dtype=BF16)[1]
    offsets = {"row_offsets": torch.arange(0, 110, 22)}
    found = [(layout, layout.pack(W_OI)) for layout in (Bitmap(), NMBits(2, 4))]
    found.append((Bitmap(), {**found[0][1], **offsets}))
    for kind in ("packed-int", "spqr", "codebook"):
        for masked, scale_bits in (("", 3), ("some", 6)):
            options = {"group_size": 5, "outliers": "some", "scale_bits": scale_bits, "masked": masked}
            weight = make(kind, 5, 44, 3, order=True, **options)
            found.append((layout_for(weight), layout_for(weight).pack(weight)))
    return found


STORED = stored_parts()


def change(tensor, how, at, value):
    """One thing about a tensor is other than it was: its form, or one of its bytes."""
    if how == "dtype":
        others = [torch.uint8, torch.int8, torch.int32, torch.int64, FP16, BF16, FP32, torch.bool]
        return tensor.to(others[value % len(others)])
    if how == "length":
        rows = torch.arange(at % (2 * len(tensor))) % len(tensor)
        return tensor[rows]
    if how == "shape":
        return tensor[None] if value % 2 else tensor.flatten()[:, None]
    wrong = tensor.clone(memory_format=torch.contiguous_format)
    memory = wrong.view(-1).view(torch.uint8)
    memory[at % len(memory)] = value
    return wrong


@every_set
@tries(400)
@given(
    stored=st.sampled_from(STORED),
    part=st.integers(0, 20),
    how=st.sampled_from(["dtype", "length", "shape", "byte", "byte", "byte", "nothing there"]),
    at=st.integers(0, 2**16),
    value=st.integers(0, 255),
)
def test_kernels_see_no_weight_that_could_lead_them_astray(stored, part, how, at, value):
    """Whatever is changed in a file: either loading refuses it, or what is loaded hangs together."""
    layout, parts = stored
    name = sorted(parts)[part % len(parts)]
    wrong = {key: tensor for key, tensor in parts.items() if key != name}
    if how != "nothing there":
        wrong[name] = change(parts[name], how, at, value)
    try:
        weight = layout.load(wrong)
    except ValueError:
        return
    hangs_together(weight)
    assert linear(prepare(weight, "cpu"), torch.ones(3, weight.shape[1])).shape == (3, weight.shape[0])


def hangs_together(weight):
    """Everything that kernels take for granted: they follow starts, counts, masks and columns without looking."""
    O, I = weight.shape
    assert min(O, I) > 0
    keep_OI = torch.ones(O, I, dtype=torch.bool)
    if weight.bitmask_OB is not None:
        assert weight.bitmask_OB.shape == (O, -(-I // 8))
        bits = (weight.bitmask_OB[:, :, None] >> torch.arange(8, dtype=torch.uint8) & 1).flatten(1).bool()
        assert not bits[:, I:].any()
        keep_OI = bits[:, :I]
    count_O = keep_OI.sum(1)
    sparse = isinstance(weight, SparseWeight)
    stream = weight.values_V if sparse else weight.codes_S
    assert weight.start_O1.dtype == torch.int64
    assert weight.start_O1[0] == 0
    assert torch.equal(weight.start_O1.diff(), count_O if sparse else (count_O * weight.bits + 7) // 8)
    assert stream.numel() * stream.element_size() == weight.start_O1[-1] * stream.element_size() + 64
    assert not stream[weight.start_O1[-1] :].any()
    if not sparse:
        coded_hangs_together(weight, keep_OI, count_O)


def coded_hangs_together(weight, keep_OI, count_O):
    O, I = weight.shape
    grid = weight.grid
    assert (weight.bitmask_OB is None) == (weight.count_O is None)
    assert weight.count_O is None or torch.equal(weight.count_O, count_O.int())
    if isinstance(grid, TableGrid):
        assert grid.table_OC.shape == (O, 2**weight.bits)
    else:
        groups_O = -(-count_O // grid.group_size)
        if weight.group_start_O1 is not None:
            assert weight.group_start_O1[0] == 0
            assert torch.equal(weight.group_start_O1.diff(), groups_O)
        total = int(groups_O.sum())
        if isinstance(grid, TwoLevelGrid):
            assert len(grid.pair_Γ) == total
            assert grid.second_TG4.shape == (-(-O // grid.tile_rows), int(groups_O.max()), 4)
            assert grid.second_TG4.isfinite().all()
        else:
            assert grid.scale_Γ.shape == (total,)
            assert grid.zero_Γ is None or grid.zero_Γ.shape == (total,)
    if weight.order_I is not None:
        assert torch.equal(weight.order_I.sort().values, torch.arange(I, dtype=torch.int32))
    if weight.outliers is not None:
        start_O1, column_N = weight.outliers.start_O1, weight.outliers.column_N
        assert start_O1[0] == 0
        assert (start_O1.diff() >= 0).all()
        assert start_O1[-1] == len(column_N) == len(weight.outliers.value_N)
        assert (column_N >= 0).all()
        assert keep_OI[torch.arange(O).repeat_interleave(start_O1.diff().long()), column_N.long()].all()
