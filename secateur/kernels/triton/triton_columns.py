"""The Triton kernels for weights by input feature. Imported only where they are used: Triton may not be installed.

Up to four tokens: outputs lie side by side in a tile, and the weights of an input that no token keeps are not loaded. Inputs
are split, as there are too few outputs to fill a GPU, and the sums of the splits are added up in float32, always in the same
order.
Many tokens: the weight is expanded, some inputs at a time, into memory, and torch multiplies.

C: inputs of a tile, R: its outputs, P: tokens, S: splits. O: output features, I: input features, T: tokens.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from secateur.kernels.backends import KEPT_TOKENS
from secateur.kernels.torch_backend import times_rows
from secateur.kernels.triton.triton_linear import EXPANDED, PROGRAMS, add_splits, store_dense
from secateur.kernels.triton.triton_tiles import coded_tile, sparse_tile
from secateur.kernels.triton.triton_weight import CHUNK, TritonWeight

INPUTS, OUTPUTS, WARPS = 16, CHUNK, 4
MAX_SPLITS = 32


@triton.jit
def _columns_tile(values_V, bitmask_OB, start_OW, codes_S, scale, zero, first, output, end, O, kept_C, FORM: tl.constexpr,
                  BITS: tl.constexpr, GROUP: tl.constexpr, C: tl.constexpr, R: tl.constexpr):  # fmt: skip
    """The weights of inputs `first` to `first + C − 1`, as far as they come before `end` and a mask, if there is one, keeps
    them, and of outputs `output` to `output + R − 1`."""
    if FORM == "bitmap":
        W_CR = sparse_tile(values_V, bitmask_OB, start_OW, first, output, end, O, C, R, kept_C)
    elif FORM == "dense":
        input_C1 = (first + tl.arange(0, C)).to(tl.int64)[:, None]
        output_1R = (output + tl.arange(0, R))[None, :]
        inside_CR = (input_C1 < end) & (output_1R < O)
        if kept_C is not None:
            inside_CR = inside_CR & kept_C[:, None]
        W_CR = tl.load(values_V + input_C1 * O + output_1R, mask=inside_CR, other=0.0)
    else:
        W_CR = coded_tile(codes_S, scale, zero, None, first, output, end, O, C, R, BITS, FORM, 1, GROUP, True, kept_C)
    return W_CR


@triton.jit
def _columns_linear(x_TI, kept_TI, y, bias_O, O, I, T, values_V, bitmask_OB, start_OW, codes_S, scale, zero,
                    FORM: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, C: tl.constexpr, R: tl.constexpr,
                    P: tl.constexpr, S: tl.constexpr):  # fmt: skip
    """A tile `[P, R]` of the output, or a split's share of it."""
    output = tl.program_id(0) * R
    output_R = output + tl.arange(0, R)
    split = tl.program_id(1)
    token_P1 = tl.arange(0, P)[:, None]
    sum_PR = tl.full([P, R], 0.0, tl.float32)
    for first in range(split * C, I, S * C):
        input_1C = (first + tl.arange(0, C))[None, :]
        at_PC = token_P1.to(tl.int64) * I + input_1C
        inside_PC = (token_P1 < T) & (input_1C < I)
        if kept_TI is not None:
            inside_PC = inside_PC & (tl.load(kept_TI + at_PC, mask=inside_PC, other=0) != 0)
        # A token that does not keep an input which another keeps has a zero there, whatever the input is.
        x_PC = tl.load(x_TI + at_PC, mask=inside_PC, other=0.0).to(tl.float32)
        kept_C = tl.max(inside_PC.to(tl.int32), 0) != 0
        W_CR = _columns_tile(
            values_V, bitmask_OB, start_OW, codes_S, scale, zero, first, output, I, O, kept_C, FORM, BITS, GROUP, C, R
        ).to(tl.float32)
        sum_PR += tl.sum(x_PC[:, :, None] * W_CR[None, :, :], 1)
    inside_PR = (token_P1 < T) & (output_R < O)[None, :]
    if S == 1 and bias_O is not None:
        sum_PR += tl.load(bias_O + output_R, mask=output_R < O, other=0.0).to(tl.float32)[None, :]
    at_PR = (split * T + token_P1.to(tl.int64)) * O + output_R[None, :]
    tl.store(y + at_PR, sum_PR.to(y.dtype.element_ty), mask=inside_PR)


@triton.jit
def _columns_expand(W_IO, first_input, end_input, O, values_V, bitmask_OB, start_OW, codes_S, scale, zero,
                    FORM: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, C: tl.constexpr, R: tl.constexpr):  # fmt: skip
    """A tile of inputs `first_input` to `end_input − 1` of the weight, dense."""
    first = first_input + tl.program_id(0) * C
    output = tl.program_id(1) * R
    W_CR = _columns_tile(
        values_V, bitmask_OB, start_OW, codes_S, scale, zero, first, output, end_input, O, None, FORM, BITS, GROUP, C, R
    )
    store_dense(W_CR, W_IO, first, output, first_input, end_input, O, C, R)


def linear(weight: TritonWeight, x_TI: Tensor, bias_O: Tensor | None, kept_TI: Tensor | None = None) -> Tensor:
    """x W^T + bias, `[T, O]` in the dtype of x, which is contiguous, as is the mask of what is kept of it."""
    O, T = weight.shape[0], len(x_TI)
    if T == 0:
        return x_TI.new_empty(0, O)
    with torch.cuda.device_of(x_TI):
        if T > KEPT_TOKENS:
            y_TO = times_rows(x_TI, O, _expanded(weight, x_TI))
            return y_TO if bias_O is None else y_TO + bias_O.to(y_TO.dtype)
        return _tiled(weight, x_TI, bias_O, kept_TI)


def _tiled(weight: TritonWeight, x_TI: Tensor, bias_O: Tensor | None, kept_TI: Tensor | None) -> Tensor:
    O, I = weight.shape
    T = len(x_TI)
    tiles = -(-O // OUTPUTS)
    S = min(max(1, PROGRAMS // tiles), -(-I // INPUTS), MAX_SPLITS)
    y_TO = x_TI.new_empty(T, O)
    out = y_TO if S == 1 else x_TI.new_empty(S, T, O, dtype=torch.float32)
    sizes = {"O": O, "I": I, "T": T, "C": INPUTS, "R": OUTPUTS, "P": triton.next_power_of_2(T), "S": S}
    kept = None if kept_TI is None else kept_TI.view(torch.uint8)
    _columns_linear[tiles, S](x_TI, kept, out, bias_O, **sizes, **weight.tensors, **weight.constants, num_warps=WARPS)
    if S > 1:
        add_splits[(-(-T * O // 1024),)](out, y_TO, bias_O, T * O, O, S=S, BLOCK=1024)
    return y_TO


def gradient(weight: TritonWeight, grad_TO: Tensor) -> Tensor:
    """grad W, `[T, I]` in the dtype of grad, which is contiguous."""
    grad_TI = grad_TO.new_empty(len(grad_TO), weight.shape[1])
    with torch.cuda.device_of(grad_TO):
        for first, W_CO in _expanded(weight, grad_TO):
            grad_TI[:, first : first + len(W_CO)] = grad_TO @ W_CO.T
    return grad_TI


def _expanded(weight: TritonWeight, like: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The dense weight some inputs at a time, `[C, O]`, with the number of the first: in the dtype and on the device of a
    tensor, and in memory that is used again."""
    O, I = weight.shape
    step = min(I, max(EXPANDED // O // INPUTS, 1) * INPUTS)
    W_IO = like.new_empty(step, O)
    for first in range(0, I, step):
        end = min(first + step, I)
        grid = (-(-(end - first) // INPUTS), -(-O // OUTPUTS))
        sizes = {"first_input": first, "end_input": end, "O": O, "C": INPUTS, "R": OUTPUTS}
        _columns_expand[grid](W_IO, **sizes, **weight.tensors, **weight.constants)
        yield first, W_IO[: end - first]
