"""Compiled kernels for trellis codes: each instruction set decodes every weight of every ring, and rotates as a matrix would.

O: output features, I: input features, T: tokens, R: outputs of a ring, K: bits of a code, L: bits of a state.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_examples import tries
from random_weights import load_trellis

from secateur.kernels import linear, prepare
from secateur.kernels.cpu import cpu_backend

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SETS = ("plain", "avx2", "avx512vnni", "avx512")
SEEDS = st.integers(0, 2**32 - 1)
# One token, the few that take one pass over the weight, and so many that bands of rings are decoded: from nine on.
TOKENS = st.sampled_from([1, 2, 3, 4, 7, 8, 9, 40])

pytestmark = pytest.mark.skipif(cpu_backend.missing() is not None, reason=str(cpu_backend.missing()))


@pytest.fixture(scope="module", params=SETS)
def instructions(request):
    """One after the other, those that this processor has."""
    before = torch.ops.secateur.instructions()
    use = torch.ops.secateur.use_instructions
    if not use(request.param):
        pytest.skip(f"this processor does not run {request.param}")
    yield request.param
    next(name for name in SETS if use(name) and torch.ops.secateur.instructions() == before)


every_set = pytest.mark.usefixtures("instructions")


def byte_sums(weight):
    """What the codes stand for but for scale, [O, I] int64, one bit after the other as the format tells it."""
    O, I = weight.shape
    R, K, L = weight.ring, weight.bits, weight.state_bits
    size = -(-R * K // 8)
    codes_NB = weight.codes_S[: O // R * I * size].view(-1, size).long()
    bit_Nb = (codes_NB[:, :, None] >> torch.arange(8) & 1).flatten(1)[:, : R * K]
    at_RL = (torch.arange(R)[:, None] * K + torch.arange(L)) % (R * K)
    state_NR = (bit_Nb[:, at_RL] << torch.arange(L)).sum(2)
    spread_NR = state_NR * 0x83DCD12D % 2**32
    sum_NR = sum(spread_NR >> 8 * byte & 255 for byte in range(4))
    return (sum_NR - 510).view(O // R, I, R).transpose(1, 2).reshape(O, I)


def transform(n, block):
    """The matrix of the Hadamard transforms of blocks, not normalised."""
    H = torch.ones(1, 1, dtype=torch.int64)
    while len(H) < block:
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    return torch.block_diag(*[H] * (n // block))


def numbers(T, I, dtype, seed):
    """Random inputs that are small whole numbers: then all that float32 adds up is exact, whatever the order."""
    return torch.randint(-2, 3, (T, I), generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(weight, x, bias_O=None):
    """Outputs are right but for the roundings of scales and bias, and those of bfloat16 inputs, weights and products."""
    O, I = weight.shape
    y = linear(prepare(weight, "cpu", dtype=x.dtype), x, bias_O)
    assert y.dtype == x.dtype
    spread_TI = (x.double() * weight.scale_in_I.double()).long() @ transform(I, weight.block_in)
    sum_TO = spread_TI @ byte_sums(weight).T
    assert spread_TI.abs().max() <= 256  # which bfloat16 has
    assert sum_TO.abs().max() < 2**24
    H_OO = transform(O, weight.block_out)
    scale_O = weight.scale_out_O.double() / (147.8 * (weight.block_in * weight.block_out) ** 0.5)
    want = (sum_TO @ H_OO).double() * scale_O
    tolerance = 2**-21 * want.abs()
    if x.dtype == BF16 and len(x) > 8:
        # Of sums beyond 256 bfloat16 has the even ones.
        odd_OI = (byte_sums(weight) % 2 * (byte_sums(weight).abs() > 256)).double()
        rounded_TO = 2**-8 * sum_TO.double().abs() + spread_TI.double().abs() @ odd_OI.T
        tolerance += (rounded_TO @ H_OO.double().abs()) * scale_O.abs()
    if bias_O is not None:
        want = want + bias_O.double()
        tolerance += 2**-23 * bias_O.double().abs()
    tolerance += torch.finfo(x.dtype).eps * (want.abs() + tolerance) + torch.finfo(x.dtype).smallest_normal
    wrong = (y.double() - want).abs() > tolerance
    assert not (wrong & (want.abs() < torch.finfo(x.dtype).max)).any()


def bias_of(O, dtype, wanted):
    return torch.linspace(-2, 2, O).to(dtype) if wanted else None


@every_set
@tries(100)
@given(
    rings=st.integers(1, 3),
    ring=st.sampled_from([1, 3, 5, 8, 15, 16, 17, 32, 48, 64, 80, 112, 240, 256]),
    I=st.sampled_from([1, 2, 7, 8, 16, 31, 48, 64, 128, 255, 256, 257, 384]),
    bits=st.integers(2, 4),
    state_bits=st.integers(2, 16),
    block=st.sampled_from([1, 2, 4, 8, 16, 32, 128]),
    T=TOKENS,
    dtype=st.sampled_from([FP32, BF16, FP16]),
    bias=st.booleans(),
    seed=SEEDS,
)
def test_every_weight_of_every_ring(rings, I, T, dtype, bias, seed, **form):
    form["state_bits"] = min(max(form["state_bits"], form["bits"]), form["ring"] * form["bits"])
    O = rings * form["ring"]
    weight = load_trellis(O, I, whole=True, seed=seed, **form)
    check(weight, numbers(T, I, dtype, seed), bias_of(O, dtype, bias))


@pytest.mark.thin(3)
@every_set
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("state_bits", [8, 12, 16])
def test_more_inputs_than_are_added_up_at_once(bits, state_bits):
    """Pieces of 256 inputs and of 512, which threads share."""
    for T in (1, 5, 9):
        check(load_trellis(512, 1100, bits, state_bits, 256, 4, whole=True), numbers(T, 1100, FP32, T))


@pytest.mark.thin(3)
@every_set
@pytest.mark.parametrize("T", [1, 8, 9])
def test_sums_are_as_exact_as_float32(T):
    weight = load_trellis(512, 2048, 3)
    x = torch.randn(T, 2048, generator=torch.Generator().manual_seed(1))
    Q_OI = byte_sums(weight).double() / 147.8
    H_OO, H_II = transform(512, 128).double() / 128**0.5, transform(2048, 128).double() / 128**0.5
    W_OI = weight.scale_out_O.double()[:, None] * (H_OO @ Q_OI @ H_II) * weight.scale_in_I.double()
    want = x.double() @ W_OI.T
    y = linear(prepare(weight, "cpu"), x)
    # AVX2 adds bytes up from zero, and takes 256 times their middle away from the sums.
    share = 2**-19 if torch.ops.secateur.instructions() == "AVX2" and T < 9 else 2**-21
    assert (y.double() - want).norm() <= share * want.norm()


@every_set
def test_threads_share_bands():
    """More weights than a thread takes at once, and the number of threads does not show."""
    before = torch.get_num_threads()
    try:
        for O, I in ((256, 2048), (1024, 1300), (60, 9000)):
            prepared = prepare(load_trellis(O, I), "cpu")
            for T in (1, 3, 8):
                found = []
                for threads in (1, 2, 3):
                    torch.set_num_threads(threads)
                    found.append(linear(prepared, numbers(T, I, FP32, T) / 3))
                assert torch.equal(found[0], found[1])
                assert torch.equal(found[0], found[2])
    finally:
        torch.set_num_threads(before)


@every_set
@pytest.mark.parametrize("T", [3, 9])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_reaches_its_token_only(value, T):
    for O, I in ((32, 70), (15, 70), (256, 640)):
        prepared = prepare(load_trellis(O, I), "cpu")
        x = numbers(T, I, FP32, 0)
        clean = linear(prepared, x)
        for column in (0, 33, 69):
            spoilt = x.clone()
            spoilt[1, column] = value
            y = linear(prepared, spoilt)
            assert not y[1].isfinite().any()
            others = torch.arange(T) != 1
            assert torch.equal(y[others], clean[others])


@every_set
@pytest.mark.parametrize("T", [0, 1, 9])
def test_inputs_and_bias_of_any_strides(T):
    wide, bias_O = numbers(2 * T, 140, FP32, 0), torch.randn(96)[::2]
    weight = load_trellis(48, 70, whole=True)
    prepared = prepare(weight, "cpu")
    if T:
        for x in (wide[::2, ::2], wide[::2, 70:], wide[:T, :70].T.contiguous().T, wide[:1, :70].expand(T, 70)):
            check(weight, x, bias_O)
    stacked = torch.stack([wide[:T, :70], wide[T:, :70]])
    assert linear(prepared, stacked).shape == (2, T, 48)
    assert torch.equal(linear(prepared, stacked)[1], linear(prepared, wide[T:, :70].contiguous()))


@every_set
@pytest.mark.parametrize("O", [15, 48])
def test_gradients(O):
    weight = load_trellis(O, 70)
    x, bias_O = torch.randn(4, 70, requires_grad=True), torch.randn(O, requires_grad=True)
    grad_TO = torch.randn(4, O)
    linear(prepare(weight, "cpu"), x, bias_O).backward(grad_TO)
    torch.testing.assert_close(x.grad, grad_TO @ weight.dense())
    torch.testing.assert_close(bias_O.grad, grad_TO.sum(0))


# --- the operator


def arguments_of(weight):
    names = [argument.name for argument in torch.ops.secateur.trellis_linear.default._schema.arguments]
    return dict(zip(names, (torch.randn(2, weight.shape[1]), *weight.operands(), None), strict=True))


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("bits", 1, "2 to 4 bits"),
        ("bits", 5, "2 to 4 bits"),
        ("states", 0, "no states of 0"),
        ("states", 17, "no states of 17"),
        ("ring", 0, "no rings of 0"),
        ("ring", -16, "no rings of -16"),
        ("ring", 9, "no rings of 9"),
        ("ring", 96, "no rings of 96"),
        ("ring", 2**62, "no rings of"),
        ("ring", 3, "no states of 12"),
        ("bits", 4, "codes is not"),
        ("block_out", 0, "no blocks of 0"),
        ("block_out", 3, "no blocks of 3"),
        ("block_in", 4, "no blocks of 4"),
        ("block_in", -2, "no blocks of -2"),
        ("block_out", -(2**63), "no blocks of"),
        ("scale_in", torch.ones(71), "scale_in is not"),
        ("scale_out", torch.ones(96), "codes is not"),
        ("scale_out", torch.ones(0), "no rings of 16"),
        ("scale_out", torch.ones(6, 8), "scale_in is not"),
        ("bias", torch.ones(47), "the bias is not"),
    ],
)
def test_the_operator_refuses_what_contradicts_itself(name, value, words):
    arguments = arguments_of(load_trellis(48, 70, ring=16))
    torch.ops.secateur.trellis_linear(*arguments.values())
    with pytest.raises(RuntimeError, match=words):
        torch.ops.secateur.trellis_linear(*{**arguments, name: value}.values())
