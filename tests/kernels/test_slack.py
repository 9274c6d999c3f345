"""What lies behind the last value or code of a weight is of no matter: in a mapped file it is another tensor."""

from dataclasses import fields, is_dataclass, replace

import column_weights
import pytest
import torch
from random_weights import load_coded, load_sparse, load_trellis

from secateur.kernels import linear, prepare
from secateur.kernels.cpu import cpu_backend
from secateur.kernels.packed import PADDING, padded, unpadded

BF16, FP32 = torch.bfloat16, torch.float32
# What `padded` makes.
STREAMS = ("values_V", "codes_S", "scale_S", "zero_S")
WEIGHTS = {
    "sparse bf16": lambda: load_sparse(37, 131, dtype=BF16)[0],
    "sparse f32": lambda: load_sparse(37, 131)[0],
    "2:4": lambda: load_sparse(37, 128, dtype=BF16, pattern=(2, 4))[0],
    **{f"int {bits}": lambda bits=bits: load_coded("packed-int", 37, 131, bits, 32)[0] for bits in range(2, 9)},
    "sparse int": lambda: load_coded("packed-int", 37, 131, 4, 32, "some")[0],
    "spqr": lambda: load_coded("spqr", 37, 131, 3, 16, outliers="some")[0],
    "codebook": lambda: load_coded("codebook", 37, 131, 4)[0],
    "trellis": lambda: load_trellis(64, 128),
    **{kind: lambda kind=kind: column_weights.load(kind, 37, 131)[0] for kind in ("dense", "bitmap", "int")},
}


def followed_by_ones(weight):
    """The same weight with every bit set behind its streams: of floats, NaN."""
    changed = {}
    for field in fields(weight):
        value = getattr(weight, field.name)
        if is_dataclass(value):
            changed[field.name] = followed_by_ones(value)
        elif field.name in STREAMS and value is not None:
            changed[field.name] = value.clone()
            changed[field.name].view(torch.uint8)[-PADDING:] = 255
    return replace(weight, **changed)


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.skipif(cpu_backend.missing() is not None, reason=str(cpu_backend.missing()))
def test_kernels(kind):
    weight = WEIGHTS[kind]()
    other = followed_by_ones(weight)
    before = torch.ops.secateur.instructions()
    names = {"plain C++": "plain", "AVX2": "avx2", "AVX-512 VNNI": "avx512vnni", "AVX-512": "avx512"}
    try:
        for instructions in names.values():
            if torch.ops.secateur.use_instructions(instructions):
                for tokens, dtype in ((1, BF16), (8, FP32), (64, BF16)):
                    x_TI = torch.randn(tokens, weight.shape[1]).to(dtype)
                    right, found = (linear(prepare(each, "cpu", dtype=dtype), x_TI) for each in (weight, other))
                    assert torch.equal(right, found), (instructions, tokens)
    finally:
        torch.ops.secateur.use_instructions(names[before])


@pytest.mark.parametrize("kind", WEIGHTS)
def test_plain_torch(kind):
    weight = WEIGHTS[kind]()
    other = followed_by_ones(weight)
    assert torch.equal(weight.dense(), other.dense())
    assert weight.count() == other.count()


def test_memory_that_goes_on_is_not_copied():
    memory = torch.arange(100 + PADDING, dtype=torch.uint8)
    stream = memory[:100].view(BF16)
    assert padded(stream).data_ptr() == memory.data_ptr()
    assert torch.equal(unpadded(padded(stream)).view(torch.uint8), memory[:100])
    shorter = torch.arange(100, dtype=torch.uint8)
    assert padded(shorter).data_ptr() != shorter.data_ptr()
    assert padded(shorter).tolist() == [*range(100), *[0] * PADDING]
    assert padded(memory[::2]).numel() == len(memory[::2]) + PADDING
