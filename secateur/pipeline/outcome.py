"""What a run tells while it goes and when it has ended.

O: output features, I: input features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from secateur.core.stats import InputStats, Level


@dataclass(frozen=True)
class LinearReport:
    """What became of one linear.

    Attributes:
        name: of the module.
        shape: (O, I).
        layout: it is stored in.
        sparsity: share of its weights that are zero; of a quantized one, share that is not stored.
        bits: per weight, all its tensors counted.
        bytes: of its tensors.
        error: ‖X(Ŵ−W)ᵀ‖² / ‖XWᵀ‖² as far as the statistics of the inputs tell, see `error_kind`.
        error_kind: `output` (from the Gram matrix: exact), `independent inputs` (from each input's square sum alone), or
            `weights` (‖Ŵ−W‖² / ‖W‖², when no inputs were seen).
        outliers: share of its weights that are kept in 16 bits besides their codes.
        tokens: of the calibration text that reach it; None: it was compressed without inputs, or nobody recorded them.
        borrowed: how many more it was shown, as an expert of a mixture that too few are sent to.
        damping: that was chosen for it by held-out windows, as a share of the Gram matrix's mean diagonal; None: the recipe's.
        match_share, match_damping: which share of the way to the dense model's outputs was gone, and how damped, where they
            were the target: `error` is relative to it, then.
    """

    name: str
    shape: tuple[int, int]
    layout: str
    sparsity: float
    bits: float
    bytes: int
    error: float
    error_kind: str
    outliers: float = 0.0
    tokens: int | None = None
    borrowed: int = 0
    damping: float | None = None
    match_share: float | None = None
    match_damping: float | None = None

    CHOSEN: ClassVar[tuple[str, ...]] = ("damping", "match_share", "match_damping")

    def chosen(self) -> dict[str, float]:
        """What held-out windows chose for it."""
        return {name: value for name in self.CHOSEN if (value := getattr(self, name)) is not None}


@dataclass(frozen=True)
class Progress:
    """Where a run stands. `linear` is None for a stage that has no linears."""

    stage: str
    block: int = 0
    blocks: int = 0
    linear: LinearReport | None = None
    seconds_left: float | None = None
    peak_bytes: int = 0


@dataclass
class Report:
    """The result of a run.

    Attributes:
        tables: of embeddings, and the head, as far as they were quantized.
        recipe: as `Recipe.to_dict` gives it, with the numbers of the run filled in.
        structure: of a structured pattern, what there was before and is now, by what it is: weights of the blocks' linears,
            blocks, heads, neurons.
        phases: seconds by what they were spent on: searching (where a choice was to be found for each linear), opening,
            gradients, reading, forward, statistics, exchange (between processes), solving, writing (of blocks), ending.
    """

    out: Path
    linears: list[LinearReport]
    notes: list[str]
    calibration: dict[str, Any]
    bytes: int = 0
    source_bytes: int = 0
    parameters: int = 0
    seconds: float = 0.0
    peak_bytes: int = 0
    phases: dict[str, float] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    structure: dict[str, tuple[int, int]] | None = None
    tables: list[LinearReport] = field(default_factory=list)

    @property
    def sparsity(self) -> float:
        """Share of zeros over the weights of all compressed linears."""
        return _weighted(self.linears, lambda linear: linear.sparsity)

    @property
    def bits(self) -> float:
        """Bits per weight over all compressed linears, everything on disk counted."""
        return _weighted(self.linears, lambda linear: linear.bits)


def _weighted(linears: list[LinearReport], value: Callable[[LinearReport], float]) -> float:
    sizes = [linear.shape[0] * linear.shape[1] for linear in linears]
    return sum(s * value(linear) for s, linear in zip(sizes, linears, strict=True)) / max(sum(sizes), 1)


def relative_error(dense_OI: Tensor, W_OI: Tensor, stats: InputStats) -> tuple[float, str]:
    """The relative squared error of a linear's output, and how it is known: see `LinearReport`."""
    error, total, kind = _energies(dense_OI, W_OI, stats)
    return (max((error / total).item(), 0.0) if total > 0 else 0.0), kind


def energies(dense_OI: Tensor, W_OI: Tensor, stats: InputStats) -> tuple[float, float, str]:
    """The squared error of a linear's output, the squared output, and how both are known."""
    error, total, kind = _energies(dense_OI, W_OI, stats)
    return error.item(), total.item(), kind


def _energies(dense_OI: Tensor, W_OI: Tensor, stats: InputStats) -> tuple[Tensor, Tensor, str]:
    change_OI = W_OI - dense_OI
    if not stats.tokens:
        return change_OI.square().sum(), dense_OI.square().sum(), "weights"
    kind = "output" if stats.level >= Level.GRAM else "independent inputs"
    return stats.energy(change_OI).sum(), stats.energy(dense_OI).sum(), kind
