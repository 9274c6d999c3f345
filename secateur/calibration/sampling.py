"""Calibration text that a model writes itself: no data set and no network needed.

B: texts of a batch, L: tokens of a text, N: windows, S: tokens of a window, V: vocabulary, P: pieces of it,
M: tokens of a piece.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from secateur.calibration.quick_steps import make_room, packed_linears, quick_attention
from secateur.errors import SecateurError
from secateur.memory.free_memory import free_memory

# Short texts cover more of what a model can say than few long ones, and their keys and values stay small.
TEXT_TOKENS = 128
# Texts written at a time: enough that every weight is read for many tokens at once.
BATCH_TEXTS = 128
#: How a token is drawn, for whoever keeps what was: see `_draw`.
DRAWN = "one share a piece, one within it"
# M: the vocabulary is summed up by so many tokens, and gone through one by one only where a share falls.
_PIECE = 256


@torch.no_grad()
def sample_windows(
    model: Any,
    start: list[int],
    samples: int,
    seq_len: int,
    seed: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
    bos: bool = True,
    frugal: bool = False,
) -> Tensor:
    """Sample texts token by token from the model's own distribution, and lay them end to end into windows.

    Args:
        model: a causal language model in evaluation mode.
        start: the tokens every text begins with.
        samples, seq_len: N and S.
        seed: of the draws.
        bos: whether each window begins as a text does: the last text in it is then cut. Otherwise the next window goes on
            with it.
        progress: called with (tokens written, tokens in total).
        frugal: whether weights may not be copied.

    Returns:
        ids_NS: int64, on the CPU.

    Raises:
        SecateurError: the model's predictions are not finite.
    """
    length = min(TEXT_TOKENS, seq_len)
    texts = samples * -(-seq_len // length) if bos else -(-samples * seq_len // length)
    generator = torch.Generator(device=model.device).manual_seed(seed)
    batches = []
    copying = not frugal and sum(p.nbytes for p in model.parameters()) <= free_memory() / 2
    with quick_attention(), packed_linears(model, min(BATCH_TEXTS, texts)) if copying else nullcontext():
        for done in range(0, texts, BATCH_TEXTS):
            count = min(BATCH_TEXTS, texts - done)

            def report(step: int, done: int = done, count: int = count) -> None:
                progress(done * length + count * step, texts * length)

            batches.append(_sample_batch(model, start, count, length, generator, report))
    ids_T = torch.cat(batches).reshape(-1)
    if bos:
        return ids_T.view(samples, -1)[:, :seq_len].contiguous()
    return ids_T[: samples * seq_len].view(samples, seq_len)


def _sample_batch(
    model: Any, start: list[int], count: int, length: int, generator: torch.Generator, report: Callable[[int], None]
) -> Tensor:
    ids_BL = torch.zeros((count, length), dtype=torch.int64, device=model.device)
    ids_BL[:, : len(start)] = torch.tensor(start[:length], device=model.device)
    cache, read = None, 0
    for step in range(len(start), length):
        out = model(input_ids=ids_BL[:, read:step], past_key_values=cache, use_cache=True)
        read = step
        if cache is None:
            make_room(out.past_key_values, length)
        cache = out.past_key_values
        ids_BL[:, step] = _draw(out.logits[:, -1], generator)
        report(step + 1)
    return ids_BL.cpu()


def _draw(logits_BV: Tensor, generator: torch.Generator) -> Tensor:
    """A token of each text, as likely as e^logit: first a piece of the vocabulary, then a token of it, each where the sum
    passes a random share of the whole.

    `torch.multinomial` draws a number for every token of the vocabulary, which takes longer than the products of a small model.

    Raises:
        SecateurError: the predictions are not finite.
    """
    p_BV = logits_BV.float()
    p_BV = (p_BV - p_BV.amax(1, keepdim=True)).exp_()
    p_BPM = nn.functional.pad(p_BV, (0, -p_BV.shape[1] % _PIECE)).unflatten(1, (-1, _PIECE))
    piece_B = _where_passed(p_BPM.sum(2), generator)
    p_BM = p_BPM[torch.arange(len(piece_B), device=piece_B.device), piece_B]
    return piece_B * _PIECE + _where_passed(p_BM, generator)


def _where_passed(weights_BN: Tensor, generator: torch.Generator) -> Tensor:
    """The place in each row at which its sum passes a random share of the whole."""
    upto_BN = weights_BN.cumsum(1, dtype=torch.float64)
    if not torch.isfinite(upto_BN[:, -1]).all():
        raise SecateurError("the model's predictions are not finite: it is damaged; choose a text by `source`")
    share_B1 = torch.rand((len(upto_BN), 1), generator=generator, dtype=torch.float64, device=upto_BN.device)
    # Strictly above, so that what has no weight is never taken.
    place_B1 = torch.searchsorted(upto_BN, share_B1 * upto_BN[:, -1:], right=True)
    return place_B1[:, 0].clamp_(max=upto_BN.shape[1] - 1)
