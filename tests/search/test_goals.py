"""A goal is one file, ours or that of another package."""

import processes

from secateur.recipes.recipe import Recipe
from secateur.search.goal import GOALS, UNIFORM, goal_of
from secateur.search.goals.target_size import TargetSize

TOY = """
from dataclasses import dataclass
from typing import ClassVar

from secateur.recipes.recipe import Choice
from secateur.search.goal import goal


@goal
@dataclass(frozen=True)
class FirstHalf:
    name: ClassVar[str] = "first-half"
    models: ClassVar[int] = 0

    @classmethod
    def of(cls, recipe):
        return cls()

    def check(self, searcher):
        pass

    def tried(self, searcher):
        return []

    def result_bytes(self, searcher):
        return None

    def choose(self, searcher, windows):
        names = list(searcher.weights)
        return {name: Choice(0.5) if i < len(names) / 2 else Choice() for i, name in enumerate(names)}
"""


def test_a_goal_is_read_once():
    assert goal_of(Recipe("wanda", 0.5)) is None
    assert goal_of(Recipe(target_size="0.5x")) == TargetSize("0.5x", 0.5, None)
    assert UNIFORM not in GOALS


def test_a_goal_of_another_package(model_of, text_file, tmp_path):
    """One file and an entry point; `compress` and `plan` take it by its name."""
    site = tmp_path / "site"
    (site / "toy-1.dist-info").mkdir(parents=True)
    (site / "toy.py").write_text(TOY)
    (site / "toy-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1\n")
    (site / "toy-1.dist-info" / "entry_points.txt").write_text("[secateur.goals]\ntoy = toy\n")
    options = ["--prune", "wanda", "--sparsity", "0.5", "--allocation", "first-half", "--calibration", str(text_file)]
    options += ["--samples", "4", "--seq-len", "16"]
    model = str(model_of("llama"))
    for command in (["compress", model, str(tmp_path / "out"), "-q"], ["plan", model]):
        done = processes.command(*command, *options, path=[site])
        assert done.returncode == 0, done.stderr
    linears = Recipe.read(tmp_path / "out" / "secateur.json").linears
    assert [choice.sparsity for choice in linears.values()] == [0.5] * 7 + [None] * 7
