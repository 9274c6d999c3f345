"""What a decoder layer does before and after its attention, in one call each, against the same in float64.

O: output features, H: features of a token, M: of the middle of the MLP, D: of a head, T: tokens.
"""

import pytest
import torch
from random_weights import load_coded, load_sparse, load_trellis

from secateur.kernels import prepare
from secateur.kernels.cpu import cpu_backend
from secateur.kernels.cpu.few_tokens import Weights, after_attention, attention_inputs

pytestmark = pytest.mark.skipif(cpu_backend.missing() is not None, reason=str(cpu_backend.missing()))

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
H, M, D = 40, 72, 8
EPS = 1e-5


def weight(kind, O, I, seed):
    """A packed weight and the dense one, of some size."""
    if kind == "sparse":
        return load_sparse(O, I, 0.5, BF16)
    options = {"order": True, "group_size": 8} if kind == "ordered" else {"group_size": 16, "seed": seed}
    return load_coded("spqr" if kind == "ordered" else "packed-int", O, I, 4, **options)


def ready(kinds, sizes):
    made = [weight(kind, *size, seed) for seed, (kind, size) in enumerate(zip(kinds, sizes, strict=True))]
    return [prepare(packed, "cpu") for packed, _ in made], [W_OI.double() for _, W_OI in made]


def normed(x, norm_H):
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * norm_H.double()


def turned(heads, cos, sin):
    low, high = heads.chunk(2, -1)
    return heads * cos + torch.cat([-high, low], -1) * sin


def close(found, want, dtype):
    assert found.dtype == dtype
    unit = torch.finfo(dtype).eps
    assert (found.double() - want).norm() <= max(2 * unit, 1e-5) * want.norm()


@pytest.mark.parametrize("kinds", [("sparse",) * 3, ("coded",) * 3, ("ordered", "sparse", "coded")])
@pytest.mark.parametrize(("T", "dtype"), [(1, FP32), (1, BF16), (3, FP16), (8, FP32)])
def test_queries_keys_and_values(kinds, T, dtype):
    prepared, dense = ready(kinds, [(4 * D, H), (2 * D, H), (2 * D, H)])
    x, norm_H = torch.randn(T, 1, H).to(dtype), torch.rand(H).to(dtype)
    angle = torch.rand(T, 1, D // 2).repeat(1, 1, 2) * 6
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    found = attention_inputs(x, norm_H, EPS, (cos, sin), Weights.of(prepared))
    q, k, v = (normed(x[:, 0].double(), norm_H) @ W_OI.T for W_OI in dense)
    q, k = (turned(y.view(T, -1, D), cos.double(), sin.double()).flatten(1) for y in (q, k))
    close(found, torch.cat([q, k, v], 1), dtype)


@pytest.mark.parametrize("kinds", [("sparse",) * 4, ("coded",) * 4, ("coded", "ordered", "sparse", "ordered")])
@pytest.mark.parametrize(("T", "dtype"), [(1, FP32), (1, BF16), (3, FP16), (8, FP32)])
def test_what_comes_after_attention(kinds, T, dtype):
    prepared, dense = ready(kinds, [(H, 32), (M, H), (M, H), (H, M)])
    a, x, norm_H = torch.randn(T, 32).to(dtype), torch.randn(T, H).to(dtype), (torch.rand(H) / 16).to(dtype)
    found = after_attention(a, x, norm_H, EPS, Weights.of(prepared))
    o, gate, up, down = dense
    y = x.double() + a.double() @ o.T
    n = normed(y, norm_H)
    close(found, y + (torch.nn.functional.silu(n @ gate.T) * (n @ up.T)) @ down.T, dtype)


def test_weights_of_other_kinds_are_not_taken():
    assert Weights.of([prepare(load_trellis(16, H), "cpu")]) is None
    assert Weights.of([prepare(weight("coded", 5, H, 0)[0], "torch")]) is None
    assert Weights.of([prepare(weight("coded", 5, H, 0)[0], "dense")]) is None


def test_the_operators_refuse_what_does_not_fit():
    """Nothing is read that is not there, whatever they are given."""
    prepared, _ = ready(["coded", "sparse", "ordered"], [(2 * D, H)] * 3)
    weights = Weights.of(prepared)
    x, norm_H, turn = torch.randn(1, H), torch.ones(H), torch.randn(1, D)
    inputs = torch.ops.secateur.attention_inputs
    inputs(x, norm_H, EPS, turn, turn, weights.parts, weights.forms)

    def refused(*args):
        with pytest.raises(RuntimeError):
            inputs(*args)

    for at, part in enumerate(weights.parts):
        for wrong in (part[:-1], part.to(torch.complex64), torch.stack([part, part], -1)[..., 0]):
            refused(x, norm_H, EPS, turn, turn, [*weights.parts[:at], wrong, *weights.parts[at + 1 :]], weights.forms)
    for at, form in enumerate(weights.forms):
        if at % 5 != 1:  # a size of groups may be another where there are none, or as many
            wrong = [*weights.forms[:at], form + 1000, *weights.forms[at + 1 :]]
            if at % 5 != 2 or form:
                refused(x, norm_H, EPS, turn, turn, weights.parts, wrong)
    refused(x, norm_H, EPS, turn, turn, weights.parts[:-1], weights.forms)
    refused(x, norm_H, EPS, turn, turn, weights.parts, weights.forms[:-1])
    refused(x, norm_H, EPS, turn, turn, [*weights.parts, x], weights.forms)
    refused(x, norm_H, EPS, turn, turn, [], [])
    refused(torch.randn(1, H + 1), norm_H, EPS, turn, turn, weights.parts, weights.forms)
    refused(torch.randn(9, H), norm_H, EPS, turn.expand(9, D), turn.expand(9, D), weights.parts, weights.forms)
    refused(torch.randn(0, H), norm_H, EPS, turn[:0], turn[:0], weights.parts, weights.forms)
    refused(x, norm_H[:-1], EPS, turn, turn, weights.parts, weights.forms)
    refused(x, norm_H, EPS, turn[:, :-1], turn[:, :-1], weights.parts, weights.forms)
    refused(x, norm_H, EPS, turn, turn[:, :-2], weights.parts, weights.forms)
    refused(x, norm_H, EPS, turn.expand(2, D), turn.expand(2, D), weights.parts, weights.forms)
    after = torch.ops.secateur.after_attention
    with pytest.raises(RuntimeError):
        after(x, x, norm_H, EPS, weights.parts, weights.forms)
    four = Weights.of(ready(["coded"] * 4, [(H, H), (M, H), (M - 1, H), (H, M)])[0])
    with pytest.raises(RuntimeError, match="do not fit"):
        after(x, x, norm_H, EPS, four.parts, four.forms)
