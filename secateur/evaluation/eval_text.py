"""Which text a model is measured on, and which windows of it.

K: windows, S: tokens of one window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from secateur.calibration.text import read_text
from secateur.calibration.text_rows import chat_template
from secateur.calibration.tokens import Named, bos_ids, windows
from secateur.errors import UsageError
from secateur.evaluation.perplexity import CutText, scored_predictions

# Tokens before a window that its first word is read behind.
_CONTEXT = 16


@dataclass(frozen=True)
class Text:
    """The first windows of a text.

    Attributes:
        data, text_field: see `read_text`; `wikitext2` and `c4` give their held-out split.
        seq_len: tokens of a window.
        windows: how many.
        stride: by how many tokens each begins after the one before; None: they do not overlap.
        bos: whether each begins with the token that the tokenizer puts before a text, where it puts one.
    """

    data: str = "docs"
    seq_len: int = 1024
    windows: int = 12
    stride: int | None = None
    text_field: str = "text"
    bos: bool = True

    def __post_init__(self) -> None:
        if not self.data:
            raise UsageError("`data` is empty: name a text, such as docs")
        if self.data == "self":
            raise UsageError("`data` self would let the model judge its own words: give a text, or docs")
        if self.seq_len < 2:
            raise UsageError(
                f"`seq_len` {self.seq_len} is too short: a window of 2 tokens has one prediction, give more"
            )
        if self.windows < 1:
            raise UsageError(f"`windows` {self.windows} leaves nothing to measure: give 1 or more")
        if self.stride is not None and not 1 <= self.stride <= self.seq_len:
            raise UsageError(
                f"`stride` {self.stride} would leave out tokens: give 1 to `seq_len`, which is {self.seq_len}"
            )

    def cut(self, tokenizer: Any) -> CutText:
        """The windows. Raises SecateurError where the text cannot be had or is too short."""
        ids_KS = windows(
            read_text(self.data, self.text_field, held_out=True, template=chat_template(tokenizer)),
            tokenizer,
            self.seq_len,
            self.windows,
            stride=self.stride,
            bos=self.bos,
            named=Named(f"`data` {self.data}", count="windows"),
        )
        return CutText(ids_KS, self.stride, bos_ids(tokenizer) if self.bos else [])


def scored_bytes(tokenizer: Any, ids_KS: Tensor, stride: int | None, bos: Sequence[int] = ()) -> int:
    """How many bytes of UTF-8 the scored tokens stand for; `bos` is as in `measure`.

    A character of which a window's edge cuts off a part is counted as three bytes.
    """

    def size(ids: list[int]) -> int:
        of_text = [id for id in ids if id not in bos]
        text = tokenizer.decode(of_text, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return len(text.encode("utf-8", "replace"))

    K, S = ids_KS.shape
    counts = scored_predictions(K, S, stride)
    total = 0
    before: list[int] = []
    for ids, count in zip(ids_KS.tolist(), counts, strict=True):
        # Of text alone: what its first word stands for depends on whether there is any before it.
        context = ids[: S - count] if S - count > len(bos) else before[-_CONTEXT:]
        total += size(context + ids[S - count :]) - size(context)
        before = ids if bos else []
    return total


def with_bos(bos: bool) -> str:
    """How windows begin, in words."""
    return f"{'with' if bos else 'without'} BOS"
