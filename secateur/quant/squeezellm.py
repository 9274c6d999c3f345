"""SqueezeLLM: "SqueezeLLM: Dense-and-Sparse Quantization", Kim et al. 2023, arXiv:2306.07629.

O: output features, I: input features, K: weights stored of a row, R: rows taken at a time, N: outliers, C: entries of a table,
which are the centres of a row's clusters. In a sorted row, S: the K + 1 places before, between and after the weights, P: those
where a cluster may begin or end, L: those C + 1 where one does, D: the distances between neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor, nn

from secateur.calibration.stats import InputStats, Level
from secateur.codes import Outliers, Quantized, Table, place_kept, take_kept
from secateur.errors import UsageError
from secateur.prune.registry import Pruned
from secateur.quant.registry import quantizer, storage_dtype
from secateur.quant.spqr import check_share

SENSITIVITIES = ("fisher", "hessian")
# What a weight counts at least, relative to the mean of its row: those that nothing depends on get what entries are left.
_LEAST_SENSITIVITY = 1e-6
# Between so many places in a row the best clusters are found at once; the steps of Lloyd's algorithm then move their limits
# past them. Both together come within 1 % of the least error, where Lloyd's steps alone may end with twice that.
_PLACES = 128
_MOST_STEPS = 100
# Instead of zero as a divisor.
_TINY = torch.finfo(torch.float64).tiny
# Float64 values of one temporary.
_CHUNK_VALUES = 1 << 18


@quantizer
@dataclass(frozen=True)
class SqueezeLLM:
    """A lookup table for each row, made by k-means with weights of their own sensitivity, and a few weights kept in 16 bits.

    Attributes:
        bits: 2, 3 or 4.
        sensitivity: what the squared error of a weight counts. `fisher`: its squared gradient (equation 4). `hessian`: the
            sum of the squares of its input, which is the diagonal of the layer's own Hessian.
        outlier_share: of the weights, kept for their magnitude (section 4.2).
        sensitive_share: of the weights, kept for their sensitivity. They may be the same.
    """

    bits: int = 4
    sensitivity: str = "fisher"
    outlier_share: float = 0.004
    sensitive_share: float = 0.0005

    name: ClassVar[str] = "squeezellm"
    all_bits: ClassVar[tuple[int, ...]] = (2, 3, 4)

    def __post_init__(self) -> None:
        if self.bits not in self.all_bits:
            raise UsageError(
                f"--bits {self.bits} is not possible: squeezellm has tables of {', '.join(map(str, self.all_bits))} bits, "
                "since one of 8 takes as much as a row of a small model"
            )
        if self.sensitivity not in SENSITIVITIES:
            raise UsageError(f"--sensitivity {self.sensitivity} is not known: it can be {' or '.join(SENSITIVITIES)}")
        check_share("outlier-share", self.outlier_share)
        check_share("sensitive-share", self.sensitive_share)

    @property
    def level(self) -> Level:
        return Level.NONE if self.needs_fisher else Level.MOMENTS

    @property
    def needs_fisher(self) -> bool:
        return self.sensitivity == "fisher"

    def solve(
        self,
        W_OI: Tensor,
        stats: InputStats,
        sizes: Sequence[int],
        dtype: torch.dtype,
        pruned: Pruned | None = None,
        fisher_OI: Tensor | None = None,
    ) -> list[Quantized]:
        """Fit the tables to the weights (to the kept ones, as the pruner left them), each linear for itself.

        Raises:
            ValueError: a weight or its sensitivity is not finite, or there are no squared gradients and they are needed.
        """
        W_OI = (W_OI if pruned is None else pruned.W_OI).contiguous()
        if not self.needs_fisher:
            sensitivity_OI = stats.square_I.expand_as(W_OI)
        elif fisher_OI is None:
            raise ValueError("squeezellm needs the squared gradients of the weights")
        else:
            sensitivity_OI = fisher_OI
        for what, x_OI in (("weights", W_OI), (f"sensitivities ({self.sensitivity})", sensitivity_OI)):
            if not torch.isfinite(x_OI).all():
                raise ValueError(f"squeezellm cannot make a table: some {what} are not finite")
        found = []
        last = 0
        for size in sizes:
            first, last = last, last + size
            keep = None if pruned is None else pruned.keep_OI[first:last]
            found.append(self._quantize(W_OI[first:last], sensitivity_OI[first:last], keep, dtype))
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
    rows = max(1, _CHUNK_VALUES // max(W_OK.shape[1], _PLACES**2))
    for first in range(0, len(W_OK) if W_OK.numel() else 0, rows):
        chunk = slice(first, first + rows)
        table_OC[chunk] = weighted_kmeans(W_OK[chunk], sensitivity_OK[chunk], dense_OK[chunk], 2**bits)
        code_OK[chunk] = torch.searchsorted(_midpoints(table_OC[chunk].float()), W_OK[chunk])
    return Table(bits, code_OK, table_OC)


def _midpoints(table_RC: Tensor) -> Tensor:
    return (table_RC[:, 1:] + table_RC[:, :-1]) / 2


def weighted_kmeans(w_RK: Tensor, sensitivity_RK: Tensor, dense_RK: Tensor, clusters: int) -> Tensor:
    """The centres, rising, for which Σ sensitivity · (w − nearest centre)² is about the least, in every row.

    Args:
        w_RK, sensitivity_RK: finite, float32; K ≥ 1.
        dense_RK: bool, the weights that count.
        clusters: C. Where there are no more different weights the centres are those weights.

    Returns:
        centre_RC: float64; zeros for a row without weights.
    """
    rows = _SortedRows.of(w_RK, sensitivity_RK, dense_RK)
    limit_RL = rows.best_limits(clusters)
    centre_RC = rows.means(limit_RL)
    for _ in range(_MOST_STEPS):
        moved_RL = rows.limits(torch.searchsorted(rows.w_RK, _midpoints(centre_RC), right=True))
        if torch.equal(moved_RL, limit_RL):
            break
        limit_RL = moved_RL
        centre_RC = rows.means(limit_RL)
    return centre_RC


@dataclass(frozen=True)
class _SortedRows:
    """Rising weights, and sums over those before each of the K + 1 places in a row; all float64.

    Attributes:
        w_RK: the weights; those that do not count are as large as the largest that does.
        mass_RK: what the squared error of each counts.
        mass_RS, moment_RS, energy_RS: sums of mass, mass · w and mass · w².
    """

    w_RK: Tensor
    mass_RK: Tensor
    mass_RS: Tensor
    moment_RS: Tensor
    energy_RS: Tensor

    @classmethod
    def of(cls, w_RK: Tensor, sensitivity_RK: Tensor, dense_RK: Tensor) -> _SortedRows:
        mass_RK = torch.where(dense_RK, sensitivity_RK, 0).double()
        mean_R1 = mass_RK.sum(1, keepdim=True) / dense_RK.sum(1, keepdim=True).clamp(min=1)
        # In a row without any sensitivity all weights count alike, then.
        mass_RK = mass_RK.div_(mean_R1.clamp_(min=_TINY)).clamp_(min=_LEAST_SENSITIVITY).mul_(dense_RK)
        largest_R1 = torch.where(dense_RK, w_RK, -torch.inf).amax(1, keepdim=True)
        largest_R1 = torch.where(dense_RK.any(1, keepdim=True), largest_R1, 0)
        # What does not count comes after all that does.
        sorted_RK, order_RK = torch.where(dense_RK, w_RK, torch.inf).sort(1)
        w_RK, mass_RK = sorted_RK.minimum(largest_R1).double(), mass_RK.gather(1, order_RK)
        moment_RK = mass_RK * w_RK
        return cls(w_RK, mass_RK, _sums(mass_RK), _sums(moment_RK), _sums(moment_RK * w_RK))

    def limits(self, inner_RL: Tensor) -> Tensor:
        """Where the clusters begin and end, from where they meet."""
        return nn.functional.pad(nn.functional.pad(inner_RL, (1, 0)), (0, 1), value=self.w_RK.shape[1])

    def means(self, limit_RL: Tensor) -> Tensor:
        """The weighted mean of each cluster. An empty one gets the weight below it."""
        mass_RC, moment_RC = (x_RS.gather(1, limit_RL).diff(dim=1) for x_RS in (self.mass_RS, self.moment_RS))
        last_RC = self.w_RK.gather(1, (limit_RL[:, 1:] - 1).clamp_(min=0))
        first_RC = self.w_RK.gather(1, limit_RL[:, :-1].clamp(max=self.w_RK.shape[1] - 1))
        # The difference of two long sums is not exact, but the mean lies between the weights.
        mean_RC = torch.minimum(torch.maximum(moment_RC / mass_RC, first_RC), last_RC)
        return torch.where(mass_RC > 0, mean_RC, last_RC)

    def best_limits(self, clusters: int) -> Tensor:
        """The clusters of least error among those that begin and end at `_PLACES` places, by dynamic programming.

        The least error of c clusters that end at a place is that of c − 1 clusters that end at an earlier one (or there) and
        of one more between the two, for the best earlier place.
        """
        place_RP = self._places()
        # Of a cluster from one place (last dimension) to another.
        mass_RPP, moment_RPP, error_RPP = (
            x_RP[:, :, None] - x_RP[:, None]
            for x_RP in (x_RS.gather(1, place_RP) for x_RS in (self.mass_RS, self.moment_RS, self.energy_RS))
        )
        error_RPP -= moment_RPP.square_().div_(mass_RPP.clamp_(min=_TINY))
        # Relative to the energy of the row it fits float32, which is faster.
        error_RPP = error_RPP.clamp_(min=0).div_(self.energy_RS[:, -1:, None].clamp(min=_TINY)).float()
        backwards_PP = torch.ones(error_RPP.shape[1:], dtype=torch.bool, device=error_RPP.device).triu(1)
        error_RPP.masked_fill_(backwards_PP, torch.inf)

        least = [error_RPP[:, :, 0]]
        for _ in range(2, clusters):
            least.append((error_RPP + least[-1][:, None]).amin(2))
        end_R1 = torch.full_like(place_RP[:, :1], place_RP.shape[1] - 1)
        inner: list[Tensor] = []
        for least_RP in reversed(least):
            error_RP = error_RPP.gather(1, end_R1[:, :, None].expand(-1, 1, place_RP.shape[1])).squeeze(1)
            end_R1 = error_RP.add_(least_RP).argmin(1, keepdim=True)
            inner.insert(0, place_RP.gather(1, end_R1))
        return self.limits(torch.cat(inner, 1))

    def _places(self) -> Tensor:
        """Places between different weights, the denser the more there is to gain; all of them where they are few.

        Two weights as one cluster have the error h · d², with d their distance and h their masses' product by their sum. The
        best clusters, where they are many, have equal shares of the sum of its cube roots (as in companding). Half of the
        places are spread by that, half evenly over the different weights.
        """
        distance_RD = self.w_RK.diff(dim=1)
        mass_RD, next_RD = self.mass_RK[:, :-1], self.mass_RK[:, 1:]
        gain_RD = (mass_RD * next_RD / (mass_RD + next_RD).clamp(min=_TINY) * distance_RD.square()).pow_(1 / 3)
        different_RD = (distance_RD > 0).double()
        density_RD = different_RD / different_RD.sum(1, keepdim=True).clamp(min=_TINY)
        density_RD += gain_RD / gain_RD.sum(1, keepdim=True).clamp(min=_TINY)
        share_RS = nn.functional.pad(density_RD, (1, 1)).cumsum(1)
        wanted_P = (torch.arange(_PLACES - 2, device=share_RS.device) + 0.5) / (_PLACES - 2)
        return self.limits(torch.searchsorted(share_RS, share_RS[:, -1:] * wanted_P))


def _sums(x_RK: Tensor) -> Tensor:
    """Over what is before each place."""
    return nn.functional.pad(x_RK.cumsum(1), (1, 0))
