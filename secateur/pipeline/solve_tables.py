"""The table of embeddings and the head, up to the tensors that go to disk.

V: vocabulary, I: features, R: some rows, N: windows, S: tokens of a window.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from secateur.core.quantized import Quantized
from secateur.core.ranks import Ranks
from secateur.core.stats import InputStats, Level
from secateur.errors import RepeatedError, UsageError
from secateur.formats.layouts.choose import layout_for
from secateur.formats.layouts.layout import Stored, all_finite, describe_dense
from secateur.model.vocabulary import EMBEDDINGS, HEAD, Table, find_tables, is_tied
from secateur.pipeline.outcome import LinearReport, energies
from secateur.pipeline.solve import Solution
from secateur.quant.table_codes import TableForm, about_bits, quantize_table, some_rows, table_type
from secateur.recipes.plan import Plan

# Weights whose error is measured at a time.
_AT_ONCE = 2**22


def tables_of(model: Any, plan: Plan, name: str) -> dict[str, tuple[Table, TableForm]]:
    """The tables that a plan quantizes, each with the form of its codes, by their modules' names.

    A head that reads the table of embeddings is one with it: of both forms that of more bits counts.

    Args:
        model: a skeleton.
        plan: says which.
        name: of the model, as the user knows it.

    Raises:
        UsageError: it has no such table, or one whose rows are no blocks of the type that is asked for.
    """
    asked, found = dict(plan.tables), find_tables(model)
    tied = is_tied(model)
    if tied and HEAD in asked:
        if EMBEDDINGS not in asked:
            raise UsageError(
                f"`{HEAD}` {asked[HEAD]}: the head of {name} is its table of embeddings, one tensor: give `{EMBEDDINGS}`, too"
            )
        asked = {EMBEDDINGS: max(asked.values(), key=about_bits)}
    for role, form in asked.items():
        if role not in found:
            module = model.get_input_embeddings() if role == EMBEDDINGS else model.get_output_embeddings()
            raise UsageError(
                f"`{role}` of {name} cannot be quantized, a {type(module).__name__} that does more than to give rows or "
                f"products, or shares its weight: leave `{role}` out, or give 16"
            )
        features = model.get_submodule(found[role].name).weight.shape[1]
        if isinstance(form, str) and table_type(form, features) is None:
            raise UsageError(
                f"`{role}` {form} does not fit rows of {features} weights, which are not whole blocks of 32: give bits, as 8"
            )
    return {found[role].name: (found[role], form) for role, form in asked.items()}


def solve_table(
    plan: Plan,
    name: str,
    W_VI: Tensor,
    form: TableForm,
    dtype: torch.dtype,
    device: torch.device,
    stats: InputStats | None = None,
) -> Solution:
    """A table in codes, with what is to be told of it.

    Args:
        plan: whether the result is dense.
        name: of its module.
        W_VI: its weight, all of it finite.
        form: of the codes.
        dtype: of the weight that the codes stand for.
        device: where to compute.
        stats: of its inputs, with their Gram matrix, where it is to be solved by them.

    Raises:
        RepeatedError: its values overflow that dtype.
    """
    weight = quantize_table(W_VI, form, dtype, device, stats)
    overflow = RepeatedError(f"{name}: its values overflow {dtype}: give another `dtype`")
    entry = None
    if plan.dense:
        W = weight.dequantize()
        if not all_finite(W):
            raise overflow
        parts = {"": W}
        told = replace(describe_dense(W), count=W.numel())
    else:
        layout = layout_for(weight)
        parts = layout.pack(weight)
        entry = layout.to_config()
        try:
            told = layout.describe(parts)
        except ValueError as error:  # whose scales are beyond 16 bits, or values beyond the dtype
            raise overflow from error
    return Solution(_report(name, W_VI, weight, told, device, stats), parts, entry)


def _report(
    name: str, W_VI: Tensor, weight: Quantized, told: Stored, device: torch.device, stats: InputStats | None
) -> LinearReport:
    V, I = weight.shape
    seen = InputStats.empty(I, Level.NONE, device) if stats is None else stats
    error = total = 0.0
    for W_RI, dense_RI in zip(_pieces(weight), W_VI.split(max(1, _AT_ONCE // I)), strict=True):
        change, whole, kind = energies(dense_RI.to(device).float(), W_RI.to(device).float(), seen)
        error, total = error + change, total + whole
    return LinearReport(
        name=name,
        shape=(V, I),
        layout=told.layout,
        sparsity=0.0,
        bits=8 * told.bytes / (V * I),
        bytes=told.bytes,
        error=max(error / total, 0.0) if total > 0 else 0.0,
        error_kind=kind,
        tokens=None if stats is None else stats.tokens,
    )


def _pieces(weight: Quantized) -> Iterator[Tensor]:
    """The dense weight some rows at a time."""
    V, I = weight.shape
    rows = max(1, _AT_ONCE // I)
    for start in range(0, V, rows):
        yield some_rows(weight.codes, slice(start, start + rows)).values().to(weight.dtype)


def share_solution(ranks: Ranks, solution: Solution | None) -> Solution:
    """What the first process has solved, in all of them, with its tensors."""
    said, tensors = None, []
    if solution is not None:
        said, tensors = [solution.record(), list(solution.parts)], list(solution.parts.values())
    (record, parts), tensors = ranks.share_with_tensors(said, tensors)
    return Solution.of_record(record, dict(zip(parts, tensors, strict=True)))
