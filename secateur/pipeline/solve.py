"""Solving linears that read the same input, up to the tensors that go to disk.

O: output features, I: input features.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor

from secateur.composite_layouts.dictionary import Shared
from secateur.composite_layouts.low_rank import LowRank
from secateur.core.damping import choose_damping
from secateur.core.dense_target import towards_dense
from secateur.core.factors import WithFactors
from secateur.core.feature_units import Units
from secateur.core.patterns import Structured
from secateur.core.pruned import Pruned
from secateur.core.quantized import Quantized
from secateur.core.registry import Pruner, UnitPruner
from secateur.core.stack import Stack
from secateur.core.stats import InputStats, Level
from secateur.errors import RepeatedError, SecateurError
from secateur.formats.layouts.choose import layout_by_inputs, layout_for
from secateur.formats.layouts.layout import Layout, Stored, all_finite, describe_dense, layout_from_config
from secateur.lowrank.fitting import fit_factors
from secateur.pipeline.outcome import LinearReport, relative_error
from secateur.prune.reconstruct import reconstruct
from secateur.prune.refit import refit
from secateur.recipes.plan import Plan

#: What a bias that changed is called among the parts of a solution.
BIAS = "bias"


@dataclass(frozen=True)
class Problem:
    """A linear to be solved.

    Attributes:
        name: of the module.
        W_OI: its weight, in any dtype.
        transposed: the module keeps it as `[I, O]`.
        dtype: of the weight in the source.
        fisher_OI: squared gradients, where the method needs them.
        units: of its inputs, of a structured pattern.
        bias_O: that the module has, where it may be changed.
        shared: what it has in common with linears of other blocks.
    """

    name: str
    W_OI: Tensor
    transposed: bool
    dtype: torch.dtype
    fisher_OI: Tensor | None = None
    units: Units | None = None
    bias_O: Tensor | None = None
    shared: Shared | None = None


@dataclass(frozen=True)
class Solution:
    """A linear that is solved.

    Attributes:
        report: what became of it.
        parts: its tensors on disk by the names of its layout's parts, on the CPU; a dense weight by the name "", and by the
            name `BIAS` a bias that changed, too. Of a structured pattern the weight has zeros for what goes.
        entry: of its layout in the config; None: it is dense.
        W_OI: its weight, dense; None: to be had from the parts.
        kept: the numbers of the units that stay, of a structured pattern.
    """

    report: LinearReport
    parts: dict[str, Tensor]
    entry: dict[str, Any] | None
    W_OI: Tensor | None = field(default=None, repr=False)
    kept: tuple[int, ...] | None = None

    @property
    def name(self) -> str:
        return self.report.name

    def tensors(self, weight: str) -> dict[str, Tensor]:
        """Its tensors by the names they have on disk, where the weight is called `weight`."""
        parts = self.parts if self.entry is None else layout_from_config(self.entry).own(self.parts)
        return {f"{weight}.{part}" if part else weight: tensor for part, tensor in parts.items()}

    def as_module_weight(self, transposed: bool) -> Tensor:
        """The dense weight as its module keeps it."""
        if self.entry is None:
            return self.parts[""]
        W_OI = layout_from_config(self.entry).unpack(self.parts) if self.W_OI is None else self.W_OI
        return W_OI.T if transposed else W_OI

    def record(self) -> dict[str, Any]:
        """What is to be known of it besides its tensors, in values that JSON holds."""
        kept = {"kept": list(self.kept)} if self.kept is not None else {}
        return {**asdict(self.report), "entry": self.entry, **kept}

    @classmethod
    def of_record(cls, record: dict[str, Any], parts: dict[str, Tensor]) -> Solution:
        """The solution behind what `record` gave."""
        fields = {**record, "shape": tuple(record["shape"])}
        entry, kept = fields.pop("entry"), fields.pop("kept", None)
        return cls(LinearReport(**fields), parts, entry, kept=None if kept is None else tuple(kept))


def solve(
    plan: Plan, problems: Sequence[Problem], stats: InputStats, pruned: Pruned | None = None
) -> tuple[list[Solution], list[str]]:
    """Solve linears that read the same input as one matrix.

    Args:
        pruned: what `prune` makes of them, where that is known.

    Returns:
        Their solutions in the same order, and what the user should know.

    Raises:
        RepeatedError: a solved weight overflows the dtype that it is to be written in.
    """
    stack = stacked(plan, problems, stats.or_isotropic())
    chosen: list[dict[str, float]] = [{} for _ in problems]
    if plan.match_dense and stack.stats.drift_II is not None:
        stack, corrections = towards_dense(stack)
        chosen = [{"match_share": each.share, "match_damping": each.damping} for each in corrections]
    if pruned is None and problems[0].units is not None:
        pruned = prune(plan, stack, problems[0].units)
    if not plan.chooses_damping:
        results, notes = _solve(plan, problems, stack, pruned)
    else:
        dampings = choose_damping(stack, lambda part, damping: _weights(plan.with_damping(damping), part))
        chosen = [{"damping": damping, **each} for damping, each in zip(dampings, chosen, strict=True)]
        results, notes = _solve_each(plan, problems, stack, dampings)
    dense = stack.split(stack.W_OI)
    solutions = [
        _pack(p, d, result, stats, c) for p, d, result, c in zip(problems, dense, results, chosen, strict=True)
    ]
    if pruned is not None and pruned.keep_U is not None:
        solutions = [_narrowed(problems[0], solutions[0], pruned)]
    names = ", ".join(problem.name for problem in problems)
    return solutions, [f"{names}: {note}" for note in notes]


def _solve(
    plan: Plan, problems: Sequence[Problem], stack: Stack, pruned: Pruned | None = None
) -> tuple[Iterator[_Result], list[str]]:
    """What becomes of each linear of a stack, made when it is asked for, and what the user should know."""
    if plan.low_rank is None:
        return _solve_alone(plan, problems, stack, pruned)
    pattern = plan.pruning.pattern if plan.pruning is not None else None
    assert not isinstance(pattern, Structured)
    ranks = [plan.low_rank.rank_of(O, stack.features) for O in stack.rows]
    split_OI = plan.low_rank.split(stack, ranks, pattern)
    found, notes = _solve_alone(plan, problems, replace(stack, W_OI=stack.W_OI - split_OI))
    del split_OI
    results = list(found)
    factors = fit_factors(stack, torch.cat([result.W_OI.float() for result in results]), ranks)
    return (result.with_factors(*each) for result, each in zip(results, factors, strict=True)), notes


def _solve_alone(
    plan: Plan, problems: Sequence[Problem], stack: Stack, pruned: Pruned | None = None
) -> tuple[Iterator[_Result], list[str]]:
    """The same where nothing of low rank is beside it."""
    notes: list[str] = []
    if pruned is None:
        pruned = prune(plan, stack)
    if pruned is not None:
        notes += pruned.notes
    quantized = _coded(plan, stack, pruned)
    if quantized is None:
        pieces = zip(problems, stack.split(stack.W_OI if pruned is None else pruned.W_OI), strict=True)
        return (_pruned(plan, problem, W_OI) for problem, W_OI in pieces), notes
    notes += (note for note in quantized[0].notes if note not in notes)  # both may find the same
    return (_quantized(plan, problem, weight) for problem, weight in zip(problems, quantized, strict=True)), notes


def _solve_each(
    plan: Plan, problems: Sequence[Problem], stack: Stack, dampings: Sequence[float]
) -> tuple[Iterator[_Result], list[str]]:
    """The same with a damping for each linear: those that have the same are solved together."""
    results: dict[int, _Result] = {}
    notes: list[str] = []
    for damping in sorted(set(dampings)):
        members = [i for i, each in enumerate(dampings) if each == damping]
        part = [problems[i] for i in members]
        found, said = _solve(plan.with_damping(damping), part, stack.of_linears(members))
        results.update(zip(members, found, strict=True))
        notes += (note for note in said if note not in notes)
    return (results[i] for i in range(len(problems))), notes


def _weights(plan: Plan, stack: Stack) -> Tensor:
    """What a plan makes of a stack, dense, `[O, I]`."""
    pruned = prune(plan, stack)
    quantized = _coded(plan, stack, pruned)
    if quantized is None:
        assert pruned is not None
        return pruned.W_OI
    return torch.cat([weight.dequantize().float() for weight in quantized]).to(stack.W_OI.device)


def _coded(plan: Plan, stack: Stack, pruned: Pruned | None) -> list[Quantized] | None:
    """The linears of a stack in codes, or as products; None where they are pruned alone."""
    if plan.factorizer is not None:
        return plan.factorizer.factorize(stack)
    return None if plan.quantizer is None else plan.quantizer.quantize(stack, pruned)


def stacked(plan: Plan, problems: Sequence[Problem], stats: InputStats) -> Stack:
    """Linears as their methods are given them."""
    fishers = [problem.fisher_OI for problem in problems if problem.fisher_OI is not None]
    stack = Stack.of([problem.W_OI for problem in problems], stats, plan.dtype or problems[0].dtype, fishers)
    shared = tuple(problem.shared for problem in problems)
    return replace(stack, shared=shared) if any(shared) else stack


def prune(plan: Plan, stack: Stack, units: Units | None = None) -> Pruned | None:
    """The first half of `solve`: what is left of the weights; None where nothing is to be pruned."""
    if plan.pruning is None:
        return None
    pruner, refiner, pattern = plan.pruning.pruner, plan.pruning.refiner, plan.pruning.pattern
    if isinstance(pattern, Structured):
        assert units is not None
        return _prune_units(cast(UnitPruner, pruner), stack, units, pattern.refit)
    pruner = cast(Pruner, pruner)
    pruned = pruner.prune(stack, pattern)
    if refiner is not None:
        keep_OI = refiner.refine(stack, pruned.keep_OI, pattern)
        pruned = Pruned(stack.W_OI * keep_OI, keep_OI, pruned.notes)
    if plan.pruning.reconstruct:
        best_OI, said = reconstruct(stack, pruned.keep_OI, pruned.W_OI, plan.pruning.damping)
        notes = (*pruned.notes, *(note for note in said if note not in pruned.notes))
        pruned = Pruned(best_OI, pruned.keep_OI, notes)
    return pruned


def _prune_units(pruner: UnitPruner, stack: Stack, units: Units, refits: bool) -> Pruned:
    if units.keep:
        keep_U = pruner.keep_units(stack, units)
    else:
        keep_U = torch.zeros(units.count, dtype=torch.bool, device=stack.W_OI.device)
    keep_I = units.spread(keep_U)
    refits = refits and units.keep > 0
    W_OI, notes = refit(stack, keep_I, pruner.shifts) if refits else (stack.W_OI * keep_I, ())
    shift_O = (stack.W_OI - W_OI) @ stack.stats.mean() if pruner.shifts else None
    return Pruned(W_OI, keep_I.expand_as(W_OI), notes, keep_U, shift_O)


def _narrowed(problem: Problem, solution: Solution, pruned: Pruned) -> Solution:
    """A solution that tells which units stay, and of the weight without the others; with a bias that makes up for them."""
    assert pruned.keep_U is not None
    assert problem.units is not None
    assert solution.W_OI is not None
    told = describe_dense(solution.W_OI[:, problem.units.spread(pruned.keep_U)])
    count = max(math.prod(told.shape), 1)
    report = replace(
        solution.report,
        shape=(told.shape[0], told.shape[1]),
        sparsity=1 - told.count / count,
        bits=8 * told.bytes / count,
        bytes=told.bytes,
    )
    parts = dict(solution.parts)
    if pruned.shift_O is not None and problem.bias_O is not None:
        parts[BIAS] = (problem.bias_O.float() + pruned.shift_O).to(solution.parts[""].dtype).cpu()
    kept = tuple(pruned.keep_U.nonzero()[:, 0].tolist())
    return replace(solution, report=report, parts=parts, kept=kept)


@dataclass(frozen=True)
class _Result:
    """What a linear becomes: dense, and what its layout packs, on the CPU; or what is to be told of it where it stays dense."""

    W_OI: Tensor
    packable: Tensor | Quantized | WithFactors
    layout: Layout | None
    told: Stored | None

    def with_factors(self, out_OR: Tensor, in_RI: Tensor) -> _Result:
        """The same with a part of low rank beside it, where that has any rank."""
        if not out_OR.numel():
            return self
        W_OI = torch.addmm(self.W_OI.float(), out_OR.float(), in_RI.float()).to(self.W_OI.dtype)
        if self.layout is None:
            return _Result(W_OI, W_OI.cpu(), None, describe_dense(W_OI))
        assert not isinstance(self.packable, WithFactors)
        return _Result(W_OI, WithFactors(self.packable, out_OR.cpu(), in_RI.cpu()), LowRank(self.layout), None)


def _pruned(plan: Plan, problem: Problem, W_OI: Tensor) -> _Result:
    # Adding zero leaves no negative zero where a negative weight was.
    W_OI = W_OI.to(plan.dtype or problem.dtype).add(0).contiguous()
    if plan.sparsifier is not None:
        return _Result(W_OI, W_OI.cpu(), _by_inputs(plan, problem, W_OI), None)
    return _Result(W_OI, W_OI.cpu(), plan.layout, describe_dense(W_OI) if plan.layout is None else None)


def _by_inputs(plan: Plan, problem: Problem, weight: Tensor | Quantized) -> Layout:
    """The layout that stores a weight by input."""
    try:
        return layout_by_inputs(weight, sparse=plan.pruning is not None)
    except ValueError as error:
        raise SecateurError(f"{problem.name} cannot be stored by input, as `activations` needs: {error}") from error


def _quantized(plan: Plan, problem: Problem, weight: Quantized) -> _Result:
    W_OI = weight.dequantize()
    if plan.sparsifier is not None:
        return _Result(W_OI, weight.cpu(), _by_inputs(plan, problem, weight), None)
    if not plan.dense:
        return _Result(W_OI, weight.cpu(), layout_for(weight), None)
    # A zero on a grid is a code like any other.
    told = replace(describe_dense(W_OI), count=weight.stored, outliers=weight.outlier_count)
    return _Result(W_OI, weight.cpu(), None, told)


def _pack(problem: Problem, dense_OI: Tensor, result: _Result, stats: InputStats, chosen: dict[str, float]) -> Solution:
    W_OI, layout = result.W_OI, result.layout
    if not all_finite(W_OI):
        raise RepeatedError(
            f"{problem.name}: weights that make up for the error of others overflow {W_OI.dtype}: give `dtype` float32"
        )
    entry = None
    if layout is None:
        assert result.told is not None
        told = result.told
        parts = {"": (W_OI.T if problem.transposed else W_OI).cpu().contiguous()}
    else:
        parts = layout.pack(result.packable)
        told = layout.describe(parts)
        entry = {**layout.to_config(), **({"transposed": True} if problem.transposed else {})}
    # Factors are packed as they are made, on the CPU.
    error, kind = relative_error(dense_OI, W_OI.to(dense_OI.device).float(), stats)
    report = LinearReport(
        name=problem.name,
        shape=(W_OI.shape[0], W_OI.shape[1]),
        layout=told.layout,
        sparsity=1 - told.count / W_OI.numel(),
        outliers=told.outliers / W_OI.numel(),
        bits=8 * told.bytes / W_OI.numel(),
        bytes=told.bytes,
        error=error,
        error_kind=kind,
        tokens=None if stats.level == Level.NONE else stats.tokens - stats.borrowed,
        borrowed=stats.borrowed,
        **chosen,
    )
    return Solution(report, parts, entry, W_OI)
