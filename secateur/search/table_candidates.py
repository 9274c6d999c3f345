"""What the table of embeddings and the head may become, and what each of that does to the predictions, measured.

N: windows, S: tokens of a window, V: vocabulary, I: features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from secateur.evaluation.distributions import log_predictions
from secateur.evaluation.kl import kl
from secateur.model.vocabulary import Table, find_tables
from secateur.pipeline.prepared import Prepared
from secateur.quant.block_grid import OPEN, grids_for
from secateur.quant.table_codes import TableForm, quantize_table
from secateur.recipes.goals import has_target
from secateur.recipes.recipe import Choice, Recipe
from secateur.search.candidates import Candidate

#: Bits that are tried, where no grids of GGUF's are.
BITS = (8, 6, 5, 4, 3)
#: Tokens that a divergence is measured on: nothing is drawn, so that fewer do than for the effects of linears.
TOKENS = 1024
# What the dense model's predictions are called in their file.
_DENSE = "predictions"


def open_tables(prepared: Prepared, asked: Recipe) -> dict[str, Table]:
    """The tables of a model for which a search finds bits, by their modules' names."""
    if not has_target(asked) or not asked.quantize:
        return {}
    fixed = {table.role for table, _ in prepared.tables.values()}
    found = find_tables(prepared.model)
    return {t.name: t for role, t in found.items() if getattr(asked, role) is None and role not in fixed}


def forms_of(asked: Recipe, table: Table, model: Any) -> tuple[TableForm, ...]:
    """What codes are tried for a table: on grids of GGUF's, where linears get those, and else of so many bits."""
    if asked.quantization.get("grid") == OPEN:
        return grids_for(model.get_submodule(table.name).weight.shape[1])
    return BITS


def table_candidates(
    prepared: Prepared,
    model: Any,
    table: Table,
    ids_NS: Tensor,
    scratch: Path,
    say: Callable[[str], None],
    forms: Sequence[TableForm] = BITS,
) -> list[Candidate]:
    """A table in codes of each form, with the divergence that it causes alone.

    Args:
        model: the dense one, whole; it is left as it was.
        ids_NS: windows.
        scratch: a folder for what the dense model predicts.
        say: told of every step.
        forms: of codes.
    """
    ids_NS = ids_NS[: max(1, TOKENS // ids_NS.shape[1])].to(model.device)
    files = [scratch / f"dense-{n:04d}.safetensors" for n in range(len(ids_NS))]
    for file, ids_S in zip(files, ids_NS, strict=True):
        if not file.exists():
            save_file({_DENSE: log_predictions(model, ids_S).cpu().contiguous()}, file)
    dense = model.get_submodule(table.name).weight
    dtype = prepared.dtype_of(table.weight) or prepared.weights[table.weight].dtype
    found = []
    for form in forms:
        choice = Choice(grid=form) if isinstance(form, str) else Choice(bits=form)
        say(f"measuring {table.name} {f'on grid {form}' if choice.grid else f'at {form} bits'}")
        weight = quantize_table(dense.detach(), form, dtype, prepared.device)
        _put(model, table, nn.Parameter(weight.dequantize().to(dense), requires_grad=False))
        divergence = sum(
            kl(load_file(file)[_DENSE].to(model.device), log_predictions(model, ids_S)).sum().item()
            for file, ids_S in zip(files, ids_NS, strict=True)
        )
        cost = max(divergence / ids_NS.numel(), 0.0)
        found.append(Candidate(choice, prepared.table_bytes(table.name, form), cost))
    _put(model, table, dense)
    return found


def _put(model: nn.Module, table: Table, weight: nn.Parameter) -> None:
    for name in (table.weight, *table.twins):
        model.get_submodule(name.rpartition(".")[0])._parameters["weight"] = weight


def with_dense_table(prepared: Prepared, table: Table, found: list[Candidate]) -> list[Candidate]:
    """Also as it is."""
    size = prepared.outside_bytes() - prepared.outside_bytes([table])
    return [*found, Candidate(Choice(), size, 0.0)]


def with_choices(asked: Recipe, tables: dict[str, Table], choices: dict[str, Choice], untouched: int) -> Recipe:
    """A recipe with what was chosen for each linear and each table."""
    linears = {name: choice for name, choice in choices.items() if name not in tables}
    forms = {
        tables[name].role: choice.grid or choice.bits or untouched for name, choice in choices.items() if name in tables
    }
    return replace(asked, linears=linears, **forms)  # type: ignore[arg-type]
