"""A loaded model as lm-eval asks it. Imported only where tasks are measured: lm-eval takes seconds to import."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

from secateur.errors import SecateurError

# Requests answered between two calls of `progress`, in batches.
_PART = 64


class TaskModel(HFLM):
    """lm-eval's own class for transformers models, which tells how far it is and refuses to rank answers by NaN.

    Log-probabilities are float32 whatever the model's dtype, as those of perplexity are.

    Args:
        model: a causal language model of transformers, on any device; it is put into evaluation mode.
        tokenizer: of that model; left as it is.
        batch: requests run at a time.
        progress: called with (requests answered, requests in total), for each kind of request anew.
    """

    def __init__(self, model: Any, tokenizer: Any, batch: int, progress: Callable[[int, int], None]) -> None:
        # lm-eval gives a tokenizer without a padding token one.
        super().__init__(
            pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch, softmax_dtype=torch.float32
        )
        self._progress = progress

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return self._in_parts(super().loglikelihood, requests)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        return self._in_parts(super().loglikelihood_rolling, requests)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        return self._in_parts(super().generate_until, requests)

    def _in_parts(self, answer: Callable[[list[Any]], list[Any]], requests: list[Any]) -> list[Any]:
        size = _PART * self.batch_size
        answers: list[Any] = []
        for start in range(0, len(requests), size):
            answers += answer(requests[start : start + size])
            self._progress(len(answers), len(requests))
        return answers

    def _loglikelihood_tokens(self, requests: Sequence[Any], *args: Any, **options: Any) -> list[tuple[float, bool]]:
        answers: list[tuple[float, bool]] = super()._loglikelihood_tokens(requests, *args, **options)
        if any(math.isnan(loglikelihood) for loglikelihood, _ in answers):
            raise SecateurError(
                "the model's log-likelihood of an answer is nan: its weights are damaged, or its dtype is too narrow for its "
                "activations; look at the checkpoint, or evaluate in float32"
            )
        return answers
