"""`eval` and `generate`: open a model by name, run it, say what came out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from secateur.calibration.text import read_text
from secateur.calibration.tokens import windows as cut_windows
from secateur.errors import UsageError
from secateur.evaluate.perplexity import Quality, measure
from secateur.kernels.backends import AUTO
from secateur.pipeline.load import load, parse_dtype
from secateur.pipeline.source import open_source


@dataclass(frozen=True)
class Size:
    """What a model takes on disk: the bytes of its weight files, and their bits for each of its parameters."""

    bytes: int
    bits_per_weight: float


@dataclass(frozen=True)
class Evaluation:
    """The figures of `eval`."""

    model: str
    reference: str | None
    data: str
    quality: Quality
    size: Size
    reference_size: Size | None

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def evaluate(
    model: str,
    reference: str | None = None,
    *,
    data: str = "docs",
    text_field: str = "text",
    seq_len: int = 1024,
    windows: int = 12,
    dtype: str = "float32",
    device: str = "cpu",
    trust_remote_code: bool = False,
    verify: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Measure a model on the first windows of a text, and its distance from a reference if one is given.

    Args:
        model, reference: whatever `compress` takes as MODEL.
        data, text_field: the text, see `read_text`; `wikitext2` and `c4` give their held-out split.
        seq_len, windows: how much of it.
        dtype: to compute in; `auto` is that of the files.
        device: where.
        trust_remote_code: whether code that comes with a model may run.
        verify: whether the model's files (not the reference's) have to be those that its manifest names.
        progress: called with (windows done, windows in total).

    Raises:
        SecateurError: a model or the text cannot be had, or something measured is not finite.
    """
    if data == "self":
        raise UsageError("--data self would let the model judge its own words: give a text, or docs")
    tokenizer = open_source(model, trust_remote_code, verify).tokenizer()
    ids_KS = cut_windows(
        read_text(data, text_field, held_out=True),
        tokenizer,
        seq_len,
        windows,
        what=f"--data {data}",
        count_flag="--windows",
    )
    loaded = [_load(name, dtype, device, trust_remote_code) for name in (model, reference) if name is not None]
    quality = measure(loaded[0], ids_KS, loaded[1] if reference is not None else None, progress=progress)
    sizes = [
        _size(name, each, trust_remote_code)
        for name, each in zip((model, reference), loaded, strict=False)
        if name is not None
    ]
    return Evaluation(model, reference, data, quality, sizes[0], sizes[1] if reference is not None else None)


def _load(model: str, dtype: str, device: str, trust_remote_code: bool, backend: str = "dense") -> Any:
    return load(model, backend, dtype=parse_dtype(dtype), device=device, trust_remote_code=trust_remote_code)


def _size(name: str, model: Any, trust_remote_code: bool) -> Size:
    size = sum(file.stat().st_size for file in open_source(name, trust_remote_code).files)
    return Size(size, 8 * size / sum(p.numel() for p in model.parameters()))


def generate(
    model: str,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    chat: bool = False,
    dtype: str = "auto",
    device: str = "cpu",
    backend: str = AUTO,
    trust_remote_code: bool = False,
    verify: bool = False,
) -> str:
    """What a model writes after a prompt, without the prompt. `verify` is as in `evaluate`.

    Raises:
        SecateurError: the model cannot be loaded, or has no chat template although `chat` asks for it.
    """
    tokenizer = open_source(model, trust_remote_code, verify).tokenizer()
    loaded = _load(model, dtype, device, trust_remote_code, backend)
    if chat:
        if not tokenizer.chat_template:
            raise UsageError(f"{model} has no chat template: leave --chat out")
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
        )
    batch = tokenizer(prompt, return_tensors="pt", add_special_tokens=not chat).to(loaded.device)
    if batch["input_ids"].shape[1] == 0:
        raise UsageError("the prompt is empty: give at least one word")
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
    return tokenizer.decode(out[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)
