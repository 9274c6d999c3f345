"""The backend `cuda-2:4`: 2:4 weights on the sparse tensor cores of NVIDIA GPUs, through torch's SparseSemiStructuredTensor.

It is for many tokens at once. A weight keeps 9/16 of its dense bytes, but torch's tensor pads few tokens to 8, and each call
plans the multiplication anew: one token took 0.2 ms where dense took 0.02 (pytorch/pytorch#111339), 64 and 512 tokens were
slower than dense and 1280 faster (pytorch/ao#1460), and the best report for one token, with the algorithm chosen by hand, is
a tenth faster (pytorch/pytorch#115077). A dense copy beside the sparse one would make few tokens fast, and take half as much
memory again as the dense model: there is none. `triton` computes few tokens from the packed weight.

For many tokens the reports disagree: on an H100 sparse took twice as long as dense in one (pytorch/tutorials#3236) and was a
fifth faster in another (NVIDIA/CUDALibrarySamples#203), and cuSPARSELt 0.8.0, which torch for CUDA 13 used until March 2026,
is slower there than the versions before and after it (pytorch/pytorch#177456). So nothing is taken from a table: when the
first weight of a shape is prepared, dense and sparse are timed on the GPU at hand, and weights of that shape stay dense where
dense is faster.

O: output features, I: input features, T: tokens; O', I': these, padded.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import linear, pad
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS

from secateur.kernels.backends import backend
from secateur.kernels.expand import pack_mask
from secateur.kernels.packed import Packed, SparseWeight, map_tensors, padded

_DTYPES = (torch.bfloat16, torch.float16)
# Tokens that dense and sparse are timed at: a prompt. A multiple of 8 and not of 16, so that an algorithm that runs here
# takes every padded number of tokens.
_TIMED_TOKENS = 2040
# From so many tokens on the algorithm found there is used, and the library's own choice below.
_MANY_TOKENS = 256
# cuSPARSELt numbers its algorithms from 0. How many there are depends on version, dtype and shape, and torch does not say
# (pytorch/pytorch#137427); 0.6.2 had 37. A number that does not exist raises RuntimeError.
_ALGORITHMS = 40
# Of a weight that is made dense again: as many rows of the identity are multiplied by at a time.
_COLUMNS_AT_ONCE = 1024


@dataclass(frozen=True)
class TensorCoreWeight:
    """What `linear` multiplies by.

    Attributes:
        shape: (O, I).
        W_OI: a SparseSemiStructuredTensor `[O', I']`, or dense `[O, I]` where that is faster.
        algorithm: the number of cuSPARSELt's for many tokens, 0 with CUTLASS; None where the weight is dense.
    """

    shape: tuple[int, int]
    W_OI: Tensor
    algorithm: int | None


def _sparse_class() -> type[SparseSemiStructuredTensorCUSPARSELT] | type[SparseSemiStructuredTensorCUTLASS]:
    """cuSPARSELt where the build of torch has it, else CUTLASS.

    Named here and not chosen by `to_sparse_semi_structured`, which reads a flag that belongs to the whole process.
    """
    if torch.backends.cusparselt.is_available():
        return SparseSemiStructuredTensorCUSPARSELT
    return SparseSemiStructuredTensorCUTLASS


def _padded_shape(O: int, I: int, dtype: torch.dtype) -> tuple[int, int]:
    """(O', I') as the library needs them: multiples of (16, 16) for cuSPARSELt and of (32, 64) for CUTLASS."""
    rule = _sparse_class()._DTYPE_SHAPE_CONSTRAINTS[dtype]
    return _round_up(O, rule.sparse_min_rows), _round_up(I, rule.sparse_min_cols)


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _compress(W_OI: Tensor) -> Tensor:
    """A dense 2:4 weight of a padded shape as a SparseSemiStructuredTensor."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The PyTorch API of SparseSemiStructuredTensor is in prototype stage")
        sparse_OI = _sparse_class().from_dense(W_OI)
    # The library writes the output token by token, as the next layer reads it, and not the transpose of it. Newer torch
    # always asks for that.
    sparse_OI.fuse_transpose_cusparselt = True
    return sparse_OI


def _with_algorithm(sparse_OI: Tensor, algorithm: int) -> Tensor:
    """The same memory, multiplied by with another algorithm of cuSPARSELt."""
    if algorithm == 0:
        return sparse_OI
    other_OI: Any = sparse_OI.detach()
    other_OI.alg_id_cusparselt = algorithm
    return other_OI


def _milliseconds(x_TI: Tensor, W_OI: Tensor) -> float:
    """How long x W^T takes on the GPU."""
    repeats = 5
    with torch.cuda.device(x_TI.device):
        for _ in range(2):
            linear(x_TI, W_OI)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            linear(x_TI, W_OI)
        end.record()
        end.synchronize()
    return float(start.elapsed_time(end)) / repeats


@cache
def _fastest(O: int, I: int, dtype: torch.dtype, device: torch.device) -> int | None:
    """The fastest algorithm for many tokens and a weight of a padded shape `[O', I']`; None where dense is faster than all.

    Takes up to a second, once for each shape. cuSPARSELt's default is not the fastest on an H100 (pytorch/pytorch#153825),
    and a kernel written for an A100 is slower than dense there (NVIDIA/cutlass#1335).

    Raises:
        RuntimeError: the library cannot multiply by such a weight at all.
    """
    draw = torch.Generator(device).manual_seed(0)
    W_OI = torch.randn(O, I, dtype=dtype, device=device, generator=draw)
    W_OI.view(-1, 4)[:, 2:] = 0
    x_TI = torch.randn(_TIMED_TOKENS, I, dtype=dtype, device=device, generator=draw)
    sparse_OI = _compress(W_OI)
    _milliseconds(x_TI, W_OI)  # an idle GPU is slow at first
    found: int | None = None
    least = _milliseconds(x_TI, W_OI)
    for algorithm in range(_ALGORITHMS if _sparse_class() is SparseSemiStructuredTensorCUSPARSELT else 1):
        try:
            taken = _milliseconds(x_TI, _with_algorithm(sparse_OI, algorithm))
        except RuntimeError:
            if algorithm == 0:
                raise
            continue
        if taken < least:
            found, least = algorithm, taken
    return found


@backend
class SemiStructured:
    """2:4 weights on sparse tensor cores, in bfloat16 and float16."""

    name: ClassVar[str] = "cuda-2:4"
    first_on: ClassVar[dict[str, int]] = {"cuda": 2}

    def why_not(self, weight: Packed, device: torch.device, dtype: torch.dtype) -> str | None:
        if weight.kernels != "sparse":
            return "the weight is quantized, and it takes 2:4 weights that are not: use triton"
        # Weights with less, such as 1:4, would run, but with every second value a stored zero: they stay packed.
        if weight.pattern != (2, 4):
            pattern = "no N:M pattern" if weight.pattern is None else "pattern {}:{}".format(*weight.pattern)
            return f"the weight has {pattern}, and it takes 2:4 only: use triton"
        if device.type != "cuda":
            return f"it needs a CUDA device, not {device.type}: use auto or dense"
        if dtype not in _DTYPES:
            return f"it computes in bfloat16 and float16, not {str(dtype).removeprefix('torch.')}: use triton or dense"
        if not torch.cuda.is_available():
            return "torch finds no CUDA device here: use dense on the CPU"
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            return f"the device has compute capability {major}.{minor}, and sparse tensor cores begin at 8.0: use dense"
        if major > 8 and not torch.backends.cusparselt.is_available():
            # pytorch/pytorch#132928
            return (
                f"this build of torch has no cuSPARSELt, and its CUTLASS kernels take compute capability 8.x, not "
                f"{major}.{minor}: use triton or dense"
            )
        return None

    def prepare(self, weight: Packed, device: torch.device, dtype: torch.dtype) -> TensorCoreWeight:
        O, I = weight.shape
        rows, columns = _padded_shape(O, I, dtype)
        # Before the weight is unpacked, so that the two do not take memory at the same time.
        algorithm = _fastest(rows, columns, dtype, device)
        W_OI = map_tensors(weight, lambda tensor: tensor.to(device)).dense().to(dtype)
        if algorithm is None:
            return TensorCoreWeight((O, I), W_OI, None)
        # Rows and columns of zeros are 2:4 too.
        return TensorCoreWeight((O, I), _compress(pad(W_OI, (0, columns - I, 0, rows - O))), algorithm)

    def linear(self, weight: Any, x_TI: Tensor, bias_O: Tensor | None) -> Tensor:
        if weight.algorithm is None:
            return linear(x_TI, weight.W_OI.to(x_TI.dtype), bias_O)
        (O, I), T = weight.shape, len(x_TI)
        W_OI = _with_algorithm(weight.W_OI, weight.algorithm if T >= _MANY_TOKENS else 0)
        multiple = _sparse_class()._DTYPE_SHAPE_CONSTRAINTS[W_OI.dtype].dense_min_rows
        # Torch's tensor pads tokens, but not columns, and not from none (an expert that no token was sent to).
        tokens, columns = _round_up(max(T, 1), multiple), W_OI.shape[1]
        padded_TI = x_TI.to(W_OI.dtype)
        if (tokens, columns) != (T, I):
            padded_TI = pad(padded_TI, (0, columns - I, 0, tokens - T))
        # It hands the library an address and takes the rows to lie one after the other.
        y_TO = linear(padded_TI.contiguous(), W_OI)[:T, :O].to(x_TI.dtype)
        return y_TO if bias_O is None else y_TO + bias_O

    def gradient(self, weight: Any, grad_TO: Tensor) -> Tensor:
        if weight.algorithm is None:
            return grad_TO @ weight.W_OI.to(grad_TO.dtype)
        # The library multiplies by W^T only, which columns of W come out of.
        pieces = [grad_TO @ W_CO.T for W_CO in self._columns(weight, grad_TO.dtype)]
        return torch.cat(pieces, 1)

    def _columns(self, weight: TensorCoreWeight, dtype: torch.dtype) -> Iterator[Tensor]:
        """The dense weight some columns at a time, each `[C, O]`: products with columns of the identity, which are exact."""
        I, device = weight.shape[1], weight.W_OI.device
        for first in range(0, I, _COLUMNS_AT_ONCE):
            count = min(_COLUMNS_AT_ONCE, I - first)
            identity_CI = torch.zeros(count, I, dtype=dtype, device=device)
            identity_CI[:, first : first + count].fill_diagonal_(1)
            yield self.linear(weight, identity_CI, None)

    def packed(self, weight: Any) -> SparseWeight:
        if weight.algorithm is None:
            W_OI = weight.W_OI
        else:
            W_OI = torch.cat(list(self._columns(weight, weight.W_OI.dtype))).T.contiguous()
        return _two_of_four(W_OI)


def _two_of_four(W_OI: Tensor) -> SparseWeight:
    """A dense 2:4 weight as it is stored: where fewer than two of four are nonzero, the first zeros are kept, too."""
    O, I = W_OI.shape
    group_G4 = (W_OI == 0).view(-1, 4)
    kept_G2 = group_G4.sort(stable=True).indices[:, :2]
    keep_OI = torch.zeros_like(group_G4).scatter_(1, kept_G2, True).view(O, I)
    start_O1 = torch.arange(O + 1, device=W_OI.device) * (I // 2)
    return SparseWeight((O, I), padded(W_OI[keep_OI]), pack_mask(keep_OI), start_O1, (2, 4))
