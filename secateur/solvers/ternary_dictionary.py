"""Codes of 16 bits for sequences of ternary weights: those of a dictionary that is complete, so that any weights are some of
its sequences, one after the other, in one way ("Synthesis of Noiseless Compression Codes", Tunstall 1967).

The dictionary depends on the share of zeros alone. A sequence costs what its weights do, in 4096ths of a bit:
⌊4096 · log₂(64/z) + ½⌋ for a zero and ⌊4096 · log₂(128/(64 − z)) + ½⌋ for another, where z 64ths are zero. The empty sequence
is made first; then, 32767 times, the one that costs least of those there are (the one made first of such as cost the same,
none of 255 weights) goes, and its three continuations are made: by a zero, by a high weight, by a low one. The codes are those
that are left, in the order in which they were made.

E: codes of a dictionary, L: nonzero weights of all its sequences, O: rows, I: weights of a row, N: codes of all rows, M: their
nonzero weights, Z: sequences that were ever made.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

ZERO, HIGH, LOW = range(3)
#: Shares of zeros that dictionaries are for, in 64ths: those between the two ends.
PARTS = 64
#: The codes of a dictionary, and the most weights of a sequence.
CODES, LONGEST = 2**16 - 1, 255
# Rows that are coded together, in weights: what is kept of each for a moment takes several bytes.
_WEIGHTS_AT_ONCE = 2**22


@dataclass(frozen=True)
class Tables:
    """What the codes of a dictionary stand for, on one device.

    Attributes:
        length_E: int16, the weights of a sequence.
        start_E1: int32, where its nonzero weights begin in `item_L`, and where the last one's end.
        item_L: int16, twice the place of a nonzero weight in its sequence, and 1 more where it is high.
    """

    length_E: Tensor
    start_E1: Tensor
    item_L: Tensor


class Dictionary:
    """The dictionary for a share of zeros. There is one of each, whoever asks for it: see `dictionary`.

    Attributes:
        zeros: the share, in 64ths.
        child_Z: where a sequence's continuations are, one behind the other; −1 for those that are codes.
        code_Z: the code of a sequence; −1 for those that went.
    """

    def __init__(self, zeros: int) -> None:
        self.zeros = zeros
        zero = math.floor(4096 * math.log2(PARTS / zeros) + 0.5)
        other = math.floor(4096 * math.log2(2 * PARTS / (PARTS - zeros)) + 0.5)
        parent, depth, child = [-1], [0], [-1]
        open_ = [(0, 0)]
        for _ in range(CODES // 2):
            cost, z = heapq.heappop(open_)
            child[z] = len(parent)
            for more in (zero, other, other):
                if depth[z] + 1 < LONGEST:
                    heapq.heappush(open_, (cost + more, len(parent)))
                parent.append(z)
                depth.append(depth[z] + 1)
                child.append(-1)
        self.child_Z = np.array(child)
        left_Z = self.child_Z < 0
        self.code_Z = np.where(left_Z, left_Z.cumsum() - 1, -1)
        self._tables = {"cpu": _tables(np.array(parent), np.array(depth), left_Z)}

    def on(self, device: torch.device) -> Tables:
        """What its codes stand for."""
        key = str(device)
        if key not in self._tables:
            here = self._tables["cpu"]
            self._tables[key] = Tables(*(t.to(device) for t in (here.length_E, here.start_E1, here.item_L)))
        return self._tables[key]

    def __reduce__(self) -> Any:
        return dictionary, (self.zeros,)

    def __deepcopy__(self, memo: Any) -> Dictionary:
        return self


def _tables(parent_Z: np.ndarray, depth_Z: np.ndarray, left_Z: np.ndarray) -> Tables:
    """Of all sequences, of which some are left."""
    number_Z = np.arange(len(parent_Z))
    symbol_Z = (number_Z - 1) % 3  # made three at a time
    symbol_Z[0] = ZERO
    # The last nonzero weight of a sequence, by the sequence that it ends, and how many there are: parents come first.
    last_Z, count_Z = np.zeros_like(number_Z), np.zeros_like(number_Z)
    for depth in range(1, int(depth_Z.max()) + 1):
        here = np.nonzero(depth_Z == depth)[0]
        nonzero = symbol_Z[here] != ZERO
        last_Z[here] = np.where(nonzero, here, last_Z[parent_Z[here]])
        count_Z[here] = count_Z[parent_Z[here]] + nonzero
    z_E = np.nonzero(left_Z)[0]
    start_E1 = np.concatenate([[0], count_Z[z_E].cumsum()])
    item_L = np.empty(start_E1[-1], np.int16)
    rest_E, at_E = count_Z[z_E], last_Z[z_E]
    while (rest_E > 0).any():
        some = rest_E > 0
        at = at_E[some]
        rest_E[some] -= 1
        item_L[(start_E1[:-1] + rest_E)[some]] = 2 * (depth_Z[at] - 1) + (symbol_Z[at] == HIGH)
        at_E[some] = last_Z[parent_Z[at]]
    return Tables(
        torch.from_numpy(depth_Z[z_E].astype(np.int16)),
        torch.from_numpy(start_E1.astype(np.int32)),
        torch.from_numpy(item_L),
    )


@lru_cache(maxsize=PARTS)
def dictionary(zeros: int) -> Dictionary:
    """The dictionary for a share of zeros in 64ths, from 1 to 63."""
    return Dictionary(zeros)


def parts_of_zeros(share: float) -> int:
    """For which share, in 64ths, the dictionary is that is best where a share of weights is zero."""
    return min(max(round(share * PARTS), 1), PARTS - 1)


def encode(symbol_OI: Tensor, of: Dictionary) -> tuple[Tensor, Tensor]:
    """The codes of rows of ternary weights, one row after the other.

    Zeros that are not there follow a row until its last sequence ends.

    Args:
        symbol_OI: uint8, `ZERO`, `HIGH` or `LOW`.

    Returns:
        code_N: uint16.
        count_O: int64, how many are of each row.
    """
    codes, counts = [], []
    rows = max(1, _WEIGHTS_AT_ONCE // max(symbol_OI.shape[1], 1))
    for symbols in symbol_OI.cpu().split(rows):
        code_RS = _encode_rows(symbols.numpy(), of)
        there_RS = code_RS >= 0
        codes.append(torch.from_numpy(code_RS[there_RS].astype(np.uint16)))
        counts.append(torch.from_numpy(there_RS.sum(1)))
    return torch.cat(codes), torch.cat(counts)


def _encode_rows(symbol_RI: np.ndarray, of: Dictionary) -> np.ndarray:
    """The codes of rows where their sequences end, −1 elsewhere: row after row."""
    at_R = np.zeros(len(symbol_RI), np.int64)
    found = []
    for symbol_R in np.ascontiguousarray(symbol_RI.T):
        at_R = of.child_Z[at_R] + symbol_R
        code_R = of.code_Z[at_R]
        found.append(code_R.astype(np.int32))
        at_R[code_R >= 0] = 0
    while at_R.any():
        # A row that has ended stays where it is.
        at_R = np.where(at_R > 0, of.child_Z[at_R] + ZERO, 0)
        code_R = np.where(at_R > 0, of.code_Z[at_R], -1)
        found.append(code_R.astype(np.int32))
        at_R[code_R >= 0] = 0
    return np.stack(found, 1)


def decode(code_N: Tensor, offset_O1: Tensor, of: Dictionary) -> tuple[Tensor, Tensor, Tensor]:
    """The nonzero weights of rows, by operations that work on any device.

    Args:
        code_N: int64, those of rows that lie one after the other.
        offset_O1: int64, where each row's begin, from 0, and where the last one's end.

    Returns:
        row_M, column_M: int64. Columns rise within a row; its last sequence may reach beyond its end.
        high_M: bool.
    """
    tables = of.on(code_N.device)
    row_N = torch.repeat_interleave(torch.arange(len(offset_O1) - 1, device=code_N.device), offset_O1.diff())
    begin_N = before(tables.length_E[code_N].long(), offset_O1, row_N)
    start_N = tables.start_E1[code_N].long()
    count_N = tables.start_E1[code_N + 1].long() - start_N
    n_M = torch.repeat_interleave(torch.arange(len(code_N), device=code_N.device), count_N)
    first_N = count_N.cumsum(0) - count_N
    item_M = tables.item_L[start_N[n_M] + torch.arange(len(n_M), device=code_N.device) - first_N[n_M]].long()
    return row_N[n_M], begin_N[n_M] + (item_M >> 1), (item_M & 1).bool()


def before(length_N: Tensor, offset_O1: Tensor, row_N: Tensor) -> Tensor:
    """How many weights of its row stand before each sequence."""
    sum_N1 = torch.nn.functional.pad(length_N.cumsum(0), (1, 0))
    return sum_N1[:-1] - sum_N1[offset_O1[:-1]][row_N]
