"""What stands before linears while a model runs: it says which inputs are read for a token.

A prompt is read with all inputs, and so are the first tokens of a text, which are few and matter much; and everything where
gradients are wanted.

B: texts, T: tokens of each, I: input features, O: output features, R: ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from secateur.core.histogram import FIRST, scores
from secateur.errors import UsageError
from secateur.gates.prompt import Prompt
from secateur.gates.section import LARGEST, LEFT, NORM, OFTEN, RIGHT, GatedInput, Section
from secateur.kernels.backends import KEPT_TOKENS
from secateur.kernels.module import PackedLinear

# What a model has its gates as.
_ATTRIBUTE = "activation_gates"


class Gates:
    """All gates of a model, and where in a text it is.

    Attributes:
        section: of the config.
        number: of the level at which inputs are left out; None: all are read.
        every_token: whether each token of a text that is given as a whole is treated as if it were being written.
        read, whole: how many weights were read, and are there, for each token that was treated so; counted where `every_token`
            or `counting`.
        last: what was chosen last, and for which input.
    """

    def __init__(self, section: Section) -> None:
        self.section = section
        self.number = section.number(section.level)
        self.gates: list[Gate] = []
        self.every_token = self.counting = False
        self.read = self.whole = 0
        self.positions_BT: Tensor | None = None
        self.last: tuple[Gate, Tensor, Tensor] | None = None

    @property
    def level(self) -> float:
        """The share of weights that is left unread, as it was calibrated."""
        return 0.0 if self.number is None else self.section.levels[self.number]

    @level.setter
    def level(self, level: float) -> None:
        self.number = self.section.number(level)
        self.last = None
        for gate in self.gates:
            gate.forget_choice()

    @property
    def share_read(self) -> float:
        """The share of weights that was read for the tokens that were counted."""
        return self.read / max(self.whole, 1)

    def begin(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A hook before the first block: the positions of the tokens that are coming."""
        self.positions_BT, self.last = positions_of(args, kwargs), None

    def dense_tokens(self, x: Tensor) -> Tensor | None:
        """Which tokens of an input are the first of their text, `[…, 1]`; None where that cannot be told."""
        positions = self.positions_BT
        if positions is None or x.shape[:-1].numel() % positions.numel():
            return None
        dense_BT = positions < FIRST
        rows = x.shape[:-1].numel()
        if rows != dense_BT.numel():  # one for all texts
            dense_BT = dense_BT.reshape(-1).repeat(rows // dense_BT.numel())
        return dense_BT.reshape(x.shape[:-1])[..., None]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "positions_BT": None, "last": None}


class Gate:
    """Chooses among the inputs of linears that read the same.

    Args:
        gates: all of the model.
        name: of the first of the linears.
        input: what is known of it.
        features, outputs: I, and the O of all its linears together.
        scale_I: factors by which inputs are compared; None: 1.
        rank: sum over the linears of (O + I) for each rank of what stands for inputs that are not read.
    """

    def __init__(
        self,
        gates: Gates,
        name: str,
        input: GatedInput,
        features: int,
        outputs: int,
        scale_I: Tensor | None,
        rank: int,
    ) -> None:
        self.name, self.scale_I = name, scale_I
        self._gates, self._input, self._features, self._outputs = gates, input, features, outputs
        self._rank = rank
        rule = gates.section.rule
        self._prompt = Prompt(rule) if rule in (OFTEN, NORM) else None

    def forget_choice(self) -> None:
        """Another level is wanted: one that hangs on a prompt is of the next one."""
        if self._prompt is not None:
            self._prompt = Prompt(self._gates.section.rule)

    # --- hooks

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Before a linear: its input, and which of it is to be read."""
        kept = self.kept(args[0])
        if kept is None:
            return None
        return (args[0], kept) if isinstance(module, PackedLinear) else (args[0].masked_fill(~kept, 0),)

    def after(self, module: nn.Module, _: tuple[Any, ...], out: Tensor) -> Tensor | None:
        """After a linear: with what stands for the inputs that were not read."""
        if self._gates.last is None or self._gates.last[0] is not self:
            return None
        x, kept = self._gates.last[1:]
        rest = x.masked_fill(kept, 0)
        return out + linear(linear(rest, module.get_buffer(RIGHT)), module.get_buffer(LEFT)).to(out.dtype)

    # --- the choice

    def kept(self, x: Tensor) -> Tensor | None:
        """Which inputs are read, of the shape of x; None: all. It is found once for the linears that are given the same x."""
        gates = self._gates
        if gates.number is None or (torch.is_grad_enabled() and x.requires_grad):
            gates.last = None
            return None
        if gates.last is not None and gates.last[0] is self and gates.last[1] is x:
            return gates.last[2]
        gates.last = None
        dense = gates.dense_tokens(x)
        if not gates.every_token and x.shape[:-1].numel() > KEPT_TOKENS:
            if self._prompt is not None:
                self._prompt.see(x, gates.positions_BT, self._input.shares_L[gates.number])
            return None
        found = self._chosen(x, gates.number)
        if found is None:
            return None
        kept, too = found
        dense = too if dense is None else dense if too is None else dense | too
        if dense is not None:
            kept = kept | dense
        if gates.counting:
            self._count(kept, dense)
        gates.last = (self, x, kept)
        return kept

    def _chosen(self, x: Tensor, number: int) -> tuple[Tensor, Tensor | None] | None:
        """The choice by the rule, and which tokens are dense besides the first; None where nothing can be chosen yet."""
        share = self._input.shares_L[number]
        if self._prompt is not None:
            every = self._gates.every_token
            return self._prompt.choose(x, self._gates.positions_BT, share, halves=every)
        if self.scale_I is not None and self.scale_I.device != x.device:
            self.scale_I = self.scale_I.to(x.device)
        size = scores(x, self.scale_I)
        if self._gates.section.rule != LARGEST:
            return size > self._input.thresholds_L[number], None
        keep = max(1, round((1 - share) * self._features))
        return torch.zeros_like(size, dtype=torch.bool).scatter_(-1, size.topk(keep, -1).indices, True), None

    def _count(self, kept: Tensor, dense: Tensor | None) -> None:
        """Count what was read in: of tokens that are written together, what any of them reads."""
        gates = self._gates
        if not gates.every_token:
            if dense is not None and bool(dense.any()):
                return
            tokens, read = 1, int(kept.reshape(-1, self._features).any(0).sum())
        else:
            counted = torch.ones_like(kept[..., :1]) if dense is None else ~dense
            tokens, read = int(counted.sum()), int((kept & counted).sum())
        gates.read += read * self._outputs + tokens * self._rank
        gates.whole += tokens * self._features * self._outputs


def positions_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The positions of the tokens that a block is called with, `[B, T]` or `[1, T]`; None where nothing tells them."""
    hidden = args[0] if args else kwargs["hidden_states"]
    T = hidden.shape[1]
    known = kwargs.get("position_ids")
    if isinstance(known, Tensor) and known.shape[-1] == T:
        return known.reshape(-1, *known.shape[-2:])[0] if known.ndim > 2 else known.reshape(-1, T)
    caches = [each for each in (*args[1:], *kwargs.values()) if hasattr(each, "get_seq_length")]
    if T == 1 and not caches:
        return None
    start = caches[0].get_seq_length() if caches else 0
    return (torch.arange(T, device=hidden.device) + start)[None]


def gates_of(model: Any) -> Gates | None:
    """The gates of a model; None where it has none."""
    found: Gates | None = getattr(model, _ATTRIBUTE, None)
    return found


def put_gates(model: Any, gates: Gates) -> None:
    """Have a model know its gates."""
    setattr(model, _ATTRIBUTE, gates)


def activations(model: Any, level: float) -> None:
    """Have a model leave another share of its weights unread while it writes.

    Args:
        model: loaded from a folder that was compressed with `activations`.
        level: one of those that were calibrated; 0: everything is read, as before a prompt.

    Raises:
        UsageError: the model has no gates, or the level was not calibrated.
    """
    gates = gates_of(model)
    if gates is None:
        raise UsageError("the model has no thresholds for activations: compress it with `activations`, such as teal")
    gates.level = level


def told_of_gates(model: Any) -> dict[str, Any] | None:
    """What is to be said of what a model reads, after a measurement in which that was counted; None where it reads all."""
    gates = gates_of(model)
    if gates is None or gates.number is None:
        return None
    return {
        "method": gates.section.method,
        "level": gates.level,
        "dense_tokens": FIRST,
        "prompt": "first half" if gates.section.rule in (OFTEN, NORM) else None,
        "share_read": gates.share_read,
    }


@contextmanager
def as_if_written(model: Any) -> Iterator[None]:
    """While it is open, a model with gates treats each token of a text as if it were writing it, but for the first of each
    text, and counts what it reads."""
    gates = gates_of(model)
    if gates is None:
        yield
        return
    before = gates.every_token
    gates.every_token = gates.counting = True
    gates.read = gates.whole = 0
    try:
        yield
    finally:
        gates.every_token = gates.counting = before
        gates.last = None
