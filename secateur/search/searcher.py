"""What a search knows of a model, and finds out on the way: what each linear may become, and what that does to the predictions.

N: windows, S: tokens of a window, O: output features, I: input features.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from secateur.calibration.effects import Effects, gather_effects
from secateur.calibration.tokens import cut
from secateur.core.stats import InputStats, Level
from secateur.folder.writer import entry_bytes
from secateur.model.structure import weight_matrix
from secateur.model.vocabulary import Table
from secateur.model.weights import release
from secateur.pipeline.calibrate import Windows
from secateur.pipeline.choose_settings import choose_settings
from secateur.pipeline.job import Job
from secateur.pipeline.measure import measure
from secateur.pipeline.prepared import Prepared, prepare
from secateur.pipeline.solve import Solution, prune, solve, stacked
from secateur.prune.wanda import wanda_score
from secateur.recipes.goals import also_tried, with_methods
from secateur.recipes.recipe import UNTOUCHED, Choice, Recipe
from secateur.search.candidates import Candidate, Library, bare, fitting, for_a_target, near_the_mean, quick
from secateur.search.outliers import outlier_share
from secateur.search.shared_choices import SharedChoices
from secateur.search.table_candidates import forms_of, open_tables, table_candidates, with_choices
from secateur.search.unreached import expect_unreached, share_of
from secateur.structured.sites import Site, Width
from secateur.structured.structure_of import nearest_width
from secateur.walking.capture import BodyCalls
from secateur.walking.clock import Clock
from secateur.walking.walk import Gathered, Solve
from secateur.walking.walker import Walker

# Tokens on which effects are measured, and of a window of them. Four windows or more, so that no one text decides.
TOKENS, WINDOW = 2048, 256

#: Compresses the model by a recipe to a folder.
Attempt = Callable[[Recipe, Path], object]


@dataclass(frozen=True)
class Searcher:
    """One search, in one process.

    Attributes:
        job: by whose recipe candidates are solved: see `bare`.
        asked: the recipe whose goal is to be reached.
        also: a quantizer that is tried besides those of the recipe.
        prepared, walker: the model.
        shared: which of its linears take one choice together.
        tables: for which bits are to be found, too, by name.
        folder: for what is kept until the search is over.
        attempt: makes a model on the way, where the goal has any made.
        clock: what each phase has taken.
    """

    job: Job
    asked: Recipe
    also: str | None
    prepared: Prepared
    walker: Walker
    shared: SharedChoices
    tables: dict[str, Table]
    folder: Path
    attempt: Attempt | None
    clock: Clock

    @classmethod
    def of(cls, job: Job, folder: Path, attempt: Attempt | None) -> Searcher:
        """A search for what the recipe of a job leaves open."""
        asked, also = with_methods(job.recipe), also_tried(job.recipe)
        job = job.with_recipe(bare(job.recipe))
        clock = Clock(job.device)
        with clock("opening"):
            prepared = prepare(job.source, job.recipe, job.plan, job.device)
            tables = open_tables(prepared, asked)
            shared = SharedChoices.of(prepared, asked.share_choice, tables)
            prepared.check_values(job.progress)
        return cls(job, asked, also, prepared, Walker(job, prepared, clock), shared, tables, folder, attempt, clock)

    @property
    def weights(self) -> dict[str, int]:
        """How many each linear to compress has, by name, in the order of a forward pass."""
        prepared = self.prepared
        return {
            name: weight_matrix(prepared.linear(name)).numel() for name in prepared.names if name in prepared.chosen
        }

    @property
    def for_a_target(self) -> list[Choice]:
        """The candidates of every linear where a size or a quality is to be reached."""
        return for_a_target(self.asked, self.job.plan.quantizer, self.also)

    @property
    def bits(self) -> int | None:
        """Of codes, where the recipe says how many."""
        return None if self.job.plan.quantizer is None else self.job.plan.quantizer.bits

    def reached_share(self, name: str) -> float:
        """Which share of tokens a linear is likely to see: of an expert, as many as all of its layer are sent alike."""
        if name not in self.prepared.of_experts:
            return 1.0
        experts = self.prepared.experts[name.rsplit(".", 2)[0]].count
        config = self.prepared.source.config.get_text_config()
        return min(1.0, (getattr(config, "num_experts_per_tok", None) or experts) / experts)

    def check_memory(self) -> None:
        """Raise UsageError where there is a limit that the whole model exceeds."""
        instead = "search without a limit and repeat the run with `recipe` OUT/secateur.json"
        # A table beside what it becomes, and half of that on its way.
        sizes = [self.prepared.linear(name).get_parameter("weight").numel() for name in self.tables]
        tables = 2 * self.prepared.compute_dtype.itemsize * max(sizes, default=0)
        self.job.room.check(self.prepared.whole_memory + tables, "a search", instead)

    def library(self, windows: Windows, choices: list[Choice], room: int | None = None) -> Library:
        """Solve every linear for every choice on dense inputs, and measure what each does to the predictions; tables, too.

        Half of the windows are for solving, others for measuring. For experts that no token reaches see `expect_unreached`.

        Args:
            room: bytes that all linears together are to take: only what is near is tried, as soon as sizes are known.
        """
        effects, of_tables = self.effects_and_tables(windows)
        found: Library = {}
        reached: dict[str, int] = {}
        shares: dict[str, float] = {}
        weights = self.weights
        ids_NS = windows.ids_NS[: max(1, len(windows.ids_NS) // 2)]

        def look(names: list[str], stats: InputStats) -> None:
            tried = self.fitting(names, choices)
            # Of grids of GGUF's there are few that fit, and others fit the next linear.
            if room is not None and found and not any(choice.grid for choice in choices):
                first = next(iter(found))
                tried = near_the_mean(found[first], room * weights[first] / sum(weights.values()))
            per_choice = self.solve(names, stats, tried)
            for i, name in enumerate(names):
                dense_OI = self.prepared.problem(name, None).W_OI.float()
                changes = []
                for solutions in per_choice:
                    W_OI = solutions[i].W_OI
                    assert W_OI is not None
                    changes.append(W_OI.float() - dense_OI)
                if name in self.prepared.of_experts:
                    reached[name] = effects.reached(name)
                    shares[name] = share_of(stats.tokens - stats.borrowed, ids_NS.numel())
                unknown = reached.get(name) == 0
                costs = [math.nan] * len(changes) if unknown else effects.divergence(name, changes)
                found[name] = [
                    Candidate(choice, self.bytes_on_disk(solutions[i]), cost)
                    for choice, solutions, cost in zip(tried, per_choice, costs, strict=True)
                ]

        self.walk(ids_NS, _each(look), self.level)
        return expect_unreached(found, reached, shares, effects.tokens) | of_tables

    def fitting(self, names: list[str], choices: list[Choice]) -> list[Choice]:
        """Those choices that are for linears of one input."""
        return fitting(choices, weight_matrix(self.prepared.linear(names[0])).shape[1])

    def outliers(self, windows: Windows) -> dict[str, float]:
        """The share of outliers of every linear on dense inputs."""
        found: dict[str, float] = {}

        def look(names: list[str], stats: InputStats) -> None:
            seen = stats.or_isotropic()
            for name in names:
                found[name] = outlier_share(wanda_score(self.prepared.problem(name, None).W_OI, seen))

        self.walk(windows.ids_NS, _each(look), Level.MOMENTS)
        return found

    @property
    def level(self) -> Level:
        """Of the statistics that candidates are solved from."""
        return max(Level.MOMENTS, self.job.plan.level)

    def solve(self, names: list[str], stats: InputStats, choices: list[Choice]) -> list[list[Solution]]:
        """For each choice the solutions of linears of one input."""
        problems = [self.prepared.problem(name, None) for name in names]
        found = []
        structure = self.prepared.structure
        if structure is not None:
            site = structure.sites[names[0]]
            with self.clock("solving"):
                for choice in choices:
                    problem = replace(problems[0], units=site.units(width_of(site, choice)))
                    found.append(solve(self.job.plan, [problem], stats.or_isotropic())[0])
            return found
        with self.clock("solving"):
            for _, same in groupby(choices, lambda choice: choice.sparsity):  # one mask for several bits
                plans = [quick(self.job.plan.of(choice)) for choice in same]
                pruned = prune(plans[0], stacked(plans[0], problems, stats.or_isotropic()))
                found += [solve(plan, problems, stats, pruned)[0] for plan in plans]
        return found

    def kept_bytes(self) -> int:
        """Of what is written whatever is chosen."""
        prepared = self.prepared
        return prepared.outside_bytes(list(self.tables.values())) + sum(map(prepared.table_bytes, prepared.tables))

    def recipe_with(self, choices: dict[str, Choice]) -> Recipe:
        """What is asked, with what was chosen for each linear and each table."""
        return with_choices(self.asked, self.tables, choices, UNTOUCHED)

    def effects(self, windows: Windows) -> Effects:
        """What changes of linears do, measured on half of the windows."""
        return self.effects_and_tables(windows)[0]

    def effects_and_tables(self, windows: Windows) -> tuple[Effects, Library]:
        """The same, and the candidates of tables: what needs the whole model."""
        ids_NS = windows.ids_NS
        held_NS = pieces(ids_NS[-max(1, len(ids_NS) // 2) :].flip(0), windows.bos_ids)
        self.job.say("computing gradients")
        model = self.prepared.load_whole()
        effects = gather_effects(
            model,
            held_NS,
            sorted(self.prepared.chosen),
            self.folder,
            self.job.recipe.calibration.seed,
            lambda done, total: self.job.say(f"computing gradients: {done} of {total} windows"),
        )
        found = {
            name: table_candidates(
                self.prepared, model, table, held_NS, self.folder, self.job.say, forms_of(self.asked, table, model)
            )
            for name, table in self.tables.items()
        }
        return effects, found

    def walk(self, ids_NS: Tensor, look: Solve, level: Level, blocks: int | None = None) -> None:
        """Run windows through the dense model, block by block, and have every stage of linears looked at.

        Args:
            blocks: how many of them; None: all.
        """
        walker, job, every = self.walker, self.job, self.prepared.blocks
        catcher = walker.enter(ids_NS)
        settings = choose_settings(
            lambda exact: measure(walker, catcher, ids_NS, exact), job.limit, job.device, job.batch_tokens
        )
        journey = walker.catch(catcher, ids_NS, settings, lambda number: self.folder / f"hidden-{number:05d}")
        blocks = len(every) if blocks is None else blocks
        if isinstance(catcher, BodyCalls):
            job.say("searching")
            journey.pass_body(range(blocks), level, look)
            for block in every:
                release(block)
            walker.leave()
            return
        walker.leave()
        for number in range(blocks):
            job.say(f"searching: block {number + 1} of {blocks}")
            inputs = journey.hiddens
            outputs = journey.waiting(number + 1) if number + 1 < blocks else None
            walker.read(number)
            journey.pass_block(number, outputs, level, look)
            release(every[number])
            if inputs.file is not None:
                inputs.file.unlink()

    def bytes_with(self, name: str, choice: Choice) -> int:
        """Of a linear's tensors on disk, whatever its inputs are."""
        unknown = InputStats.empty(weight_matrix(self.prepared.linear(name)).shape[1], self.level)
        return self.bytes_on_disk(self.solve([name], unknown, [choice])[0][0])

    def bytes_on_disk(self, solution: Solution) -> int:
        """Of a linear's tensors, with their entries in the header of the file."""
        weight = self.prepared.weights.name_to_write(f"{solution.name}.weight")
        return solution.report.bytes + sum(map(entry_bytes, solution.tensors(weight)))


def width_of(site: Site, choice: Choice) -> Width:
    """The width that is chosen for a site; where only a share is, the nearest one."""
    if choice.units is not None:
        return Width(choice.units, choice.groups or 1)
    return nearest_width(site, 1 - (choice.sparsity or 0.0))


def _each(look: Callable[[list[str], InputStats], object]) -> Solve:
    """Looks at each group of a stage."""

    def all_of(gathered: list[Gathered]) -> None:
        for names, stats in gathered:
            look(names, stats)

    return all_of


def pieces(ids_NS: Tensor, bos: list[int], tokens: int = TOKENS) -> Tensor:
    """Windows cut into pieces of at most `WINDOW` tokens, each with what a text begins with, as many as hold some tokens."""
    length = min(WINDOW, ids_NS.shape[1])
    found = [piece for ids in ids_NS.tolist() for piece in cut(ids, bos, length)]
    return torch.tensor(found[: max(1, tokens // length)])
