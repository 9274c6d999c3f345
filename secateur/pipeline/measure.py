"""How much memory a run takes, before it is taken: measured on a few tokens and on small linears, and scaled up.

O: output features, I: input features, N: windows, S: tokens of a window.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.feature_units import Units
from secateur.core.patterns import NM, Structured
from secateur.core.ranks import Ranks
from secateur.core.stack import Stack
from secateur.core.stats import InputStats
from secateur.folder.reader import MAPPED_BYTES
from secateur.folder.writer import SHARD_BYTES
from secateur.memory.footprint import Footprint, Group, Polynomial
from secateur.memory.live_bytes import PROBES, LiveBytes
from secateur.mixture.experts import Rows
from secateur.model.block_names import split_name
from secateur.model.structure import Linear, block_linears, parameters_outside, weight_matrix
from secateur.model.weights import release
from secateur.pipeline.prepared import Prepared
from secateur.pipeline.solve import Problem, solve
from secateur.quant.table_codes import sweeping_bytes
from secateur.recipes.plan import Plan
from secateur.walking.capture import BlockCall, BodyCalls
from secateur.walking.experts_in_turn import ExpertsInTurn, Turns
from secateur.walking.gathering import Gathering
from secateur.walking.placing import only_in_head
from secateur.walking.walker import Catcher, Walker

# Linears are measured at two sizes, of so many inputs at most.
_MEASURED_INPUTS = (512, 1024)
# More copies of the weights and of the Gram matrix than any solver makes.
_MOST_WEIGHTS, _MOST_GRAMS = 16, 6


@dataclass(frozen=True)
class _Sizes:
    """Bytes that the shapes of a model tell: `outside`, `embeddings`, `block`, `written` as in `Footprint`.

    Attributes:
        tensor: the largest of a block, in its file.
        stored: a weight that is written dense.
    """

    outside: int
    embeddings: int
    block: int
    written: int
    tensor: int
    stored: int

    @classmethod
    def of(cls, prepared: Prepared) -> _Sizes:
        """Of the largest block of a model and of what is outside the blocks."""
        inside = max(
            (_tensors(prepared, number) for number in range(len(prepared.blocks))),
            key=lambda tensors: sum(tensor.numel() for tensor, _ in tensors),
        )
        outside = dict(parameters_outside(prepared.model, prepared.blocks))
        stored, written = prepared.source.dtype.itemsize, prepared.written_dtype.itemsize
        computed = prepared.compute_dtype.itemsize
        largest = max((tensor.numel() for tensor in outside.values()), default=0)
        return cls(
            # The largest, mapped; what waits to be written, and the copy of it that is.
            outside=stored * largest
            + 2 * written * min(sum(t.numel() for t in outside.values()), largest + SHARD_BYTES // written),
            embeddings=sum(
                computed * tensor.numel() for name, tensor in outside.items() if _runs_before_blocks(prepared, name)
            ),
            block=computed * sum(tensor.numel() for tensor, in_turn in inside if not in_turn),
            written=written * sum(tensor.numel() for tensor, _ in inside),
            tensor=stored * max(tensor.numel() for tensor, _ in inside),
            stored=written,
        )


def _tensors(prepared: Prepared, number: int) -> list[tuple[Tensor, bool]]:
    """Those of a block, and whether each is in memory only while its turn lasts."""
    prefix = prepared.block_names[number]
    return [
        (tensor, f"{prefix}.{name}".removesuffix(".weight") in prepared.of_experts)
        for name, tensor in prepared.blocks[number].state_dict().items()
    ]


def _runs_before_blocks(prepared: Prepared, name: str) -> bool:
    """Whether a parameter outside the blocks is in memory while they are entered."""
    owner = prepared.model.get_submodule(name.rpartition(".")[0])
    solved = name.removesuffix(".weight") in prepared.tables
    mapped = prepared.device.type == "cpu" and type(owner) is nn.Embedding and not solved
    return not mapped and not only_in_head(prepared.model, name)


def measure_without_inputs(prepared: Prepared, exact: bool) -> Footprint:
    """What a run takes whose methods look at no inputs: one linear at a time. `exact`: see `measure`."""
    sizes = _Sizes.of(prepared)
    shapes = {tuple(weight_matrix(prepared.linear(name)).shape) for name in prepared.chosen}
    largest = max((O * I for O, I in shapes), default=0)
    solving = 4.0 * _MOST_WEIGHTS * largest
    if exact:
        cpu = torch.device("cpu")
        solving = max((_solving(prepared.plan, [O], I, torch.float32, cpu)[0] for O, I in shapes), default=0.0)
    zero = Polynomial(0, 0)
    return Footprint(
        base=prepared.base,
        mapped=MAPPED_BYTES + sizes.tensor,
        outside=sizes.outside,
        embeddings=0,
        block=4 * largest,
        written=sizes.written,
        hidden=0,
        forward=zero,
        groups=(Group(zero, 0, solving),),
        tokens=0,
        seq_len=0,
        device=prepared.device.type,
    )


def measure(walker: Walker, catcher: Catcher, ids_NS: Tensor, exact: bool) -> Footprint:
    """What a run will hold in memory, from the first block of each kind, or from the body.

    Args:
        ids_NS: the windows of this process.
        exact: also measure what solving takes; else it is put at more than it is, which takes no time.
    """
    prepared = walker.prepared
    sizes = _Sizes.of(prepared)
    on_device = ids_NS.to(prepared.device)
    if isinstance(catcher, BodyCalls):
        size = sum(p.numel() for b in prepared.blocks for p in b.parameters())
        block_bytes = prepared.compute_dtype.itemsize * size
        linears = {name: linear for i in range(len(prepared.blocks)) for name, linear in prepared.chosen_in(i).items()}
        passed = [_pass(walker, catcher, on_device, 0, linears)]
    else:
        block_bytes = sizes.block
        passed = [
            _pass(walker, catcher, on_device, number, _like_chosen(prepared, number))
            for number in prepared.first_of_kinds
        ]
    solving = _Solving(prepared, exact)
    groups = [solving.group(names, kept) for each in passed for names, kept in each.held]
    learning = _Learning.of(prepared, passed, ids_NS.numel(), exact)
    groups += learning.groups
    if prepared.head is not None and not isinstance(catcher, BodyCalls):
        groups.append(_of_head(prepared, prepared.head))
    saved = max(sum(solving.saved(names) for names, _ in each.held) for each in passed)
    return Footprint(
        base=prepared.base + learning.kept,
        mapped=MAPPED_BYTES + sizes.tensor,
        outside=sizes.outside,
        embeddings=sizes.embeddings,
        block=block_bytes,
        # More than a shard never waits.
        written=int(min(sizes.written - saved, SHARD_BYTES + sizes.tensor)),
        hidden=passed[0].hidden,
        forward=max((each.forward for each in passed), key=lambda forward: forward(ids_NS.shape[1])),
        groups=tuple(groups),
        tokens=ids_NS.numel(),
        seq_len=ids_NS.shape[1],
        device=prepared.device.type,
        experts=max((module.count for module in prepared.experts.values()), default=0),
        processes=walker.ranks.size,
        streams=2 if prepared.plan.match_dense else 1,
        keeps=walker.room.limit is None,
    )


def _of_head(prepared: Prepared, head: str) -> Group:
    """A head that is solved by its inputs, when no block is in memory any more."""
    V, I = prepared.linear(head).get_parameter("weight").shape
    weight = prepared.weights.bytes_as(prepared.weights.name_to_write(f"{head}.weight"), None)
    return Group(Polynomial(0, 0), 4 * I * (I + 2), weight + V * I + sweeping_bytes((V, I)))


def _like_chosen(prepared: Prepared, number: int) -> dict[str, Linear]:
    """The linears of a block that are called like some that are to be compressed, in whatever block."""
    parts = {split_name(name, prepared.lists)[1] for name in prepared.chosen}
    everything = block_linears(prepared.blocks[number], prepared.block_names[number])
    return {name: everything[name] for name in everything if split_name(name, prepared.lists)[1] in parts}


class _Solving:
    """What solving linears takes; those of the same shapes take the same."""

    def __init__(self, prepared: Prepared, exact: bool) -> None:
        self._prepared, self._exact = prepared, exact
        self._known: dict[tuple[Any, ...], tuple[float, float]] = {}

    def group(self, names: list[str], held: Polynomial) -> Group:
        """Linears that read the same input, by what a window holds that pauses at them."""
        _, I = self._shape(names)
        plan = self._prepared.plan
        stats = 4 * I * (I * plan.matrices + 2)
        return Group(held, stats, self._solve(names)[0], self._expert(names[0]))

    def saved(self, names: list[str]) -> float:
        """Bytes by which they are smaller where they are written than dense."""
        rows, I = self._shape(names)
        if not self._exact:
            return 0.0
        return self._prepared.written_dtype.itemsize * sum(rows) * I - self._solve(names)[1]

    def _expert(self, name: str) -> int:
        """Bytes of the expert that a linear belongs to."""
        if name not in self._prepared.of_experts:
            return 0
        expert = self._prepared.model.get_submodule(name.rpartition(".")[0])
        return self._prepared.compute_dtype.itemsize * sum(p.numel() for p in expert.parameters())

    def _shape(self, names: list[str]) -> tuple[list[int], int]:
        shapes = [weight_matrix(self._prepared.linear(name)).shape for name in names]
        return [O for O, _ in shapes], shapes[0][1]

    def _solve(self, names: list[str]) -> tuple[float, float]:
        rows, I = self._shape(names)
        key = (*rows, I)
        if key not in self._known:
            rough = 4.0 * (_MOST_WEIGHTS * sum(rows) * I + _MOST_GRAMS * I * I), 0.0
            prepared = self._prepared
            self._known[key] = (
                _solving(prepared.plan, rows, I, prepared.source.dtype, prepared.device) if self._exact else rough
            )
        return self._known[key]


@dataclass(frozen=True)
class _Passed:
    """What passing a block takes.

    Attributes:
        hidden: bytes of the hidden states of a token.
        forward: the most that a window takes.
        held: of each group of linears, what a window keeps that pauses there.
    """

    hidden: int
    forward: Polynomial
    held: list[tuple[list[str], Polynomial]]


@dataclass(frozen=True)
class _Learning:
    """What it takes to learn dictionaries that linears of several blocks share.

    Attributes:
        groups: the linears as the windows are taken ahead through those blocks, and as their dictionaries are learned.
        kept: bytes of dictionaries, while those blocks are solved.
    """

    groups: list[Group]
    kept: int

    @classmethod
    def of(cls, prepared: Prepared, passed: Sequence[_Passed], tokens: int, exact: bool) -> _Learning:
        """Of a model; `exact`: see `measure`."""
        groups, most = [], 0
        for each in passed:
            shared = [([name for name in names if name in prepared.sharing], held) for names, held in each.held]
            stats = [_bytes_of_stats(prepared, names[0]) for names, _ in shared if names]
            waiting, kept = tokens * each.hidden, 0
            for names, held in shared:
                taken = [_learning(prepared, name, exact) for name in names]
                kept += sum(size for _, size in taken)
                if names:  # two are added up
                    together = waiting + sum(stats) + 2 * _bytes_of_stats(prepared, names[0])
                    groups.append(Group(held, together, 0))
                    groups.append(Group(Polynomial(0, 0), waiting + together, max(peak for peak, _ in taken)))
            most = max(most, kept)
        return cls(groups, most)


def _bytes_of_stats(prepared: Prepared, name: str) -> int:
    I = prepared.shape(name)[1]
    return 4 * I * (I * prepared.plan.matrices + 2)


def _learning(prepared: Prepared, name: str, exact: bool) -> tuple[float, int]:
    """The most bytes that it takes to learn the dictionary that a linear shares, with its weights, and those of the result."""
    plan, (O, I) = prepared.plan, prepared.shape(name)
    rows = O * plan.dictionary_blocks
    weights = 4 * rows * I
    if not exact:
        return 4.0 * _MOST_GRAMS * I * I + _MOST_WEIGHTS * weights, weights
    method: Any = plan.factorizer
    peaks, size = [], 0
    for features in (min(I, limit) for limit in _MEASURED_INPUTS):
        draw = torch.Generator().manual_seed(0)
        stats = _inputs(plan, features, draw, prepared.device)
        W_OI = torch.randn(max(1, round(rows * features / I)), features, generator=draw).to(prepared.device)
        parts = W_OI.split(max(1, len(W_OI) // plan.dictionary_blocks))
        with LiveBytes() as live:
            learned = method.learn(Stack.of(parts, stats, prepared.source.dtype))
        peaks.append((features, live.peak))
        size = int(sum(part.nbytes for part in learned.parts.values()) * (I / features) ** 2)
    return weights + Polynomial.through(peaks)(I), size


def _pass(walker: Walker, catcher: Catcher, ids_NS: Tensor, number: int, linears: dict[str, Linear]) -> _Passed:
    """Send a few tokens through a block, or the body, and see what is in memory."""
    prepared = walker.prepared
    probe = catcher.probe
    if isinstance(catcher, BodyCalls):
        block: nn.Module = catcher.body
    else:
        walker.read(number)
        block = prepared.blocks[number]
    stages, _ = walker.stages(block, probe[number], probe[0], linears)
    firsts = [stage for stage in stages if any(stage.groups)]
    S = ids_NS.shape[1]
    peaks: list[tuple[int, int]] = []
    held: dict[int, list[tuple[int, int]]] = {i: [] for i in range(len(firsts))}
    place = {stage.called: i for i, stage in enumerate(firsts) if stage.chunk is not None}
    turns = ExpertsInTurn(prepared, Turns("routed", 0, 1, 1))
    hidden = 0
    for n in sorted({min(n, S) for n in PROBES}):
        caught = catcher.catch(ids_NS[:1, :n])
        call = BlockCall(caught[0].hidden, caught[number].args, caught[number].kwargs)
        hidden = call.hidden.nbytes // n
        with LiveBytes() as live, ExitStack() as left:

            def note(i: int, n: int = n, size: int = call.hidden.nbytes, live: LiveBytes = live) -> None:
                held[i].append((n, live.now + size))

            def announced(called: tuple[str, ...], _: Any, note: Any = note) -> bool:
                if called in place:
                    note(place[called])
                return False

            for i, stage in enumerate(firsts):
                if stage.chunk is None:
                    linear = prepared.linear(stage.groups[0][0])
                    hook = linear.register_forward_pre_hook(lambda *_, i=i, note=note: note(i))
                    left.callback(hook.remove)
            left.enter_context(turns.visited(block, announced))
            call.run(block, call.hidden)
            peaks.append((n, live.peak))
    if number:
        release(block)
    forward = Polynomial.through(peaks)
    inner = [prepared.experts[stage.chunk[0]] for stage in firsts if stage.chunk is not None]
    if inner:
        # All tokens of a window may go to one expert, whose inner states were not computed here.
        width = max(sum(module.widths) for module in inner)
        forward = Polynomial(forward.linear + prepared.compute_dtype.itemsize * width, forward.square)
    return _Passed(
        hidden, forward, [(names, Polynomial.through(held[i])) for i, s in enumerate(firsts) for names in s.groups]
    )


def _inputs(plan: Plan, features: int, draw: torch.Generator, device: torch.device) -> InputStats:
    """Statistics as the walk would gather them, of random inputs."""
    x_TI = torch.randn(2 * features, features, generator=draw).to(device)
    gathering = Gathering(features, plan.level, plan.needs_halves, plan.match_dense, device)
    # The dense model's inputs differ somewhat.
    gathering.add(Rows(0, (), x_TI), 1.1 * x_TI if plan.match_dense else None, 0, windows=2)
    return gathering.total(Ranks(device))


def _solving(
    plan: Plan, rows: Sequence[int], features: int, dtype: torch.dtype, device: torch.device
) -> tuple[float, float]:
    """The most memory that solving takes besides the weights and the statistics, and the bytes of what is written then.

    What a solver keeps is as large as the weights or as the Gram matrix, or is so many rows or columns of them. So linears of
    the same shape are solved at two smaller scales, which tell what grows with the square of the scale from what grows with it.
    """
    pattern = plan.pruning.pattern if plan.pruning is not None else None
    unit = pattern.m if isinstance(pattern, NM) else 1
    structured = isinstance(pattern, Structured)
    peaks, written = [], 0.0
    for limit in _MEASURED_INPUTS:
        I = min(features, max(unit, limit // unit * unit))
        draw = torch.Generator().manual_seed(0)
        stats = _inputs(plan, I, draw, device)
        problems = []
        for i, O in enumerate(rows):
            W_OI = torch.randn(max(1, round(O * I / features)), I, generator=draw).to(device)
            fisher_OI = W_OI.square().cpu() if plan.needs_fisher else None
            # Half of all units, single ones: those that take most to choose.
            units = Units(1, I, 1, max(1, I // 2)) if structured else None
            problems.append(Problem(str(i), W_OI, False, dtype, fisher_OI, units))
        with LiveBytes() as live:
            solutions, _ = solve(plan, problems, stats)
        peaks.append((I, live.peak))
        written = sum(solution.report.bytes for solution in solutions) * (features / I) ** 2
        if features == I:
            return live.peak, written
    return Polynomial.through(peaks)(features), written
