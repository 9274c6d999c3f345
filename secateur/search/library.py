"""What each linear may become, and what each of that does to the model's predictions.

N: windows, S: tokens of a window, O: output features, I: input features.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from secateur.calibration.tokens import cut
from secateur.core.stats import InputStats, Level
from secateur.folder.writer import entry_bytes
from secateur.model.structure import weight_matrix
from secateur.model.weights import release
from secateur.pipeline.capture import BodyCalls
from secateur.pipeline.hidden import HiddenStates
from secateur.pipeline.outcome import Progress
from secateur.pipeline.run import Run
from secateur.pipeline.solve import Solution, prune, solve, stacked
from secateur.pipeline.walk import Solve
from secateur.prune.wanda import wanda_score
from secateur.recipes.recipe import Choice
from secateur.search.effects import Effects, gather_effects
from secateur.search.owl import outlier_share

# Tokens on which effects are measured, and of a window of them. Four windows or more, so that no one text decides.
TOKENS, _WINDOW = 2048, 256
# Candidates, pruned and quantized, on either side of the mean size that are tried where there is one; and how many times as
# large or small as the mean a candidate may be.
NEAR = 2
_FAR = 3


@dataclass(frozen=True)
class Candidate:
    """What a linear may become.

    Attributes:
        choice: of it.
        bytes: of its tensors on disk, with their entries in the header of the file.
        divergence: KL(dense ‖ model) that it causes alone, in nats a token.
    """

    choice: Choice
    bytes: int
    divergence: float


Library = dict[str, list[Candidate]]


def is_both(choice: Choice) -> bool:
    """Whether a linear is pruned and quantized."""
    return choice.sparsity is not None and choice.bits is not None


class Search:
    """The search of one run, in its first process.

    Args:
        run: what `compress` would run on the placeholder of the recipe; it solves nothing itself.
        folder: for what is kept until the search is over.
    """

    def __init__(self, run: Run, folder: Path) -> None:
        self.run = run
        self.folder = folder

    def library(self, ids_NS: Tensor, choices: list[Choice], room: int | None = None) -> Library:
        """Solve every linear for every choice on dense inputs, and measure what each does to the predictions.

        Half of the windows are for solving, others for measuring.

        Args:
            room: bytes that all linears together are to take: only what is near is tried, as soon as sizes are known.
        """
        effects = self._effects(ids_NS)
        found: Library = {}

        def look(names: list[str], stats: InputStats) -> None:
            tried = choices if room is None or not found else self._near(found, room)
            per_choice = self._solved(names, stats, tried)
            for i, name in enumerate(names):
                dense_OI = weight_matrix(self.run.linear(name)).float()
                changes = []
                for solutions in per_choice:
                    W_OI = solutions[i].W_OI
                    assert W_OI is not None
                    changes.append(W_OI.float() - dense_OI)
                costs = effects.divergence(name, changes)
                found[name] = [
                    Candidate(choice, self._bytes_on_disk(solutions[i]), cost)
                    for choice, solutions, cost in zip(tried, per_choice, costs, strict=True)
                ]

        self._walk(ids_NS[: max(1, len(ids_NS) // 2)], look, self._level)
        return found

    def outliers(self, ids_NS: Tensor) -> dict[str, float]:
        """The share of outliers of every linear on dense inputs."""
        found: dict[str, float] = {}

        def look(names: list[str], stats: InputStats) -> None:
            for name in names:
                found[name] = outlier_share(wanda_score(weight_matrix(self.run.linear(name)), stats))

        self._walk(ids_NS, look, Level.MOMENTS)
        return found

    def rehearse(self, ids_NS: Tensor, choices: list[Choice]) -> None:
        """Solve the linears of the first block for every choice: the run's clock tells what it took."""
        self._walk(ids_NS, lambda names, stats: self._solved(names, stats, choices), self._level, blocks=1)

    def _near(self, found: Library, room: int) -> list[Choice]:
        """The candidates whose size is not far from the mean that there is room for, or the two smallest.

        Those pruned and quantized take longest to solve: of them there are fewer. What sizes are, the first linear tells.
        """
        name, first = next(iter(found.items()))
        of_all = sum(weight_matrix(self.run.linear(each)).numel() for each in self.run.chosen)
        mean = room * weight_matrix(self.run.linear(name)).numel() / of_all
        by_size = sorted(first, key=lambda candidate: candidate.bytes)
        both = [candidate for candidate in by_size if is_both(candidate.choice)]
        under = sum(candidate.bytes <= mean for candidate in both)
        far = [*both[: max(0, under - NEAR)], *both[under + NEAR :]]
        near = [c.choice for c in first if c not in far and mean / _FAR <= c.bytes <= mean * _FAR]
        return near or [candidate.choice for candidate in by_size[:2]]

    @property
    def _level(self) -> Level:
        return max(Level.MOMENTS, self.run.plan.level)

    def _solved(self, names: list[str], stats: InputStats, choices: list[Choice]) -> list[list[Solution]]:
        """For each choice the solutions of linears of one input."""
        problems = [self.run.problem(name, self.run.linear(name), None) for name in names]
        found = []
        with self.run.clock("solving"):
            for _, same in groupby(choices, lambda choice: choice.sparsity):  # one mask for several bits
                plans = [self.run.plan.of(choice) for choice in same]
                pruned = prune(plans[0], stacked(plans[0], problems, stats))
                found += [solve(plan, problems, stats, pruned)[0] for plan in plans]
        return found

    def _effects(self, ids_NS: Tensor) -> Effects:
        run = self.run
        length = min(_WINDOW, ids_NS.shape[1])
        others_NS = ids_NS[-max(1, len(ids_NS) // 2) :].flip(0)
        pieces_NS = torch.tensor([piece for ids in others_NS.tolist() for piece in cut(ids, run.bos_ids, length)])
        held_NS = pieces_NS[: max(1, TOKENS // length)]
        run.progress(Progress("computing gradients"))
        return gather_effects(
            run.load_whole(),
            held_NS,
            sorted(run.chosen),
            self.folder,
            run.recipe.calibration.seed,
            lambda done, total: run.progress(Progress(f"computing gradients: {done} of {total} windows")),
        )

    def _walk(self, ids_NS: Tensor, look: Solve, level: Level, blocks: int | None = None) -> None:
        """Run windows through the dense model, block by block, and have every group of linears looked at.

        Args:
            blocks: how many of them; None: all.
        """
        run = self.run
        catcher = run.enter_blocks(ids_NS)
        settings = run.choose(lambda exact: run.measure(catcher, ids_NS, exact), run.batch_tokens)
        calls, hiddens = run.catch(catcher, ids_NS, settings, self._hidden(settings.hidden, 0))
        blocks = len(run.blocks) if blocks is None else blocks
        if isinstance(catcher, BodyCalls):
            run.progress(Progress("searching"))
            run.solve_body(catcher, calls, hiddens, settings.pause, look, level, end=blocks)
            for block in run.blocks:
                release(block)
            run.release_outside()
            return
        run.release_outside()
        for number in range(blocks):
            run.progress(Progress(f"searching: block {number + 1} of {blocks}"))
            outputs = None
            if number + 1 < blocks:
                outputs = HiddenStates(hiddens.keep_on, self._hidden(settings.hidden, number + 1))
            run.read_block(number)
            run.solve_block(number, catcher, calls, hiddens, outputs, settings.pause, look, level)
            release(run.blocks[number])
            if hiddens.file is not None:
                hiddens.file.unlink()
            if outputs is not None:
                hiddens = outputs

    def _hidden(self, where: str, number: int) -> Path | None:
        return self.folder / f"hidden-{number:05d}" if where == "file" else None

    def _bytes_on_disk(self, solution: Solution) -> int:
        weight = self.run.weights.name_to_write(f"{solution.name}.weight")
        return solution.report.bytes + sum(map(entry_bytes, solution.tensors(weight)))
