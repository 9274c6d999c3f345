"""Products with some inputs only, by every backend, against float64.

O: output features, I: input features, T: tokens.
"""

import pytest
import torch

from secateur.core.quantized import Quantized
from secateur.errors import UsageError
from secateur.formats.layouts.bitmap import Bitmap
from secateur.formats.layouts.choose import layout_by_inputs
from secateur.formats.layouts.packed_int import Uniform
from secateur.kernels.backends import linear, prepare
from secateur.kernels.module import PackedLinear

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def load(kind, O, I, dtype=BF16, bits=4, group_size=8, seed=0):
    """A weight by input feature, as kernels take it, and in float64."""
    draw = torch.Generator().manual_seed(seed)
    if kind == "int":
        G = -(-I // group_size)
        code_OI = torch.randint(0, 2**bits, (O, I), generator=draw).to(torch.uint8)
        scale_OG = (torch.rand(O, G, generator=draw) + 0.1).half()
        zero_OG = None if seed % 2 else torch.randint(0, 2**bits, (O, G), generator=draw).to(torch.uint8)
        weight = Quantized(Uniform(bits, group_size, code_OI, scale_OG, zero_OG), (O, I), FP32)
        W_OI = weight.dequantize()
    else:
        W_OI = torch.randn(O, I, generator=draw).to(dtype)
        if kind == "bitmap":
            W_OI[torch.rand(O, I, generator=draw) < 0.5] = 0
        weight = W_OI
    layout = layout_by_inputs(weight, sparse=kind == "bitmap")
    return layout.load(layout.pack(weight)), W_OI.double()


def inputs(T, I, share, dtype=BF16, seed=0):
    """Inputs with a mask; what is not kept is NaN or infinite."""
    draw = torch.Generator().manual_seed(seed)
    kept_TI = torch.rand(T, I, generator=draw) < share
    bad_TI = torch.where(torch.rand(T, I, generator=draw) < 0.5, float("nan"), float("inf"))
    return torch.where(kept_TI, torch.randn(T, I, generator=draw), bad_TI).to(dtype), kept_TI


def exact(W_OI, x_TI, kept_TI, bias_O=None):
    """The product in float64, and what its terms add up to without their signs."""
    x_TI = x_TI.double().masked_fill(~kept_TI, 0)
    y_TO = x_TI @ W_OI.T
    return y_TO if bias_O is None else y_TO + bias_O.double(), x_TI.abs() @ W_OI.abs().T + 1e-30


def close(y_TO, x_TI, W_OI, kept_TI, bias_O=None):
    exact_TO, size_TO = exact(W_OI, x_TI, kept_TI, bias_O)
    assert y_TO.dtype == x_TI.dtype
    rounding = torch.finfo(y_TO.dtype).eps * exact_TO.abs() + 1e-5 * size_TO
    assert ((y_TO.double() - exact_TO).abs() <= rounding).all()


@pytest.mark.parametrize("kind", ["dense", "bitmap", "int"])
@pytest.mark.parametrize("T", [1, 3, 9])
def test_the_torch_backend_leaves_out_what_is_not_kept(kind, T):
    weight, W_OI = load(kind, 37, 29)
    x_TI, kept_TI = inputs(T, 29, 0.5, FP32)
    prepared = prepare(weight, "torch")
    close(linear(prepared, x_TI, None, kept_TI), x_TI, W_OI, kept_TI)
    close(linear(prepared, x_TI[None], None, kept_TI[None])[0], x_TI, W_OI, kept_TI)


def test_any_layout_takes_a_mask():
    W_OI = torch.randn(7, 12)
    prepared = prepare(Bitmap().load(Bitmap().pack(W_OI)), "torch")
    x_TI, kept_TI = inputs(2, 12, 0.5, FP32)
    close(linear(prepared, x_TI, torch.ones(7), kept_TI), x_TI, W_OI.double(), kept_TI, torch.ones(7))


def test_gradients_are_those_of_kept_inputs():
    weight, W_OI = load("dense", 7, 12, FP32)
    prepared = prepare(weight, "auto")
    x_TI = torch.randn(2, 12, requires_grad=True)
    kept_TI = torch.rand(2, 12) < 0.5
    linear(prepared, x_TI, None, kept_TI).sum().backward()
    wanted_TI = torch.where(kept_TI, W_OI.sum(0).float(), 0)
    torch.testing.assert_close(x_TI.grad, wanted_TI)


@pytest.mark.parametrize(
    "mask", [torch.ones(2, 12), torch.ones(12, dtype=torch.bool), torch.ones(2, 11, dtype=torch.bool)]
)
def test_a_mask_of_another_form_is_refused(mask):
    prepared = prepare(load("dense", 7, 12)[0], "torch")
    with pytest.raises(UsageError, match="the mask of kept inputs is"):
        linear(prepared, torch.randn(2, 12), None, mask)


class Linear(PackedLinear):
    transposed = False


def test_the_module_takes_a_mask():
    weight, W_OI = load("int", 16, 24)
    bias_O = torch.nn.Parameter(torch.randn(16))
    module = Linear(weight, bias_O, "auto", FP32)
    module.place(torch.device("cpu"))
    x_TI, kept_TI = inputs(2, 24, 0.5, FP32)
    with torch.no_grad():
        close(module(x_TI, kept_TI), x_TI, W_OI, kept_TI, bias_O)
        close(module(x_TI.nan_to_num(0, 0, 0)), x_TI.nan_to_num(0, 0, 0), W_OI, torch.ones_like(kept_TI), bias_O)
