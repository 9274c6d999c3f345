"""How well a model predicts text, and how far it has moved from the model that it was made from.

K: windows, S: tokens of one window, P: predictions of one window, S−1, B: predictions taken at a time, W: windows of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from secateur.calibration.tokens import is_one_of
from secateur.errors import SecateurError, UsageError
from secateur.evaluation.distributions import Window, divergence, predict
from secateur.evaluation.routing import compare_routing
from secateur.evaluation.streamed import StreamedModel
from secateur.evaluation.uncertainty import interval
from secateur.model.source import longest_window


class Reference(Protocol):
    """What another model predicts for the same windows: `KeptReference`, or a model that is run."""

    def windows(self, start: int, ids_WS: Tensor, scored: list[int]) -> list[Window]:
        """Of the windows from number `start` on, see `predict`."""
        ...


class LiveReference:
    """A model that is run beside the one that is measured, of transformers or a `StreamedModel`."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def windows(self, start: int, ids_WS: Tensor, scored: list[int]) -> list[Window]:
        return predict(self.model, ids_WS, scored)


#: The figures of a mixture of experts.
ROUTING = ("same_experts", "routing_agreement", "routing_kl")
# What runs at a time on a GPU: tokens, and logits, of which each takes 4 bytes.
_BATCH_TOKENS, _BATCH_LOGITS = 8192, 2**30


@dataclass(frozen=True)
class Scores:
    """Every prediction: `[K, P]`, float32 on the CPU; NaN where windows overlap and an earlier one has scored it, and where a
    text begins.

    Attributes:
        loss_KP: −log-probability of the token that comes next, in nats.
        reference_loss_KP: the reference's.
        kl_KP: KL(reference ‖ model), in nats.
        agreed_KP: 1 where the most likely token is the reference's, else 0.
        same_experts_KP, routing_KP, routing_kl_KP: of a mixture of experts, see `compare_routing`.
    """

    loss_KP: Tensor
    reference_loss_KP: Tensor | None = None
    kl_KP: Tensor | None = None
    agreed_KP: Tensor | None = None
    same_experts_KP: Tensor | None = None
    routing_KP: Tensor | None = None
    routing_kl_KP: Tensor | None = None

    @property
    def count_K(self) -> Tensor:
        """How many predictions each window scored."""
        return (~self.loss_KP.isnan()).sum(1)

    @property
    def overlap(self) -> bool:
        """Whether windows overlap: the first predictions of some are not scored, as they are in the first window."""
        first_K = (~self.loss_KP.isnan()).int().argmax(1)
        return bool((first_K > first_K[0]).any())

    def of_text(self, ids_KS: Tensor, bos: Sequence[int]) -> Scores:
        """Without the predictions of tokens that texts begin with: nothing leads up to them."""
        begins_KP = is_one_of(ids_KS[:, 1:], bos)
        return Scores(*(values_KP.masked_fill(begins_KP, math.nan) for values_KP in self.given().values()))

    def windows(self) -> dict[str, list[float]]:
        """The mean of each figure over each window."""
        return {name: values_KP.double().nanmean(1).tolist() for name, values_KP in self.given().items()}

    def positions(self) -> dict[str, list[float]]:
        """The mean of each figure over all windows at each position: the p-th is predicted from p + 1 tokens."""
        return {name: values_KP.double().nanmean(0).tolist() for name, values_KP in self.given().items()}

    def given(self) -> dict[str, Tensor]:
        """All figures that there are, by name."""
        named = {
            "loss": self.loss_KP,
            "reference_loss": self.reference_loss_KP,
            "kl": self.kl_KP,
            "agreement": self.agreed_KP,
            "same_experts": self.same_experts_KP,
            "routing_agreement": self.routing_KP,
            "routing_kl": self.routing_kl_KP,
        }
        return {name: values_KP for name, values_KP in named.items() if values_KP is not None}


@dataclass(frozen=True)
class Quality:
    """What was measured over token windows. Intervals are of 95 % confidence over the choice of windows, see `uncertainty`.

    Attributes:
        perplexity: exp(loss); infinite where that is beyond a float.
        loss: mean negative log-likelihood of the next token, in nats.
        tokens: how many predictions were scored; windows · (seq_len − 1) where windows do not overlap and no text begins
            within one.
        windows, seq_len: the text.
        kl: mean KL(reference ‖ model) of the next-token distributions, in nats a token.
        agreement: share of predictions whose most likely token is the reference's.
        reference_perplexity, reference_loss: the reference's on the same predictions.
        perplexity_interval, kl_interval, agreement_interval, reference_perplexity_interval: None of a single window, and where
            windows overlap.
        same_experts: of a mixture of experts, the share of tokens that are sent to the same set of experts as by the
            reference, in the mean over layers.
        routing_agreement: the share |A∩B| / k of a token's experts that are the reference's, in the same mean.
        routing_kl: KL(reference ‖ model) of the routers' distributions over the experts of a layer, in nats, in the same mean;
            of the 32 likeliest experts and all others as one. None where no router's scores can be told.
        scores: prediction by prediction.
    """

    perplexity: float
    loss: float
    tokens: int
    windows: int
    seq_len: int
    kl: float | None = None
    agreement: float | None = None
    reference_perplexity: float | None = None
    reference_loss: float | None = None
    perplexity_interval: tuple[float, float] | None = None
    kl_interval: tuple[float, float] | None = None
    agreement_interval: tuple[float, float] | None = None
    same_experts: float | None = None
    same_experts_interval: tuple[float, float] | None = None
    routing_agreement: float | None = None
    routing_agreement_interval: tuple[float, float] | None = None
    routing_kl: float | None = None
    routing_kl_interval: tuple[float, float] | None = None
    reference_perplexity_interval: tuple[float, float] | None = None
    scores: Scores = field(kw_only=True, repr=False, compare=False)

    @classmethod
    def of(cls, scores: Scores) -> Quality:
        """The figures that scores come to."""
        count_K = scores.count_K
        mean = {name: values_KP.double().nanmean().item() for name, values_KP in scores.given().items()}
        # Windows that overlap hang together: drawing them again would make intervals too narrow.
        ends = {
            name: None if scores.overlap else interval(values_KP.double().nansum(1), count_K)
            for name, values_KP in scores.given().items()
        }
        around, reference_around = ends["loss"], ends.get("reference_loss")
        # Rounding can leave a mean just below zero, where no divergence is.
        for name in mean.keys() & {"kl", "routing_kl"}:
            mean[name] = max(mean[name], 0.0)
            low_high = ends[name]
            ends[name] = None if low_high is None else (max(low_high[0], 0.0), max(low_high[1], 0.0))
        return cls(
            perplexity=_exp(mean["loss"]),
            loss=mean["loss"],
            tokens=int(count_K.sum()),
            windows=len(count_K),
            seq_len=scores.loss_KP.shape[1] + 1,
            kl=mean.get("kl"),
            agreement=mean.get("agreement"),
            reference_perplexity=_exp(mean["reference_loss"]) if "reference_loss" in mean else None,
            reference_loss=mean.get("reference_loss"),
            perplexity_interval=(_exp(around[0]), _exp(around[1])) if around else None,
            kl_interval=ends.get("kl"),
            agreement_interval=ends.get("agreement"),
            same_experts=mean.get("same_experts"),
            same_experts_interval=ends.get("same_experts"),
            routing_agreement=mean.get("routing_agreement"),
            routing_agreement_interval=ends.get("routing_agreement"),
            routing_kl=mean.get("routing_kl"),
            routing_kl_interval=ends.get("routing_kl"),
            reference_perplexity_interval=(_exp(reference_around[0]), _exp(reference_around[1]))
            if reference_around
            else None,
            scores=scores,
        )


def scored_predictions(K: int, S: int, stride: int | None) -> list[int]:
    """How many predictions each window scores: all, or, where windows overlap, those that no earlier one has scored."""
    return [S - 1] + [min(stride or S, S - 1)] * (K - 1)


@dataclass(frozen=True)
class CutText:
    """A text cut into windows, see `measure`."""

    ids_KS: Tensor
    stride: int | None = None
    bos: Sequence[int] = ()

    @property
    def scored(self) -> list[int]:
        """How many predictions each window scores."""
        K, S = self.ids_KS.shape
        return scored_predictions(K, S, self.stride)

    def place_of(self, k: int) -> str:
        """A window, for the error's sake."""
        K, S = self.ids_KS.shape
        text_len = S - len(self.bos)
        begin = k * min(self.stride or text_len, text_len)
        return f"window {k + 1} of {K} (tokens {begin} to {begin + text_len - 1})"


@torch.no_grad()
def measure(
    model: Any,
    ids_KS: Tensor,
    reference: Any = None,
    *,
    stride: int | None = None,
    bos: Sequence[int] = (),
    batch_tokens: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Quality:
    """Measure a model, and its distance from a reference, on token windows.

    Each window is read from an empty context. Log-probabilities are float32 whatever the model's dtype. Models are put into
    evaluation mode.

    Args:
        model: a causal language model of transformers, on any device, or a `StreamedModel`.
        ids_KS: the windows, of at least 2 tokens each.
        reference: another one with the same tokens, or what is kept of its predictions.
        stride: by how many tokens a window begins after the one before, where they overlap; each token is then scored once,
            in the first window that has it. None: they do not overlap.
        bos: the tokens that each window begins with, if it does; they are never scored, wherever they stand.
        batch_tokens: run at a time, in whole windows, one at least; None takes one on a CPU, and elsewhere 8192 tokens, or
            fewer where the vocabulary is so large that their logits would fill gigabytes.
        progress: called with (windows done, windows in total).

    Raises:
        UsageError: the windows do not suit the model, or the two models have different vocabularies.
        SecateurError: a loss or divergence is not finite.
    """
    K, S = ids_KS.shape
    if K < 1 or S < 2:
        raise UsageError(f"{K} windows of {S} tokens hold no prediction: `windows` starts at 1 and `seq_len` at 2")
    live = isinstance(reference, nn.Module | StreamedModel)
    other: Reference | None = LiveReference(reference) if live else reference
    for each in (model, other.model) if isinstance(other, LiveReference) else (model,):
        check_fits(each, ids_KS)
        ready(each, progress)
    cut = CutText(ids_KS, stride, bos)
    scored = cut.scored
    found: list[list[Tensor]] = []

    def score(some: slice) -> None:
        # A function, so that no logits are left when those of the next batch are computed.
        ids_WS, counts = ids_KS[some], scored[some]
        own = predict(model, ids_WS, counts, routing=other is not None)
        others = other.windows(some.start, ids_WS, counts) if other is not None else [None] * len(own)
        for k, window, beside in zip(range(K)[some], own, others, strict=True):
            if beside is not None and window.vocabulary != beside.vocabulary:
                raise UsageError(
                    f"the model has {window.vocabulary} tokens and the reference {beside.vocabulary}: "
                    "they can only be compared if they share their tokenizer"
                )
            found.append(_score(window, beside, cut.place_of(k)))

    at_once = reference if isinstance(reference, StreamedModel) else model
    for some in batches(K, S, batch_tokens, at_once):
        score(some)
        if progress is not None:
            progress(len(found), K)
    columns = zip(*found, strict=True)
    return Quality.of(Scores(*(padded(list(column), S - 1) for column in columns)).of_text(ids_KS, bos))


def batches(K: int, S: int, batch_tokens: int | None, model: Any) -> list[slice]:
    """Which windows run together, see `measure`; where blocks are read one after another, all do."""
    if isinstance(model, StreamedModel):
        return [slice(0, K)]
    if batch_tokens is None:
        vocabulary = model.config.get_text_config().vocab_size
        batch_tokens = S if model.device.type == "cpu" else min(_BATCH_TOKENS, _BATCH_LOGITS // vocabulary)
    size = max(1, batch_tokens // S)
    return [slice(start, min(start + size, K)) for start in range(0, K, size)]


def ready(model: Any, progress: Callable[[int, int], None] | None) -> None:
    """Have a model stand ready to be measured; one whose blocks are read one after another tells of them."""
    if isinstance(model, nn.Module):
        model.eval()
    elif progress is not None:
        model.report(progress)


def _score(window: Window, reference: Window | None, where: str) -> list[Tensor]:
    """The rows of `Scores` for one window."""
    rows: list[list[Tensor]] = []
    for chunk in window.chunks():
        own = window.rows(chunk)
        row = [own.loss_B]
        if reference is not None:
            other = reference.rows(chunk).to(own.loss_B.device)
            row += [other.loss_B, divergence(other, own), (own.likeliest_B == other.likeliest_B).float()]
        rows.append(row)
    found = [torch.cat([piece.cpu() for piece in column]) for column in zip(*rows, strict=True)]
    what = ("the model's loss", "the reference's loss", "the model's divergence from the reference")
    for values_P, name in zip(found, what, strict=False):
        check_finite(values_P, name, where)
    routing = None if reference is None else compare_routing(window.routing, reference.routing)
    return found + (routing or [])


def padded(rows: list[Tensor], P: int) -> Tensor:
    """Rows that end at the last position, as a matrix."""
    return torch.stack([nn.functional.pad(row_P, (P - len(row_P), 0), value=math.nan) for row_P in rows])


def check_finite(values_P: Tensor, name: str, where: str) -> None:
    """Raise SecateurError where something measured is not finite."""
    value = values_P.double().sum().item()
    if not math.isfinite(value):
        raise SecateurError(
            f"{name} is {value} in {where}: its weights are damaged, or its dtype is too narrow for its activations; "
            "look at the checkpoint, or evaluate in float32"
        )


def _exp(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def check_fits(model: Any, ids_KS: Tensor) -> None:
    """Raise UsageError where windows have more tokens than a model takes, or tokens that it does not have."""
    S = ids_KS.shape[1]
    positions = longest_window(model.config)
    if positions is not None and positions < S:
        raise UsageError(f"windows of {S} tokens are longer than the model's {positions} positions: lower `seq_len`")
    size, largest = model.get_input_embeddings().num_embeddings, int(ids_KS.max())
    if largest >= size:
        raise UsageError(f"the text has token {largest}, but the model only {size}: its tokenizer is another model's")
