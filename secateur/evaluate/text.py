"""Which text a model is measured on, and which windows of it.

K: windows, S: tokens of one window.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from secateur.calibration.text import read_text
from secateur.calibration.tokens import windows
from secateur.errors import UsageError
from secateur.evaluate.perplexity import scored_predictions


@dataclass(frozen=True)
class Text:
    """The first windows of a text.

    Attributes:
        data, text_field: see `read_text`; `wikitext2` and `c4` give their held-out split.
        seq_len: tokens of a window.
        windows: how many.
        stride: by how many tokens each begins after the one before; None: by `seq_len`, and they do not overlap.
    """

    data: str = "docs"
    seq_len: int = 1024
    windows: int = 12
    stride: int | None = None
    text_field: str = "text"

    def __post_init__(self) -> None:
        if self.data == "self":
            raise UsageError("--data self would let the model judge its own words: give a text, or docs")
        if self.seq_len < 2:
            raise UsageError(
                f"--seq-len {self.seq_len} is too short: a window of 2 tokens has one prediction, give more"
            )
        if self.windows < 1:
            raise UsageError(f"--windows {self.windows} leaves nothing to measure: give 1 or more")
        if self.stride is not None and not 1 <= self.stride <= self.seq_len:
            raise UsageError(
                f"--stride {self.stride} would leave out tokens: give 1 to --seq-len, which is {self.seq_len}"
            )

    def cut(self, tokenizer: Any) -> Tensor:
        """The windows as ids_KS. Raises SecateurError where the text cannot be had or is too short."""
        return windows(
            read_text(self.data, self.text_field, held_out=True),
            tokenizer,
            self.seq_len,
            self.windows,
            stride=self.stride,
            what=f"--data {self.data}",
            count_flag="--windows",
        )


def scored_bytes(tokenizer: Any, ids_KS: Tensor, stride: int | None) -> int:
    """How many bytes of UTF-8 the scored tokens stand for.

    A character of which a window's edge cuts off a part is counted as three bytes.
    """

    def size(ids: list[int]) -> int:
        text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return len(text.encode("utf-8", "replace"))

    K, S = ids_KS.shape
    counts = scored_predictions(K, S, stride)
    return sum(size(ids) - size(ids[: S - count]) for ids, count in zip(ids_KS.tolist(), counts, strict=True))
