"""Products with some inputs only: by the backend `torch`, which is slow, by modules, and what is refused.

O: output features, I: input features, T: tokens.
"""

import pytest
import torch
from column_weights import FP32, close, inputs, load

from secateur.errors import UsageError
from secateur.formats.layouts.bitmap import Bitmap
from secateur.kernels.backends import linear, prepare
from secateur.kernels.module import PackedLinear


@pytest.mark.parametrize("backend", ["torch", "dense"])
@pytest.mark.parametrize("kind", ["dense", "bitmap", "int"])
@pytest.mark.parametrize("T", [1, 3, 9])
def test_what_is_not_kept_is_left_out(kind, T, backend):
    weight, W_OI, terms_OI = load(kind, 37, 29)
    x_TI, kept_TI = inputs(T, 29, 0.5, FP32)
    prepared = prepare(weight, backend)
    close(linear(prepared, x_TI, None, kept_TI), x_TI, W_OI, terms_OI, kept_TI)
    close(linear(prepared, x_TI[None], None, kept_TI[None])[0], x_TI, W_OI, terms_OI, kept_TI)


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_any_layout_takes_a_mask(backend):
    W_OI, bias_O = torch.randn(7, 12), torch.randn(7)
    prepared = prepare(Bitmap().load(Bitmap().pack(W_OI)), backend)
    x_TI, kept_TI = inputs(2, 12, 0.5, FP32)
    close(linear(prepared, x_TI, bias_O, kept_TI), x_TI, W_OI.double(), W_OI.double().abs(), kept_TI, bias_O)


def test_gradients_are_those_of_kept_inputs():
    weight, W_OI, _ = load("dense", 7, 12, FP32)
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
    weight, W_OI, terms_OI = load("int", 16, 24)
    bias_O = torch.nn.Parameter(torch.randn(16))
    module = Linear(weight, bias_O, "auto", FP32)
    module.place(torch.device("cpu"))
    x_TI, kept_TI = inputs(2, 24, 0.5, FP32)
    with torch.no_grad():
        close(module(x_TI, kept_TI), x_TI, W_OI, terms_OI, kept_TI, bias_O)
        x_TI = x_TI.masked_fill(~kept_TI, 1)
        close(module(x_TI), x_TI, W_OI, terms_OI, None, bias_O)
