"""The compiled kernels for weights by input feature: each instruction set computes what the dense weight in float64 does, from
the inputs that are kept.

O: output features, I: input features, T: tokens.
"""

import pytest
import torch
from column_weights import BF16, FP16, FP32, close, inputs, load
from hypothesis import example, given
from hypothesis import strategies as st
from random_examples import tries
from torch import nn

from secateur.formats.layouts.choose import layout_by_inputs
from secateur.kernels import linear, prepare
from secateur.kernels.cpu import cpu_backend

pytestmark = pytest.mark.skipif(cpu_backend.missing() is not None, reason=str(cpu_backend.missing()))

DTYPES = st.sampled_from([BF16, FP16, FP32])
# Around the widths of vectors, of bytes of the mask, and of chunks of it.
OUTPUTS = st.sampled_from([1, 7, 8, 9, 15, 31, 33, 63, 64, 65, 100, 255, 256, 257, 330, 520])
INPUTS = st.sampled_from([1, 2, 7, 8, 9, 15, 16, 17, 40, 64, 100])
KINDS = [("dense", 16), ("bitmap", 16), *(("int", bits) for bits in range(2, 9))]
NAMES = {"plain": "plain C++", "avx2": "AVX2", "avx512vnni": "AVX-512 VNNI", "avx512": "AVX-512"}

# More outputs than stay in the cache.
LARGE = {
    **{"O": 4200, "I": 9, "share": 0.5, "dtype": BF16, "x_dtype": BF16, "group_size": 4},
    **{"symmetric": False, "biased": True, "seed": 0},
}


@pytest.fixture(scope="module", params=("plain", "avx2", "avx512"))
def instructions(request):
    """One after the other, those that this processor has."""
    before = torch.ops.secateur.instructions()
    if not torch.ops.secateur.use_instructions(request.param):
        pytest.skip(f"this processor does not run {request.param}")
    yield request.param
    torch.ops.secateur.use_instructions(next(name for name, shown in NAMES.items() if shown == before))


every_set = pytest.mark.usefixtures("instructions")


def of_kind(kind, O, I, dtype=BF16, **options):
    return load(kind[0], O, I, dtype, kind[1], **options)


@every_set
@tries(250)
@given(
    kind=st.sampled_from(KINDS),
    O=OUTPUTS,
    I=INPUTS,
    T=st.integers(1, 4),
    share=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    dtype=DTYPES,
    x_dtype=DTYPES,
    group_size=st.sampled_from([2, 5, 8, 16, 64, 1000]),
    symmetric=st.booleans(),
    biased=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
@example(kind=("dense", 16), T=2, **LARGE)
@example(kind=("bitmap", 16), T=1, **LARGE)
@example(kind=("int", 4), T=1, **LARGE)
def test_some_inputs(O, I, T, share, x_dtype, biased, seed, **options):
    weight, *right = of_kind(O=O, I=I, seed=seed, **options)
    x_TI, kept_TI = inputs(T, I, share, x_dtype, seed)
    bias_O = torch.linspace(-2, 2, O).to(x_dtype) if biased else None
    y_TO = linear(prepare(weight, "cpu", dtype=x_dtype), x_TI, bias_O, kept_TI)
    close(y_TO, x_TI, *right, kept_TI, bias_O)
    if share == 0.0:
        assert torch.equal(y_TO, (y_TO * 0 if bias_O is None else bias_O.expand(T, O)))


@every_set
@tries(120)
@given(
    kind=st.sampled_from(KINDS),
    O=OUTPUTS,
    I=INPUTS,
    T=st.sampled_from([0, 1, 2, 3, 4, 5, 7, 8, 9, 64]),
    dtype=DTYPES,
    x_dtype=DTYPES,
    biased=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_all_inputs(kind, O, I, T, dtype, x_dtype, biased, seed):
    weight, *right = of_kind(kind, O, I, dtype, seed=seed)
    x_TI = inputs(T, I, 1.0, x_dtype, seed)[0]
    bias_O = torch.linspace(-2, 2, O).to(x_dtype) if biased else None
    y_TO = linear(prepare(weight, "cpu", dtype=x_dtype), x_TI, bias_O)
    close(y_TO, x_TI, *right, None, bias_O, rounded=T > 8 and x_dtype == BF16)


@every_set
@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_comes_back_to_the_bit(kind):
    """One input of one at a time, by few tokens, and by many, for which tiles are unpacked."""
    weight, W_OI, _ = of_kind(kind, 330, 20, FP16, group_size=8)
    prepared = prepare(weight, "cpu")
    x_II = torch.eye(20)
    one_by_one = torch.cat([linear(prepared, x_I[None], None, x_I[None] > 0) for x_I in x_II])
    assert torch.equal(one_by_one.T.double(), W_OI)
    assert torch.equal(linear(prepared, x_II).T.double(), W_OI)


@every_set
@pytest.mark.parametrize("kind", KINDS[:4])
def test_threads_share_outputs(kind):
    """The number of threads does not show."""
    weight, *right = of_kind(kind, 1000, 300, group_size=64)
    prepared = prepare(weight, "cpu", dtype=BF16)
    x_TI, kept_TI = inputs(3, 300, 0.5)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(linear(prepared, x_TI, None, kept_TI))
    finally:
        torch.set_num_threads(before)
    close(found[0], x_TI, *right, kept_TI)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@every_set
@pytest.mark.parametrize("kind", KINDS[:4])
def test_a_token_sees_its_own_inputs_only(kind):
    """One that keeps what others do not gets what it gets alone; weights that nobody keeps may be anything."""
    weight, *right = of_kind(kind, 70, 50)
    prepared = prepare(weight, "cpu", dtype=FP32)
    x_TI, kept_TI = inputs(4, 50, 0.3, FP32)
    together = linear(prepared, x_TI, None, kept_TI)
    for t in range(4):
        alone = linear(prepared, x_TI[t : t + 1], None, kept_TI[t : t + 1])
        close(alone, x_TI[t : t + 1], *right, kept_TI[t : t + 1])
        torch.testing.assert_close(alone[0], together[t], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("kind", ["dense", "bitmap"])
def test_weights_of_inputs_that_nobody_keeps_are_not_read(kind, dtype):
    """They are NaN, and an output without any of them is a number: so the share that is kept is the share that is read."""
    _, W_OI, terms_OI = load(kind, 40, 30, dtype)
    kept_TI = torch.rand(2, 30, generator=torch.Generator().manual_seed(1)) < 0.4
    read_I = kept_TI.any(0)
    spoilt_OI = W_OI.to(dtype)
    spoilt_OI[:, ~read_I] = torch.nan
    layout = layout_by_inputs(spoilt_OI, kind == "bitmap")
    prepared = prepare(layout.load(layout.pack(spoilt_OI)), "cpu", dtype=FP32)
    x_TI = torch.randn(2, 30)
    close(linear(prepared, x_TI, None, kept_TI), x_TI, W_OI, terms_OI, kept_TI)
    assert linear(prepared, x_TI).isnan().all()


def operands(kind, T=2):
    weight = load(kind, 33, 20)[0]
    return [torch.randn(T, 20), *weight.operands(), torch.randn(33), torch.rand(T, 20) < 0.5]


@pytest.mark.parametrize("kind", ["dense", "bitmap", "int"])
def test_the_operator_is_as_torch_wants_it(kind):
    torch.library.opcheck(torch.ops.secateur.columns_linear.default, operands(kind))


@pytest.mark.parametrize("kind", ["dense", "bitmap", "int"])
def test_the_operator_refuses_what_does_not_fit(kind):
    """Every tensor of another dtype, shorter or of strides: never what lies behind it in memory."""
    operator, args = torch.ops.secateur.columns_linear.default, operands(kind)
    names = [argument.name for argument in operator._schema.arguments]
    operator(*args)
    for at, (name, value) in enumerate(zip(names, args, strict=True)):

        def refused(wrong, at=at):
            with pytest.raises(RuntimeError):
                operator(*args[:at], wrong, *args[at + 1 :])

        if isinstance(value, torch.Tensor):
            refused(value.to(torch.complex64))
            if name not in ("x", "bias"):
                refused(value.to(torch.int16))
            if name not in ("x", "bias", "start"):  # which itself says how much of the others there has to be
                refused(value[:-1])
            if name not in ("x", "bias", "kept"):
                refused(torch.stack([value, value], -1)[..., 0])
        if name == "x":
            refused(value[0])
            refused(torch.randn(2, 700))
        if name == "outputs":
            refused(0)
            refused(3300)
        if name in ("values", "codes", "scale", "start", "before") and value is not None:
            refused(None)
        if name in ("bits", "group_size") and kind == "int":
            refused(0)
            refused(-1)
    with pytest.raises(RuntimeError, match="for fewer than 9 tokens"):
        operator(*operands(kind, 9))


class Call(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.prepared = prepare(weight, "cpu")

    def forward(self, x):
        x = x.tanh()
        return linear(self.prepared, x, None, x.abs() > 0.5).relu()


@pytest.mark.parametrize("kind", ["dense", "bitmap", "int"])
def test_compile_and_export(kind):
    module, x = Call(load(kind, 33, 20)[0]), torch.randn(3, 20)
    want = module(x)
    assert torch.equal(torch.compile(module, fullgraph=True, backend="eager")(x), want)
    assert torch.equal(torch.export.export(module, (x,)).module()(x), want)


def test_inputs_bias_and_mask_of_any_strides():
    weight, *right = load("int", 12, 20)
    prepared = prepare(weight, "cpu", dtype=FP32)
    wide, bias_O = torch.randn(4, 40), torch.randn(24)[::2]
    kept = torch.rand(4, 40) < 0.5
    for x_TI, kept_TI in ((wide[::2, ::2], kept[::2, ::2]), (wide[:, 20:], kept[:1, :20].expand(4, 20))):
        close(linear(prepared, x_TI, bias_O, kept_TI), x_TI, *right, kept_TI, bias_O)
