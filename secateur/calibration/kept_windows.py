"""Token windows for calibration, from whatever source the recipe names.

N: windows, S: tokens of a window.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from secateur.calibration.sampling import BATCH_TEXTS, DRAWN, TEXT_TOKENS, sample_windows
from secateur.calibration.text import read_text
from secateur.calibration.text_rows import chat_template
from secateur.calibration.tokens import Named, bos_ids, check_room, windows
from secateur.errors import CheckpointError, UsageError
from secateur.experts.balanced_windows import balanced
from secateur.folder.manifest import hash_of_values
from secateur.model.load import load_source
from secateur.model.source import DEMO, Source, longest_window
from secateur.recipes.recipe import Calibration

SELF = "self"
_DEFAULTS = (128, 2048)
_DEMO_DEFAULTS = (16, 512)
_CHARS_PER_TOKEN = 4
_LEAST_CHARS = 10_000_000


def is_kept(source: Source, wanted: Calibration, device: torch.device) -> bool:
    """Whether text that the model would write itself was kept, so that it need not be loaded."""
    return _kept_file(source, _with_numbers(source, wanted), device).exists()


def _with_numbers(source: Source, wanted: Calibration) -> Calibration:
    samples, seq_len = _DEMO_DEFAULTS if source.name == DEMO else _DEFAULTS
    longest = longest_window(source.config) or seq_len
    if wanted.seq_len is not None and wanted.seq_len > longest:
        raise UsageError(f"`seq_len` {wanted.seq_len} is more than the {longest} positions of {source.name}")
    return replace(wanted, samples=wanted.samples or samples, seq_len=wanted.seq_len or min(seq_len, longest))


def calibration_ids(
    source: Source, wanted: Calibration, device: torch.device, say: Callable[[str], None], frugal: bool = False
) -> tuple[Tensor, Calibration, list[int]]:
    """The windows that a recipe's calibration names, and the calibration with its numbers filled in.

    Args:
        source: the model to be calibrated.
        wanted: the recipe's words.
        device: where a model that writes its own text runs.
        say: told what is going on.
        frugal: whether no more memory is to be taken than a model takes that writes its own text, whatever time that costs.

    Returns:
        ids_NS (int64, on the CPU), the calibration as it was carried out, and the tokens that the tokenizer puts before a
        text, if windows are to begin with them.

    Raises:
        UsageError: the text cannot be had or is too little, or windows are longer than the model takes.
    """
    settings = _with_numbers(source, wanted)
    assert settings.samples is not None
    assert settings.seq_len is not None
    if settings.source == SELF:
        ids_NS, begin = _self_sampled(source, settings, device, say, frugal)
        return ids_NS, settings, begin
    say(f"reading {settings.source}")
    # A choice of windows sixteen times as many as are taken; no more of a data set is read.
    tokenizer = source.tokenizer()
    documents = read_text(
        settings.source,
        settings.text_field,
        max(16 * _CHARS_PER_TOKEN * settings.samples * settings.seq_len, _LEAST_CHARS),
        template=chat_template(tokenizer),
    )
    ids_NS = windows(
        documents,
        tokenizer,
        settings.seq_len,
        settings.samples,
        seed=settings.seed,
        bos=settings.bos,
        named=Named(f"`source` {settings.source}"),
    )
    vocabulary = source.config.get_text_config().vocab_size
    if int(ids_NS.max()) >= vocabulary:
        raise CheckpointError(
            f"the tokenizer of {source.name} gives token {int(ids_NS.max())}, but the model has only {vocabulary}"
        )
    return ids_NS, settings, bos_ids(tokenizer) if settings.bos else []


def cache_folder() -> Path:
    """Where sampled text is kept: `secateur` in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "secateur"


def _writing_dtype(stored: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which a model writes its text: in half precision only where the processor computes in it by itself."""
    if device.type == "cuda":
        return stored
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


def _kept_file(source: Source, settings: Calibration, device: torch.device) -> Path:
    drawn = [settings.samples, settings.seq_len, settings.seed, TEXT_TOKENS, BATCH_TEXTS, DRAWN]
    place = [device.type, str(_writing_dtype(source.dtype, device))]
    values = [source.hashes, *drawn, *place, torch.__version__, *(["bos"] if settings.bos else [])]
    values += ["balance", settings.expert_balance] if settings.expert_balance > 1 else []
    return cache_folder() / f"self-{hash_of_values(values)[:32]}.safetensors"


def _self_sampled(
    source: Source, settings: Calibration, device: torch.device, say: Callable[[str], None], frugal: bool
) -> tuple[Tensor, list[int]]:
    """Text that the model wrote, and what its tokenizer puts before one, if windows are to begin with that."""
    samples, seq_len = settings.samples, settings.seq_len
    assert samples is not None
    assert seq_len is not None
    file = _kept_file(source, settings, device)
    vocabulary = source.config.get_text_config().vocab_size
    kept = _read_kept(file, (samples, seq_len), vocabulary)
    if kept is not None:
        say("using cached calibration text")
        return kept
    begin, start = _beginning(source, settings.bos)
    check_room(seq_len, begin)
    say("letting the model write its calibration text")
    model = load_source(source, _writing_dtype(source.dtype, device), device)
    ids_NS = sample_windows(
        model,
        start,
        samples * settings.expert_balance,
        seq_len,
        settings.seed,
        lambda done, total: say(f"letting the model write its calibration text: {done} of {total} tokens"),
        settings.bos,
        frugal,
    )
    if settings.expert_balance > 1:
        say("choosing windows that even out the experts' use")
        ids_NS = balanced(model, ids_NS, settings.expert_balance)
    _keep(file, ids_NS, begin)
    return ids_NS, begin


def _beginning(source: Source, bos: bool) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before a text, if that is wanted, and what the model is to begin one with."""
    config = source.config.get_text_config()
    try:
        tokenizer = source.tokenizer()
    except CheckpointError:
        tokenizer = None
    begin = bos_ids(tokenizer) if bos and tokenizer is not None else []
    if begin and max(begin) < config.vocab_size:
        return begin, begin
    for owner in (tokenizer, config):
        for name in ("bos_token_id", "eos_token_id"):
            found = getattr(owner, name, None)
            found = found[0] if isinstance(found, list) and found else found
            if isinstance(found, int) and 0 <= found < config.vocab_size:
                return [], [found]
    raise UsageError(f"{source.name} names no token that begins a text: give a text by `source`")


def _read_kept(file: Path, shape: tuple[int, int], vocabulary: int) -> tuple[Tensor, list[int]] | None:
    try:
        kept = load_file(file)
        ids_NS, begin = kept["ids"], kept["begin"].tolist() if "begin" in kept else []
    except (OSError, SafetensorError, KeyError):
        return None
    fits = ids_NS.shape == shape and ids_NS.dtype == torch.int64 and ids_NS.min() >= 0 and ids_NS.max() < vocabulary
    return (ids_NS, begin) if fits and ids_NS[0, : len(begin)].tolist() == begin else None


def _keep(file: Path, ids_NS: Tensor, begin: list[int]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=file.parent)
        os.close(handle)
        save_file({"ids": ids_NS, **({"begin": torch.tensor(begin)} if begin else {})}, name)
        os.replace(name, file)
    except (OSError, SafetensorError):
        pass  # the cache saves time; a run does not fail for want of it
