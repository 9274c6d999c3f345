"""Options that several methods have."""

from typing import Any

from secateur.core.options import option
from secateur.solvers.inverse_cholesky import DAMPING, MAX_DAMPING


def damping_option() -> Any:
    """λ, which a method adds to the diagonal of the Gram matrix."""
    return option(DAMPING, "Share of the Gram matrix's mean diagonal added to it.", above=0, below=MAX_DAMPING)
