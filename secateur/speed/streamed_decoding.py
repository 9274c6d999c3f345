"""A model that memory does not hold as it writes: how long a step takes, and what share of the disk it makes use of.

What the disk, or the way from the host to a device, could give is measured by the same reader without anything computed.

B: texts written at a time, S: tokens of each so far.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from secateur.errors import UsageError
from secateur.offload.streamer import Streamer

# Tokens that every text begins with; steps before anything is measured; steps that are, at least and at most.
_PROMPT, _WARM_UP, _LEAST, _MOST = 8, 1, 3, 16
#: Tokens that are kept keys and values of, for each text.
TOKENS = _PROMPT + _WARM_UP + _MOST


@dataclass(frozen=True)
class Streamed:
    """A step of a model that writes so many texts at a time.

    Attributes:
        tokens: texts, each of which gets one token in a step.
        seconds: of a step: the median.
        bytes_read: from files in a step.
        bytes_copied: to a device in a step.
    """

    tokens: int
    seconds: float
    bytes_read: float
    bytes_copied: float


@dataclass(frozen=True)
class Transfers:
    """What can be had without computing.

    Attributes:
        disk: bytes a second that are read from the files.
        bus: bytes a second that are copied to a device.
    """

    disk: float
    bus: float


def time_streamed(
    model: Any, texts: Sequence[int], seconds: float, progress: Callable[[int, int], None] | None
) -> tuple[list[Streamed], Transfers]:
    """Time a model that was loaded under a limit, with each number of texts, and its reader alone before and after.

    Raises:
        UsageError: nothing of it is read while it runs.
    """
    streamer = getattr(model, "streamer", None)
    if streamer is None:
        raise UsageError("all of the model fits into `max_memory`: give less, or leave it out")
    alone = [_alone(streamer, model.device)]
    found = []
    for number, count in enumerate(texts, 1):
        found.append(_write(model, streamer, count, seconds))
        if progress is not None:
            progress(number, len(texts))
    alone.append(_alone(streamer, model.device))
    return found, Transfers(max(each.disk for each in alone), max(each.bus for each in alone))


def _now(device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def _alone(streamer: Streamer, device: torch.device) -> Transfers:
    """A pass in which nothing is computed."""
    count = len(streamer.blocks)
    streamer.before(0)  # what comes next is on its way by now
    streamer.after(0)
    began, read, copied = _now(device), streamer.bytes_read, streamer.bytes_copied
    for number in range(1, count + 1):
        streamer.before(number % count)
        streamer.after(number % count)
    spent = _now(device) - began
    return Transfers((streamer.bytes_read - read) / spent, (streamer.bytes_copied - copied) / spent)


def _write(model: Any, streamer: Streamer, texts: int, seconds: float) -> Streamed:
    """Some steps from random tokens on, each token the likeliest."""
    draw = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    ids_BS = torch.randint(vocabulary, (texts, _PROMPT), generator=draw).to(model.device)
    cache = None
    taken: list[float] = []
    read = copied = 0
    for step in range(1 + _WARM_UP + _MOST):
        if step > _WARM_UP + _LEAST and sum(taken) > seconds:
            break
        before = streamer.bytes_read, streamer.bytes_copied
        began = _now(model.device)
        out = model(input_ids=ids_BS, past_key_values=cache, use_cache=True)
        spent = _now(model.device) - began
        cache, ids_BS = out.past_key_values, out.logits[:, -1:].argmax(-1)
        if step > _WARM_UP:  # the first reads the prompt
            taken.append(spent)
            read += streamer.bytes_read - before[0]
            copied += streamer.bytes_copied - before[1]
    return Streamed(texts, statistics.median(taken), read / len(taken), copied / len(taken))
