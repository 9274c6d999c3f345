"""A stack of decoder layers in one call of the compiled kernels, against the same in float64, one operation after the other.

O: output features, H: features of a token, M: of the middle of the MLP, D: of a head, K: heads of keys and values, B: texts,
S: tokens in the cache, L: layers.
"""

import gc

import pytest
import torch
from random_weights import load_coded, load_sparse, load_trellis

from secateur.kernels import prepare
from secateur.kernels.cpu import cpu_backend
from secateur.kernels.cpu.decoder_stack import DecoderStack, UnknownWeightError

pytestmark = pytest.mark.skipif(cpu_backend.missing() is not None, reason=str(cpu_backend.missing()))

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
L, H, M, D, HEADS, K = 2, 40, 72, 8, 4, 2
SHAPES = [(HEADS * D, H), (K * D, H), (K * D, H), (H, HEADS * D), (M, H), (M, H), (H, M)]
EPS, SCALE = 1e-5, 0.3


@pytest.fixture(params=["plain", "avx2", "avx512"])
def instructions(request):
    """The kernels of one kind of processor, as far as this one can run them."""
    before = torch.ops.secateur.instructions()
    if not torch.ops.secateur.use_instructions(request.param):
        pytest.skip("this processor has none of these")
    yield
    names = {"plain C++": "plain", "AVX2": "avx2", "AVX-512": "avx512", "AVX-512 VNNI": "avx512vnni"}
    torch.ops.secateur.use_instructions(names[before])


def weight(kind, O, I, seed):
    """A weight as a stack takes it, and the dense one."""
    if kind == "dense":
        W_OI = torch.randn(O, I, generator=torch.Generator().manual_seed(seed)).to(BF16)
        return W_OI, W_OI
    if kind == "sparse":
        packed, W_OI = load_sparse(O, I, 0.5, BF16)
    elif kind == "ordered":
        packed, W_OI = load_coded("spqr", O, I, 4, order=True, group_size=8)
    else:
        packed, W_OI = load_coded("packed-int", O, I, 4, group_size=16, seed=seed)
    return prepare(packed, "cpu"), W_OI


class Layers:
    """A stack, and what it is to give."""

    def __init__(self, kinds, biases=False, norms_of_heads=False):
        draw = torch.Generator().manual_seed(1)
        self.weights, self.dense, self.biases = [], [], []
        for i in range(L * len(SHAPES)):
            ready, W_OI = weight(kinds[i % len(kinds)], *SHAPES[i % len(SHAPES)], i)
            bias_O = torch.randn(len(W_OI), generator=draw).to(BF16) if biases else None
            self.weights.append((ready, bias_O))
            self.dense.append(W_OI.double())
            self.biases.append(0 if bias_O is None else bias_O.double())
        sizes = [H, H, D, D] if norms_of_heads else [H, H]
        self.norms = [(torch.rand(size, generator=draw) / 8).to(BF16) for size in sizes * L]
        self.last = torch.rand(H, generator=draw)
        self.stack = DecoderStack(self.weights, self.norms, EPS, D, SCALE)

    def linear(self, i, x):
        return x @ self.dense[i].T + self.biases[i]

    def want(self, x, turn, seen, cache, S, first=0, last=L):
        """One operation after the other, in float64; the cache has keys and values up to `S`."""
        x = x.double().flatten(1)
        cos, sin = (each.double().view(len(x), 1, D) for each in turn)
        many = len(self.norms) // L
        for i in range(first, last):
            norms = self.norms[i * many : (i + 1) * many]
            n = normed(x, norms[0])
            q, k, v = (self.linear(7 * i + j, n).view(len(x), -1, D) for j in range(3))
            if many == 4:
                q, k = normed(q, norms[2]), normed(k, norms[3])
            q, k = turned(q, cos, sin), turned(k, cos, sin)
            # As the cache rounds them.
            keys, values = cache[i - first].double()[..., :S, :]
            keys = torch.cat([keys, k.to(cache.dtype).double()[:, :, None]], 2).repeat_interleave(HEADS // K, 1)
            values = torch.cat([values, v.to(cache.dtype).double()[:, :, None]], 2).repeat_interleave(HEADS // K, 1)
            scores = (keys @ q[..., None])[..., 0] * SCALE
            if seen is not None:
                scores = scores.masked_fill(~seen[:, None], -torch.inf)
            shares = scores.softmax(-1).nan_to_num()
            x = x + self.linear(7 * i + 3, (shares[:, :, None] @ values).flatten(1))
            n = normed(x, norms[1])
            middle = torch.nn.functional.silu(self.linear(7 * i + 4, n)) * self.linear(7 * i + 5, n)
            x = x + self.linear(7 * i + 6, middle)
        return x


def normed(x, norm):
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * norm.double()


def turned(heads, cos, sin):
    low, high = heads.chunk(2, -1)
    return heads * cos + torch.cat([-high, low], -1) * sin


def inputs(B, dtype, S=5, room=9, layers=L):
    draw = torch.Generator().manual_seed(2)
    x = torch.randn(B, 1, H, generator=draw).to(dtype)
    angle = torch.rand(B, 1, D // 2, generator=draw).repeat(1, 1, 2) * 6
    cache = torch.full((layers, 2, B, K, room, D), torch.nan, dtype=dtype)
    cache[..., :S, :] = torch.randn(layers, 2, B, K, S, D, generator=draw).to(dtype)
    return x, (angle.cos().to(dtype), angle.sin().to(dtype)), cache


def close(found, want, dtype):
    assert found.dtype == dtype
    unit = torch.finfo(dtype).eps
    assert (found.double() - want).norm() <= max(4 * unit, 2e-5) * want.norm()


@pytest.mark.parametrize(
    "kinds", [("sparse",), ("coded",), ("dense",), ("ordered", "sparse", "coded"), ("dense", "coded", "coded")]
)
@pytest.mark.parametrize(("B", "dtype"), [(1, FP32), (1, BF16), (3, FP16), (8, FP32)])
def test_layers_in_float64_are_what_a_stack_gives(kinds, B, dtype):
    layers = Layers(kinds)
    x, turn, cache = inputs(B, dtype)
    want = layers.want(x, turn, None, cache, 5)
    close(layers.stack.step(x, turn, None, None, cache, 5), want, dtype)
    assert cache[..., :6, :].isfinite().all()
    assert cache[..., 6:, :].isnan().all()  # nothing else was written
    # A norm that comes last; the token that has been written is written again.
    close(layers.stack.step(x, turn, None, layers.last, cache, 5), normed(want, layers.last), dtype)


def test_with_biases_norms_of_heads_hidden_tokens_and_any_threads(instructions):
    layers = Layers(("coded", "sparse", "dense"), biases=True, norms_of_heads=True)
    before = torch.get_num_threads()
    for B in (1, 3):
        x, turn, cache = inputs(B, FP32, S=37, room=38)
        seen = torch.rand(B, 38, generator=torch.Generator().manual_seed(4)) < 0.5
        seen[-1] = B == 1
        want = layers.want(x, turn, seen, cache, 37)
        found = layers.stack.step(x, turn, seen, None, cache, 37)
        close(found, want, FP32)
        # The same to the bit, whoever computes what.
        try:
            for threads in (1, 2, 5) * 10:
                torch.set_num_threads(threads)
                assert torch.equal(layers.stack.step(x, turn, seen, None, cache, 37), found)
        finally:
            torch.set_num_threads(before)


def test_large_products_are_the_same_by_any_threads():
    """Dealt out in chunks of which none is a multiple of the rows that kernels do side by side."""
    O, M, I = 1030, 1031, 512
    shapes = [(O, I), (O, I), (O, I), (I, O), (M, I), (M, I), (I, M)]
    draw = torch.Generator().manual_seed(0)
    for kind in ("coded", "sparse", "dense"):
        made = [weight(kind, *shape, i)[0] for i, shape in enumerate(shapes)]
        norms = [torch.rand(I, generator=draw) for _ in range(2)]
        stack = DecoderStack([(each, None) for each in made], norms, EPS, 2, SCALE)
        x, turn = torch.randn(1, I, generator=draw), (torch.rand(1, 2, generator=draw),) * 2
        cache, found = torch.randn(1, 2, 1, O // 2, 4, 2, generator=draw), []
        before = torch.get_num_threads()
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                found.append(stack.step(x, turn, None, None, cache, 3))
        finally:
            torch.set_num_threads(before)
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])


def test_with_an_empty_cache_one_layer_and_many_tokens(instructions):
    layers = Layers(("coded",))
    for S in (0, 1, 300):
        x, turn, cache = inputs(1, FP32, S, S + 1, 1)
        want = layers.want(x, turn, None, cache, S, 1, 2)
        close(layers.stack.step(x, turn, None, None, cache, S, 1), want, FP32)


def test_large_scores_and_what_is_not_finite(instructions):
    layers = Layers(("dense",))
    x, turn, cache = inputs(2, FP32)
    cache[0, 0] *= 1e4
    close(layers.stack.step(x, turn, None, None, cache, 5), layers.want(x, turn, None, cache, 5), FP32)
    # Nothing comes of a text from what another has.
    x[0, 0, 3] = torch.nan
    found = layers.stack.step(x, turn, None, None, cache, 5)
    assert found[0].isnan().all()
    assert found[1].isfinite().all()


def test_a_dense_weight_or_norm_that_is_written_to_is_read_anew():
    layers = Layers(("dense", "coded"), biases=True)
    x, turn, cache = inputs(1, FP32)
    for tensor in (layers.weights[0][0], layers.weights[0][1], layers.norms[1]):
        tensor.data.mul_(0.5)
    layers.dense[0], layers.biases[0] = layers.weights[0][0].double(), layers.weights[0][1].double()
    close(layers.stack.step(x, turn, None, None, cache, 5), layers.want(x, turn, None, cache, 5), FP32)


def test_weights_of_other_kinds_are_not_taken():
    for other in (
        prepare(load_trellis(16, H), "cpu"),
        prepare(load_coded("packed-int", 5, H, 4)[0], "torch"),
        prepare(load_coded("packed-int", 5, H, 4)[0], "dense"),
    ):
        with pytest.raises(UnknownWeightError):
            DecoderStack([(other, None)] * 7, [torch.ones(H)] * 2, EPS, D, SCALE)


def test_stacks_go_with_their_objects():
    layers = Layers(("coded",))
    number = layers.stack._number
    x, turn, cache = inputs(1, FP32)
    del layers
    gc.collect()
    assert not torch.ops.secateur.free_stack(number)
    with pytest.raises(RuntimeError, match="there is no stack"):
        torch.ops.secateur.stack_step(number, 0, L, x, *turn, None, None, cache, 5)


def test_the_operators_refuse_what_does_not_fit():
    """Nothing is read that is not there, whatever they are given."""
    layers = Layers(("coded", "sparse", "ordered", "dense"), biases=True)
    x, turn, cache = inputs(2, FP32)
    step, seen = layers.stack.step, torch.ones(2, 6, dtype=torch.bool)
    step(x, turn, seen, layers.last, cache, 5)
    cos, sin = turn
    for wrong in (
        (x[..., :-1], turn, seen, None, cache, 5),
        (x.int(), turn, seen, None, cache, 5),
        (x[:0], (cos[:0], sin[:0]), None, None, cache[:, :, :0], 5),
        (x.expand(2, 5, H), turn, seen, None, cache, 5),
        (x, (cos[..., :-2], sin[..., :-2]), seen, None, cache, 5),
        (x, (cos[:1], sin[:1]), seen, None, cache, 5),
        (x, turn, seen[:, :-1], None, cache, 5),
        (x, turn, seen.int(), None, cache, 5),
        (x, turn, seen.expand(2, 2, 6), None, cache, 5),
        (x, turn, seen, layers.last[:-1], cache, 5),
        (x, turn, seen, layers.last.int(), cache, 5),
        (x, turn, None, None, cache, 9),
        (x, turn, None, None, cache, -1),
        (x, turn, None, None, cache[..., :5, :], 4),
        (x, turn, None, None, cache[0], 5),
        (x, turn, None, None, cache[:, :, :, :1].contiguous(), 5),
        (x, turn, None, None, cache.int(), 5),
        (x, turn, None, None, cache, 5, 1),
        (x, turn, None, None, cache, 5, -1),
    ):
        with pytest.raises(RuntimeError):
            step(*wrong)
    layers.norms[0].data = torch.ones(H - 1)
    with pytest.raises(RuntimeError, match="norm"):
        step(x, turn, seen, None, cache, 5)


def test_stacks_are_not_made_of_what_does_not_fit(monkeypatch):
    given = []
    make = torch.ops.secateur.make_stack
    monkeypatch.setattr(torch.ops.secateur, "make_stack", lambda *args: given.append(args) or make(*args))
    Layers(("coded", "sparse", "ordered", "dense"), biases=True)
    monkeypatch.undo()
    parts, forms, norms, eps, head, scale = given[0]

    def refused(*args):
        with pytest.raises(RuntimeError):
            make(*args, eps, head, scale)

    for at, part in enumerate(parts):
        for wrong in (part[:-1], part.to(torch.complex64), torch.stack([part, part], -1)[..., 0]):
            refused([*parts[:at], wrong, *parts[at + 1 :]], forms, norms)
    for at, form in enumerate(forms):
        if at % 5 == 3 or at % 5 == 4:  # which tensors there are; input features
            for wrong in (form + 1000, 0, -form, 2**40):
                refused(parts, [*forms[:at], wrong, *forms[at + 1 :]], norms)
    refused(parts[:-1], forms, norms)
    refused([*parts, parts[0]], forms, norms)
    refused(parts, forms[:-1], norms)
    refused(parts, forms[:-5], norms)
    refused([], [], norms)
    refused(parts, forms, norms[:-1])
    refused(parts, forms, [*norms[:-1], norms[-1][:-1]])
    refused(parts, forms, [])
    for wrong in (0, -2, 3, 12, 2**40):
        with pytest.raises(RuntimeError):
            make(parts, forms, norms, eps, wrong, scale)


@pytest.mark.parametrize(("T", "O", "I"), [(1, 1, 1), (1, 300, 577), (3, 7, 16), (8, 33, 64)])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_a_dense_linear(instructions, T, O, I, dtype):
    draw = torch.Generator().manual_seed(0)
    x_TI, W_OI, bias_O = (torch.randn(*shape, generator=draw).to(dtype) for shape in ((T, I), (O, I), (O,)))
    want = x_TI.double() @ W_OI.double().T
    close(torch.ops.secateur.dense_linear(x_TI, W_OI, None), want, dtype)
    close(torch.ops.secateur.dense_linear(x_TI, W_OI, bias_O), want + bias_O.double(), dtype)
    for wrong in (
        (x_TI, W_OI.T, None),
        (x_TI, W_OI[:, :-1], None),
        (x_TI, W_OI, bias_O[:-1]),
        (x_TI, W_OI.int(), None),
    ):
        if wrong[1].shape != W_OI.shape or wrong[2] is not None or wrong[1].dtype != dtype:
            with pytest.raises(RuntimeError):
                torch.ops.secateur.dense_linear(*wrong)
