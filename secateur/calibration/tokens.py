"""Text to token windows of equal length.

K: windows, S: tokens of one window, N: tokens of all documents.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from secateur.errors import UsageError

# Where a long document is cut to tokenise only its beginning, so many tokens before the cut are not trusted: what a
# tokenizer makes of a word, or of a run of spaces or digits, depends on where it ends.
_MARGIN = 1024
_CHARS_PER_TOKEN = 8
_LEAST_CHARS = 1 << 16


def windows(
    documents: Iterable[str],
    tokenizer: Any,
    seq_len: int,
    count: int,
    *,
    seed: int | None = None,
    stride: int | None = None,
    what: str,
    count_flag: str = "--samples",
) -> Tensor:
    """Windows of tokens cut from the documents laid end to end.

    Each document is tokenised whole, with the special tokens that its tokenizer adds by itself.

    Args:
        documents: the text; without a seed no more of it is read, and tokenised, than is needed.
        tokenizer: a tokenizer of transformers.
        seq_len, count: S and K.
        seed: None takes the first K windows; otherwise K are drawn from all windows, and stay in the order of the text.
        stride: by how many tokens each window begins after the one before, where they overlap; without a seed only.
        what: what the user calls this text, and `count_flag`, the flag that sets K, for the error's sake.

    Returns:
        ids_KS: int64, on the CPU.

    Raises:
        UsageError: there is too little text.
    """
    if seq_len < 1 or count < 1:
        raise UsageError(f"{count} windows of {seq_len} tokens cannot be had: {count_flag} and --seq-len start at 1")
    step = stride or seq_len
    needed = seq_len + step * (count - 1)
    ids: list[int] = []
    for document in documents:
        if seed is not None:
            ids += tokenizer_ids(tokenizer, document)
            continue
        ids += _first_ids(tokenizer, document, needed - len(ids))
        if len(ids) >= needed:
            break
    if len(ids) < needed:
        raise UsageError(
            f"{what} gives {len(ids)} tokens, and {needed} are needed ({count} windows of {seq_len}): "
            f"give more text, or lower {count_flag} or --seq-len"
        )
    if seed is None:
        return torch.tensor(ids[:needed]).unfold(0, seq_len, step).clone()
    total = len(ids) // seq_len
    drawn_K = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:count].sort().values
    return torch.tensor(ids[: total * seq_len]).view(total, seq_len)[drawn_K]


def hash_of(ids_KS: Tensor) -> str:
    """The SHA-256 of the windows' tokens, in hex: another text, tokenizer or cut gives another."""
    return hashlib.sha256(ids_KS.contiguous().numpy().tobytes()).hexdigest()


def tokenizer_ids(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text of any length; `verbose` off leaves out the warning about long ones."""
    return tokenizer(text, verbose=False)["input_ids"]


def _first_ids(tokenizer: Any, text: str, needed: int) -> list[int]:
    """At least the first `needed` tokens of a text, or all where there are fewer, as if it were tokenised whole."""
    for chars in _growing(_CHARS_PER_TOKEN * (needed + _MARGIN), len(text)):
        ids = tokenizer_ids(tokenizer, text[:chars])[:-_MARGIN]
        if len(ids) >= needed:
            return ids
    return tokenizer_ids(tokenizer, text)


def _growing(chars: int, limit: int) -> Iterator[int]:
    """Lengths, each four times the last, that are clearly less than the limit: beyond, cutting saves nothing."""
    chars = max(chars, _LEAST_CHARS)
    while 2 * chars < limit:
        yield chars
        chars *= 4
