"""How well a model predicts text, and how far it has moved from the model that it was made from.

K: windows, S: tokens of one window, P: predictions of one window, S−1, B: predictions taken at a time, V: vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from secateur.errors import SecateurError, UsageError

# Float32 log-probabilities of each model held at a time: 4 MiB, whatever the vocabulary. What fits a cache is also fastest.
_CHUNK_VALUES = 1 << 20


@dataclass(frozen=True)
class Quality:
    """What was measured over token windows.

    Attributes:
        perplexity: exp(loss); infinite where that is beyond a float.
        loss: mean negative log-likelihood of the next token, in nats.
        tokens: how many predictions were scored, windows · (seq_len − 1).
        windows, seq_len: the text.
        kl: mean KL(reference ‖ model) of the next-token distributions, in nats a token.
        agreement: share of predictions whose most likely token is the reference's.
        reference_perplexity: the reference's on the same predictions.
    """

    perplexity: float
    loss: float
    tokens: int
    windows: int
    seq_len: int
    kl: float | None = None
    agreement: float | None = None
    reference_perplexity: float | None = None


@torch.no_grad()
def measure(
    model: Any, ids_KS: Tensor, reference: Any = None, *, progress: Callable[[int, int], None] | None = None
) -> Quality:
    """Measure a model, and its distance from a reference, on token windows.

    Each window is one forward pass of each model, from an empty context. Log-probabilities are float32 whatever the
    model's dtype. Both models are put into evaluation mode.

    Args:
        model: a causal language model of transformers, on any device.
        ids_KS: the windows, of at least 2 tokens each.
        reference: another one with the same tokens.
        progress: called with (windows done, windows in total) after each window.

    Raises:
        UsageError: the windows do not suit the model, or the two models have different vocabularies.
        SecateurError: a loss or divergence is not finite.
    """
    K, S = ids_KS.shape
    if K < 1 or S < 2:
        raise UsageError(f"{K} windows of {S} tokens hold no prediction: --windows starts at 1 and --seq-len at 2")
    models = [model] if reference is None else [model, reference]
    for each in models:
        _check_fits(each, ids_KS)
        each.eval()
    loss = reference_loss = kl = agreed = 0.0
    for k, ids_S in enumerate(ids_KS):
        window = f"window {k + 1} of {K} (tokens {k * S} to {k * S + S - 1})"
        logits = [_predict(each, ids_S) for each in models]
        if len({logits_PV.shape[1] for logits_PV in logits}) > 1:
            raise UsageError(
                f"the model has {logits[0].shape[1]} tokens and the reference {logits[1].shape[1]}: "
                "they can only be compared if they share their tokenizer"
            )
        sums = _score(logits, ids_S[1:])
        loss += _finite(sums.loss, f"the model's loss is {{}} in {window}")
        if reference is not None:
            reference_loss += _finite(sums.reference_loss, f"the reference's loss is {{}} in {window}")
            kl += _finite(sums.kl, f"the model's divergence from the reference is {{}} in {window}")
            agreed += sums.agreed
        if progress is not None:
            progress(k + 1, K)
    tokens = K * (S - 1)
    quality = Quality(_exp(loss / tokens), loss / tokens, tokens, K, S)
    if reference is None:
        return quality
    return replace(
        quality,
        # Rounding can leave the mean just below zero, where no divergence is.
        kl=max(kl / tokens, 0.0),
        agreement=agreed / tokens,
        reference_perplexity=_exp(reference_loss / tokens),
    )


@dataclass
class _Sums:
    """Over the predictions of one window."""

    loss: float = 0.0
    reference_loss: float = 0.0
    kl: float = 0.0
    agreed: float = 0.0


def _predict(model: Any, ids_S: Tensor) -> Tensor:
    """logits_PV: what the model expects after each token but the last, in its own dtype."""
    return model(input_ids=ids_S[None].to(model.device), use_cache=False).logits[0, :-1]


def _score(logits: list[Tensor], target_P: Tensor) -> _Sums:
    sums = _Sums()
    device = logits[0].device
    target_P = target_P.to(device)
    for chunk in _chunks(*logits[0].shape):
        model_BV, *other = (_log_softmax(logits_PV[chunk].to(device)) for logits_PV in logits)
        sums.loss += _loss(model_BV, target_P[chunk])
        for reference_BV in other:
            sums.reference_loss += _loss(reference_BV, target_P[chunk])
            sums.agreed += (model_BV.argmax(1) == reference_BV.argmax(1)).sum().item()
            sums.kl += _divergence(reference_BV, model_BV)
    return sums


def _chunks(P: int, V: int) -> Iterator[slice]:
    rows = max(1, _CHUNK_VALUES // V)
    return (slice(start, start + rows) for start in range(0, P, rows))


def _log_softmax(logits_BV: Tensor) -> Tensor:
    return logits_BV.log_softmax(1, dtype=torch.float32)


def _loss(log_p_BV: Tensor, target_B: Tensor) -> float:
    return -_sum(log_p_BV.gather(1, target_B[:, None]))


def _divergence(log_p_BV: Tensor, log_q_BV: Tensor) -> float:
    """Σ KL(p ‖ q) over the rows. A token that p rules out adds nothing, though it be −∞ in both."""
    p_BV = log_p_BV.exp()
    term_BV = (log_p_BV - log_q_BV).mul_(p_BV).masked_fill_(p_BV == 0, 0)
    return _sum(term_BV.sum(1))


def _sum(values: Tensor) -> float:
    # On the CPU, because not every accelerator has float64.
    return values.cpu().double().sum().item()


def _finite(value: float, problem: str) -> float:
    if math.isfinite(value):
        return value
    raise SecateurError(
        f"{problem.format(value)}: its weights are damaged, or its dtype is too narrow for its activations; "
        "look at the checkpoint, or evaluate in float32"
    )


def _exp(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def _check_fits(model: Any, ids_KS: Tensor) -> None:
    S = ids_KS.shape[1]
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(positions, int) and positions < S:
        raise UsageError(f"windows of {S} tokens are longer than the model's {positions} positions: lower --seq-len")
    size, largest = model.get_input_embeddings().num_embeddings, int(ids_KS.max())
    if largest >= size:
        raise UsageError(f"the text has token {largest}, but the model only {size}: its tokenizer is another model's")
