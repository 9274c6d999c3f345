"""What goals have in common that find sparsity and bits of every linear."""

from __future__ import annotations

from secateur.core.registry import QUANTIZERS
from secateur.errors import UsageError
from secateur.folder.writer import entry_bytes
from secateur.quant.block_grid import OPEN, UNIFORM
from secateur.recipes.recipe import Choice, Recipe
from secateur.search.candidates import Candidate, Library, finer
from secateur.search.searcher import Searcher
from secateur.search.table_candidates import with_dense_table


def check_target(recipe: Recipe, name: str) -> None:
    """Raise UsageError where a recipe says itself what a goal of that name is to find."""
    if recipe.allocation == "owl":
        raise UsageError(f"`{name}` is reached by a search: leave `allocation` owl out")
    if recipe.linears:
        return
    if recipe.quantize in QUANTIZERS and not QUANTIZERS[recipe.quantize].all_bits:
        raise UsageError(
            f"`quantize` {recipe.quantize} has no bits to choose among: leave `{name}` out, or quantize by gptq"
        )
    grid = recipe.quantization.get("grid", UNIFORM)
    for option, value in (
        ("sparsity", recipe.sparsity),
        ("pattern", recipe.pattern),
        ("bits", recipe.quantization.get("bits")),
        ("grid", grid if grid not in (UNIFORM, OPEN) else None),
    ):
        if value is not None:
            raise UsageError(f"`{name}` finds sparsity and bits of every linear: leave `{option}` out")


def with_dense(searcher: Searcher, library: Library) -> Library:
    """A library in which all may also stay as it is; without bits, sparsities between those that were solved, too."""
    bytes_of = searcher.prepared.linear_bytes
    found = {
        name: with_dense_table(searcher.prepared, searcher.tables[name], each)
        if name in searcher.tables
        else [*each, Candidate(Choice(), bytes_of(name) + entry_bytes(f"{name}.weight"), 0.0)]
        for name, each in library.items()
    }
    return found if searcher.asked.quantize else {name: finer(each) for name, each in found.items()}
