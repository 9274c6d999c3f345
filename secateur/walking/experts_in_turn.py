"""The experts of a block while text passes it: which tokens each sees, and weights in memory for no longer than their turn.

I: input features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn

from secateur.folder.reader import StoredTensors
from secateur.mixture.experts import Experts, Rows, Visit, visited
from secateur.model.structure import Linear
from secateur.model.weights import place
from secateur.pipeline.prepared import Prepared
from secateur.walking.capture import Stage
from secateur.walking.twin import Twin

# Tokens that an expert sees at least, where nothing is said: as many, or one for so many of its inputs.
_LEAST, _INPUTS_OF_A_TOKEN = 256, 4

#: Told the full names of the linears that are about to be called, and what they read; whether they are to be called at all.
Announced = Callable[[tuple[str, ...], Sequence[Rows]], bool]


@dataclass(frozen=True)
class Turns:
    """How all experts of a run are visited.

    Attributes:
        inputs: what each sees: see `Visit`.
        tokens: that it sees at least; None: see `least_tokens`.
        windows: of all processes.
        window: tokens of one.
        at_once: how many experts are visited together.
        keep: where weights that are solved wait while batches begin again; None: they are not needed again.
    """

    inputs: str
    tokens: int | None
    windows: int
    window: int
    at_once: int = 1
    keep: Path | None = None

    def visit(self, experts: Experts, announce: Callable[[Experts, Sequence[Rows]], bool]) -> Visit:
        """How the experts of a module are visited."""
        tokens = least_tokens(experts) if self.tokens is None else self.tokens
        return Visit(announce, self.at_once, self.window, math.ceil(tokens / self.windows), self.inputs)


def least_tokens(experts: Experts) -> int:
    """How many tokens each expert sees at least where the user says nothing."""
    widest = max(experts.linear(0, name).in_features for name in (*experts.firsts, experts.last))
    return max(_LEAST, widest // _INPUTS_OF_A_TOKEN)


@dataclass
class ExpertsInTurn:
    """The experts of one block, or of several that text passes together.

    Attributes:
        prepared: the model.
        turns: how they are visited.
        whole: whether all of them are in place the whole time, as where linears are used more than once.
        twin: of the block, whose experts these are, with the weights of the source; None: the block's own.
    """

    prepared: Prepared
    turns: Turns
    whole: bool = False
    twin: Twin | None = None
    _chunk: tuple[str, int] | None = None
    _in_place: set[str] = field(default_factory=set)

    @contextmanager
    def visited(self, block: nn.Module, announced: Announced) -> Iterator[None]:
        """Within the context, the experts of a block announce what they read."""

        def announce(experts: Experts, rows: Sequence[Rows]) -> bool:
            return announced(tuple(f"{experts.name}.{linear}" for each in rows for linear in each.linears), rows)

        with visited(block, lambda experts: self.turns.visit(experts, announce)):
            yield

    def enter(self, stage: Stage) -> None:
        """Have the weights that experts of a stage compute with in place, and none of other experts."""
        if self.whole or stage.chunk is None:
            return
        if stage.chunk != self._chunk:
            self.leave()
            self._chunk = stage.chunk
        for name in stage.called:
            self._read(name)

    def _linear(self, name: str) -> Linear:
        linear = self.prepared.linear(name)
        return linear if self.twin is None else self.twin.of(linear)

    def _read(self, name: str) -> None:
        linear = self._linear(name)
        weight = linear.get_parameter("weight")
        if weight.is_meta:
            place(linear, "weight", self._stored(name, weight).to(self.prepared.device, weight.dtype))
        elif (
            self.twin is None
            and self.turns.keep is not None
            and name in self.prepared.chosen
            and name not in self._in_place
        ):
            # Solved just now.
            self.turns.keep.mkdir(exist_ok=True)
            save_file({name: weight.detach().cpu().contiguous()}, self.turns.keep / f"{name}.safetensors")
        self._in_place.add(name)

    def _stored(self, name: str, expected: Tensor) -> Tensor:
        """The new weight of a linear that is solved, in this run or an earlier one; else that of the source."""
        if self.twin is not None:
            return self.prepared.weights.checked(f"{name}.weight", expected)
        file = None if self.turns.keep is None else self.turns.keep / f"{name}.safetensors"
        if file is not None and file.exists():
            return StoredTensors([file])[name]
        if name in self.prepared.solved:
            return self.prepared.solved[name]()
        return self.prepared.weights.checked(f"{name}.weight", expected)

    def leave(self) -> None:
        """Let go of all weights of experts."""
        for name in self._in_place:
            linear = self._linear(name)
            place(linear, "weight", linear.get_parameter("weight").to("meta"))
        self._in_place.clear()
        self._chunk = None
