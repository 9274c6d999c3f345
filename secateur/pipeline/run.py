"""One run of `compress` over a model's blocks.

N: windows, S: tokens of a window.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from torch import Tensor, nn

from secateur._version import __version__
from secateur.calibration.kept_windows import SELF, calibration_ids, is_kept
from secateur.calibration.tokens import hash_of
from secateur.core.patterns import NM
from secateur.core.stats import InputStats, Level
from secateur.errors import RepeatedError, UsageError
from secateur.folder.reader import StoredTensors
from secateur.folder.writer import SHARD_BYTES, ShardWriter, entry_bytes
from secateur.formats.layouts.layout import all_finite
from secateur.model.block_names import how_to_ignore, lists_of, patterns_of, split_name
from secateur.model.load import load_source
from secateur.model.source import Source
from secateur.model.structure import (
    Linear,
    block_linears,
    build_skeleton,
    check_no_experts,
    find_blocks,
    is_transposed,
    kept_in_float32,
    parameters_outside,
    select_linears,
    shared_parameters,
    weight_matrix,
)
from secateur.model.weights import (
    OTHER_DTYPE,
    Ahead,
    ModelWeights,
    check_values,
    converted,
    materialise,
    place,
    release,
    tie,
)
from secateur.pipeline.capture import BlockCall, BlockCalls, BodyCalls, NotInTurn, group_by_input
from secateur.pipeline.clock import Clock
from secateur.pipeline.gradients import KeptFisher
from secateur.pipeline.hidden import HiddenStates
from secateur.pipeline.memory.footprint import Footprint, Settings, footprint, without_inputs
from secateur.pipeline.outcome import LinearReport, Progress, Report, peak_memory
from secateur.pipeline.partial import Partial
from secateur.pipeline.ranks import Ranks
from secateur.pipeline.shared import Shared
from secateur.pipeline.solve import Problem, Solution, solve
from secateur.pipeline.walk import Solve, in_batches, run_block, solve_in_pass, solve_in_passes
from secateur.recipes.plan import Plan
from secateur.recipes.recipe import Calibration, Choice, Recipe
from secateur.units import words

_PROBE_TOKENS = 8
# Inputs of a block are put on disk when so long has passed since the last time, in seconds, and so many times what it took:
# a resumed run has to run its blocks again from there, without solving them.
_HIDDEN_EVERY = 5.0
_HIDDEN_SHARE = 50
# Where the next block is read while one is solved. On a CPU that would take the cores from solving.
_READ_AHEAD = ("cuda",)


@dataclass
class Run:
    """One run of `compress`: what its steps share."""

    source: Source
    recipe: Recipe
    plan: Plan
    ranks: Ranks
    partial: Partial
    batch_tokens: int | None
    limit: int | None
    progress: Callable[[Progress], None]
    shared: Shared | None = None
    block: int = 0
    blocks_started: float = 0.0
    solved_before: int = 0
    saved: list[Path] = field(default_factory=list)
    saved_at: float = 0.0
    saving_took: float = 0.0
    reports: list[LinearReport] = field(default_factory=list)
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    # Of the block that is being solved.
    solutions: list[Solution] = field(default_factory=list)
    new_notes: list[str] = field(default_factory=list)
    # What the tokenizer puts before a text, where calibration windows begin with it.
    bos_ids: list[int] = field(default_factory=list)
    waiting: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.clock = Clock(self.ranks.device)

    @property
    def device(self) -> torch.device:
        return self.ranks.device

    def run(self) -> None:
        """Do all that is not done yet, up to the last block."""
        with self.clock("opening"):
            self.prepare()
            if self.partial.complete:
                self._count_records()
                return
            ids_NS = self.calibrate()
            self.begin(ids_NS)
        if self.partial_blocks == len(self.blocks):
            return
        if ids_NS is not None:
            self.gather_fisher(ids_NS)
        if ids_NS is None or self.plan.level == Level.NONE:
            self._solve_without_inputs()
        else:
            self._solve_with_inputs(ids_NS)

    def report(self) -> Report:
        """What came of it; only `bytes` of the new checkpoint are not known yet."""
        report = Report(self.partial.out, self.reports, self.notes, self.calibration, parameters=self.parameters)
        report.source_bytes = sum(f.stat().st_size for f in self.source.files)
        report.phases = dict(self.clock.seconds)
        report.recipe = self.recipe.to_dict()
        return report

    @property
    def partial_blocks(self) -> int:
        """How many blocks are done, as all processes know it."""
        return int(self.ranks.share(self.partial.blocks))

    # --- before the blocks

    def prepare(self) -> None:
        """Build the skeleton and find what is to be compressed."""
        # Blocks are run in float32 on a CPU, which few of them slow down for; a GPU is made for the model's own dtype.
        self.compute_dtype = self.source.dtype if self.device.type == "cuda" else torch.float32
        self.model: Any = build_skeleton(self.source, self.compute_dtype)
        found = find_blocks(self.model)
        for name, block in found.modules.items():
            check_no_experts(block, name)
        self.block_names, self.blocks = list(found.modules), list(found.modules.values())
        self.lists, self.idle = found.lists, found.idle
        self.names = list(found.linears)
        self.chosen = set(select_linears(self.names, self.recipe.targets, self.recipe.ignore))
        self.twins = shared_parameters(self.model)
        self._leave_shared()
        self._leave_alone()
        self._check_shapes()
        if self.plan.level > Level.NONE:
            self._check_reached(found.unreached)
        self.weights = ModelWeights(self.source, self.model)
        self.parameters = sum(p.numel() for p in self.model.parameters())  # now, while tied ones are one
        # Kept in float32 by transformers whatever the rest is: not to be rounded, then.
        kept = kept_in_float32(self.model, self.plan.dtype) if self.plan.dtype is not None else []
        self.kept = {name for name, _ in kept}
        self._check_values()
        self.ahead = Ahead(self.weights, self.device) if self.device.type in _READ_AHEAD else None
        self.base = psutil.Process().memory_info().rss
        self.writer = ShardWriter(self.partial.folder)
        self.written: set[str] = set()
        # With the methods' own defaults filled in, so that the manifest repeats the run in later versions, too.
        self.recipe = replace(self.recipe, **self.plan.options())
        self.calibration: dict[str, Any] = {"level": self.plan.level.name.lower()}

    def _leave_shared(self) -> None:
        """Take linears that share their weights with others out of those to compress: a checkpoint has these once."""
        self.tied = [name for name in self.names if name in self.chosen and f"{name}.weight" in self.twins]
        self.chosen -= set(self.tied)
        if not self.chosen:
            raise UsageError("nothing is left to compress: all linears share their weights with others")

    def _leave_alone(self) -> None:
        """Take linears for which nothing is chosen out of those to compress."""
        for name in self.recipe.linears:
            if name not in self.chosen:
                raise UsageError(
                    f"the recipe chooses for {name}, which is none of the linears to compress: is it of another model?"
                )
        self.chosen -= {name for name, choice in self.recipe.linears.items() if choice == Choice()}
        if not self.chosen:
            raise UsageError("nothing is left to compress: the recipe's choices leave every linear alone")

    def _check_shapes(self) -> None:
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

    def _check_reached(self, unreached: Collection[str] | None) -> None:
        """Raise UsageError where linears are to be calibrated that have no input."""
        bad = [name for name in self.names if name in self.chosen and name in (unreached or ())]
        if bad:
            raise UsageError(
                f"{bad[0]} is not reached by ordinary text, so it cannot be calibrated: leave such linears alone with "
                f"{self._how_to_ignore(bad)}"
            )

    def _how_to_ignore(self, names: list[str]) -> str:
        return how_to_ignore(names, self.chosen - set(names), self.lists)

    def _check_values(self) -> None:
        """Check all weights before any is solved, once for all runs on a source."""
        if self.plan.dtype in self.source.sound or not self.ranks.first or self.partial.records:
            return
        self.progress(Progress("checking the weights"))
        compressed = {f"{name}.weight" for name in self.chosen}
        plain = {name for name in self.model.state_dict() if name not in compressed | self.kept}
        check_values(self.weights, self.model, dict.fromkeys(plain, self.plan.dtype) if self.plan.dtype else {})
        self.source.sound.add(self.plan.dtype)

    def calibrate(self) -> Tensor | None:
        """The windows of all processes, where the methods look at any; the recipe gets its numbers filled in."""
        if not self.plan.needs_text:
            return None
        self._check_whole()
        said, tensors = None, []
        if self.ranks.first:
            ids_NS, settings = self.calibration_windows()
            said, tensors = [asdict(settings), self.bos_ids], [ids_NS]
        said, (ids_NS,) = self.ranks.share_with_tensors(said, tensors)
        self.recipe, self.bos_ids = replace(self.recipe, calibration=Calibration(**said[0])), said[1]
        self.calibration.update(samples=ids_NS.shape[0], seq_len=ids_NS.shape[1], tokens=ids_NS.numel())
        self.calibration["bos"] = bool(self.bos_ids)
        if self.plan.needs_fisher:
            self.calibration["fisher"] = True
        return ids_NS

    def calibration_windows(self) -> tuple[Tensor, Calibration]:
        """The windows of all processes and the calibration with its numbers filled in; for the first process."""
        wanted, say = self.recipe.calibration, lambda s: self.progress(Progress(s))
        if self.shared is None:
            ids_NS, settings, self.bos_ids = calibration_ids(self.source, wanted, self.device, say)
        else:
            ids_NS, settings, self.bos_ids = self.shared.calibration_ids(wanted, self.device, say)
        return ids_NS, settings

    def linear(self, name: str) -> Linear:
        """The linear of that name."""
        return self.model.get_submodule(name)

    def bytes_outside(self) -> int:
        """The bytes on disk of all tensors that are written and are no weight of a linear to compress."""
        compressed = {f"{name}.weight" for name in self.chosen}
        dtypes = {
            self.weights.name_to_write(name): None if name in self.kept else self.plan.dtype
            for name in self.model.state_dict()
            if name in self.weights and name not in compressed
        }
        dtypes |= dict.fromkeys(self.weights.unused)
        return sum(self.weights.bytes_as(name, dtype) + entry_bytes(name) for name, dtype in dtypes.items())

    def dense_bytes(self, name: str) -> int:
        """The bytes of a linear's weight where it is written dense."""
        return self.weights.bytes_as(self.weights.name_to_write(f"{name}.weight"), self.plan.dtype)

    def whole_bytes(self) -> int:
        """The most memory that the process takes where the model has to be in memory as a whole; 0 where it has not."""
        wanted = self.recipe.calibration
        sampled = (
            self.plan.level > Level.NONE and wanted.source == SELF and not is_kept(self.source, wanted, self.device)
        )
        if not (sampled or self.plan.needs_fisher):
            return 0
        size = self.dense_memory
        if self.plan.needs_fisher:
            linears = [weight_matrix(self.linear(name)) for name in self.chosen]
            size += 4 * (sum(W.numel() for W in linears) + max(W.numel() for W in linears))
        return size

    @property
    def written_dtype(self) -> torch.dtype:
        """Of most weights written."""
        return self.plan.dtype or self.source.stored

    @property
    def dense_memory(self) -> int:
        """The memory that the process takes with the dense model in it."""
        return self.base + self.compute_dtype.itemsize * self.parameters

    def _check_whole(self) -> None:
        """Raise UsageError where the model has to be in memory as a whole and may not be."""
        if self.limit is None:
            return
        what, instead = "--calibration self", "--calibration docs or a file of text"
        if self.plan.needs_fisher:
            what, instead = "--sensitivity fisher", "--sensitivity hessian"
        self.check_room(self.whole_bytes(), what, instead)

    def check_room(self, needed: int, what: str, instead: str) -> None:
        """Raise UsageError where `what` loads the model as a whole, which takes so many bytes of the host, and may not."""
        if self.limit is not None and self.device.type != "cuda" and needed > self.limit:
            raise UsageError(
                f"{what} loads the model as a whole, and --max-memory {words(self.limit)} is too little for it: give "
                f"{words(needed)}, or {instead}"
            )

    def begin(self, ids_NS: Tensor | None) -> None:
        """Say what run this is, and go on where an earlier one stopped."""
        identity = None
        if self.ranks.first:
            identity = {
                "model": self.source.hashes,
                "recipe": self.recipe.to_dict(),
                "calibration text": hash_of(ids_NS) if ids_NS is not None else None,
                "versions": versions(),
                "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
                "number of threads": torch.get_num_threads(),
                "instruction set": torch.backends.cpu.get_cpu_capability(),
                "number of processes": self.ranks.size,
            }
        self.partial.begin(self.ranks.share(identity))
        self._count_records()
        self.solved_before = len(self.reports)
        self.writer = ShardWriter(
            self.partial.folder, begin=sum(len(record["files"]) for record in self.partial.records)
        )
        self.fisher = None
        if self.plan.needs_fisher:
            assert ids_NS is not None
            shared, begin = self.shared, self.bos_ids
            file = self.partial.fisher_file if shared is None else shared.fisher_file(ids_NS, begin, self.chosen)
            self.fisher = KeptFisher(file, self.ranks)

    def gather_fisher(self, ids_NS: Tensor) -> None:
        """Compute squared gradients on windows, where the method needs them and no earlier run did."""
        if self.fisher is None or self.fisher.there:
            return
        self.progress(Progress("computing gradients"))
        with self.clock("opening"):
            model = self.load_whole()
        with self.clock("gradients"):
            self.fisher.gather(model, ids_NS, sorted(self.chosen), lambda s: self.progress(Progress(s)), self.bos_ids)

    def load_whole(self) -> Any:
        """The dense model, checked."""
        # In float32 on a CPU: half precision is emulated by most.
        dtype = self.source.dtype if self.device.type == "cuda" else torch.float32
        return load_source(self.source, dtype, self.device, check_finite=True)

    def _count_records(self) -> None:
        """Take what is recorded into the report."""
        for record in self.partial.records:
            for linear in record["linears"]:
                self._count(Solution.of_record(linear, {}))
            self.notes += (note for note in record["notes"] if note not in self.notes)

    def _count(self, solution: Solution) -> None:
        self.reports.append(solution.report)
        if solution.entry is not None:
            self.entries[solution.name] = solution.entry

    # --- writing

    def _write_plain(self, name: str) -> None:
        if name in self.weights and name not in self.written:
            dtype = None if name in self.kept else self.plan.dtype
            self._write_dense(name, converted(name, self.weights[name], dtype, OTHER_DTYPE))
            self.written.add(name)

    def _write_dense(self, name: str, tensor: Tensor) -> None:
        """Write a tensor of the model under the name that it had, or have it wait for those that were one with it."""
        if self.plan.dense and self.weights.converted:
            self.waiting[name] = tensor
        else:
            self.writer.add(self.weights.name_to_write(name), tensor)

    def write_outside(self) -> None:
        """Write what is in no block, in the first process, unless an earlier run did."""
        if not self.ranks.first or self.partial.records:
            return
        self.progress(Progress("copying what is not compressed"))
        self._note_what_is_left()
        with self.clock("opening"):
            for name, _ in parameters_outside(self.model, self.blocks):
                self._write_plain(name)
            for name in self.weights.unused:
                self.writer.add(name, converted(name, self.weights.stored(name), None, ""))
            self._record()
            self.new_notes = []
            # Where the first block is in place already, nothing is read soon that would drop the last table, often a large one.
            self.weights.release()

    def _note_what_is_left(self) -> None:
        """Say what the source has lost already, and which linears and blocks stay dense though nobody asked for that."""
        if self.source.rounded:
            self._note(
                f"{self.source.name} was quantized before: what that lost stays lost, and what is done now comes on top"
            )
        for prefix in lists_of(self.idle):
            idle = [name for name in self.idle if name.rpartition(".")[0] == prefix]
            which = prefix if prefix not in self.lists else ", ".join(idle)
            self._note(f"left as {'it is' if len(idle) == 1 else 'they are'}, for text does not run them: {which}")
        if self.tied:
            names = ", ".join(patterns_of(self.tied, self.lists))
            self._note(f"left as they are, for several modules share their weights: {names}")

    def _note(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)
            self.new_notes.append(note)

    def _record(self, hidden: dict[str, Any] | None = None) -> None:
        """Have what was written since the last record on the disk, and say so in the journal."""
        if self.waiting:
            for name, tensor in self.weights.unconverted(self.waiting).items():
                self.writer.add(name, tensor)
            self.waiting = {}
        self.writer.flush()
        files, self.writer.files = self.writer.files, {}
        content = {"linears": [solution.record() for solution in self.solutions], "notes": [*self.new_notes]}
        self.partial.record(files, content, hidden)

    def end_block(self, number: int, outputs: HiddenStates | None, *, keep: bool = False) -> None:
        """Write the rest of a block, let it go unless it is to be kept, and record it; `outputs` may be put on disk."""
        block, prefix = self.blocks[number], self.block_names[number]
        with self.clock("writing"):
            if self.ranks.first:
                for name in block.state_dict():
                    if (
                        name.removesuffix(".weight") == name
                        or f"{prefix}.{name.removesuffix('.weight')}" not in self.chosen
                    ):
                        self._write_plain(f"{prefix}.{name}")
            if not keep:
                release(block)
            hidden = self._save(outputs, number + 1)
            if self.ranks.first:
                self._record(hidden)
            if outputs is not None:
                self.partial.drop_hidden({*self.saved[-2:], *([outputs.file] if outputs.file is not None else [])})
        self.solutions, self.new_notes = [], []

    def _save(self, hiddens: HiddenStates | None, block: int) -> dict[str, Any] | None:
        """Now and then, put the inputs of a block on disk in each process."""
        if hiddens is None:
            return None
        now = time.monotonic()
        if not self.ranks.share(now - self.saved_at > max(_HIDDEN_EVERY, _HIDDEN_SHARE * self.saving_took)):
            return None
        file = self.partial.hidden_file(block)
        said = self.ranks.gather([file.name, hiddens.save(file)])
        self.saved.append(file)
        self.saved_at, self.saving_took = time.monotonic(), time.monotonic() - now
        return {"block": block, "files": said}

    # --- blocks

    def _solve_without_inputs(self) -> None:
        self._settle(self.measure_without_inputs)
        self.write_outside()
        self.blocks_started = time.monotonic()
        for number in range(self.partial_blocks, len(self.blocks)):
            self.solve_block_without_inputs(number)

    def solve_block_without_inputs(self, number: int) -> None:
        """Compress a block, one linear in memory at a time, and record it."""
        self.block = number
        linears = self.chosen_in(number)
        if linears:
            self._solve(list(linears), None, linears)
        self.end_block(number, None)

    def _solve_with_inputs(self, ids_NS: Tensor) -> None:
        done = self.partial_blocks
        own_NS = self.ranks.mine(ids_NS)
        catcher = self.enter_blocks(own_NS)
        settings = self._settle(lambda exact: self.measure(catcher, own_NS, exact))
        self.write_outside()
        calls, hiddens = self.catch(catcher, own_NS, settings, self.hidden_file(settings, 0))
        if isinstance(catcher, BodyCalls):
            self._solve_body(done, catcher, calls, hiddens, settings)
            return
        self.release_outside()

        begin, found = 0, self.partial.find_hidden() if done else None
        if found is not None:
            begin, file = found
            hiddens = HiddenStates.open(file, hiddens)
            release(self.blocks[0])
            self.saved.append(file)
        if done:
            self.partial.restore_random_state()
            self.progress(Progress(f"running blocks {begin + 1} to {done} again" if begin < done else "going on"))
        self.blocks_started = self.saved_at = time.monotonic()
        for number in range(begin, len(self.blocks)):
            self.block = number
            outputs = None
            if number + 1 < len(self.blocks):
                keep_on = hiddens.keep_on
                outputs = HiddenStates(keep_on, self.hidden_file(settings, number + 1))
            self.read_block(number)
            if number < done:
                assert outputs is not None
                self._take_solved(number)
                run_block(self.blocks[number], [batch[number] for batch in calls], hiddens, outputs)
                release(self.blocks[number])
            else:
                self.solve_block(number, catcher, calls, hiddens, outputs, settings.pause)
                self.end_block(number, outputs)
            if outputs is not None:
                hiddens = outputs

    def _solve_body(
        self,
        done: int,
        catcher: BodyCalls,
        calls: list[list[BlockCall]],
        hiddens: HiddenStates,
        settings: Settings,
    ) -> None:
        """Compress the blocks after those that are done, of a model that does not run its blocks in turn."""
        for number in range(done):
            self._take_solved(number)
        if done:
            self.partial.restore_random_state()
            self.progress(Progress("going on"))
        self.blocks_started = time.monotonic()
        ended = lambda number: self.end_block(number, None, keep=True)  # noqa: E731
        self.solve_body(catcher, calls, hiddens, settings.pause, begin=done, ended=ended)

    def enter_blocks(self, ids_NS: Tensor) -> BlockCalls | BodyCalls:
        """Put the first block in place, and what comes before it; all blocks, where the model does not run them in turn."""
        with self.clock("opening"):
            for name, _ in parameters_outside(self.model, self.blocks):
                # The head computes logits, which nobody reads here.
                if not self._only_in_head(name) and not self._keep_mapped(name):
                    materialise(self.model, "", [name], self.weights, self.device)
            tie(self.model)
            self._move_buffers(self.model)
        self.read_block(0)
        probe_1S = ids_NS[:1, :_PROBE_TOKENS].to(self.device)
        try:
            return BlockCalls(self.model, self.blocks, probe_1S)
        except NotInTurn as error:
            instead = "--prune magnitude or --quantize rtn, which look at no text"
            self.check_room(self.dense_memory, f"calibrating {self.source.name}, where {error},", instead)
        with self.clock("opening"):
            for number in range(len(self.blocks)):
                self.read_block(number)
        return BodyCalls(self.model, probe_1S)

    def _keep_mapped(self, name: str) -> bool:
        """Leave a table of embeddings in its file, of which few rows are wanted; whether that is possible."""
        owner_name, _, leaf = name.rpartition(".")
        owner = self.model.get_submodule(owner_name)
        # A subclass may compute with its rows, in their dtype.
        if type(owner) is not nn.Embedding or self.device.type != "cpu" or name not in self.weights:
            return False
        if self.weights[name].shape != owner.weight.shape or not all_finite(self.weights[name]):
            return False  # for `materialise` to say so
        self.weights.release()
        place(owner, leaf, self.weights[name])
        owner.register_forward_hook(lambda _, __, rows: rows.to(self.compute_dtype))
        return True

    def read_block(self, number: int) -> None:
        """Put a block's weights in place, unless they are, and have the next one's read meanwhile."""
        block = self.blocks[number]
        with self.clock("reading"):
            if any(parameter.is_meta for parameter in block.parameters()):
                names, prefix = list(block.state_dict()), self.block_names[number]
                materialise(block, prefix, names, self.weights, self.device, ahead=self.ahead)
                self._read_shared(block, prefix, names)
            if self.ahead is not None and number + 1 < len(self.blocks):
                self.ahead.start(self.block_names[number + 1], self.blocks[number + 1])

    def _read_shared(self, block: nn.Module, prefix: str, names: list[str]) -> None:
        """Give a block the weights that it shares with another and that are stored under the other's name."""
        for name in names:
            twin = next((twin for twin in self.twins.get(f"{prefix}.{name}", ()) if twin in self.weights), None)
            if twin is not None and f"{prefix}.{name}" not in self.weights:
                owner = block.get_submodule(name.rpartition(".")[0])
                leaf = name.rpartition(".")[2]
                tensor = self.weights.checked(twin, owner.get_parameter(leaf))
                place(owner, leaf, tensor.to(self.device, owner.get_parameter(leaf).dtype))

    def catch(
        self, catcher: BlockCalls | BodyCalls, ids_NS: Tensor, settings: Settings, file: Path | None
    ) -> tuple[list[list[BlockCall]], HiddenStates]:
        """How each block is called for each batch of the windows, and the inputs of the first."""
        hiddens = HiddenStates(torch.device("cpu") if settings.hidden == "host" else self.device, file)
        calls = []
        with self.clock("opening"):
            for batch_NS in in_batches(ids_NS, settings.batch_tokens):
                batch = catcher.catch(batch_NS.to(self.device))
                hiddens.append(batch[0].hidden)
                for call in batch:
                    call.hidden = call.hidden[:0, :0].clone()
                calls.append(batch)
        return calls, hiddens

    def solve_block(
        self,
        number: int,
        catcher: BlockCalls,
        calls: list[list[BlockCall]],
        hiddens: HiddenStates,
        outputs: HiddenStates | None,
        pause: bool,
        solve: Solve | None = None,
        level: Level | None = None,
    ) -> None:
        """Compress a block that is in place, or have something else done with its linears, and run its inputs through it.

        Args:
            solve: what is done with each group of linears; None compresses them.
            level: of the statistics that it is given; None: the plan's.
        """
        linears = self.chosen_in(number)
        if not linears and outputs is None:
            return
        groups, times = self._groups(self.blocks[number], catcher.probe[0].hidden, catcher.probe[number], linears)
        self._walk(
            self.blocks[number],
            [batch[number] for batch in calls],
            hiddens,
            groups,
            linears,
            self.plan.level if level is None else level,
            solve or (lambda names, stats: self._solve(names, stats, linears)),
            outputs=outputs,
            pause=pause,
            again=any(n > 1 for n in times.values()),
        )
        if outputs is not None and not outputs.finite:
            name = self.block_names[number]
            raise RepeatedError(f"the output of {name} is not finite: the model overflows in {self.compute_dtype}")

    def solve_body(
        self,
        catcher: BodyCalls,
        calls: list[list[BlockCall]],
        hiddens: HiddenStates,
        pause: bool,
        solve: Solve | None = None,
        level: Level | None = None,
        *,
        begin: int = 0,
        end: int | None = None,
        ended: Callable[[int], object] = lambda _: None,
    ) -> None:
        """The same for the blocks from `begin` to `end`, all in place, of a model that does not run them in turn.

        Args:
            ended: told the number of each block that is done.
        """
        end = len(self.blocks) if end is None else end
        linears: dict[str, Linear] = {}
        groups: list[list[str]] = []
        block_of: dict[str, int] = {}
        again = False
        for number in range(begin, end):
            chosen = self.chosen_in(number)
            found, times = self._groups(catcher.body, catcher.probe[0].hidden, catcher.probe[0], chosen)
            linears.update(chosen)
            groups += found
            block_of.update(dict.fromkeys(chosen, number))
            again = again or any(n > 1 for n in times.values())
        self.block = begin

        def end_blocks(last: int) -> None:
            while self.block < last:
                ended(self.block)
                self.block += 1

        def solve_next(names: list[str], stats: InputStats) -> None:
            end_blocks(block_of[names[0]])
            if solve is not None:
                solve(names, stats)
            else:
                self._solve(names, stats, linears)

        self._walk(
            catcher.body,
            [batch[0] for batch in calls],
            hiddens,
            groups,
            linears,
            self.plan.level if level is None else level,
            solve_next,
            outputs=None,
            pause=pause,
            again=again,
        )
        end_blocks(end)

    def _walk(self, *args: Any, pause: bool, again: bool, **options: Any) -> None:
        """Run all batches through a block or body; `again`: it uses linears more than once."""
        if again:
            solve_in_passes(*args, **options, ranks=self.ranks, clock=self.clock)
        else:
            solve_in_pass(*args, **options, pause=pause, ranks=self.ranks, clock=self.clock)

    def chosen_in(self, number: int) -> dict[str, Linear]:
        """The linears of a block that are to be compressed, by name."""
        linears = block_linears(self.blocks[number], self.block_names[number])
        return {name: linear for name, linear in linears.items() if name in self.chosen}

    def _groups(
        self, block: nn.Module, hidden: Tensor, probe: BlockCall, linears: dict[str, Linear]
    ) -> tuple[list[list[str]], dict[str, int]]:
        groups, times = group_by_input(block, BlockCall(hidden, probe.args, probe.kwargs), linears)
        self._check_reached({name for name, n in times.items() if n == 0})
        return groups, times

    def _take_solved(self, number: int) -> None:
        """Put the compressed weights of a block, which is recorded, in the place of those that were read."""
        record = self.partial.records[1 + number]
        stored = StoredTensors([self.partial.folder / name for name in record["files"]])
        for linear in record["linears"]:
            module = self.linear(linear["name"])
            weight = f"{linear['name']}.weight"
            names = [name for name in stored if name == weight or name.startswith(f"{weight}.")]
            parts = {name.removeprefix(weight).removeprefix("."): stored[name] for name in names}
            self._place(module, Solution.of_record(linear, parts))

    def hidden_file(self, settings: Settings, block: int) -> Path | None:
        return self.partial.hidden_file(block) if settings.hidden == "file" else None

    def _only_in_head(self, name: str) -> bool:
        owner = self.model.get_submodule(name.rpartition(".")[0])
        return owner is self.model.get_output_embeddings() and owner is not self.model.get_input_embeddings()

    def _move_buffers(self, model: nn.Module) -> None:
        for module in model.modules():
            for leaf, buffer in module._buffers.items():
                if buffer is not None and buffer.device.type != "meta":
                    place(module, leaf, buffer.to(self.device))

    def release_outside(self) -> None:
        for module in self.model.modules():
            if not any(module is part for block in self.blocks for part in block.modules()):
                for leaf, parameter in module._parameters.items():
                    if parameter is not None:
                        place(module, leaf, parameter.detach().to("meta"))

    # --- memory

    def measure_without_inputs(self, exact: bool) -> Footprint:
        """What a run holds in memory that needs no inputs."""
        linears = [self.linear(name) for name in self.chosen]
        return without_inputs(self.base, linears, self._sizes(self._largest), self.plan, self.device.type, exact)

    @property
    def _largest(self) -> nn.Module:
        return max(self.blocks, key=lambda block: sum(p.numel() for p in block.parameters()))

    def measure(self, catcher: BlockCalls | BodyCalls, ids_NS: Tensor, exact: bool) -> Footprint:
        """What the run will hold in memory, from the first block, which is in place, or from the body."""
        sizes = self._sizes(self._largest)
        if isinstance(catcher, BodyCalls):
            block = catcher.body
            linears = {name: linear for i in range(len(self.blocks)) for name, linear in self.chosen_in(i).items()}
            sizes["block"] = self.compute_dtype.itemsize * sum(p.numel() for b in self.blocks for p in b.parameters())
        else:
            block = self.blocks[0]
            parts = {split_name(name, self.lists)[1] for name in self.chosen}
            everything = block_linears(block, self.block_names[0])
            linears = {name: everything[name] for name in everything if split_name(name, self.lists)[1] in parts}
        groups, _ = self._groups(block, catcher.probe[0].hidden, catcher.probe[0], linears)
        return footprint(
            self.plan,
            block,
            catcher,
            ids_NS.to(self.device),
            groups,
            linears,
            self.source.dtype,
            self.base,
            sizes,
            exact,
        )

    def _sizes(self, block: nn.Module) -> dict[str, int]:
        outside = dict(parameters_outside(self.model, self.blocks))
        stored = self.source.dtype.itemsize
        written = self.written_dtype.itemsize
        largest = max((tensor.numel() for tensor in outside.values()), default=0)
        inside = [tensor.numel() for tensor in block.state_dict().values()]
        return {
            # The largest, mapped; what waits to be written, and the copy of it that is.
            "outside": stored * largest
            + 2 * written * min(sum(t.numel() for t in outside.values()), largest + SHARD_BYTES // written),
            "embeddings": sum(
                self.compute_dtype.itemsize * tensor.numel()
                for name, tensor in outside.items()
                if not self._only_in_head(name)
                and not (
                    self.device.type == "cpu"
                    and type(self.model.get_submodule(name.rpartition(".")[0])) is nn.Embedding
                )
            ),
            "block": self.compute_dtype.itemsize * sum(inside),
            "written": written * sum(inside),
            "tensor": stored * max(inside),
            "stored": written,
        }

    def _settle(self, measure: Callable[[bool], Footprint]) -> Settings:
        """Choose how the run is carried out, as the first process can; one that goes on keeps its batches."""
        before = self.partial.settings
        if before is not None and self.batch_tokens not in (None, before["batch_tokens"]):
            raise UsageError(
                f"{self.partial.folder} was begun with --batch-tokens {before['batch_tokens']}: give the same, or leave it out"
            )
        tokens = before["batch_tokens"] if before is not None else self.batch_tokens
        chosen = None
        if self.ranks.first:
            chosen = self.choose(measure, tokens).to_dict()
        settings = Settings(**self.ranks.share(chosen))
        self.partial.settle(settings.to_dict())
        return settings

    def choose(self, measure: Callable[[bool], Footprint], tokens: int | None) -> Settings:
        """The fastest settings that fit the memory."""
        on_device = torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else None
        # Most models fit by far, which a rough estimate tells.
        rough = measure(False)
        fastest = next(iter(rough.choices(tokens)))
        return (
            fastest
            if rough.fits(fastest, self.limit, on_device)
            else measure(True).choose(self.limit, on_device, tokens)
        )

    # --- solving

    def _solve(self, names: list[str], stats: InputStats | None, linears: dict[str, Linear]) -> None:
        """Solve linears of one input, dealt out to the processes, put the result in place and hand it to the writer.

        Without statistics they need not have one input, nor be in place: each is read, solved and let go of.
        """
        hands = self.ranks.deal([weight_matrix(linears[name]).numel() for name in names])
        fishers = self.fisher.of(names) if self.fisher is not None else {}
        mine = [names[i] for i in hands[self.ranks.rank]]
        solutions: dict[str, Solution] = {}
        notes: list[str] = []
        with self.clock("solving"):
            for stack in [[name] for name in mine] if stats is None else self._alike(mine):
                found, said = solve(
                    self.plan.of(self.recipe.linears.get(stack[0])),
                    [self.problem(name, linears[name], fishers.get(name)) for name in stack],
                    stats or InputStats.empty(weight_matrix(linears[stack[0]]).shape[1], Level.NONE, self.device),
                )
                solutions.update((solution.name, solution) for solution in found)
                notes += said
        with self.clock("exchange"):
            for rank, hand in enumerate(hands):
                if hand:
                    self._exchange(rank, [names[i] for i in hand], solutions, notes)
        for name in names:
            self._put(solutions[name], linears[name], in_place=stats is not None)
        for note in notes:
            self._note(note)

    def _alike(self, names: list[str]) -> list[list[str]]:
        """Linears for which the same was chosen, which are solved together."""
        stacks: dict[Choice | None, list[str]] = {}
        for name in names:
            stacks.setdefault(self.recipe.linears.get(name), []).append(name)
        return list(stacks.values())

    def problem(self, name: str, linear: Linear, fisher_OI: Tensor | None) -> Problem:
        weight = f"{name}.weight"
        if linear.get_parameter("weight").is_meta:
            stored = self.weights.checked(weight, linear.get_parameter("weight")).to(self.device)
            W_OI = stored.T if is_transposed(linear) else stored
        else:
            W_OI = weight_matrix(linear)
        return Problem(name, W_OI, is_transposed(linear), self.weights.dtype(weight), fisher_OI)

    def _exchange(self, rank: int, names: list[str], solutions: dict[str, Solution], notes: list[str]) -> None:
        """Have the solutions that one process found, and its notes, in all of them."""
        if self.ranks.size == 1:
            return
        said, tensors = None, []
        if rank == self.ranks.rank:
            own = [solutions[name] for name in names]
            said = [[[solution.record(), list(solution.parts)] for solution in own], notes]
            tensors = [tensor for solution in own for tensor in solution.parts.values()]
        (records, told), tensors = self.ranks.share_with_tensors(said, tensors, rank)
        if rank == self.ranks.rank:
            return
        left = iter(tensors)
        for record, parts in records:
            solution = Solution.of_record(record, {part: next(left) for part in parts})
            solutions[solution.name] = solution
        notes += told

    def _put(self, solution: Solution, linear: Linear, in_place: bool) -> None:
        if self.ranks.first:
            weight = f"{solution.name}.weight"
            if solution.entry is None:
                self._write_dense(weight, solution.parts[""])
            else:
                for name, tensor in solution.tensors(self.weights.name_to_write(weight)).items():
                    self.writer.add(name, tensor)
        self.written.add(f"{solution.name}.weight")
        if in_place:
            self._place(linear, solution)
        self._count(solution)
        self.solutions.append(replace(solution, parts={}, W_OI=None))
        spent = time.monotonic() - self.blocks_started
        left = spent * ((len(self.chosen) - self.solved_before) / (len(self.reports) - self.solved_before) - 1)
        self.progress(Progress("compressing", self.block, len(self.blocks), solution.report, left, peak_memory()))

    def _place(self, linear: Linear, solution: Solution) -> None:
        old = linear.get_parameter("weight")
        place(linear, "weight", solution.as_module_weight(is_transposed(linear)).to(old.device, old.dtype))


def versions() -> dict[str, str]:
    """Of what a result may depend on."""
    return {
        "secateur": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
