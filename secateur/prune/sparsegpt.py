"""SparseGPT: "Massive Language Models Can Be Accurately Pruned in One-Shot", Frantar & Alistarh 2023, arXiv:2301.00774.

O: output features, R: those of one of several stacked linears, I: input features, B: input features of one column block,
S: of one step within it, N: weights of a block.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from secateur.calibration.stats import InputStats, Level
from secateur.prune.patterns import NM, Pattern, drop_lowest, keep_in_groups
from secateur.prune.registry import Pruned, pruner

BLOCK = 128
DAMPING = 0.01
_MAX_DAMPING = 1e4
# Columns whose corrections are applied one by one before they are applied to the rest of the block as one product.
_STEP = 16


def inverse_cholesky(gram_II: Tensor, damping: float = DAMPING) -> tuple[Tensor, float]:
    """The upper triangular U with UᵀU = (G + λ·mean(diag G)·1)⁻¹.

    Row i of U, from the diagonal on, is what optimal brain surgery needs once the inputs before i are settled: U[i, i]² is
    the i-th diagonal entry of the inverse over the inputs that remain, and U[i, i:] / U[i, i] the direction of the correction
    (Frantar & Alistarh, section 3.3).

    Args:
        gram_II: symmetric, positive semidefinite, float32. An input that is always zero gets the mean diagonal entry.
        damping: λ; raised tenfold as often as the factorisation needs.

    Returns:
        U_II and the λ that was used.

    Raises:
        ValueError: no damping helps, which is only possible when the matrix is not finite.
    """
    diagonal_I = gram_II.diagonal()
    dead_I = diagonal_I <= 0
    mean = diagonal_I.mean().item() or 1.0
    while damping <= _MAX_DAMPING:
        # With the order of the inputs reversed, Cholesky's lower factor is an upper one here: G = R Rᵀ, so U = R⁻¹. One
        # factorisation and one triangular inverse do the work of inverting G and factorising the inverse. Every matrix is
        # dropped or overwritten as soon as it can be: there are as many as fit in memory that bound the size of a linear.
        reversed_II = gram_II.flip(0, 1)
        reversed_II.diagonal().copy_((torch.where(dead_I, mean, diagonal_I) + damping * mean).flip(0))
        lower_II, info = torch.linalg.cholesky_ex(reversed_II)
        del reversed_II
        if info.item() == 0:
            inverse_II = torch.eye(len(lower_II), device=lower_II.device, dtype=lower_II.dtype)
            torch.linalg.solve_triangular(lower_II, inverse_II, upper=False, out=inverse_II)
            del lower_II
            if torch.isfinite(inverse_II).all():
                return inverse_II.flip(0, 1), damping
        damping = max(damping, 1e-4) * 10
    raise ValueError("the Gram matrix cannot be factorised with any damping: it holds values that are not finite")


@pruner("sparsegpt", Level.GRAM)
def sparsegpt(W_OI: Tensor, stats: InputStats, pattern: Pattern, rows: Sequence[int] = ()) -> Pruned:
    """Prune column by column, and let the columns still to come make up for what was removed (algorithm 1).

    The mask is chosen adaptively: for each block of 128 columns the weights of lowest W² / U² (equation 5) over all rows
    of a linear, or, for N:M, those of each group of M when the sweep reaches it.

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
    U_II, damping = inverse_cholesky(stats.gram())
    dead_I = stats.square_I <= 0
    # Transposed: the weights of one input are contiguous, so a step of the sweep reads and writes straight lines.
    sizes = list(rows) or [len(W_OI)]
    W_IO = W_OI.float().T.masked_fill(dead_I[:, None], 0).contiguous()
    keep_IO = torch.ones_like(W_IO, dtype=torch.bool)
    step = pattern.m if isinstance(pattern, NM) else _STEP
    # An N:M group must not straddle two blocks.
    block = max(BLOCK // step, 1) * step

    for start in range(0, I, block):
        stop = min(start + block, I)
        W_BO, keep_BO, U_BB = W_IO[start:stop], keep_IO[start:stop], U_II[start:stop, start:stop]
        pivot_B1 = U_BB.diagonal()[:, None]
        error_BO = torch.empty_like(W_BO)
        if not isinstance(pattern, NM):
            score_BO = (W_BO / pivot_B1).square_()
            for keep_BR, score_BR in zip(keep_BO.split(sizes, 1), score_BO.split(sizes, 1), strict=True):
                drop_1N = drop_lowest(score_BR.reshape(1, -1), pattern.pruned(score_BR.numel()))
                keep_BR.copy_(~drop_1N.view_as(score_BR))
        for first in range(0, stop - start, step):
            last = min(first + step, stop - start)
            W_SO, error_SO, U_SS = W_BO[first:last], error_BO[first:last], U_BB[first:last, first:last]
            W_SO.addmm_(U_BB[:first, first:last].T, error_BO[:first], alpha=-1)
            if isinstance(pattern, NM):
                keep_BO[first:last] = keep_in_groups((W_SO / pivot_B1[first:last]).square_(), pattern.n)
            removed_SO = torch.where(keep_BO[first:last], 0.0, 1 / pivot_B1[first:last])
            for i in range(last - first):
                if i:
                    W_SO[i].addmv_(error_SO[:i].T, U_SS[:i, i], alpha=-1)
                torch.mul(W_SO[i], removed_SO[i], out=error_SO[i])
        W_IO[stop:].addmm_(U_II[start:stop, stop:].T, error_BO, alpha=-1)
        W_BO.mul_(keep_BO)

    notes = []
    if dead_I.any():
        notes.append(f"{int(dead_I.sum())} of {I} inputs are always zero in the calibration text")
    if stats.tokens < I:
        notes.append(f"{stats.tokens} calibration tokens are fewer than the {I} inputs: give more")
    if damping != DAMPING:
        notes.append(
            f"damping raised from {DAMPING:g} to {damping:g} of the mean diagonal: the Gram matrix is singular"
        )
    return Pruned(W_IO.T.contiguous(), keep_IO.T.contiguous(), tuple(notes))
