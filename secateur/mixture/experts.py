"""Experts of a mixture as ordinary linears, so that all that knows linears knows them.

transformers keeps the experts of a layer in two fused parameters; most checkpoints hold each projection of each expert.

T: tokens, H: hidden size, E: experts, K: experts of a token, I: inner size of an expert, O: output features of a projection.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from secateur.mixture.expert_rows import Copied, Routed, borrowed, note_scores, scores_of

GATE_UP, UP, DOWN = "gate_up_proj", "up_proj", "down_proj"
# Experts that are given a copy of all tokens each, scaled by the router, instead of the routers' choice.
COPIED_INPUTS = "Llama4TextExperts"
# In early releases of transformers 5 the module does not say that gate and up alternate.
_INTERLEAVED = "GptOssExperts"


@dataclass(frozen=True)
class Piece:
    """Where a projection of one expert lies in a fused parameter.

    Attributes:
        parameter: its name.
        expert: the number of the expert.
        rows: of the projection, of all output features that the parameter has for an expert.
        transposed: whether the parameter keeps `[I, O]` for an expert.
    """

    parameter: str
    expert: int
    rows: slice
    transposed: bool

    def of(self, fused: Tensor) -> Tensor:
        """The projection's weight `[O, I]`, a view of the fused parameter."""
        return self.within(fused[self.expert])

    def within(self, W: Tensor) -> Tensor:
        """The same, of what the fused parameter has for the expert."""
        return (W.T if self.transposed else W)[self.rows]

    def shape(self, fused: tuple[int, ...]) -> tuple[int, int]:
        """Its shape (O, I), of that of the fused parameter."""
        O, I = fused[:0:-1] if self.transposed else fused[1:]
        return len(range(*self.rows.indices(O))), I


def module_of(weight: str) -> str:
    """The name of the module of all experts, by that of one expert's weight."""
    return weight.rsplit(".", 3)[0]


@dataclass(frozen=True)
class Rows:
    """What some linears of one expert are about to read.

    Attributes:
        expert: its number.
        linears: their names below the experts' module.
        x_TI: their input.
        weight_T: how much each row counts in statistics; None: all alike.
        borrowed: how many rows, the last ones, are of tokens that the router sent elsewhere: they count in statistics only.
        token_T: which tokens of the batch they are of; None: all, in their order.
        batch_tokens: how many the batch has; None: those of all rows.
        read: gives what the same linears would read of any tokens of the batch; None: they have nothing to read of most.
    """

    expert: int
    linears: tuple[str, ...]
    x_TI: Tensor
    weight_T: Tensor | None = None
    borrowed: int = 0
    token_T: Tensor | None = None
    batch_tokens: int | None = None
    read: Callable[[Tensor], Tensor] | None = None


#: Told what the linears of some experts are about to read, before any of them is called; whether they are to be called at all.
Announce = Callable[["Experts", Sequence[Rows]], bool]


@dataclass(frozen=True)
class Visit:
    """How experts are visited while a model is calibrated: in order, those that no token was sent to as well.

    Attributes:
        announce: told what comes.
        at_once: how many experts are announced together.
        window: tokens of a window.
        quota: tokens of each window that an expert sees at least: those with the highest scores of the router are borrowed.
        inputs: `routed`, `gate` (each row counts by the weight that the router gives it) or `all` (every expert sees every
            token).
    """

    announce: Announce
    at_once: int = 1
    window: int = 1
    quota: int = 0
    inputs: str = "routed"


class Experts(nn.Module):
    """Stands in for an experts module of transformers: children "0" … "E−1", each with the linears of one expert.

    Biases stay fused under their own names, and so does whatever else the module has. Without a `visit` only those experts are
    run that a token was sent to.

    Args:
        fused: the module of transformers.
        names: of the projections, by the parameter that holds them.
        name: of the module in its model.
    """

    def __init__(self, fused: nn.Module, names: dict[str, tuple[str, ...]], name: str) -> None:
        super().__init__()
        self.name = name
        self.gated = hasattr(fused, GATE_UP)
        first: Tensor = getattr(fused, GATE_UP if self.gated else UP)
        down: Tensor = getattr(fused, DOWN)
        self.count, self.dtype = len(down), down.dtype
        self.fused_shapes = {(GATE_UP if self.gated else UP): tuple(first.shape), DOWN: tuple(down.shape)}
        self.transposed = bool(getattr(fused, "is_transposed", type(fused).__name__ == COPIED_INPUTS))
        concatenated = getattr(fused, "is_concatenated", True) and type(fused).__name__ != _INTERLEAVED
        self.interleaved = self.gated and not concatenated
        self.copied_inputs = type(fused).__name__ == COPIED_INPUTS
        self.firsts = names[GATE_UP if self.gated else UP]
        (self.last,) = names[DOWN]
        #: Of each weight below this module, where it lies.
        self.pieces: dict[str, Piece] = {}
        for e in range(self.count):
            expert = nn.Module()
            for projection, rows in zip(self.firsts, self._first_rows(first), strict=True):
                self._add(expert, e, projection, Piece(GATE_UP if self.gated else UP, e, rows, self.transposed), first)
            self._add(expert, e, self.last, Piece(DOWN, e, slice(None), self.transposed), down)
            self.add_module(str(e), expert)
        for leaf in self.fused_shapes:
            del fused._parameters[leaf]
        for leaf, parameter in fused._parameters.items():
            self.register_parameter(leaf, parameter)
        for leaf, buffer in fused._buffers.items():
            self.register_buffer(leaf, buffer, leaf not in fused._non_persistent_buffers_set)
        for leaf, child in fused._modules.items():
            self.add_module(leaf, child)
        self._fused = (fused,)  # whose functions are called, and which is none of this module's children
        self.visit: Visit | None = None

    def _first_rows(self, first: Tensor) -> list[slice]:
        O = first.shape[2] if self.transposed else first.shape[1]
        if not self.gated:
            return [slice(0, O)]
        if self.interleaved:
            return [slice(0, O, 2), slice(1, O, 2)]
        return [slice(0, O // 2), slice(O // 2, O)]

    def _add(self, expert: nn.Module, e: int, name: str, piece: Piece, fused: Tensor) -> None:
        O, I = piece.shape(tuple(fused.shape))
        linear = nn.Linear(I, O, bias=False, dtype=fused.dtype, device="meta")
        linear.weight.requires_grad_(False)
        expert.add_module(name, linear)
        self.pieces[f"{e}.{name}.weight"] = piece

    def linear(self, e: int, name: str) -> Any:
        """A projection of an expert."""
        return self.get_submodule(f"{e}.{name}")

    @property
    def widths(self) -> tuple[int, ...]:
        """How many values one token has on its way through an expert, of each kind: its input, what is inside, the output."""
        first, last = self.linear(0, self.firsts[0]), self.linear(0, self.last)
        inside: int = first.out_features
        ends: int = first.in_features + last.out_features
        return ends, inside * len(self.firsts), last.in_features

    @property
    def has_bias(self) -> bool:
        """Whether the projections have biases, which stay fused."""
        return any(leaf.endswith("_bias") for leaf in self._parameters)

    def narrowed(self, inner: int) -> tuple[dict[str, tuple[int, ...]], dict[str, Piece]]:
        """The shapes of the fused parameters, and where each weight lies in them, where experts have another inner size."""
        (leaf, first), (_, down) = self.fused_shapes.items()
        rows = inner * len(self.firsts)
        first = (*first[:2], rows) if self.transposed else (first[0], rows, first[2])
        down = (down[0], inner, down[2]) if self.transposed else (*down[:2], inner)
        of_firsts = dict(zip(self.firsts, self._first_rows(torch.empty(first, device="meta")), strict=True))
        pieces = {
            weight: replace(piece, rows=of_firsts.get(weight.split(".")[1], slice(None)))
            for weight, piece in self.pieces.items()
        }
        return {leaf: first, DOWN: down}, pieces

    def inner_size(self, parameter: str, shape: tuple[int, ...]) -> int:
        """The inner size of experts whose fused parameter has a shape."""
        if parameter == DOWN:
            return shape[1] if self.transposed else shape[2]
        return (shape[2] if self.transposed else shape[1]) // len(self.firsts)

    @property
    def linears(self) -> list[str]:
        """The names of all experts' linears below this module."""
        return [weight.removesuffix(".weight") for weight in self.pieces]

    # --- running

    def forward(self, hidden_TH: Tensor, index_TK: Tensor | None = None, weight_TK: Tensor | None = None) -> Tensor:
        """The weighted sum of what the experts of each token give for it, `[T, H]`; an index of E or more is no expert's."""
        if self.copied_inputs:
            return self._run_copied(hidden_TH)
        assert index_TK is not None
        assert weight_TK is not None
        routed = Routed(hidden_TH, index_TK, weight_TK, self.count)
        # As transformers' own loop over experts does: in the dtype of the output, expert by expert.
        out_TH = torch.zeros_like(hidden_TH)
        for e, output_RH in self._outputs(routed):
            token_R, k_R = routed.rows(e)
            weighted_RH = output_RH * weight_TK[token_R, k_R, None]
            out_TH.index_add_(0, token_R, weighted_RH.to(out_TH.dtype))
        return out_TH

    def _run_copied(self, hidden: Tensor) -> Tensor:
        copies_ETH = hidden.view(self.count, -1, hidden.shape[-1])
        routed = Copied(copies_ETH)
        out_ETH = torch.zeros_like(copies_ETH)
        for e, output_RH in self._outputs(routed):
            out_ETH[e, routed.rows(e)[0]] = output_RH.to(out_ETH.dtype)
        return out_ETH.view(-1, hidden.shape[-1])

    def _outputs(self, routed: Routed | Copied) -> Iterator[tuple[int, Tensor]]:
        """What experts give for the tokens that are sent to them."""
        if self.visit is None:
            for e in routed.hit:
                yield e, self.output(e, routed.inputs(e))
            return
        scores_TE = scores_of(self.count, routed)
        for begin in range(0, self.count, self.visit.at_once):
            members = range(begin, min(begin + self.visit.at_once, self.count))
            yield from self._visit(members, routed, scores_TE, self.visit)

    def _visit(
        self, members: range, routed: Routed | Copied, scores_TE: Tensor | None, visit: Visit
    ) -> Iterator[tuple[int, Tensor]]:
        """The same for experts that are visited together: first all their inputs are announced, then all their inner ones."""
        given = [self._rows_of(e, routed, scores_TE, visit) for e in members]
        if visit.announce(self, given):
            inner = [self.inner(e, rows.x_TI) for e, rows in zip(members, given, strict=True)]
        else:
            widths = [self.linear(e, self.last).in_features for e in members]
            inner = [rows.x_TI.new_zeros(len(rows.x_TI), width) for rows, width in zip(given, widths, strict=True)]
        then = [
            replace(rows, linears=(f"{e}.{self.last}",), x_TI=x_TI, read=self._inner_of(e, rows.read))
            for e, x_TI, rows in zip(members, inner, given, strict=True)
        ]
        called = visit.announce(self, then)
        for e, rows in zip(members, then, strict=True):
            own = len(routed.rows(e)[0])
            if called:
                yield e, self._last(e, rows.x_TI[:own])

    def _rows_of(self, e: int, routed: Routed | Copied, scores_TE: Tensor | None, visit: Visit) -> Rows:
        """The input of an expert while it is calibrated: its own tokens first, borrowed ones after them."""
        names = tuple(f"{e}.{name}" for name in self.firsts)
        own_RH = routed.inputs(e)
        weight_R = routed.weights(e) if visit.inputs == "gate" else None
        quota = routed.count if visit.inputs == "all" else visit.quota
        more = borrowed(e, routed, scores_TE, visit.window, quota)
        own_R = routed.rows(e)[0]
        # A copy that is scaled by the router is zero where the router sends the token elsewhere.
        read = None if self.copied_inputs else partial(routed.tokens, e=e)
        if not len(more):
            return Rows(e, names, own_RH, weight_R, 0, own_R, routed.count, read)
        x_TI = torch.cat([own_RH, routed.tokens(more, e)])
        if weight_R is not None:
            # What the expert would get for such a token, had it been chosen, is not known: as much as its least own one.
            least = weight_R.min() if len(weight_R) else weight_R.new_ones(())
            weight_R = torch.cat([weight_R, least.expand(len(more))])
        token_R = torch.cat([own_R, more.to(own_R.device)])
        return Rows(e, names, x_TI, weight_R, len(more), token_R, routed.count, read)

    def _inner_of(self, e: int, read: Callable[[Tensor], Tensor] | None) -> Callable[[Tensor], Tensor] | None:
        """What the last projection of an expert reads of tokens, of which `read` gives what the first ones do."""
        return None if read is None else lambda token_T: self.inner(e, read(token_T))

    def inner(self, e: int, x_TI: Tensor) -> Tensor:
        """What the last projection of an expert reads, of its input."""
        fused: Any = self._fused[0]
        first = [self.linear(e, name)(x_TI) for name in self.firsts]
        bias = self._bias(GATE_UP if self.gated else UP, e)
        if bias is not None:
            pieces = (self.pieces[f"{e}.{name}.weight"] for name in self.firsts)
            first = [y + bias[piece.rows] for y, piece in zip(first, pieces, strict=True)]
        if not self.gated:
            inner: Tensor = fused.act_fn(first[0])
            return inner
        gate, up = first
        if not hasattr(fused, "_apply_gate"):
            inner = up * fused.act_fn(gate)
            return inner
        both = torch.stack([gate, up], -1).flatten(-2) if self.interleaved else torch.cat([gate, up], -1)
        inner = fused._apply_gate(both)
        return inner

    def output(self, e: int, x_TI: Tensor) -> Tensor:
        """What an expert gives for its input."""
        return self._last(e, self.inner(e, x_TI))

    def _last(self, e: int, x_TI: Tensor) -> Tensor:
        output: Tensor = self.linear(e, self.last)(x_TI)
        bias = self._bias(DOWN, e)
        if bias is not None:
            output = output + bias
        if getattr(self._fused[0], "has_post_expert_norm", False):
            output = self.get_submodule("post_expert_norm")(output)
        return output

    def _bias(self, parameter: str, e: int) -> Tensor | None:
        bias: Tensor | None = getattr(self, f"{parameter}_bias", None)
        return None if bias is None else bias[e]

    def fused(self, weight_of: Callable[[str, Piece], Tensor], device: torch.device) -> nn.Module:
        """The module of transformers again, with fused parameters of the weights that are given for names below this one."""
        fused = self._fused[0]
        for leaf, shape in self.fused_shapes.items():
            whole = torch.empty(shape, dtype=self.dtype, device=device)
            for weight, piece in self.pieces.items():
                if piece.parameter == leaf:
                    piece.of(whole).copy_(weight_of(weight, piece))
            fused.register_parameter(leaf, nn.Parameter(whole, requires_grad=False))
        for leaf, parameter in self._parameters.items():
            fused._parameters[leaf] = parameter
        for leaf, buffer in self._buffers.items():
            fused._buffers[leaf] = buffer
        return fused.train(self.training)

    def extra_repr(self) -> str:
        return f"{self.count} experts"


@contextmanager
def visited(block: nn.Module, visit: Callable[[Experts], Visit]) -> Iterator[None]:
    """Within the context, the experts of a block are visited as is said for each module of them."""
    found = [(parent, m) for parent in block.modules() for m in parent.children() if isinstance(m, Experts)]
    handles = [
        sibling.register_forward_hook(note_scores(experts.count))
        for parent, experts in found
        for sibling in parent.children()
        if sibling is not experts
    ]
    for _, experts in found:
        experts.visit = visit(experts)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for _, experts in found:
            experts.visit = None
