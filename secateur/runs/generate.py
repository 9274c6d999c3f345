"""`generate`: what a model writes after a prompt."""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import PreTrainedModel

from secateur.errors import UsageError
from secateur.kernels.backends import AUTO, check_backend
from secateur.memory.room import limit_memory
from secateur.model.in_memory import open_model
from secateur.model.load import load_source, load_within, open_device, parse_dtype


def generate(  # noqa: PLR0913 - users name them
    model: str | PreTrainedModel,
    prompt: str,
    *,
    tokenizer: Any = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    chat: bool = False,
    dtype: str = "auto",
    device: str = "cpu",
    backend: str = AUTO,
    max_memory: str | int | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    verify: bool = False,
) -> str:
    """What a model writes after a prompt, without the prompt.

    `tokenizer`, `verify` and `revision` are as in `evaluate`, `max_memory` as in `load`: what memory does not hold is read for
    every token.

    Raises:
        SecateurError: the model cannot be loaded, or has no chat template although `chat` asks for it.
    """
    check_backend(backend)
    if not 0 <= temperature < math.inf:
        raise UsageError(f"`temperature` {temperature:g} is not possible: give 0 or more, such as 0.7")
    target = open_device("cpu" if max_memory is not None and device == "auto" else device)
    source = open_model(
        model,
        tokenizer,
        revision=revision,
        trust_remote_code=trust_remote_code,
        verify=verify,
        dtype=parse_dtype(dtype),
    )
    tokenizer = source.tokenizer()
    if chat:
        if not tokenizer.chat_template:
            raise UsageError(f"{source.name} has no chat template: leave `chat=True` out")
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
        )
    batch = tokenizer(prompt, return_tensors="pt", add_special_tokens=not chat)
    length = batch["input_ids"].shape[1]
    if length == 0:
        raise UsageError("the prompt is empty: give at least one word")
    limit, loaded_dtype = limit_memory(max_memory), parse_dtype(dtype) or source.dtype
    if limit is None:
        loaded = load_source(source, loaded_dtype, target, backend=backend)
    else:
        loaded = load_within(source, loaded_dtype, target, limit, backend, length + max_new_tokens)
    batch = batch.to(loaded.device)
    torch.manual_seed(seed)
    sampling: dict[str, Any] = (
        {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    )
    with torch.no_grad():
        out = loaded.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            **sampling,
        )
    return tokenizer.decode(out[0, length:], skip_special_tokens=True)
