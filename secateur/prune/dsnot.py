"""DSnoT: "Dynamic Sparse No Training: Training-Free Fine-tuning for Sparse LLMs", Zhang et al. 2024, arXiv:2310.08915.

O: output features, I: input features, G: groups within which a swap must stay, M: inputs of one group.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from secateur.core.options import check_options, option
from secateur.core.patterns import NM, Pattern
from secateur.core.registry import refiner
from secateur.core.stack import Stack
from secateur.core.stats import Level
from secateur.prune.wanda import wanda_score


@refiner
@dataclass(frozen=True)
class DSnoT:
    """Swap removed for kept weights so that the expected error of each output falls.

    The expected error of row i is ε_i = Σ W_ij·E[x_j] over its removed weights. A cycle grows the removed weight that lowers
    |ε_i| most over the variance of its input (equation 3), and prunes, of the kept weights whose removal lowers |ε_i| too, the
    one of lowest Wanda score (equation 4); within the group of the grown weight for N:M. A row stops when |ε_i| is small
    enough, when a swap would turn the sign of ε_i, when no swap helps, or after the last cycle. A weight is moved once at most.
    """

    cycles: int = option(50, "Swaps of a row at most.", low=1)
    threshold: float = option(0.1, "Expected error of a row at which it is done.", low=0)

    name: ClassVar[str] = "dsnot"
    paper: ClassVar[str] = "Zhang et al. 2024, arXiv:2310.08915"
    level: ClassVar[Level] = Level.MOMENTS

    def __post_init__(self) -> None:
        check_options(self)

    def refine(self, stack: Stack, keep_OI: Tensor, pattern: Pattern) -> Tensor:
        """A new mask.

        Args:
            stack: the dense weights.
            keep_OI: bool, the mask to start from. Any N:M it has is kept; for an unstructured mask each row keeps its count.
            pattern: the pattern of the mask.
        """
        W_OI, stats = stack.W_OI, stack.stats
        O, I = W_OI.shape
        M = pattern.m if isinstance(pattern, NM) else I
        keep_OGM = keep_OI.clone().view(O, I // M, M)
        effect_OI = W_OI * stats.mean()
        error_O = (effect_OI * ~keep_OI).sum(1)
        sign_O = error_O.sign()

        # The sign of a row's error never turns, so the order in which its removed weights are tried is known beforehand.
        # An input that never changes is the best of all to grow; the floor is what rounding may leave of its variance.
        floor_I = 1e-5 * (stats.square_I / max(stats.tokens, 1)).clamp_(min=torch.finfo(torch.float32).tiny)
        gain_OI = torch.where(keep_OI, 0, effect_OI * sign_O[:, None] / stats.variance().maximum(floor_I))
        cycles = min(self.cycles, I)
        gain_OC, grow_OC = gain_OI.topk(cycles, dim=1)
        # What may still be pruned: kept from the start, with an effect against the error's sign.
        may_prune_OI = keep_OI & (effect_OI * sign_O[:, None] < 0)
        cost_OGM = torch.where(may_prune_OI, wanda_score(W_OI, stats), torch.inf).view(O, I // M, M)
        effect_OGM = effect_OI.view(O, I // M, M)

        rows_O = torch.arange(O, device=W_OI.device)
        running_O = error_O.abs() > self.threshold
        for cycle in range(cycles):
            running_O &= gain_OC[:, cycle] > 0
            if not running_O.any():
                break
            grow_O = grow_OC[:, cycle]
            group_O, member_O = grow_O // M, grow_O % M
            cost_O, prune_O = cost_OGM[rows_O, group_O].min(1)
            possible_O = running_O & torch.isfinite(cost_O)
            after_O = error_O - effect_OGM[rows_O, group_O, member_O] + effect_OGM[rows_O, group_O, prune_O]
            swap_O = possible_O & (after_O.sign() == sign_O)
            # Another group may still offer a swap; a turned sign, or an unstructured row without candidates, ends the row.
            running_O &= swap_O | ~possible_O if isinstance(pattern, NM) else swap_O
            rows, group = rows_O[swap_O], group_O[swap_O]
            keep_OGM[rows, group, member_O[swap_O]] = True
            keep_OGM[rows, group, prune_O[swap_O]] = False
            cost_OGM[rows, group, prune_O[swap_O]] = torch.inf
            error_O = torch.where(swap_O, after_O, error_O)
            running_O &= error_O.abs() > self.threshold
        return keep_OGM.view(O, I)
