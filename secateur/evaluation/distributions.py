"""Next-token distributions: what a model predicts, whole or the likeliest tokens only, and how far one is from another.

B: predictions taken at a time, P: predictions of one window, S: tokens of one window, T: tokens kept of a distribution,
V: vocabulary, W: windows of one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.evaluation.kl import kl, log_rest
from secateur.evaluation.routing import Routing, routing_of, watched

# Float32 log-probabilities of each model held at a time: 4 MiB, whatever the vocabulary. What fits a cache is also fastest.
_CHUNK_VALUES = 1 << 20


@dataclass(frozen=True)
class Distributions:
    """Distributions of the next token after B places of a text.

    Attributes:
        log_p_BT: log-probabilities, float32: of all tokens, or of the likeliest.
        loss_B: −log-probability of the token that does come next.
        likeliest_B: the most likely token.
        token_BT: which tokens `log_p_BT` is of; None: of all in their order.
        log_rest_B: log-probability of all others together; None where there are none.
    """

    log_p_BT: Tensor
    loss_B: Tensor
    likeliest_B: Tensor
    token_BT: Tensor | None = None
    log_rest_B: Tensor | None = None

    def to(self, device: torch.device) -> Distributions:
        """The same on a device."""
        given = {name: value.to(device) for name, value in vars(self).items() if value is not None}
        return Distributions(**given)


@dataclass(frozen=True)
class Window:
    """What is predicted within one window.

    Attributes:
        count: of predictions.
        vocabulary: V.
        rows: gives the distributions of some of them.
        routing: of a mixture of experts, layer by layer.
    """

    count: int
    vocabulary: int
    rows: Callable[[slice], Distributions]
    routing: Routing = ()

    def chunks(self) -> Iterator[slice]:
        """The predictions, some at a time."""
        size = max(1, _CHUNK_VALUES // self.vocabulary)
        return (slice(start, min(start + size, self.count)) for start in range(0, self.count, size))


def predict(model: Any, ids_WS: Tensor, scored: list[int], routing: bool = True) -> list[Window]:
    """Run a model over windows, each from an empty context.

    Args:
        model: a causal language model of transformers, or a `StreamedModel`.
        ids_WS: the windows, run as one batch.
        scored: how many predictions of each are wanted, the last ones.
        routing: whether to look at where a mixture of experts sends its tokens.

    Returns:
        For each window what gives its distributions: log-probabilities are computed in float32, whatever the dtype of the
        model, when they are asked for.
    """
    if not isinstance(model, nn.Module):
        streamed: list[Window] = model.predict(ids_WS, scored, routing)
        return streamed
    with ExitStack() as stack:
        calls = stack.enter_context(watched(model)) if routing else []
        logits_WSV = model(input_ids=ids_WS.to(model.device), use_cache=False).logits  # type: ignore[arg-type]
    W, S = ids_WS.shape
    routings = routing_of(calls, W, S, scored)

    found = []
    each = zip(logits_WSV, ids_WS.to(logits_WSV.device), scored, routings, strict=True)
    for logits_SV, ids_S, count, layers in each:
        logits_PV = logits_SV[:-1][-count:]
        P, V = logits_PV.shape
        found.append(window_of(logits_PV.__getitem__, P, V, ids_S[-count:], layers))
    return found


def window_of(
    logits: Callable[[slice], Tensor], count: int, vocabulary: int, target_P: Tensor, routing: Routing
) -> Window:
    """A window whose distributions are computed, when they are asked for, of logits that some function gives."""

    def rows(chunk: slice) -> Distributions:
        logits_BV = logits(chunk)
        log_p_BV = logits_BV.log_softmax(1, dtype=torch.float32)
        loss_B = -log_p_BV.gather(1, target_P[chunk, None].to(log_p_BV.device))[:, 0]
        return Distributions(log_p_BV, loss_B, log_p_BV.argmax(1))

    return Window(count, vocabulary, rows, routing)


def log_predictions(model: Any, ids_S: Tensor) -> Tensor:
    """Log-probabilities of what comes after each token of one window, `[S, V]`, float32."""
    logits_SV: Tensor = model(input_ids=ids_S[None].to(model.device), use_cache=False).logits[0]
    return logits_SV.log_softmax(1, dtype=torch.float32)


def shortened(whole: Distributions, tokens: int) -> Distributions:
    """The likeliest tokens of whole distributions, and the mass of the rest."""
    top = whole.log_p_BT.topk(tokens, dim=1)
    return Distributions(
        top.values, whole.loss_B, whole.likeliest_B, top.indices, log_rest(whole.log_p_BT, top.indices)
    )


def divergence(p: Distributions, q: Distributions) -> Tensor:
    """KL(p ‖ q) of each prediction, in nats; `q` is whole: see `kl`."""
    return kl(p.log_p_BT, q.log_p_BT, p.token_BT, p.log_rest_B)
