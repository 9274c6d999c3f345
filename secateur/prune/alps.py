"""ALPS: "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language Models", Meng et al. 2024,
arXiv:2406.07831.

O: output features, R: those of one of several stacked linears, I: input features, P: rows that are computed on together.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from secateur.core.damping import damping_option, number
from secateur.core.options import check_options
from secateur.core.patterns import NM, Pattern, drop_lowest, keep_best
from secateur.core.pruned import Pruned
from secateur.core.registry import pruner
from secateur.core.stack import Stack
from secateur.core.stats import Level
from secateur.solvers.conjugate_gradients import conjugate_gradients, rows_at_a_time
from secateur.solvers.inverse_cholesky import MAX_DAMPING

# The penalty grows by the same factor from stage to stage, and rests for some iterations within one. The authors let it grow
# with what changes in the mask, over 30 to 90 iterations; a fixed course of 24 with over-relaxation ends with the same
# error (benchmarks/README.md).
_STAGES, _ITERATIONS = 8, 3
_FIRST_PENALTY, _LAST_PENALTY = 0.1, 0.8
_RELAXATION = 1.2
# Rows of a symmetric product that are computed at a time, from the diagonal on.
_PANEL = 256


@pruner
@dataclass(frozen=True)
class ALPS:
    """Split the problem between weights that fit the outputs and weights that are sparse, and draw both together.

    Minimises ‖X(Ŵ−W)ᵀ‖² + λ‖Ŵ−W‖² with an exact number of weights (problem 1) by the alternating direction method of
    multipliers with a growing penalty (algorithm 1), on inputs scaled to the same norm; then the best weights for the mask that
    it ends with by conjugate gradients (algorithm 2). A mask that is not N:M is ranked over all weights of a linear. λ is a
    share of the mean diagonal entry of the Gram matrix, or more where that is singular.

    Memory: three matrices `[I, I]` besides the statistics (four within the eigendecomposition, of which LAPACK has two), and
    five `[O, I]`, or seven for a mask that is not N:M, all float32. One eigendecomposition serves all linears of one input; it
    stays with the statistics.
    """

    damping: float | str = damping_option()

    name: ClassVar[str] = "alps"
    paper: ClassVar[str] = "Meng et al. 2024, arXiv:2406.07831"
    level: ClassVar[Level] = Level.GRAM

    def __post_init__(self) -> None:
        check_options(self)

    def prune(self, stack: Stack, pattern: Pattern) -> Pruned:
        """Weights of a dead input (always zero) are set to zero: nothing depends on them.

        Raises:
            ValueError: M does not divide the number of inputs, or the statistics are not finite.
        """
        if isinstance(pattern, NM):
            pattern.check_divides(stack.features)
        damping = number(self.damping)
        spectrum = stack.once(("eigen", damping), lambda: eigen(stack, damping))
        B_OI = stack.W_OI.masked_fill(stack.dead_I, 0).mul_(spectrum.scale_I)
        start_OI, keep_OI = _split(B_OI, spectrum, pattern, list(stack.rows))
        H_II, _ = scaled(stack, spectrum.damping)
        inverse_II = spectrum.product(1 / spectrum.values_I)
        found_OI = conjugate_gradients(H_II, inverse_II, B_OI, keep_OI, start_OI).div_(spectrum.scale_I)
        notes = (*stack.dead_notes(), *stack.notes(damping, spectrum.damping))
        return Pruned(found_OI, keep_OI, notes)


@dataclass(frozen=True)
class Eigen:
    """A damped Gram matrix, scaled to a diagonal of ones, as H = Q·diag(l)·Qᵀ.

    Attributes:
        scale_I: what each weight is multiplied by where inputs are so scaled.
        values_I: l, all positive.
        vectors_II: Q.
        damping: that was used, as a share of the mean diagonal.
    """

    scale_I: Tensor
    values_I: Tensor
    vectors_II: Tensor
    damping: float

    def product(self, factor_I: Tensor) -> Tensor:
        """Q·diag(f)·Qᵀ for factors f in place of the eigenvalues, a new `[I, I]`."""
        Q_II = self.vectors_II
        out_II = torch.empty_like(Q_II)
        for i in range(0, len(Q_II), _PANEL):
            stop = i + _PANEL
            torch.matmul(Q_II[i:stop] * factor_I, Q_II[i:].T, out=out_II[i:stop, i:])
            out_II[stop:, i:stop] = out_II[i:stop, stop:].T
        return out_II


def eigen(stack: Stack, damping: float) -> Eigen:
    """Damped until all eigenvalues are positive.

    Raises:
        ValueError: the statistics are not finite, or hold no Gram matrix.
    """
    while damping <= MAX_DAMPING:
        H_II, scale_I = scaled(stack, damping)
        if not torch.isfinite(H_II).all():
            break
        values_I, vectors_II = torch.linalg.eigh(H_II)
        if values_I[0] > 0:
            # LAPACK has them column by column: products of rows are faster.
            return Eigen(scale_I, values_I, vectors_II.contiguous(), damping)
        damping *= 10
    raise ValueError("the Gram matrix has no eigenvalues with any damping: it holds values that are not finite")


def scaled(stack: Stack, damping: float) -> tuple[Tensor, Tensor]:
    """The damped Gram matrix with a diagonal of ones, and what each input is divided by for that."""
    H_II = stack.damped_gram(damping)
    scale_I = H_II.diagonal().sqrt()
    return H_II.div_(scale_I).div_(scale_I[:, None]), scale_I


def penalties() -> Iterator[float]:
    """The penalty of each stage."""
    for stage in range(_STAGES):
        yield _FIRST_PENALTY * (_LAST_PENALTY / _FIRST_PENALTY) ** (stage / (_STAGES - 1))


def _split(B_OI: Tensor, spectrum: Eigen, pattern: Pattern, sizes: list[int]) -> tuple[Tensor, Tensor]:
    """The sparse weights that the iterations end with, and their mask; equations 4 to 6 of the paper.

    With the multiplier divided by the penalty ρ, which shrinks it as ρ grows, an iteration is, with a relaxation of α,

        X = B + (D − U − B)·ρ(H + ρ)⁻¹,   Z = αX + (1 − α)D + U,   D = Z where it is kept, else 0,   U = Z − D:

    the weights X that fit the outputs and are near D, the sparse ones D, and the multiplier U. So Z and its mask say all there
    is to know.

    Args:
        B_OI: weights times the norm of their inputs.
    """
    Z_OI = B_OI.clone()
    keep_OI = keep_largest(Z_OI, pattern, sizes)
    before = 0.0  # no U to begin with
    height = rows_at_a_time(B_OI)
    for penalty in penalties():
        pull_II = spectrum.product(penalty / (spectrum.values_I + penalty))
        for _ in range(_ITERATIONS):
            carried, before = before / penalty, penalty
            for Z_PI, keep_PI, B_PI in zip(*(M_OI.split(height) for M_OI in (Z_OI, keep_OI, B_OI)), strict=True):
                D_PI = Z_PI * keep_PI
                away_PI = torch.mul(D_PI, 1 + carried).sub_(Z_PI, alpha=carried).sub_(B_PI)
                Z_PI.mul_(carried).add_(D_PI, alpha=1 - _RELAXATION - carried).add_(B_PI, alpha=_RELAXATION)
                Z_PI.addmm_(away_PI, pull_II, alpha=_RELAXATION)
            keep_OI = keep_largest(Z_OI, pattern, sizes)
        del pull_II  # before the next one is there
    return Z_OI.mul_(keep_OI), keep_OI


def keep_largest(Z_OI: Tensor, pattern: Pattern, sizes: list[int]) -> Tensor:
    """The mask of the largest weights, compared within each linear, or within each group of M."""
    if isinstance(pattern, NM):
        return keep_best(Z_OI.abs(), pattern)
    drops = [drop_lowest(Z_RI.abs().reshape(1, -1), pattern.pruned(Z_RI.numel())) for Z_RI in Z_OI.split(sizes)]
    return ~torch.cat(drops, dim=1).view_as(Z_OI)
