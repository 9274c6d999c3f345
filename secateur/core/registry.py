"""The contracts of methods, and the names under which they are found.

A method is a frozen dataclass whose fields are its options (see `options`), in a file of its own, registered by a decorator
under the name that the user types. It computes in float32, returns new tensors and changes nothing that it is given.

O: output features, I: input features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol, TypeVar

from torch import Tensor

from secateur.core.feature_units import Units
from secateur.core.patterns import Pattern
from secateur.core.pruned import Pruned
from secateur.core.quantized import Quantized
from secateur.core.stack import Stack
from secateur.core.stats import Level


class Pruner(Protocol):
    """Chooses weights to remove. Making one raises UsageError where an option makes no sense.

    Attributes:
        name: what the user types.
        paper: where it was published; "" if nowhere.
        level: the least statistics of the inputs that it works from.
    """

    name: ClassVar[str]
    paper: ClassVar[str]

    @property
    def level(self) -> Level: ...

    def prune(self, stack: Stack, pattern: Pattern) -> Pruned:
        """New weights of linears that read the same input, zero where the mask is false; the mask fits the pattern."""
        ...


class UnitPruner(Protocol):
    """Chooses units of input features to remove (see `Structured`). Attributes: see `Pruner`.

    Attributes:
        shifts: whether what goes is made up for by a constant, where the linear has a bias.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    shifts: ClassVar[bool]

    @property
    def level(self) -> Level: ...

    def keep_units(self, stack: Stack, units: Units) -> Tensor:
        """keep_U of a linear: which units stay, as many in each group as `units` says."""
        ...


class Refiner(Protocol):
    """Makes a mask better. Attributes: see `Pruner`."""

    name: ClassVar[str]
    paper: ClassVar[str]

    @property
    def level(self) -> Level: ...

    def refine(self, stack: Stack, keep_OI: Tensor, pattern: Pattern) -> Tensor:
        """A better mask of the same pattern for the dense weights of a stack."""
        ...


class Quantizer(Protocol):
    """Rounds weights to a grid or table. Attributes: see `Pruner`; `all_bits`: what `bits` may be, rising.

    One that cannot quantize pruned weights, or not always, has another, `unpruned`: why not, and what to do instead, or None.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    all_bits: ClassVar[tuple[int, ...]]

    @property
    def bits(self) -> int:
        """Of a code."""
        ...

    @property
    def level(self) -> Level: ...

    @property
    def needs_fisher(self) -> bool:
        """Whether it wants the squared gradient of the loss for every weight."""
        ...

    def quantize(self, stack: Stack, pruned: Pruned | None = None) -> list[Quantized]:
        """One quantized weight for each linear of a stack.

        Where `pruned` is given its `keep_OI` is their mask, and what is not kept is exactly zero.
        """
        ...


class Factorizer(Protocol):
    """Makes weights products of two matrices that are smaller together. Attributes: see `Pruner`.

    One by which linears of several blocks can have one of the two in common has two others: `dictionary_blocks`, of how many
    blocks in a row; and `learn(stack)`, which gives it for a stack of those linears, to be found in `Stack.shared` later.
    """

    name: ClassVar[str]
    paper: ClassVar[str]

    @property
    def level(self) -> Level: ...

    def factorize(self, stack: Stack) -> list[Quantized]:
        """The product, by its factors, for each linear of a stack."""
        ...


class LowRanker(Protocol):
    """Splits a part of low rank off weights before what is left of them is compressed. Attributes: see `Pruner`.

    Whatever becomes of the rest, the part of low rank is fitted to it afterwards.

    Attributes:
        needs_pattern: whether the rest has to be pruned.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    level: ClassVar[Level]
    needs_pattern: ClassVar[bool]

    def split(self, stack: Stack, ranks: Sequence[int], pattern: Pattern | None) -> Tensor:
        """L `[O, I]`, in which each linear of a stack has its rank at most; `pattern`: what is left is to have."""
        ...


class Sparsifier(Protocol):
    """Chooses for a token which inputs of linears are read, and with them which weights. Attributes: see `Pruner`.

    One that compares inputs by more than their size has another, `scale(weights)`: a factor `[I]` of each, from all weights
    `[O, I]` that it meets. One that has a matrix of low rank stand for inputs that are not read has `rank(shape, sparsity)`,
    which is read for every token, where so large a share is not to be read in all; and `rest(W_OI, rank)`: its two factors,
    `[O, R]` and `[R, I]`.

    Attributes:
        rule: how a running model chooses, one of `gates.section.RULES`.
        neurons_only: whether it is for linears alone that read neurons.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    neurons_only: ClassVar[bool]

    @property
    def level(self) -> Level: ...

    @property
    def rule(self) -> str: ...


class ExpertScore(Protocol):
    """Says which experts of a layer stay, as `experts.by_score.ByScore` does. Attributes: see `Pruner`.

    Attributes:
        needs: what it looks at, in words.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    needs: ClassVar[str]


PRUNERS: dict[str, type[Pruner] | type[UnitPruner]] = {}
REFINERS: dict[str, type[Refiner]] = {}
QUANTIZERS: dict[str, type[Quantizer]] = {}
SPARSIFIERS: dict[str, type[Sparsifier]] = {}
EXPERT_SCORES: dict[str, type[ExpertScore]] = {}
LOW_RANKERS: dict[str, type[LowRanker]] = {}
FACTORIZERS: dict[str, type[Factorizer]] = {}
#: By what a recipe calls the part that they play.
ROLES: dict[str, dict[str, Any]] = {
    "prune": PRUNERS,
    "refine": REFINERS,
    "quantize": QUANTIZERS,
    "activations": SPARSIFIERS,
    "expert_score": EXPERT_SCORES,
    "factorize": FACTORIZERS,
}

_M = TypeVar("_M", bound=type[Any])


def _register(table: dict[str, Any]) -> Callable[[_M], _M]:
    def register(method: _M) -> _M:
        table[method.name] = method
        return method

    return register


#: Register a class as a pruning method, as a refiner of masks, as a quantization method, and so on: see `ROLES`.
pruner, refiner, quantizer = _register(PRUNERS), _register(REFINERS), _register(QUANTIZERS)
sparsifier, expert_score, low_ranker = _register(SPARSIFIERS), _register(EXPERT_SCORES), _register(LOW_RANKERS)
factorizer = _register(FACTORIZERS)
