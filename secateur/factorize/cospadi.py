"""CoSpaDi: "CoSpaDi: Compressing LLMs via Calibration-Guided Sparse Dictionary Learning", Shopkhoev et al. 2025,
arXiv:2509.22075.

O: output features, I: input features, K: atoms.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from secateur.composite_layouts.dictionary import Factor, Factors, Shared
from secateur.core.damping import damping_option, number, with_damping
from secateur.core.options import check_options, option
from secateur.core.quantized import BITS, Quantized
from secateur.core.registry import factorizer
from secateur.core.stack import Stack
from secateur.core.stats import Level
from secateur.factorize.two_factors import (
    HALF,
    Metric,
    bytes_of_numbers,
    most_atoms,
    product,
    size_option,
    stored_atoms,
    stored_coefficients,
)
from secateur.solvers.dictionary_learning import k_svd
from secateur.solvers.inverse_cholesky import DAMPING
from secateur.solvers.sparse_coding import pursue, pursue_in_rounds

# Of the power iteration by which an atom is made better: it begins with what it was, and its turn comes again.
_POWER_STEPS = 2


@factorizer
@dataclass(frozen=True)
class CoSpaDi:
    """A dictionary of atoms for each linear, and for each output the few of them whose sum is nearest to it.

    With the inputs' Gram matrix G = LᵀL the error of the outputs is ‖(W − SD)Lᵀ‖², so that a dictionary learned by K-SVD for
    the rows of WLᵀ, taken back by L⁻ᵀ, is the one that the outputs want (section 3). As many atoms as the size allows, with
    `ratio` times fewer used by an output; a last choice is made for the atoms as they are stored.

    Linears of several blocks may share a dictionary: it is learned for the rows of all their weights by the sum of their Gram
    matrices, that of the inputs of all of them one below the other. What each takes of it is chosen by its own.
    """

    size: float = size_option()
    ratio: float = option(2.0, "Atoms for each that an output uses.", low=1, high=64)
    iterations: int = option(8, "Iterations of K-SVD.", low=0, high=1000)
    rounds: int = option(8, "Rounds in which an output's atoms are chosen; 0: one at a time (OMP).", low=0, high=1000)
    dictionary_blocks: int = option(
        1, "Blocks in a row whose linears of one name share a dictionary.", low=1, high=1000
    )
    dictionary_bits: int = option(HALF, "Bits of the atoms' numbers.", choices=(*BITS, HALF))
    coefficient_bits: int = option(HALF, "Bits of the coefficients.", choices=(*BITS, HALF))
    damping: float | str = damping_option()

    name: ClassVar[str] = "cospadi"
    paper: ClassVar[str] = "Shopkhoev et al. 2025, arXiv:2509.22075"
    level: ClassVar[Level] = Level.GRAM

    def __post_init__(self) -> None:
        check_options(self)

    def factorize(self, stack: Stack) -> list[Quantized]:
        """See `Factorizer`."""
        damping = number(self.damping)
        U_II, used = stack.inverse(damping)
        metric, notes = Metric(U_II), stack.notes(damping, used)
        found = []
        for i, W_OI in enumerate(stack.split(stack.W_OI)):
            A_OI = metric.into(W_OI)
            shared: Shared | None = stack.shared[i] if stack.shared else None
            atoms = self._learn(stack, metric, A_OI, 1) if shared is None else shared.atoms
            D_KI = atoms.values().to(A_OI.device)
            S_OK = self._code(A_OI, metric.into(D_KI))
            coefficients = stored_coefficients(S_OK, self.coefficient_bits, stack.dtype, sparse=True)
            factors = Factors(atoms, coefficients, None if shared is None else shared.lender)
            found.append(product(factors, stack, (W_OI.shape[0], W_OI.shape[1]), notes))
        return found

    def learn(self, stack: Stack) -> Factor:
        """The dictionary that linears of several blocks share, a stack of them; a damping that is to be chosen is the usual."""
        U_II, _ = stack.inverse(number(with_damping(self, DAMPING).damping))
        metric = Metric(U_II)
        return self._learn(stack, metric, metric.into(stack.W_OI), len(stack.rows))

    def _learn(self, stack: Stack, metric: Metric, A_OI: Tensor, linears: int) -> Factor:
        """A dictionary for some linears' rows in their metric, as it is stored."""
        K = self.atoms((A_OI.shape[0], A_OI.shape[1]), linears)
        D_KI = k_svd(A_OI, K, self._code, self.iterations, _POWER_STEPS)
        return stored_atoms(metric.back(D_KI), self.dictionary_bits, stack.dtype)

    def _code(self, A_OI: Tensor, D_KI: Tensor) -> Tensor:
        """What each output takes of the atoms."""
        most = self.used(len(D_KI))
        return pursue(A_OI, D_KI, most) if self.rounds == 0 else pursue_in_rounds(A_OI, D_KI, most, self.rounds)

    def used(self, atoms: int) -> int:
        """How many of so many atoms an output uses at most."""
        return max(1, int(atoms / self.ratio))

    def atoms(self, shape: tuple[int, int], linears: int = 1) -> int:
        """How many atoms a linear of this shape has, or several whose weights have it one below the other."""
        O, I = shape

        def bytes_with(atoms: int) -> int:
            coefficients = bytes_of_numbers(O, self.used(atoms), self.coefficient_bits)
            return bytes_of_numbers(atoms, I, self.dictionary_bits) + coefficients + O * -(-atoms // 8)

        return most_atoms(self.size, shape, bytes_with, linears)
