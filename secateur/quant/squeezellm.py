"""SqueezeLLM: "SqueezeLLM: Dense-and-Sparse Quantization", Kim et al. 2023, arXiv:2306.07629.

O: output features, I: input features, K: weights stored of a row, N: outliers, C: entries of a table, the centres of a
row's clusters.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor

from secateur.core.options import check_options, option
from secateur.core.pruned import Pruned
from secateur.core.quantized import Outliers, Quantized, place_kept, take_kept
from secateur.core.registry import quantizer
from secateur.core.stack import Stack
from secateur.core.stats import Level
from secateur.formats.layouts.codebook import Table
from secateur.quant.grid_options import MOST_OUTLIERS, bits_option, outlier_share_option
from secateur.quant.storage import storage_dtype
from secateur.solvers.kmeans import PLACES, midpoints, weighted_kmeans

SENSITIVITIES = ("fisher", "hessian")
# Float64 values of one temporary.
_CHUNK_VALUES = 1 << 18


@quantizer
@dataclass(frozen=True)
class SqueezeLLM:
    """A lookup table for each row, made by k-means with weights of their own sensitivity, and a few weights kept in 16 bits.

    The importance of a weight is its squared gradient (`fisher`, equation 4), or the sum of the squares of its input
    (`hessian`), which is the diagonal of the layer's own Hessian. Weights are kept in 16 bits for their magnitude and for their
    importance (section 4.2); they may be the same.
    """

    bits: int = bits_option(4, (2, 3, 4), "a table of 8 bits takes as much as a row of a small model")
    sensitivity: str = option(
        "fisher", "Importance of a weight: fisher (squared gradients) or hessian (input energy).", choices=SENSITIVITIES
    )
    outlier_share: float = outlier_share_option(0.004)
    sensitive_share: float = option(
        0.0005, "Fraction of weights kept in 16 bits for their importance.", low=0, high=MOST_OUTLIERS, share=True
    )

    name: ClassVar[str] = "squeezellm"
    paper: ClassVar[str] = "Kim et al. 2023, arXiv:2306.07629"
    all_bits: ClassVar[tuple[int, ...]] = (2, 3, 4)

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def level(self) -> Level:
        return Level.NONE if self.needs_fisher else Level.MOMENTS

    @property
    def needs_fisher(self) -> bool:
        return self.sensitivity == "fisher"

    def quantize(self, stack: Stack, pruned: Pruned | None = None) -> list[Quantized]:
        """Fit the tables to the weights (to the kept ones, as the pruner left them), each linear for itself.

        Raises:
            ValueError: a weight or its sensitivity is not finite, or there are no squared gradients and they are needed.
        """
        W_OI = (stack.W_OI if pruned is None else pruned.W_OI).contiguous()
        if not self.needs_fisher:
            sensitivity_OI = stack.stats.square_I.expand_as(W_OI)
        elif stack.fisher_OI is None:
            raise ValueError("squeezellm needs the squared gradients of the weights")
        else:
            sensitivity_OI = stack.fisher_OI
        for what, x_OI in (("weights", W_OI), (f"sensitivities ({self.sensitivity})", sensitivity_OI)):
            if not torch.isfinite(x_OI).all():
                raise ValueError(f"squeezellm cannot make a table: some {what} are not finite")
        found = []
        last = 0
        for size in stack.rows:
            first, last = last, last + size
            keep = None if pruned is None else pruned.keep_OI[first:last]
            found.append(self._quantize(W_OI[first:last], sensitivity_OI[first:last], keep, stack.dtype))
        return found

    def _quantize(self, W_OI: Tensor, sensitivity_OI: Tensor, keep_OI: Tensor | None, dtype: torch.dtype) -> Quantized:
        half = storage_dtype(W_OI, dtype)
        if keep_OI is None:
            W_OK, sensitivity_OK, stored_OK = W_OI, sensitivity_OI, torch.ones_like(W_OI, dtype=torch.bool)
        else:
            W_OK, sensitivity_OK, stored_OK = (take_kept(x_OI, keep_OI) for x_OI in (W_OI, sensitivity_OI, keep_OI))
        outlier_OK = _largest(W_OK.abs(), stored_OK, self.outlier_share)
        outlier_OK |= _largest(sensitivity_OK, stored_OK, self.sensitive_share)

        codes = _make_codes(self.bits, W_OK, sensitivity_OK, stored_OK & ~outlier_OK, half)
        outliers = None
        if outlier_OK.any():
            row_N, stored_N = outlier_OK.nonzero(as_tuple=True)
            column_N = stored_N if keep_OI is None else place_kept(outlier_OK, keep_OI).nonzero()[:, 1]
            entry_N = codes.table_OC[row_N, codes.code_OK[row_N, stored_N].long()]
            outliers = Outliers(outlier_OK.sum(1), column_N, (W_OK[row_N, stored_N] - entry_N.float()).to(half))
        return Quantized(codes, (W_OI.shape[0], W_OI.shape[1]), dtype, keep_OI, outliers=outliers)


def _largest(score_OK: Tensor, stored_OK: Tensor, share: float) -> Tensor:
    """A mask of the largest scores, none negative: so large a share of all that are stored, rounded down."""
    # As a fraction, because 0.29 · 100 is less than 29 in floating point.
    count = int(Fraction(str(share)) * int(stored_OK.sum()))
    chosen = torch.where(stored_OK, score_OK, -1).flatten().topk(count, sorted=False).indices
    return torch.zeros_like(stored_OK).flatten().index_fill_(0, chosen, True).view_as(stored_OK)


def _make_codes(bits: int, W_OK: Tensor, sensitivity_OK: Tensor, dense_OK: Tensor, half: torch.dtype) -> Table:
    """Tables for the dense weights, and of all weights the nearest entries."""
    code_OK = torch.empty_like(W_OK, dtype=torch.uint8)
    table_OC = torch.zeros(len(W_OK), 2**bits, dtype=half, device=W_OK.device)
    rows = max(1, _CHUNK_VALUES // max(W_OK.shape[1], PLACES**2))
    for first in range(0, len(W_OK) if W_OK.numel() else 0, rows):
        chunk = slice(first, first + rows)
        table_OC[chunk] = weighted_kmeans(W_OK[chunk], sensitivity_OK[chunk], dense_OK[chunk], 2**bits)
        code_OK[chunk] = torch.searchsorted(midpoints(table_OC[chunk].float()), W_OK[chunk])
    return Table(bits, code_OK, table_OC)
