"""Weighted k-means of numbers, for all rows of a matrix at once.

O: output features, K: weights stored of a row, R: rows taken at a time, C: centres of a row's clusters. In a sorted row, S: the
K + 1 places before, between and after the weights, P: those where a cluster may begin or end, L: those C + 1 where one does,
D: the distances between neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

# What a weight counts at least, relative to the mean of its row: those that nothing depends on get what entries are left.
_LEAST_SENSITIVITY = 1e-6


# Between so many places in a row the best clusters are found at once; the steps of Lloyd's algorithm then move their limits
# past them. Both together come within 1 % of the least error, where Lloyd's steps alone may end with twice that.
PLACES = 128


_MOST_STEPS = 100


# Instead of zero as a divisor.
_TINY = torch.finfo(torch.float64).tiny


def midpoints(table_RC: Tensor) -> Tensor:
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
        moved_RL = rows.limits(torch.searchsorted(rows.w_RK, midpoints(centre_RC), right=True))
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
        """The clusters of least error among those that begin and end at `PLACES` places, by dynamic programming.

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
        wanted_P = (torch.arange(PLACES - 2, device=share_RS.device) + 0.5) / (PLACES - 2)
        return self.limits(torch.searchsorted(share_RS, share_RS[:, -1:] * wanted_P))


def _sums(x_RK: Tensor) -> Tensor:
    """Over what is before each place."""
    return nn.functional.pad(x_RK.cumsum(1), (1, 0))
