"""`generate`: what a model writes after a prompt, or after each of many."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

from secateur.errors import UsageError
from secateur.kernels.backends import AUTO, check_backend
from secateur.model.in_memory import open_model
from secateur.model.load import load_source, load_within, open_device, parse_dtype

#: Prompts that are continued at a time, where nobody says how many.
BATCH = 16

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Written:
    """What was written.

    Attributes:
        texts: after each prompt.
        tokens: of all texts, those that end them included.
        seconds: it took, without loading.
        bytes_read: of weights, meanwhile.
    """

    texts: list[str]
    tokens: int
    seconds: float
    bytes_read: int


@overload
def generate(model: str | PreTrainedModel, prompt: str, **options: Any) -> str: ...


@overload
def generate(model: str | PreTrainedModel, prompt: list[str], **options: Any) -> list[str]: ...


def generate(model: str | PreTrainedModel, prompt: str | list[str], **options: Any) -> str | list[str]:
    """What a model writes after a prompt, or after each of a list of them, without the prompt.

    Args:
        model: a folder, a hub id, `demo`, or a model in memory.
        prompt: one, or several, which are continued together.
        options: see `write_texts`.

    Raises:
        SecateurError: the model cannot be loaded, or has no chat template although `chat` asks for it.
    """
    if isinstance(prompt, str):
        return write_texts(model, [prompt], **options).texts[0]
    return write_texts(model, prompt, **options).texts


def write_texts(  # noqa: PLR0913 - users name them
    model: str | PreTrainedModel,
    prompts: Sequence[str],
    *,
    tokenizer: Any = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    chat: bool = False,
    batch_size: int = BATCH,
    dtype: str = "auto",
    device: str = "cpu",
    backend: str = AUTO,
    max_memory: str | int | dict[Any, Any] | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    verify: bool = False,
    progress: Progress | None = None,
) -> Written:
    """What a model writes after prompts.

    Args:
        tokenizer, verify, revision: as in `evaluate`.
        batch_size: prompts that are continued at a time; each has its own end.
        max_memory: as in `load`: what memory does not hold is read for every token, once for all prompts of a batch.
        progress: called with (tokens written of each prompt's, in the sum, and the most that there may be).

    Raises:
        SecateurError: see `generate`.
    """
    check_backend(backend)
    if not 0 <= temperature < math.inf:
        raise UsageError(f"`temperature` {temperature:g} is not possible: give 0 or more, such as 0.7")
    if batch_size < 1:
        raise UsageError(f"`batch_size` {batch_size} is not possible: give 1 or more")
    target = open_device("cpu" if max_memory is not None and device == "auto" else device)
    wanted = parse_dtype(dtype)
    source = open_model(
        model, tokenizer, revision=revision, trust_remote_code=trust_remote_code, verify=verify, dtype=wanted
    )
    tokenizer = source.tokenizer()
    if chat and not tokenizer.chat_template:
        raise UsageError(f"{source.name} has no chat template: leave `chat=True` out")
    ids = [_ids(tokenizer, prompt, chat, i if len(prompts) > 1 else 0) for i, prompt in enumerate(prompts, 1)]
    batches = [ids[i : i + batch_size] for i in range(0, len(ids), batch_size)]
    loaded_dtype = wanted or source.dtype
    if max_memory is None:
        loaded = load_source(source, loaded_dtype, target, backend=backend)
    else:
        most = max((len(batch) * (max(map(len, batch)) + max_new_tokens) for batch in batches), default=0)
        loaded = load_within(source, loaded_dtype, target, max_memory, backend, most)
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    watch = _Watch(len(ids) * max_new_tokens, progress)
    began, read = time.perf_counter(), _bytes_read(loaded)
    rows: list[list[int]] = []
    for batch in batches:
        rows += _continue(loaded, tokenizer, batch, watch, max_new_tokens=max_new_tokens, **sampling)
        watch.next(len(batch) * max_new_tokens)
    seconds = time.perf_counter() - began
    texts = [tokenizer.decode(row, skip_special_tokens=True) for row in rows]
    return Written(texts, sum(map(len, rows)), seconds, _bytes_read(loaded) - read)


def _ids(tokenizer: Any, prompt: str, chat: bool, number: int) -> list[int]:
    """The tokens of a prompt, which has a number where there are several."""
    if chat:
        message = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    found: list[int] = tokenizer(prompt, add_special_tokens=not chat)["input_ids"]
    if not found:
        raise UsageError(f"{f'prompt {number}' if number else 'the prompt'} is empty: give at least one word")
    return found


def _continue(model: Any, tokenizer: Any, prompts: list[list[int]], watch: _Watch, **options: Any) -> list[list[int]]:
    """What follows each prompt, up to the token that ends it."""
    ends = _ends(model.generation_config.eos_token_id)
    pad = next((each for each in (tokenizer.pad_token_id, tokenizer.eos_token_id, *ends) if each is not None), 0)
    length = max(map(len, prompts))
    ids_NS = torch.tensor([[pad] * (length - len(each)) + each for each in prompts])
    mask_NS = torch.tensor([[0] * (length - len(each)) + [1] * len(each) for each in prompts])
    with torch.no_grad():
        out_NS: Tensor = model.generate(
            input_ids=ids_NS.to(model.device),
            attention_mask=mask_NS.to(model.device),
            pad_token_id=pad,
            num_return_sequences=1,
            stopping_criteria=StoppingCriteriaList([watch]),
            **options,
        )
    found = []
    for row in out_NS[:, length:].tolist():
        end = next((i for i, token in enumerate(row) if token in ends), len(row))
        found.append(row[: end + 1])
    return found


def _ends(ids: int | Iterable[int] | None) -> set[int]:
    return set() if ids is None else {ids} if isinstance(ids, int) else set(ids)


class _Watch(StoppingCriteria):
    """Tells of each token, and stops nothing."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._total, self._progress = total, progress
        self._before = self._here = 0

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Any:
        self._here += len(input_ids)
        self._tell(self._before + self._here)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def next(self, most: int) -> None:
        """All that could be written of some texts has been, or they have ended before."""
        self._before, self._here = self._before + most, 0
        self._tell(self._before)

    def _tell(self, done: int) -> None:
        if self._progress is not None:
            self._progress(min(done, self._total), self._total)


def _bytes_read(model: Any) -> int:
    streamer = getattr(model, "streamer", None)
    return 0 if streamer is None else int(streamer.bytes_read)
