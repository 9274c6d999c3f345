"""ALPS: "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language Models", Meng et al. 2024,
arXiv:2406.07831.

O: output features, R: those of one of several stacked linears, I: input features, N: weights of a linear.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from secateur.calibration.stats import InputStats, Level
from secateur.prune.patterns import NM, Pattern, drop_lowest, keep_best, kth_smallest
from secateur.prune.reconstruct import conjugate_gradients, damped_gram
from secateur.prune.registry import Pruned, pruner
from secateur.sweep import DAMPING, calibration_notes, inverse_cholesky

# The penalty grows by the same factor from stage to stage, and rests for some iterations within one. The authors let it grow
# with what changes in the mask, over 30 to 90 iterations; a fixed course of 24 with over-relaxation ends with the same
# error (benchmarks/README.md).
_STAGES, _ITERATIONS = 8, 3
_FIRST_PENALTY, _LAST_PENALTY = 0.1, 0.8
_RELAXATION = 1.35
# Weights of a linear among which the mask's threshold is found on the way.
_SAMPLE = 2**16


@pruner("alps", Level.GRAM)
def alps(W_OI: Tensor, stats: InputStats, pattern: Pattern, rows: Sequence[int] = ()) -> Pruned:
    """Split the problem between weights that fit the outputs and weights that are sparse, and draw both together.

    Minimises ‖X(Ŵ−W)ᵀ‖² + λ‖Ŵ−W‖² with an exact number of weights (problem 1) by the alternating direction method of
    multipliers with a growing penalty (algorithm 1), on inputs scaled to the same norm; then the best weights for the mask that
    it ends with by conjugate gradients (algorithm 2). A mask that is not N:M is ranked over all weights of a linear. λ is 0.01
    of the mean diagonal entry of the Gram matrix, or more where that is singular.

    Memory: five matrices `[I, I]` besides the statistics, and eight `[O, I]`, all float32. One eigendecomposition serves all
    linears of one input.

    Args:
        W_OI: weights, any floating dtype.
        stats: inputs at `Level.GRAM`. Weights of a dead input (always zero) are set to zero: nothing depends on them.
        pattern: how many to keep.
        rows: how many rows each of the stacked linears has; empty if it is one.

    Raises:
        ValueError: M does not divide the number of inputs, or the statistics are not finite.
    """
    I = W_OI.shape[1]
    if isinstance(pattern, NM):
        pattern.check_divides(I)
    U_II, used = stats.once(("inverse", DAMPING), lambda: inverse_cholesky(stats.upper()))
    dead_I = stats.square_I <= 0
    W_OI = W_OI.float().masked_fill(dead_I, 0)
    gram_II = damped_gram(stats, used)
    scale_I = gram_II.diagonal().sqrt()
    value_I, vector_II = stats.once(("eigen", used), lambda: torch.linalg.eigh(gram_II / scale_I / scale_I[:, None]))
    sizes = list(rows) or [len(W_OI)]
    split_OI, keep_OI = _split(W_OI * scale_I, value_I.clamp(min=0), vector_II, pattern, sizes)
    start_OI = split_OI.mul_(keep_OI).div_(scale_I)
    found_OI = conjugate_gradients(gram_II, U_II.T @ U_II, W_OI, keep_OI, start_OI)
    notes = calibration_notes(stats, DAMPING, used)
    if dead_I.any():
        notes = (f"{int(dead_I.sum())} of {I} inputs are always zero in the calibration text", *notes)
    return Pruned(found_OI, keep_OI, notes)


def _split(
    W_OI: Tensor, value_I: Tensor, vector_II: Tensor, pattern: Pattern, sizes: list[int]
) -> tuple[Tensor, Tensor]:
    """The weights that fit the outputs, and the mask, that the iterations end with; equations 4 to 6 of the paper.

    With the multiplier divided by the penalty ρ, the weights that fit are B = W + (D−V−W)·ρ(H+ρ)⁻¹, the sparse ones D are those
    of Z = B + V that are kept, and the new V is what is left: Z − D. So Z and its mask say all there is to know.

    Args:
        W_OI: weights times the norm of their inputs.
        value_I, vector_II: eigenvalues and eigenvectors, in columns, of the Gram matrix H of the inputs divided by it.
    """
    less_OI = W_OI.neg()
    size_OI = torch.empty_like(
        W_OI
    )  # and whatever else has its shape: memory that is taken anew costs more than a product
    keep_OI = _keep(torch.abs(W_OI, out=size_OI), pattern, sizes)
    Z_OI, before = W_OI * keep_OI, 1.0
    aim_OI, fit_OI = torch.empty_like(W_OI), torch.empty_like(W_OI)
    for stage in range(_STAGES):
        penalty = _FIRST_PENALTY * (_LAST_PENALTY / _FIRST_PENALTY) ** (stage / (_STAGES - 1))
        resolvent_II = (vector_II * (penalty / (value_I + penalty))) @ vector_II.T
        for iteration in range(_ITERATIONS):
            # Where nothing is kept the sparse weight is zero, and the multiplier is Z as of the penalty before.
            ratio, before = before / penalty, penalty
            factor_OI = size_OI.copy_(keep_OI).mul_(1 + ratio).sub_(ratio)
            torch.addcmul(less_OI, Z_OI, factor_OI, out=aim_OI)
            torch.addmm(W_OI, aim_OI, resolvent_II, out=fit_OI)
            # Over-relaxed: further than the new weights lie from the sparse ones.
            factor_OI = size_OI.copy_(keep_OI).mul_(1 - _RELAXATION - ratio).add_(ratio)
            Z_OI.mul_(factor_OI).add_(fit_OI, alpha=_RELAXATION)
            last = stage == _STAGES - 1 and iteration == _ITERATIONS - 1
            keep_OI = _keep(torch.abs(Z_OI, out=size_OI), pattern, sizes, exact=last)
    return fit_OI, keep_OI


def _keep(size_OI: Tensor, pattern: Pattern, sizes: list[int], exact: bool = True) -> Tensor:
    """The mask of the largest weights, compared within each linear, or within each group of M.

    Where it need not be `exact`, the least weight that is kept of a large linear is found among some of them.
    """
    if isinstance(pattern, NM):
        return keep_best(size_OI, pattern)
    masks = []
    for size_RI in size_OI.split(sizes):
        size_N = size_RI.reshape(-1)
        count = pattern.pruned(len(size_N))
        stride = max(1, len(size_N) // _SAMPLE)
        if exact or stride == 1 or count == 0:
            masks.append(~drop_lowest(size_N[None], count).view_as(size_RI))
            continue
        while math.gcd(stride, size_RI.shape[1]) > 1:
            stride += 1  # not the same few inputs of every row
        some_N = size_N[::stride].contiguous()
        masks.append(size_RI > kth_smallest(some_N[None], max(1, count * len(some_N) // len(size_N))))
    return torch.cat(masks)
