"""The processes of a run as they solve: each its share of the linears of one input, and all have what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from secateur.core.ranks import Ranks
from secateur.core.stats import InputStats, Level
from secateur.model.structure import weight_matrix
from secateur.pipeline.gating import gated
from secateur.pipeline.gradients import KeptFisher
from secateur.pipeline.prepared import Prepared
from secateur.pipeline.solve import Solution, solve
from secateur.recipes.recipe import Choice
from secateur.walking.clock import Clock


@dataclass(frozen=True)
class Team:
    """Solves linears by the plan of a prepared model.

    Attributes:
        prepared: the model.
        ranks: the processes.
        clock: measures the phases.
        fisher: squared gradients, where the method needs them.
    """

    prepared: Prepared
    ranks: Ranks
    clock: Clock
    fisher: KeptFisher | None = None

    def solve(self, gathered: Sequence[tuple[list[str], InputStats | None]]) -> tuple[list[Solution], list[str]]:
        """Solve linears by their input; the solutions in the same order and what the user should know, in all processes.

        Without statistics they need not have one input, nor be in place: each is read, solved and let go of.
        """
        names = [name for group, _ in gathered for name in group]
        sizes = [weight_matrix(self.prepared.linear(name)).numel() for name in names]
        hands = [[names[i] for i in hand] for hand in self.ranks.deal(sizes)]
        solutions: dict[str, Solution] = {}
        notes: list[str] = []
        with self.clock("solving"):
            for group, stats in gathered:
                mine = [name for name in group if name in hands[self.ranks.rank]]
                found, said = self._solve(mine, group, stats)
                solutions.update(found)
                notes += said
        with self.clock("exchange"):
            for rank, hand in enumerate(hands):
                if hand and self.ranks.size > 1:
                    self._exchange(rank, hand, solutions, notes)
        return [solutions[name] for name in names], notes

    def _solve(
        self, mine: list[str], names: list[str], stats: InputStats | None
    ) -> tuple[dict[str, Solution], list[str]]:
        """The solutions of this process's linears, by name, and their notes."""
        fishers = self.fisher.of(names) if self.fisher is not None else {}
        solutions: dict[str, Solution] = {}
        notes: list[str] = []
        choices = self.prepared.recipe.linears
        if stats is not None and mine and not stats.tokens and stats.level > Level.NONE:
            notes.append(
                f"{', '.join(mine)}: no calibration token reaches it, so it was compressed by its weights alone"
            )
        for stack in [[name] for name in mine] if stats is None else self._alike(mine):
            problems = [self.prepared.problem(name, fishers.get(name)) for name in stack]
            inputs = stats or InputStats.empty(problems[0].W_OI.shape[1], Level.NONE, self.prepared.device)
            plan, choice = self.prepared.plan, choices.get(stack[0])
            if inputs.histogram is None:
                plan = replace(plan, sparsifier=None)
            found, said = solve(plan.of(choice), problems, inputs)
            if plan.sparsifier is not None:
                found = gated(plan, found, [self.prepared.shape(name) for name in names], names, inputs, choice)
            solutions.update((solution.name, solution) for solution in found)
            notes += said
        return solutions, notes

    def _alike(self, names: list[str]) -> list[list[str]]:
        """Linears for which the same was chosen, which are solved together."""
        stacks: dict[Choice | None, list[str]] = {}
        for name in names:
            stacks.setdefault(self.prepared.recipe.linears.get(name), []).append(name)
        return list(stacks.values())

    def _exchange(self, rank: int, names: list[str], solutions: dict[str, Solution], notes: list[str]) -> None:
        """Have the solutions that one process found, and its notes, in all of them."""
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
