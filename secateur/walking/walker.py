"""Taking calibration windows through the blocks of a prepared model, with no more of its weights in memory than are wanted.

N: windows, S: tokens of a window.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from secateur.core.stats import InputStats, Level
from secateur.errors import RepeatedError
from secateur.memory.footprint import Settings
from secateur.model.structure import Linear, parameters_outside
from secateur.model.weights import Ahead, materialise, place, tie
from secateur.pipeline.job import Job
from secateur.pipeline.prepared import Prepared
from secateur.unfinished.hidden import HiddenStates
from secateur.unfinished.kept_inputs import file_beside
from secateur.walking.capture import BlockCall, BlockCalls, BodyCalls, NotInTurn, Stage, find_stages
from secateur.walking.clock import Clock
from secateur.walking.experts_in_turn import ExpertsInTurn, Turns
from secateur.walking.forward import forward, precision
from secateur.walking.placing import keep_mapped, keep_rows, move_buffers, only_in_head, read_shared
from secateur.walking.twin import Twin
from secateur.walking.walk import Beside, Gathered, Passage, Solve, Target, Way, in_batches, walk

_PROBE_TOKENS = 8
# Where the next block is read while one is solved. On a CPU that would take the cores from solving.
_READ_AHEAD = ("cuda",)

Catcher = BlockCalls | BodyCalls


class Walker:
    """Reads blocks and takes windows through them.

    Args:
        job: whose memory limit holds.
        prepared: the model.
        clock: measures the phases.
    """

    def __init__(self, job: Job, prepared: Prepared, clock: Clock) -> None:
        self.prepared, self.clock = prepared, clock
        self.ranks = job.ranks
        self.room = job.room
        self._ahead = Ahead(prepared.weights, prepared.device) if prepared.device.type in _READ_AHEAD else None

    # --- what is before the blocks

    def enter(self, ids_NS: Tensor) -> Catcher:
        """Put the first block in place, and what comes before it; all blocks, where the model does not run them in turn.

        Raises:
            UsageError: all blocks have to be in memory, and may not.
        """
        prepared = self.prepared
        self._place_outside()
        self.read(0)
        probe_1S = ids_NS[:1, :_PROBE_TOKENS].to(prepared.device)
        try:
            return BlockCalls(prepared.model, prepared.blocks, probe_1S)
        except NotInTurn as error:
            instead = "`prune` magnitude or `quantize` rtn, which look at no text"
            self.room.check(prepared.whole_memory, f"calibrating {prepared.source.name}, where {error},", instead)
        with self.clock("opening"):
            for number in range(len(prepared.blocks)):
                self.read(number, whole=True)
        return BodyCalls(prepared.model, probe_1S)

    def _place_outside(self) -> None:
        """Put in place what is outside the blocks; the head computes logits, which nobody reads here."""
        prepared = self.prepared
        with self.clock("opening"):
            for name, _ in parameters_outside(prepared.model, prepared.blocks):
                if only_in_head(prepared.model, name) or self._place_solved(name):
                    continue
                if keep_mapped(prepared.model, name, prepared.weights, prepared.compute_dtype, prepared.device):
                    continue
                materialise(prepared.model, "", [name], prepared.weights, prepared.device)
            tie(prepared.model)
            move_buffers(prepared.model, prepared.device)

    def _place_solved(self, name: str) -> bool:
        """Put what a table has become in its place; whether it is one that is solved."""
        solved = self.prepared.solved.get(name.removesuffix(".weight"))
        if solved is None:
            return False
        owner = self.prepared.model.get_submodule(name.rpartition(".")[0])
        device, dtype = self.prepared.device, self.prepared.compute_dtype
        if type(owner) is nn.Embedding:
            keep_rows(owner, "weight", solved().to(device), dtype)
        else:
            place(owner, "weight", solved().to(device, dtype))
        return True

    def leave(self) -> None:
        """Let go of what is outside the blocks."""
        inside = {id(part) for block in self.prepared.blocks for part in block.modules()}
        for module in self.prepared.model.modules():
            if id(module) not in inside:
                for leaf, parameter in module._parameters.items():
                    if parameter is not None:
                        place(module, leaf, parameter.detach().to("meta"))

    # --- behind the blocks

    def stats_of_head(self, journey: Journey, head: str) -> InputStats:
        """The statistics, for Gram matrices, of what a head reads where windows have come out of the last block."""
        assert isinstance(journey.catcher, BlockCalls)
        self._place_outside()
        model, device = self.prepared.model, self.prepared.device
        linear = self.prepared.linear(head)
        stats = InputStats.empty(linear.get_parameter("weight").shape[1], Level.GRAM, device)
        first = 0
        for i in range(len(journey.hiddens)):
            with forward(self.clock, precision(self.prepared)):
                hidden = journey.hiddens.take(i)
                ids_NS = journey.ids_NS[first : first + len(hidden)].to(device)
                x = journey.catcher.before_head(model, linear, ids_NS, hidden)
            with self.clock("statistics"):
                stats.add(x.reshape(-1, x.shape[-1]))
            first += len(hidden)
        self.leave()
        if not stats.finite:
            raise RepeatedError(
                f"the input of {head} is not finite: the model overflows in {self.prepared.compute_dtype}"
            )
        return stats

    # --- blocks

    def read(self, number: int, whole: bool = False) -> None:
        """Put a block's weights in place, unless they are, and have the next one's read meanwhile.

        Args:
            whole: with those of its experts, which are read when their turn comes else.
        """
        prepared = self.prepared
        block, prefix = prepared.blocks[number], prepared.block_names[number]
        with self.clock("reading"):
            names = self._names(number, whole)
            if any(_tensor(block, name).is_meta for name in names):
                materialise(block, prefix, names, prepared.weights, prepared.device, ahead=self._ahead)
                read_shared(block, prefix, names, prepared.weights, prepared.twins, prepared.device)
            if self._ahead is not None and number + 1 < len(prepared.blocks):
                self._ahead.start(
                    prepared.block_names[number + 1], prepared.blocks[number + 1], self._names(number + 1, whole)
                )

    def _names(self, number: int, whole: bool) -> list[str]:
        """Of the tensors of a block that are read when the block is."""
        prefix, of_experts = self.prepared.block_names[number], self.prepared.of_experts
        names = list(self.prepared.blocks[number].state_dict())
        return [name for name in names if whole or f"{prefix}.{name}".removesuffix(".weight") not in of_experts]

    def catch(
        self,
        catcher: Catcher,
        ids_NS: Tensor,
        settings: Settings,
        file_of: Callable[[int], Path],
        windows: int | None = None,
        beside: bool = False,
    ) -> Journey:
        """How each block is called for each batch of the windows, and the inputs of the first.

        Args:
            file_of: where the inputs of a block wait, if they wait in files.
            windows: of how many in all processes these are some; None: of those that the processes are given here.
            beside: whether the dense model's inputs go along.
        """
        device = self.prepared.device
        keep_on = torch.device("cpu") if settings.hidden == "host" else device

        def waiting(number: int, named: Callable[[Path], Path] = lambda file: file) -> HiddenStates:
            return HiddenStates(keep_on, named(file_of(number)) if settings.hidden == "file" else None)

        def waiting_beside(number: int) -> HiddenStates:
            return waiting(number, file_beside)

        hiddens, calls = waiting(0), []
        dense = waiting_beside(0) if beside else None
        with self.clock("opening"):
            for batch_NS in in_batches(ids_NS, settings.batch_tokens):
                batch = catcher.catch(batch_NS.to(device))
                for each in (hiddens, dense):
                    if each is not None:
                        each.append(batch[0].hidden)
                for call in batch:
                    call.hidden = call.hidden[:0, :0].clone()
                calls.append(batch)
        keep = None if settings.pause else file_of(0).parent / "experts"
        asked = self.prepared.recipe.calibration
        given = self.ranks.gather(len(ids_NS))
        turns = Turns(
            inputs=asked.expert_inputs,
            tokens=asked.expert_tokens,
            windows=sum(given) if windows is None else windows,
            window=ids_NS.shape[1],
            at_once=settings.experts,
            keep=keep,
        )
        first = sum(given[: self.ranks.rank])
        along = None
        if dense is not None:
            along = Journey(self, catcher, settings.pause, waiting_beside, calls, dense, turns, ids_NS, first)
        twin = Twin(catcher.body) if beside and isinstance(catcher, BodyCalls) else None
        return Journey(self, catcher, settings.pause, waiting, calls, hiddens, turns, ids_NS, first, along, twin)

    def stages(
        self, block: nn.Module, call: BlockCall, probe: BlockCall, linears: dict[str, Linear], at_once: int = 1
    ) -> tuple[list[Stage], bool]:
        """The linears of a block by the input that they read, and whether one of them is used more than once.

        Args:
            call: how the block is called, and `probe`: a call with the hidden states of a few tokens.
            at_once: how many experts are visited together.
        """
        called = BlockCall(probe.hidden, call.args, call.kwargs)
        stages, times = find_stages(block, called, linears, self.prepared.of_experts, at_once)
        self.prepared.check_reached({name for name, n in times.items() if n == 0})
        return stages, any(n > 1 for n in times.values())


@dataclass
class Journey:
    """Windows on their way through the blocks.

    Attributes:
        walker: that takes them.
        catcher: of the blocks' calls.
        pause: whether batches may stand half way through a block.
        waiting: what the inputs of a block are collected in.
        calls: for each batch those of all blocks, or of the body.
        hiddens: the inputs of the next block.
        turns: how experts are visited.
        ids_NS: the windows.
        first: the number of the first window, among those of all processes.
        beside: the same windows on their way through the dense model, where they go along.
        twin: of the body, as it was before anything in it was solved, where those windows pass it whole.
    """

    walker: Walker
    catcher: Catcher
    pause: bool
    waiting: Callable[[int], HiddenStates]
    calls: list[list[BlockCall]]
    hiddens: HiddenStates
    turns: Turns
    ids_NS: Tensor
    first: int = 0
    beside: Journey | None = None
    twin: Twin | None = None

    @property
    def inputs(self) -> list[HiddenStates]:
        """The inputs of the next block, and the dense model's where they go along."""
        return [self.hiddens] if self.beside is None else [self.hiddens, self.beside.hiddens]

    def put(self, inputs: Sequence[HiddenStates]) -> None:
        """Go on from other inputs of the next block."""
        self.hiddens, *dense = inputs
        if self.beside is not None:
            (self.beside.hiddens,) = dense

    def passage(self, number: int, outputs: HiddenStates | None, body: nn.Module | None = None) -> Passage:
        """Of one block, which is in place, or of a body that holds all."""
        module = self.walker.prepared.blocks[number] if body is None else body
        walker, calls = self.walker, [batch[number] for batch in self.calls]
        dtype = precision(walker.prepared)
        return Passage(module, calls, self.hiddens, outputs, walker.ranks, walker.clock, dtype, self.first)

    def pass_unsolved(self, number: int) -> None:
        """Run the inputs of a block that is in place through it; what comes out is the next one's."""
        outputs = self.waiting(number + 1)
        if self.walker.prepared.has_experts(number):
            replace(self, beside=None).walk_block(number, {}, outputs, Level.NONE, lambda _: None)
        else:
            self.passage(number, outputs).run()
        self.hiddens = outputs

    def pass_beside(self, number: int) -> None:
        """Run the dense model's inputs of a block through it, where they go along; none of it may be compressed yet."""
        if self.beside is not None:
            self.beside.pass_unsolved(number)

    def walk_block(
        self, number: int, linears: dict[str, Linear], outputs: HiddenStates | None, level: Level, solve: Solve
    ) -> None:
        assert isinstance(self.catcher, BlockCalls)
        walker, probe = self.walker, self.catcher.probe
        block = walker.prepared.blocks[number]
        stages, again = walker.stages(block, probe[number], probe[0], linears, self.turns.at_once)
        experts = ExpertsInTurn(walker.prepared, self.turns, whole=again)
        plan, sizes = walker.prepared.plan, walker.prepared.sizes
        looks_first = plan.looks_first and not walker.prepared.has_experts(number)
        target = Target(stages, linears, again, level, solve, experts, plan.needs_halves, sizes, looks_first)
        way = target.way(self.pause)
        if way is Way.REPEAT:
            walker.read(number, whole=True)
        beside = None
        if self.beside is not None:
            further = self.beside.waiting(number + 1) if outputs is not None else None
            beside = self._beside(self.beside.passage(number, further), Twin(block), again)
        try:
            walk(self.passage(number, outputs), target, way, beside)
        finally:
            if self.turns.keep is not None:
                shutil.rmtree(self.turns.keep, ignore_errors=True)
        if self.beside is not None and beside is not None:
            self.beside.go_on(number, beside.passage.outputs)

    def _beside(self, passage: Passage, twin: Twin, whole: bool) -> Beside:
        """The dense model's batches on their way through a twin of what they pass."""
        return Beside(twin, passage, ExpertsInTurn(self.walker.prepared, self.turns, whole, twin))

    def go_on(self, number: int, outputs: HiddenStates | None) -> None:
        """From the outputs of a block, which must be finite; None: they go no further."""
        if outputs is None:
            return
        if not outputs.finite:
            prepared = self.walker.prepared
            name = prepared.block_names[number]
            raise RepeatedError(f"the output of {name} is not finite: the model overflows in {prepared.compute_dtype}")
        self.hiddens = outputs

    def pass_block(self, number: int, outputs: HiddenStates | None, level: Level, solve: Solve) -> None:
        """Have something done with the linears of a block that is in place, and run its inputs through it.

        Args:
            outputs: takes the inputs of the next block.
            level: of the statistics that `solve` is given.

        Raises:
            RepeatedError: an output is not finite.
        """
        prepared = self.walker.prepared
        linears = prepared.chosen_in(number)
        if not linears and outputs is None:
            return
        self.walk_block(number, linears, outputs, level, solve)
        self.go_on(number, outputs)

    def pass_body(
        self, numbers: range, level: Level, solve: Solve, ended: Callable[[int], object] = lambda _: None
    ) -> None:
        """The same for some blocks, all in place, of a model that does not run them in turn.

        Args:
            ended: told the number of each block that is done.
        """
        assert isinstance(self.catcher, BodyCalls)
        body, (probe,) = self.catcher.body, self.catcher.probe
        linears: dict[str, Linear] = {}
        stages: list[Stage] = []
        block_of: dict[str, int] = {}
        again = False
        for number in numbers:
            chosen = self.walker.prepared.chosen_in(number)
            found, more_than_once = self.walker.stages(body, probe, probe, chosen)
            linears.update(chosen)
            stages += [stage for stage in found if any(stage.groups)]
            block_of.update(dict.fromkeys(chosen, number))
            again = again or more_than_once
        left = iter(numbers)
        current = next(left, numbers.stop)

        def end_blocks(before: int) -> None:
            nonlocal current
            while current < before:
                ended(current)
                current = next(left, numbers.stop)

        def solve_next(gathered: list[Gathered]) -> None:
            end_blocks(block_of[gathered[0][0][0]])
            solve(gathered)

        experts = ExpertsInTurn(self.walker.prepared, self.turns, whole=True)
        halves = self.walker.prepared.plan.needs_halves
        sizes = self.walker.prepared.sizes
        target = Target(stages, linears, again, level, solve_next, experts, halves, sizes)
        passage = self.passage(0, None, body)
        beside = None
        if self.beside is not None and self.twin is not None:
            beside = self._beside(replace(passage, hiddens=self.beside.hiddens), self.twin, whole=True)
        walk(passage, target, target.way(self.pause), beside)
        end_blocks(numbers.stop)


def _tensor(block: nn.Module, name: str) -> Tensor:
    owner, _, leaf = name.rpartition(".")
    found: Tensor = getattr(block.get_submodule(owner), leaf)
    return found
