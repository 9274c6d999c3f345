"""Text to token windows of equal length.

K: windows, S: tokens of one window, N: tokens of all documents.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from secateur.errors import UsageError

# What a tokenizer is tried on. More than one: a small vocabulary may have no token for the first.
_PROBES = ("a", "0", "\n")
# Where a long document is cut to tokenise only its beginning, so many tokens before the cut are not trusted: what a
# tokenizer makes of a word, or of a run of spaces or digits, depends on where it ends.
_MARGIN = 1024
_CHARS_PER_TOKEN = 8
_LEAST_CHARS = 1 << 16


@dataclass(frozen=True)
class Named:
    """What the user calls a text, and the parameter that says how many windows of it there are to be."""

    text: str
    count: str = "samples"


def bos_ids(tokenizer: Any) -> list[int]:
    """The tokens that a tokenizer puts before a text by itself; none for many.

    Found by what it does: its flags tell neither of all tokenizers nor the truth of some.
    """
    for probe in _PROBES:
        plain = tokenizer(probe, add_special_tokens=False, verbose=False)["input_ids"]
        whole = tokenizer_ids(tokenizer, probe)
        for at in range(len(whole) - len(plain) + 1) if plain else ():
            if whole[at : at + len(plain)] == plain:
                return whole[:at]
    return []


def windows(
    documents: Iterable[str],
    tokenizer: Any,
    seq_len: int,
    count: int,
    *,
    seed: int | None = None,
    stride: int | None = None,
    bos: bool = False,
    named: Named,
) -> Tensor:
    """Windows of tokens cut from the documents laid end to end.

    Each document is tokenised whole, with the special tokens that its tokenizer adds by itself.

    Args:
        documents: the text; without a seed no more of it is read, and tokenised, than is needed.
        tokenizer: a tokenizer of transformers.
        seq_len, count: S and K.
        seed: None takes the first K windows; otherwise K are drawn from all windows, and stay in the order of the text.
        stride: by how many tokens each window begins after the one before, where they overlap; without a seed only.
        bos: whether each window begins with what the tokenizer puts before a text, and S tokens with it, see `cut`.
            Otherwise only documents do, and most windows begin in the middle of one.
        named: for the error's sake.

    Returns:
        ids_KS: int64, on the CPU.

    Raises:
        UsageError: there is too little text, or a window has no room for any.
    """
    if seq_len < 1 or count < 1:
        raise UsageError(f"{count} windows of {seq_len} tokens cannot be had: `{named.count}` and `seq_len` start at 1")
    begin = bos_ids(tokenizer) if bos else []
    check_room(seq_len, begin)
    text_len = seq_len - len(begin)
    step = min(stride or text_len, text_len)
    # A window takes the beginning of a document for its own, where the two meet.
    needed = seq_len + step * (count - 1)
    enough = needed + len(begin) * (count - 1)
    ids: list[int] = []
    for document in documents:
        if seed is not None:
            ids += tokenizer_ids(tokenizer, document)
            continue
        ids += _first_ids(tokenizer, document, enough - len(ids))
        if len(ids) >= enough:
            break
    found = cut(ids, begin, seq_len, step)
    if len(found) < count:
        raise UsageError(
            f"{named.text} gives {len(ids)} tokens, and {max(needed, len(ids) + 1)} are needed ({count} windows of {seq_len}): "
            f"give more text, or lower `{named.count}` or `seq_len`"
        )
    if seed is None:
        return torch.tensor(found[:count])
    drawn_K = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))[:count].sort().values
    return torch.tensor([found[k] for k in drawn_K.tolist()])


def cut(ids: list[int], begin: list[int], seq_len: int, step: int | None = None) -> list[list[int]]:
    """All whole windows of `seq_len` tokens in a run of tokens, each with `begin` before its text.

    Where a window would begin with the beginning of a document, it takes that for its own: no window begins twice.

    Args:
        ids: the tokens, with `begin` before each document.
        begin: the tokens that every window begins with; may be none.
        step: from the text of a window to that of the next; None: no window has text of another.
    """
    text_len = seq_len - len(begin)
    found: list[list[int]] = []
    at = 0
    while True:
        if begin and ids[at : at + len(begin)] == begin:
            at += len(begin)
        if at + text_len > len(ids):
            return found
        found.append(begin + ids[at : at + text_len])
        at += step or text_len


def check_room(seq_len: int, begin: list[int]) -> None:
    """Raise UsageError where a window has no room for text behind the tokens that it begins with."""
    if seq_len <= len(begin):
        raise UsageError(
            f"`seq_len` {seq_len} leaves no room for text behind what the tokenizer begins a text with: give "
            f"{len(begin) + 1} at least, or `bos=False`"
        )


def is_one_of(ids: Tensor, some: Sequence[int]) -> Tensor:
    """Which tokens are among some."""
    return torch.isin(ids, torch.tensor(some, dtype=ids.dtype, device=ids.device))


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
