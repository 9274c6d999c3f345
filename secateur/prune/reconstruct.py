"""The best weights for a given mask: the last step of ALPS (Meng et al. 2024, arXiv:2406.07831, section 3.3), for any pruner.

O: output features, I: input features.
"""

from torch import Tensor

from secateur.core.stack import Stack
from secateur.solvers.conjugate_gradients import conjugate_gradients
from secateur.solvers.inverse_cholesky import DAMPING


def reconstruct(
    stack: Stack, keep_OI: Tensor, start_OI: Tensor | None = None, damping: float = DAMPING
) -> tuple[Tensor, tuple[str, ...]]:
    """Minimise ‖X(Ŵ−W)ᵀ‖² + λ‖Ŵ−W‖² over the weights Ŵ that are zero outside a mask.

    λ is a share of the mean diagonal entry of the Gram matrix, or more where that is singular. Each row is a least squares
    problem on its own kept inputs; all are solved at once by conjugate gradients, preconditioned by the inverse of the whole
    matrix restricted to the mask. A row never ends with a larger error than it began with.

    Memory: four matrices `[I, I]` besides the statistics, of which one stays with them; and four `[O, I]` besides the
    arguments.

    Args:
        stack: the dense weights, and inputs at `Level.GRAM`. Weights of a dead input (always zero) become zero: nothing depends
            on them.
        keep_OI: bool, which weights may be other than zero.
        start_OI: weights to begin from; None: the dense ones where they are kept.
        damping: that share.

    Returns:
        The weights, float32, zero where `keep_OI` is false; and what the user should know.

    Raises:
        ValueError: the statistics are not finite.
    """
    W_OI = stack.W_OI.masked_fill(stack.dead_I, 0)
    start_OI = W_OI if start_OI is None else start_OI.float().masked_fill(stack.dead_I, 0)
    U_II, used = stack.inverse(damping)
    found_OI = conjugate_gradients(stack.damped_gram(used), U_II.T @ U_II, W_OI, keep_OI, start_OI * keep_OI)
    return found_OI, stack.notes(damping, used)
