"""Weights by input feature and inputs of which some are kept, for tests of every backend, and what is right in float64.

O: output features, I: input features, T: tokens.
"""

import torch

from secateur.core.quantized import Quantized
from secateur.formats.layouts.choose import layout_by_inputs
from secateur.formats.layouts.packed_int import Uniform

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def load(kind, O, I, dtype=BF16, bits=4, group_size=8, symmetric=False, seed=0):
    """A weight by input feature, as kernels take it; it in float64; and the terms that float32 adds up to become each weight,
    without their signs."""
    draw = torch.Generator().manual_seed(seed)
    if kind == "int":
        G = -(-I // group_size)
        code_OI = torch.randint(0, 2**bits, (O, I), generator=draw).to(torch.uint8)
        scale_OG = (torch.rand(O, G, generator=draw) + 0.1).half()
        zero_OG = None if symmetric else torch.randint(0, 2**bits, (O, G), generator=draw).to(torch.uint8)
        weight = Quantized(Uniform(bits, group_size, code_OI, scale_OG, zero_OG), (O, I), FP32)
        W_OI = weight.dequantize()
        # Codes may be read as 1 + code / 2^bits, and the ones be taken away with the zeros.
        terms_OI = 4 * 2**bits * scale_OG.double().repeat_interleave(min(group_size, I), 1)[:, :I]
    else:
        W_OI = torch.randn(O, I, generator=draw).to(dtype)
        if kind == "bitmap":
            density_I = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0])[torch.randint(0, 5, (I,), generator=draw)]
            W_OI[torch.rand(O, I, generator=draw) >= density_I] = 0
        weight, terms_OI = W_OI, W_OI.double().abs()
    layout = layout_by_inputs(weight, sparse=kind == "bitmap")
    return layout.load(layout.pack(weight)), W_OI.double(), terms_OI


def inputs(T, I, share, dtype=BF16, seed=0):
    """Inputs with a mask; what is not kept is NaN or infinite. For float16 small, so that no output is beyond it."""
    draw = torch.Generator().manual_seed(seed)
    kept_TI = torch.rand(T, I, generator=draw) < share
    bad_TI = torch.where(torch.rand(T, I, generator=draw) < 0.5, float("nan"), float("inf"))
    size = 2**-8 if dtype == FP16 else 1
    return torch.where(kept_TI, torch.randn(T, I, generator=draw) * size, bad_TI).to(dtype), kept_TI


def close(y_TO, x_TI, W_OI, terms_OI, kept_TI=None, bias_O=None, rounded=False):
    """The output is off by no more than its roundings: each term of a sum once or twice, and the output to its dtype, where the
    bias may be added to what is rounded already. `rounded`: weights were rounded to the dtype of the inputs, too."""
    x64_TI = x_TI.double() if kept_TI is None else x_TI.double().masked_fill(~kept_TI, 0)
    want_TO, size_TO = x64_TI @ W_OI.T, x64_TI.abs() @ terms_OI.T
    if bias_O is not None:
        want_TO, size_TO = want_TO + bias_O.double(), size_TO + bias_O.double().abs()
    assert y_TO.dtype == x_TI.dtype
    assert y_TO.shape == want_TO.shape
    allowed_TO = 2**-24 * (2 * W_OI.shape[1] + 16) * size_TO
    unit = torch.finfo(x_TI.dtype).eps / 2
    if rounded:
        allowed_TO += 2 * unit * (x64_TI.abs() @ W_OI.abs().T)
    allowed_TO += 2 * unit * (want_TO.abs() + allowed_TO) + torch.finfo(x_TI.dtype).smallest_normal * unit
    assert ((y_TO.double() - want_TO).abs() <= allowed_TO).all()
