"""Which sets of weights may be kept: a share of each row, N of every M, or whole units.

O: output features, I: input features, G: groups of M.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from secateur.errors import UsageError


@dataclass(frozen=True)
class Unstructured:
    """A share `sparsity` of the weights is zero, anywhere in the unit that the method compares (a row, say)."""

    sparsity: float

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise UsageError(
                f"sparsity {self.sparsity:g} is outside [0, 1): give the share of weights to remove, like 0.5 or 50%"
            )

    def pruned(self, count: int) -> int:
        """How many of `count` weights are removed: never more than asked for."""
        # The small term keeps 0.29 · 100 = 28.999999999999996 from losing a weight, and must not add the last one.
        return min(int(self.sparsity * count + 1e-9), max(count - 1, 0))

    def __str__(self) -> str:
        return f"{self.sparsity:.4g} unstructured"


@dataclass(frozen=True)
class NM:
    """Of every `m` consecutive inputs of a row, `n` are kept."""

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 0 < self.n < self.m:
            raise UsageError(
                f"pattern {self.n}:{self.m} is not possible: N:M keeps N of every M weights, with 0 < N < M, like 2:4"
            )

    @property
    def sparsity(self) -> float:
        return 1 - self.n / self.m

    def check_divides(self, features: int) -> None:
        """Raise ValueError unless the inputs divide into whole groups."""
        if features % self.m:
            raise ValueError(f"{features} input features do not divide into groups of {self.m}")

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


#: What may be removed as a whole.
UNITS = ("neurons", "heads", "blocks")


@dataclass(frozen=True)
class Structured:
    """Whole units of a model go, and with them every weight that computes or reads them.

    Attributes:
        sparsity: share of the weights of all blocks that go.
        units: of which kinds, some of `UNITS`.
        multiple: that the number of neurons left in a block is of; None: of 32, where the model's own number is.
        refit: whether the weights that read the units that stay make up for those that go.
        per_layer: whether each block may have widths of its own, which only our own loader builds.
    """

    sparsity: float
    units: tuple[str, ...] = ("neurons",)
    multiple: int | None = None
    refit: bool = True
    per_layer: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.sparsity < 1:
            raise UsageError(
                f"sparsity {self.sparsity:g} is outside (0, 1): give the share of the blocks' weights to remove, like 25%"
            )
        unknown = [unit for unit in self.units if unit not in UNITS]
        if unknown or not self.units or len(set(self.units)) < len(self.units):
            raise UsageError(
                f"`units` {','.join(self.units)!r} is not possible: it can be {', '.join(UNITS)}, or several"
            )
        if self.multiple is not None and self.multiple < 1:
            raise UsageError(f"`multiple` is {self.multiple}: it must be at least 1")

    def __str__(self) -> str:
        return f"{self.sparsity:.4g} structured ({', '.join(self.units)})"


Pattern = Unstructured | NM

# Up to this many scores a group, comparing all pairs is faster than sorting.
_MOST_COMPARED = 8
# Scores that are compared at a time.
_PIECE = 2**22


def parse_pattern(pattern: str | None, sparsity: float | None) -> Pattern:
    """The pattern behind `pattern` and `sparsity` of a recipe.

    A pattern `N:M` implies its sparsity 1 − N/M; `sparsity` may be given as well if it says the same.

    Raises:
        UsageError: neither is given, they contradict each other, or one makes no sense.
    """
    if pattern is None or pattern == "unstructured":
        if sparsity is None:
            raise UsageError("how much to prune is not said: give `sparsity` (a share such as 0.5) or `pattern` N:M")
        if sparsity == 0:
            raise UsageError("`sparsity` 0 removes nothing: give the share of weights to remove, like 0.5 or 50%")
        return Unstructured(sparsity)
    match = re.fullmatch(r"(\d{1,4}):(\d{1,4})", pattern)
    if not match:
        raise UsageError(f"pattern {pattern!r} is not understood: use N:M such as 2:4, 'unstructured' or 'structured'")
    found = NM(int(match[1]), int(match[2]))
    if sparsity is not None and not abs(sparsity - found.sparsity) <= 1e-9:
        raise UsageError(
            f"`pattern` {pattern} means a sparsity of {found.sparsity:g}, but `sparsity` says {sparsity:g}: drop one"
        )
    return found


def drop_lowest(score_RC: Tensor, count: int) -> Tensor:
    """Mask of the `count` lowest scores in every row; of equal scores the first ones are dropped.

    Args:
        score_RC: any rows of scores, no NaN.

    Returns:
        drop_RC: bool, exactly `count` true in every row.
    """
    if count == 0:
        return torch.zeros_like(score_RC, dtype=torch.bool)
    # Some rows at a time: what is compared takes many times the memory of the scores.
    pieces = score_RC.split(max(1, _PIECE // max(1, score_RC.shape[1])))
    return torch.cat([_drop_lowest(piece_RC, count) for piece_RC in pieces])


def _drop_lowest(score_RC: Tensor, count: int) -> Tensor:
    threshold_R1 = _kth_smallest(score_RC, count)
    drop_RC = score_RC <= threshold_R1
    surplus_R1 = drop_RC.sum(1, keepdim=True) - count
    if surplus_R1.any():
        tied_RC = score_RC == threshold_R1
        allowed_R1 = tied_RC.sum(1, keepdim=True) - surplus_R1
        drop_RC &= ~tied_RC | (tied_RC.cumsum(1) <= allowed_R1)
    return drop_RC


def _kth_smallest(score_RC: Tensor, k: int) -> Tensor:
    if score_RC.device.type == "cpu":
        # Ten to fifty times as fast as torch's kthvalue.
        exact_RC = score_RC.detach() if score_RC.dtype == torch.float64 else score_RC.detach().float()
        return torch.from_numpy(np.partition(exact_RC.numpy(), k - 1, axis=1)[:, k - 1 : k])
    return score_RC.kthvalue(k, dim=1, keepdim=True).values


def keep_best(score_OI: Tensor, pattern: Pattern) -> Tensor:
    """Mask of the weights with the highest scores, compared within each output row or each group of M.

    Args:
        score_OI: the more, the more worth keeping; no NaN.

    Returns:
        keep_OI: bool, exactly as many kept in every row or group as the pattern says; of equal scores the last are kept.

    Raises:
        ValueError: M does not divide the number of inputs.
    """
    O, I = score_OI.shape
    if isinstance(pattern, Unstructured):
        return ~drop_lowest(score_OI, pattern.pruned(I))
    pattern.check_divides(I)
    score_MG = score_OI.reshape(-1, pattern.m).T
    return keep_in_groups(score_MG, pattern.n).T.reshape(O, I)


def keep_in_groups(score_MG: Tensor, n: int) -> Tensor:
    """Mask of the `n` highest of the M scores in each column; of equal scores the last are kept."""
    M = len(score_MG)
    if M > _MOST_COMPARED:
        order_MG = score_MG.argsort(dim=0, stable=True)
        return torch.ones_like(score_MG, dtype=torch.bool).scatter_(0, order_MG[: M - n], False)
    # How many scores of its group each one exceeds, by comparing all pairs: for few scores faster than sorting.
    rank_MG = torch.zeros(score_MG.shape, dtype=torch.uint8, device=score_MG.device)
    for i in range(M):
        for j in range(i + 1, M):
            exceeds_G = score_MG[i] > score_MG[j]
            rank_MG[i] += exceeds_G
            rank_MG[j] += ~exceeds_G
    return rank_MG >= M - n
