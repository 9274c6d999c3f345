"""How much memory a run takes, before it is taken: measured on a few tokens and on small linears, and scaled up.

O: output features, I: input features, N: windows, S: tokens of a window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.patterns import NM
from secateur.core.stats import InputStats, Level
from secateur.folder.reader import MAPPED_BYTES
from secateur.folder.writer import SHARD_BYTES
from secateur.memory.footprint import Footprint, Group, Polynomial
from secateur.memory.live_bytes import LiveBytes
from secateur.model.block_names import split_name
from secateur.model.structure import Linear, block_linears, parameters_outside, weight_matrix
from secateur.pipeline.capture import BodyCalls
from secateur.pipeline.prepared import Prepared
from secateur.pipeline.solve import Problem, solve
from secateur.pipeline.walker import Catcher, Walker, only_in_head
from secateur.recipes.plan import Plan

# Tokens on which a block is measured: two lengths tell what grows with the length from what grows with its square.
_PROBES = (8, 32)
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
        block = max(prepared.blocks, key=lambda block: sum(p.numel() for p in block.parameters()))
        outside = dict(parameters_outside(prepared.model, prepared.blocks))
        inside = [tensor.numel() for tensor in block.state_dict().values()]
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
            block=computed * sum(inside),
            written=written * sum(inside),
            tensor=stored * max(inside),
            stored=written,
        )


def _runs_before_blocks(prepared: Prepared, name: str) -> bool:
    """Whether a parameter outside the blocks is in memory while they are entered."""
    owner = prepared.model.get_submodule(name.rpartition(".")[0])
    mapped = prepared.device.type == "cpu" and type(owner) is nn.Embedding
    return not mapped and not only_in_head(prepared.model, name)


def measure_without_inputs(prepared: Prepared, exact: bool) -> Footprint:
    """What a run takes whose methods look at no inputs: one linear at a time. `exact`: see `measure`."""
    sizes = _Sizes.of(prepared)
    shapes = {tuple(weight_matrix(prepared.linear(name)).shape) for name in prepared.chosen}
    largest = max(O * I for O, I in shapes)
    solving = 4.0 * _MOST_WEIGHTS * largest
    if exact:
        cpu = torch.device("cpu")
        solving = max(_solving(prepared.plan, [O], I, torch.float32, cpu)[0] for O, I in shapes)
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
    """What a run will hold in memory, from the first block, which is in place, or from the body.

    Args:
        ids_NS: the windows of this process.
        exact: also measure what solving takes; else it is put at more than it is, which takes no time.
    """
    prepared = walker.prepared
    sizes = _Sizes.of(prepared)
    if isinstance(catcher, BodyCalls):
        block, size = catcher.body, sum(p.numel() for b in prepared.blocks for p in b.parameters())
        linears = {name: linear for i in range(len(prepared.blocks)) for name, linear in prepared.chosen_in(i).items()}
        block_bytes = prepared.compute_dtype.itemsize * size
    else:
        block, block_bytes = prepared.blocks[0], sizes.block
        parts = {split_name(name, prepared.lists)[1] for name in prepared.chosen}
        everything = block_linears(block, prepared.block_names[0])
        linears = {name: everything[name] for name in everything if split_name(name, prepared.lists)[1] in parts}
    groups, _ = walker.groups(block, catcher.probe[0], catcher.probe[0], linears)
    hidden, forward, held = _forward(
        block, catcher, ids_NS.to(prepared.device), [linears[names[0]] for names in groups]
    )
    found, written = [], float(sizes.written)
    for names, kept in zip(groups, held, strict=True):
        shapes = [weight_matrix(linears[name]).shape for name in names]
        I, rows = shapes[0][1], [O for O, _ in shapes]
        bytes_of_stats = 4 * I * (I + 2 if prepared.plan.level >= Level.GRAM else 2)
        solving = 4.0 * (_MOST_WEIGHTS * sum(rows) * I + _MOST_GRAMS * I * I)
        if exact:
            solving, packed = _solving(prepared.plan, rows, I, prepared.source.dtype, prepared.device)
            written -= sizes.stored * sum(rows) * I - packed
        found.append(Group(kept, bytes_of_stats, solving))
    return Footprint(
        base=prepared.base,
        mapped=MAPPED_BYTES + sizes.tensor,
        outside=sizes.outside,
        embeddings=sizes.embeddings,
        block=block_bytes,
        written=int(written),
        hidden=hidden,
        forward=forward,
        groups=tuple(found),
        tokens=ids_NS.numel(),
        seq_len=ids_NS.shape[1],
        device=prepared.device.type,
    )


def _forward(
    block: nn.Module, catcher: Catcher, ids_NS: Tensor, firsts: Sequence[Linear]
) -> tuple[int, Polynomial, list[Polynomial]]:
    """Bytes of the hidden states of a token, of a window on its way through a block, and of what it keeps at each linear."""
    S = ids_NS.shape[1]
    peaks: list[tuple[int, int]] = []
    held: list[list[tuple[int, int]]] = [[] for _ in firsts]
    hidden = 0
    for n in sorted({min(n, S) for n in _PROBES}):
        call = catcher.catch(ids_NS[:1, :n])[0]
        hidden = call.hidden.nbytes // n
        with LiveBytes() as live:

            def note(i: int, n: int = n, size: int = call.hidden.nbytes, live: LiveBytes = live) -> Any:
                return lambda *_: held[i].append((n, live.now + size))

            handles = [linear.register_forward_pre_hook(note(i)) for i, linear in enumerate(firsts)]
            call.run(block, call.hidden)
            peaks.append((n, live.peak))
            for handle in handles:
                handle.remove()
    return hidden, Polynomial.through(peaks), [Polynomial.through(points) for points in held]


def _solving(
    plan: Plan, rows: Sequence[int], features: int, dtype: torch.dtype, device: torch.device
) -> tuple[float, float]:
    """The most memory that solving takes besides the weights and the statistics, and the bytes of what is written then.

    What a solver keeps is as large as the weights or as the Gram matrix, or is so many rows or columns of them. So linears of
    the same shape are solved at two smaller scales, which tell what grows with the square of the scale from what grows with it.
    """
    pattern = plan.pruning.pattern if plan.pruning is not None else None
    unit = pattern.m if isinstance(pattern, NM) else 1
    peaks, written = [], 0.0
    for limit in _MEASURED_INPUTS:
        I = min(features, max(unit, limit // unit * unit))
        draw = torch.Generator().manual_seed(0)
        stats = InputStats.empty(I, plan.level, device)
        stats.add(torch.randn(2 * I, I, generator=draw).to(device))
        problems = []
        for i, O in enumerate(rows):
            W_OI = torch.randn(max(1, round(O * I / features)), I, generator=draw).to(device)
            fisher_OI = W_OI.square().cpu() if plan.needs_fisher else None
            problems.append(Problem(str(i), W_OI, False, dtype, fisher_OI))
        with LiveBytes() as live:
            solutions, _ = solve(plan, problems, stats)
        peaks.append((I, live.peak))
        written = sum(solution.report.bytes for solution in solutions) * (features / I) ** 2
        if features == I:
            return live.peak, written
    return Polynomial.through(peaks)(features), written
