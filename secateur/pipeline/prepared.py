"""A model made ready to be walked through: its skeleton, and which of its linears are to be compressed.

O: output features, I: input features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from secateur.composite_layouts.dictionary import Factor, Shared
from secateur.core.histogram import Histogram
from secateur.core.patterns import NM, Structured
from secateur.core.stats import InputStats, Level
from secateur.errors import UsageError
from secateur.folder.writer import entry_bytes
from secateur.mixture.experts import Experts
from secateur.mixture.unfuse import check_unfused, experts_in
from secateur.model.block_names import how_to_ignore, split_name
from secateur.model.load import load_source
from secateur.model.source import Source
from secateur.model.structure import (
    Blocks,
    Linear,
    block_linears,
    build_skeleton,
    find_blocks,
    is_transposed,
    kept_in_float32,
    select_linears,
    shared_parameters,
    weight_matrix,
)
from secateur.model.vocabulary import HEAD, Table
from secateur.model.weights import ModelWeights, check_values
from secateur.pipeline.alike_linears import sharing_of
from secateur.pipeline.gated_linears import gated_linears, sizes_for
from secateur.pipeline.outcome import Progress
from secateur.pipeline.solve import Problem, Solution
from secateur.pipeline.solve_tables import solve_table, tables_of
from secateur.pipeline.units_left import chosen_widths, is_per_layer, shortened
from secateur.quant.table_codes import TableForm, table_bytes
from secateur.recipes.goals import is_open
from secateur.recipes.plan import Plan
from secateur.recipes.recipe import Choice, Recipe
from secateur.structured.shorten import dropped, without_dropped
from secateur.structured.structure_of import Structure, structure_of


@dataclass(frozen=True)
class Prepared:
    """A model whose blocks and linears are known, and whose weights are read when their turn comes.

    Attributes:
        source: that it comes from.
        recipe, plan: what is to be done.
        device: where it is run.
        compute_dtype: in which it is run.
        model: its skeleton; what is in place is real, all else on the meta device.
        block_names, blocks: in the order in which they are run.
        lists: the names of the lists of blocks.
        idle: blocks that text does not run.
        names: of all linears in blocks.
        chosen: those to compress.
        tied: those left alone because several modules share their weights.
        twins: names of parameters that are one.
        weights: the stored weights by the names of the model.
        kept: tensors that keep their dtype whatever the rest is written in.
        parameters: how many the model has.
        base: bytes that the process had in use before any weight was read.
        experts: of mixtures, by name.
        of_experts: names of their linears.
        tables: the table of embeddings and the head, as far as they are quantized, each with the form of its codes; by the
            module's name.
        solved: gives the new weights of experts that an earlier run has solved, by the name of their linear, and of a table.
        structure: what a structured pattern makes of it.
        gated: linears of which it is to be chosen for a token which inputs are read.
        sharing: of linears of several blocks that share a dictionary, the first of those that do, which it is stored with.
        dictionaries: those that are shared and known by now, by that linear.
    """

    source: Source
    recipe: Recipe
    plan: Plan
    device: torch.device
    compute_dtype: torch.dtype
    model: Any
    block_names: list[str]
    blocks: list[nn.Module]
    lists: list[str]
    idle: tuple[str, ...]
    names: list[str]
    chosen: frozenset[str]
    tied: list[str]
    twins: Mapping[str, Collection[str]]
    weights: ModelWeights
    kept: frozenset[str]
    parameters: int
    base: int
    experts: Mapping[str, Experts]
    of_experts: frozenset[str]
    tables: Mapping[str, tuple[Table, TableForm]]
    solved: dict[str, Callable[[], Tensor]] = field(default_factory=dict)
    structure: Structure | None = None
    gated: frozenset[str] = frozenset()
    sharing: Mapping[str, str] = field(default_factory=dict)
    dictionaries: dict[str, Factor] = field(default_factory=dict)

    @property
    def written(self) -> Source:
        """The source, with the config that the result has."""
        return self.source if self.structure is None else self.structure.written

    @property
    def parameters_left(self) -> int:
        """How many parameters the result has."""
        structure = self.structure
        if structure is None:
            return self.parameters
        shared = {name for names in self.twins.values() for name in sorted(names)[1:]}
        tensors = self.model.state_dict(keep_vars=True)
        cut = structure.shapes({name: t for name, t in tensors.items() if name not in shared})
        return sum(math.prod(shape) for name, shape in cut.items() if isinstance(tensors[name], nn.Parameter))

    # --- linears

    def linear(self, name: str) -> Linear:
        """The linear of that name."""
        found: Linear = self.model.get_submodule(name)
        return found

    def shape(self, name: str) -> tuple[int, int]:
        """(O, I) of a linear."""
        O, I = weight_matrix(self.linear(name)).shape
        return O, I

    def sizes(self, names: Sequence[str]) -> Histogram | None:
        """Where it is counted how large the input of some linears is; None where nobody asks."""
        if not self.gated.issuperset(names):
            return None
        return sizes_for(self.plan, [weight_matrix(self.linear(name)) for name in names])

    def chosen_in(self, number: int) -> dict[str, Linear]:
        """The linears of a block that are to be compressed, by name."""
        linears = block_linears(self.blocks[number], self.block_names[number])
        return {name: linear for name, linear in linears.items() if name in self.chosen}

    @cached_property
    def kinds(self) -> list[frozenset[str]]:
        """Of each block, what its linears are called: those of one kind have the same."""
        return [
            frozenset(name.removeprefix(f"{prefix}.") for name in block_linears(block, prefix))
            for block, prefix in zip(self.blocks, self.block_names, strict=True)
        ]

    @property
    def first_of_kinds(self) -> list[int]:
        """The first block of each kind."""
        return [self.kinds.index(kind) for kind in dict.fromkeys(self.kinds)]

    def has_experts(self, number: int) -> bool:
        """Whether a block is one of a mixture of experts."""
        prefix = self.block_names[number]
        return any(name.startswith(f"{prefix}.") for name in self.experts)

    def problem(self, name: str, fisher_OI: Tensor | None) -> Problem:
        """A linear as it is to be solved; one that is not in place is read."""
        linear, weight = self.linear(name), f"{name}.weight"
        if linear.get_parameter("weight").is_meta:
            stored = self.weights.checked(weight, linear.get_parameter("weight")).to(self.device)
            W_OI = stored.T if is_transposed(linear) else stored
        else:
            W_OI = weight_matrix(linear)
        shared = self.shared(name)
        problem = Problem(name, W_OI, is_transposed(linear), self.weights.dtype(weight), fisher_OI, shared=shared)
        if self.structure is None:
            return problem
        bias = getattr(linear, "bias", None)
        if bias is not None and bias.is_meta:
            bias = self.weights.checked(f"{name}.bias", bias).to(self.device)
        return replace(problem, units=self.structure.units(name), bias_O=bias)

    def shared(self, name: str) -> Shared | None:
        """What a linear has in common with others, where that is known."""
        owner = self.sharing.get(name, name)
        if owner not in self.dictionaries:
            return None
        number = split_name(owner, self.lists)[0].rpartition(".")[2]
        return Shared(self.dictionaries[owner], None if owner == name else int(number))

    @property
    def head(self) -> str | None:
        """The name of a head that is quantized by itself, and may be solved by its inputs."""
        return next((name for name, (table, _) in self.tables.items() if table.role == HEAD), None)

    def solve_table(self, name: str, stats: InputStats | None = None) -> Solution:
        """A table in codes, by what its inputs are where that is known."""
        table, form = self.tables[name]
        W_VI = self.weights.checked(table.weight, self.linear(name).get_parameter("weight"))
        dtype = self.dtype_of(table.weight) or self.weights.dtype(table.weight)
        return solve_table(self.plan, name, W_VI, form, dtype, self.device, stats)

    def is_plain(self, weight: str) -> bool:
        """Whether a parameter is written as it is."""
        module = weight.removesuffix(".weight")
        if any(module == name or weight in table.twins for name, (table, _) in self.tables.items()):
            return False
        return module == weight or module not in self.chosen

    # --- sizes in bytes

    @property
    def written_dtype(self) -> torch.dtype:
        """Of most weights written."""
        return self.plan.dtype or self.source.stored

    def dtype_of(self, name: str) -> torch.dtype | None:
        """Of a tensor that is written as it is; None: the one it has."""
        return None if name in self.kept else self.plan.dtype

    def outside_bytes(self, but: Sequence[Table] = ()) -> int:
        """On disk, of all tensors that are written as they are; `but` tables that may not be."""
        left_out = {name for table in but for name in (table.weight, *table.twins)}
        dtypes = {
            self.weights.name_to_write(name): self.dtype_of(name)
            for name in self.model.state_dict()
            if name in self.weights and self.is_plain(name) and name not in left_out
        }
        dtypes |= dict.fromkeys(self.weights.unused)
        return sum(self.weights.bytes_as(name, dtype) + entry_bytes(name) for name, dtype in dtypes.items())

    def linear_bytes(self, name: str) -> int:
        """Of a linear's weight where it is written dense."""
        return self.weights.bytes_as(self.weights.name_to_write(f"{name}.weight"), self.plan.dtype)

    def table_bytes(self, name: str, form: TableForm | None = None) -> int:
        """Of a table in codes of a form, or of that which the plan says."""
        shape = self.linear(name).get_parameter("weight").shape
        parts = table_bytes(self.tables[name][1] if form is None else form, (shape[0], shape[1]))
        weight = self.weights.name_to_write(f"{name}.weight")
        return sum(parts.values()) + sum(entry_bytes(f"{weight}.{part}") for part in parts)

    def dense_bytes(self) -> int:
        """Of the files of the dense model in the dtype that is written."""
        return self.outside_bytes() + sum(map(self.linear_bytes, [*self.chosen, *self.tables]))

    @property
    def whole_memory(self) -> int:
        """Of memory that the process takes with the dense model in it."""
        return self.base + self.compute_dtype.itemsize * self.parameters

    # --- checks

    def check_reached(self, unreached: Collection[str]) -> None:
        """Raise UsageError where linears are to be calibrated that have no input."""
        bad = [name for name in self.names if name in self.chosen and name in unreached]
        if bad:
            raise UsageError(
                f"{bad[0]} is not reached by ordinary text, so it cannot be calibrated: leave such linears alone with "
                f"{self._how_to_ignore(bad)}"
            )

    def check_values(self, progress: Callable[[Progress], None]) -> None:
        """Check all weights before any is solved, once for all runs on a source.

        Raises:
            CheckpointError: one is damaged.
        """
        if self.plan.dtype in self.source.sound:
            return
        progress(Progress("checking the weights"))
        plain = {name for name in self.model.state_dict() if self.is_plain(name) and name not in self.kept}
        check_values(self.weights, self.model, dict.fromkeys(plain, self.plan.dtype) if self.plan.dtype else {})
        self.source.sound.add(self.plan.dtype)

    def check_shapes(self) -> None:
        """Raise UsageError where a linear's inputs do not divide into the groups of the pattern."""
        pattern = self.plan.pruning.pattern if self.plan.pruning else None
        if not isinstance(pattern, NM):
            return
        features = {name: weight_matrix(self.linear(name)).shape[1] for name in self.names if name in self.chosen}
        bad = [name for name, I in features.items() if I % pattern.m]
        if bad:
            raise UsageError(
                f"{bad[0]} has {features[bad[0]]} input features, which do not divide into groups of {pattern.m}: "
                f"choose another pattern, or leave such linears alone with {self._how_to_ignore(bad)}"
            )

    def _how_to_ignore(self, names: list[str]) -> str:
        return how_to_ignore(names, set(self.chosen) - set(names), self.lists)

    def load_whole(self) -> Any:
        """The dense model, checked, with experts as linears of their own."""
        # In float32 on a CPU: half precision is emulated by most.
        dtype = self.source.dtype if self.device.type == "cuda" else torch.float32
        return load_source(self.source, dtype, self.device, check_finite=True, apart=True)


def prepare(source: Source, recipe: Recipe, plan: Plan, device: torch.device) -> Prepared:
    """Build the skeleton of a model and find what is to be compressed.

    Raises:
        UsageError: nothing is left to compress, or a linear does not fit the recipe; what to do is said.
        CheckpointError: the files do not fit the model.
    """
    # Blocks are run in float32 on a CPU, which few of them slow down for; a GPU is made for the model's own dtype.
    compute_dtype = source.dtype if device.type == "cuda" else torch.float32
    model: Any = build_skeleton(source, compute_dtype)
    found = find_blocks(model)
    before = len(found.modules), sum(weight_matrix(linear).numel() for linear in found.linears.values())
    pattern = plan.pruning.pattern if plan.pruning is not None else None
    widths = chosen_widths(recipe)
    drop = dropped(found, widths, is_per_layer(pattern))
    short = shortened(source, model, found, drop, pattern)
    if short is not None:
        source, widths = short, without_dropped(found, widths, drop)
        model = build_skeleton(source, compute_dtype)
        found = find_blocks(model)
    for name, block in found.modules.items():
        check_unfused(block, name)
    experts = experts_in(model)
    names, twins = list(found.linears), shared_parameters(model)
    tied: list[str] = []
    chosen: set[str] = set()
    structure = None
    if isinstance(pattern, Structured):
        _check_own_weights(source, found, twins)
        given = widths if recipe.linears else None
        structure = structure_of(source, model, found, pattern, given, is_open(recipe))
        structure = replace(structure, before=before)
        chosen = set(structure.widths)
    elif plan.of_linears:
        wanted = select_linears(names, recipe.targets, recipe.ignore)
        tied = [name for name in names if name in wanted and f"{name}.weight" in twins]
        chosen = _without_left_alone(set(wanted) - set(tied), recipe, bool(plan.tables))
    gated = gated_linears(source, model, found, plan, chosen)
    if plan.sparsifier is not None and not plan.changes_weights:
        chosen = set(gated)
    of_experts = frozenset(f"{name}.{linear}" for name, module in experts.items() for linear in module.linears)
    apart = [name for name in names if name in chosen and name not in of_experts]
    weights = ModelWeights(source, model)  # which may untie what the config ties
    prepared = Prepared(
        source=source,
        recipe=recipe,
        plan=plan,
        device=device,
        compute_dtype=compute_dtype,
        model=model,
        block_names=list(found.modules),
        blocks=list(found.modules.values()),
        lists=found.lists,
        idle=found.idle,
        names=names,
        chosen=frozenset(chosen),
        tied=tied,
        twins=twins,
        weights=weights,
        kept=frozenset(name for name, _ in (kept_in_float32(model, plan.dtype) if plan.dtype is not None else [])),
        parameters=sum(p.numel() for p in model.parameters()),
        base=psutil.Process().memory_info().rss,
        experts=experts,
        of_experts=of_experts,
        structure=structure,
        gated=gated,
        tables=tables_of(model, plan, source.name),
        sharing=sharing_of(model, apart, list(found.modules), found.lists, plan.dictionary_blocks),
    )
    prepared.check_shapes()
    if plan.level > Level.NONE:
        prepared.check_reached(found.unreached or ())
    return prepared


def _check_own_weights(source: Source, found: Blocks, twins: Collection[str]) -> None:
    """Raise UsageError where linears of blocks share their weights with others: no units can go from one of them alone."""
    shared = next((name for name in found.linears if f"{name}.weight" in twins), None)
    if shared is not None:
        raise UsageError(f"{shared} of {source.name} shares its weight with another module, so no units can go")


def _without_left_alone(chosen: set[str], recipe: Recipe, tables: bool) -> set[str]:
    """Linears to compress without those for which nothing is chosen; `tables`: something else becomes smaller."""
    if not chosen:
        raise UsageError("nothing is left to compress: all linears share their weights with others")
    for name in recipe.linears:
        if name not in chosen:
            raise UsageError(
                f"the recipe chooses for {name}, which is none of the linears to compress: is it of another model?"
            )
    chosen = chosen - {name for name, choice in recipe.linears.items() if choice == Choice()}
    if not chosen and not tables:
        raise UsageError("nothing is left to compress: the recipe's choices leave every linear alone")
    return chosen
