"""Writing what a run has solved, block by block, and keeping account of it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from secateur.composite_layouts.dictionary import ATOMS, Factor
from secateur.folder.reader import StoredTensors
from secateur.folder.writer import ShardWriter
from secateur.memory.peak import peak_memory
from secateur.model.block_names import lists_of, patterns_of, split_name
from secateur.model.fused_tensors import FusedTensors
from secateur.model.structure import is_transposed, parameters_outside
from secateur.model.weights import OTHER_DTYPE, converted, place
from secateur.pipeline.outcome import LinearReport, Progress
from secateur.pipeline.prepared import Prepared
from secateur.pipeline.solve import BIAS, Solution
from secateur.unfinished.hidden import HiddenStates
from secateur.unfinished.kept_inputs import KeptInputs
from secateur.unfinished.partial import Partial
from secateur.walking.clock import Clock

_LOG = logging.getLogger(__name__)


class Recorder:
    """Writes in the first process, and knows in all of them what was written.

    Args:
        prepared: the model.
        partial: the unfinished run; what it has recorded is counted.
        clock: measures the phases.
        progress: told of every linear.

    Attributes:
        inputs: of blocks, as far as they are on the disk.
        reports: of the linears that are solved.
        tables: of the tables that are.
        entries: of their layouts in the config, by name.
        notes: what the user should know.
        number_of: the block of each linear to compress, by name.
    """

    def __init__(
        self, prepared: Prepared, partial: Partial, clock: Clock, progress: Callable[[Progress], None]
    ) -> None:
        self.prepared, self.partial, self._clock, self._progress = prepared, partial, clock, progress
        self.inputs = KeptInputs(partial)
        self.reports: list[LinearReport] = []
        self.tables: list[LinearReport] = []
        self.entries: dict[str, dict[str, Any]] = {}
        self.notes: list[str] = []
        self._writer = ShardWriter(partial.folder, begin=sum(len(record["files"]) for record in partial.records))
        self._written: set[str] = set()
        self._kept: dict[str, tuple[int, ...]] = {}
        self._waiting: dict[str, Tensor] = {}
        self._fused = FusedTensors(prepared.weights, prepared.model)
        # Since the last record.
        self._solutions: list[Solution] = []
        self._solved_tables: list[Solution] = []
        self._new_notes: list[str] = []
        numbers = {name: i for i, name in enumerate(prepared.block_names)}
        self.number_of = {name: numbers[split_name(name, prepared.lists)[0]] for name in prepared.chosen}
        for record in partial.records:
            for linear in record["linears"]:
                self._count(Solution.of_record(linear, {}), self.reports)
            for table in record["tables"]:
                self._count(Solution.of_record(table, {}), self.tables)
            self.notes += (note for note in record["notes"] if note not in self.notes)
        self._solved_before = len(self.reports)
        self._started = time.monotonic()

    def start(self) -> None:
        """Blocks are solved from now on: the time that is left counts from here."""
        self._started = time.monotonic()
        self.inputs.start()

    def _count(self, solution: Solution, reports: list[LinearReport]) -> None:
        reports.append(solution.report)
        if solution.entry is not None:
            self.entries[solution.name] = solution.entry

    def note(self, note: str) -> None:
        """Tell the user something, once."""
        if note not in self.notes:
            _LOG.warning(note)
            self.notes.append(note)
            self._new_notes.append(note)

    # --- linears

    def put(self, solution: Solution, in_place: bool) -> None:
        """Write a linear; `in_place`: its new weight is put in the place of the old one, too."""
        weight = f"{solution.name}.weight"
        if self.partial.ranks.first:
            if solution.kept is not None:
                self._kept[solution.name] = solution.kept
            if solution.entry is None:
                self._write_dense(weight, self._cut(weight, solution.parts[""]))
                if BIAS in solution.parts:
                    self._write_dense(f"{solution.name}.bias", solution.parts[BIAS])
            else:
                for name, tensor in solution.tensors(self.prepared.weights.name_to_write(weight)).items():
                    self._writer.add(name, tensor)
                if weight in self._fused:
                    self._write(self._fused.add(weight, None))
        self._written.update([weight, f"{solution.name}.bias"] if BIAS in solution.parts else [weight])
        if in_place:
            self._place(solution)
        self._count(solution, self.reports)
        self._solutions.append(replace(solution, parts={}, W_OI=None))
        spent = time.monotonic() - self._started
        remaining = (len(self.prepared.chosen) - self._solved_before) / (len(self.reports) - self._solved_before) - 1
        number, blocks = self.number_of[solution.name], len(self.prepared.blocks)
        told = solution.report
        _LOG.info("%s: block %d of %d, %.2f bits, error %.2e", told.name, number + 1, blocks, told.bits, told.error)
        self._progress(Progress("compressing", number, blocks, solution.report, spent * remaining, peak_memory()))

    def put_table(self, solution: Solution) -> None:
        """Write a table of embeddings, or the head."""
        table, _ = self.prepared.tables[solution.name]
        if self.partial.ranks.first:
            if solution.entry is None:
                self._write_dense(table.weight, solution.parts[""])
            else:
                tensors = solution.tensors(self.prepared.weights.name_to_write(table.weight))
                for name, tensor in tensors.items():
                    self._writer.add(name, tensor)
        self._count(solution, self.tables)
        self._solved_tables.append(replace(solution, parts={}))
        _LOG.info("%s: %.2f bits, error %.2e", solution.name, solution.report.bits, solution.report.error)

    def take_table(self, name: str) -> Solution:
        """A table that an earlier run has recorded."""
        record = self.partial.records[0]
        stored = StoredTensors([self.partial.folder / file for file in record["files"]])
        weight = self.prepared.weights.name_to_write(self.prepared.tables[name][0].weight)
        parts = {key.removeprefix(weight).removeprefix("."): stored[key] for key in _parts_of(weight, stored)}
        return Solution.of_record(next(each for each in record["tables"] if each["name"] == name), parts)

    def stored_atoms(self, name: str) -> Factor:
        """The atoms of a linear that is recorded, which it shares with others."""
        records = self.partial.records
        record = next(each for each in records if any(linear["name"] == name for linear in each["linears"]))
        stored = StoredTensors([self.partial.folder / file for file in record["files"]])
        weight = self.prepared.weights.name_to_write(f"{name}.weight")
        parts = {
            key.removeprefix(f"{weight}.{ATOMS}_"): stored[key].clone()
            for key in stored
            if key.startswith(f"{weight}.{ATOMS}_")
        }
        return Factor.of_parts(self.entries[name][ATOMS], parts)

    def _place(self, solution: Solution) -> None:
        linear = self.prepared.linear(solution.name)
        # The old one may not be in place: an expert's.
        W = solution.as_module_weight(is_transposed(linear)).to(
            self.prepared.device, linear.get_parameter("weight").dtype
        )
        place(linear, "weight", W)
        if BIAS in solution.parts:
            place(linear, "bias", solution.parts[BIAS].to(self.prepared.device, linear.get_parameter("bias").dtype))

    def _cut(self, name: str, tensor: Tensor) -> Tensor:
        """What is left of a parameter, where a structured pattern takes some of it."""
        structure = self.prepared.structure
        return tensor if structure is None else structure.cut(name, tensor, self._kept)

    def take_solved(self, number: int) -> None:
        """Put the compressed weights of a block, which is recorded, in the place of those that were read; experts' when
        their turn comes. Dictionaries that it shares are at hand.
        """
        record = self.partial.records[1 + number]
        stored = StoredTensors([self.partial.folder / name for name in record["files"]])
        parts_of: dict[str, dict[str, str]] = {}
        for name in stored:
            owner, found, part = name.rpartition(".weight")
            parts_of.setdefault(owner + found, {})[part.removeprefix(".")] = name
        weights = self.prepared.weights
        for linear in record["linears"]:
            weight = f"{linear['name']}.weight"
            names = parts_of.get(weights.name_to_write(weight), {})
            parts = {part: stored[name] for part, name in names.items()}
            owner = self.prepared.sharing.get(linear["name"], linear["name"])
            if owner != linear["name"]:
                lent = self.prepared.dictionaries[owner].parts
                parts |= {f"{ATOMS}_{part}": tensor for part, tensor in lent.items()}
            if not parts and weight in self._fused:  # it lies with other experts
                parts = {"": self._fused.part(weight, stored)}
            solution = self._whole(Solution.of_record(linear, parts), stored)
            if linear["name"] in self.prepared.of_experts:
                self.prepared.solved[linear["name"]] = partial(solution.as_module_weight, False)
            else:
                self._place(solution)

    def _whole(self, solution: Solution, stored: StoredTensors) -> Solution:
        """A solution with zeros for what is not stored of it, and with its bias."""
        structure = self.prepared.structure
        if structure is None or solution.kept is None:
            return solution
        parts = {"": structure.uncut(solution.name, solution.parts[""], solution.kept)}
        bias = self.prepared.weights.name_to_write(f"{solution.name}.bias")
        if bias in stored:
            parts[BIAS] = stored[bias]
        return replace(solution, parts=parts)

    # --- everything else

    def write_outside(self) -> None:
        """Write what is in no block, in the first process, unless an earlier run did."""
        if not self.partial.ranks.first or self.partial.records:
            return
        self._progress(Progress("copying what is not compressed"))
        self._note_what_is_left()
        weights = self.prepared.weights
        with self._clock("opening"):
            for name, _ in parameters_outside(self.prepared.model, self.prepared.blocks):
                if self.prepared.is_plain(name):
                    self._write_plain(name)
            for name in weights.unused:
                self._writer.add(name, converted(name, weights.stored(name), None, ""))
            self._record()
            # Where the first block is in place already, nothing is read soon that would drop the last table, often a large one.
            weights.release()

    def _note_what_is_left(self) -> None:
        """Say what the source has lost already, and which linears and blocks stay dense though nobody asked for that."""
        source, lists = self.prepared.source, self.prepared.lists
        if source.rounded:
            self.note(
                f"{source.name} was quantized before: what that lost stays lost, and what is done now comes on top"
            )
        for prefix in lists_of(self.prepared.idle):
            idle = [name for name in self.prepared.idle if name.rpartition(".")[0] == prefix]
            which = prefix if prefix not in lists else ", ".join(idle)
            self.note(f"left as {'it is' if len(idle) == 1 else 'they are'}, for text does not run them: {which}")
        for name, (table, form) in self.prepared.tables.items():
            asked = dict(self.prepared.plan.tables)
            if table.twins and len(set(asked.values())) > 1:
                gets = f"grid {form}" if isinstance(form, str) else f"the {form} bits"
                self.note(f"{name} and the head are one tensor: it gets {gets} asked for one of them")
        structure = self.prepared.structure
        apart = structure.not_understood if structure is not None else {}
        for kind, blocks in apart.items():
            named = ", ".join(blocks[:3]) + (f" and {len(blocks) - 3} more" if len(blocks) > 3 else "")
            self.note(f"all {kind} stay where they cannot be told apart: {named}")
        if self.prepared.tied:
            names = ", ".join(patterns_of(self.prepared.tied, lists))
            self.note(f"left as they are, for several modules share their weights: {names}")

    def _write_plain(self, name: str) -> None:
        weights, structure = self.prepared.weights, self.prepared.structure
        if structure is not None and structure.goes(name):
            return
        if name in weights and name not in self._written:
            tensor = self._cut(name, weights[name])
            self._write_dense(name, converted(name, tensor, self.prepared.dtype_of(name), OTHER_DTYPE))
            self._written.add(name)

    def _write_dense(self, name: str, tensor: Tensor) -> None:
        """Write a tensor of the model under the name that it had, or have it wait for those that were one with it."""
        if name in self._fused:
            self._write(self._fused.add(name, tensor))
        else:
            self._write({self.prepared.weights.name_to_write(name): tensor})

    def _write(self, tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if self.prepared.plan.dense and self.prepared.weights.converted:
                self._waiting[name] = tensor
            else:
                self._writer.add(name, tensor)

    # --- records

    def end_block(self, number: int, outputs: Sequence[HiddenStates] = ()) -> None:
        """Write the rest of a block and record it; `outputs`, the inputs of the next block, may be put on disk: those of the
        compressed model, and of the dense one where they go along.
        """
        prefix = self.prepared.block_names[number]
        with self._clock("writing"):
            if self.partial.ranks.first:
                for name in self.prepared.blocks[number].state_dict():
                    if self.prepared.is_plain(f"{prefix}.{name}"):
                        self._write_plain(f"{prefix}.{name}")
            hidden = self.inputs.save(outputs, number + 1)
            if self.partial.ranks.first:
                self._record(hidden)
            if outputs:
                self.inputs.drop(outputs)
        self._solutions, self._solved_tables, self._new_notes, self._kept = [], [], [], {}

    def _record(self, hidden: dict[str, Any] | None = None) -> None:
        """Have what was written since the last record on the disk, and say so in the journal."""
        if self._waiting:
            for name, tensor in self.prepared.weights.unconverted(self._waiting).items():
                self._writer.add(name, tensor)
            self._waiting = {}
        self._writer.flush()
        files, self._writer.files = self._writer.files, {}
        content = {
            "linears": [solution.record() for solution in self._solutions],
            "tables": [solution.record() for solution in self._solved_tables],
            "notes": self._new_notes,
        }
        self.partial.record(files, content, hidden)
        self._solved_tables, self._new_notes = [], []


def _parts_of(weight: str, stored: Iterable[str]) -> Iterator[str]:
    """Stored names of a weight, or of its parts."""
    return (name for name in stored if name == weight or name.startswith(f"{weight}."))
