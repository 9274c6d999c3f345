"""Trellis codes: weights of a ring, each coded by the bits of its neighbours, too ("QTIP: Quantization with Trellises and
Incoherence Processing", Tseng et al. 2024, arXiv:2406.11235; the idea: Marcellin & Fischer 1990).

A ring of T weights is T symbols of K bits, which close to a circle. The state of a weight is L bits of that circle, from its
own symbol on, the first in the lowest bits, so that it can be decoded without the others: what it stands for is computed from
its state. Which symbols come nearest to given weights is found by Viterbi's search, from the last weight to the first: there a
state is the one before it, shifted by K bits, with new ones below.

N: rings, T: weights of one, U: of a stretch of it, S: states, 2^L, J: what two states in a row have in common, 2^(L−K),
B: symbols, 2^K.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from secateur.solvers.pieces import run_pieces

_native: Any
try:
    _native = importlib.import_module("secateur.solvers._viterbi")
except ImportError:  # installed without a compiler
    _native = None

HAVE_NATIVE: bool = _native is not None
# Which instructions the search uses: 0 plain C, 1 AVX2, 2 AVX-512. Tests lower it.
_isa: int = _native.BEST_ISA if HAVE_NATIVE else 0
_NATIVE_BITS = (2, 3, 4)

#: The default of L, and the most: a state is read at once.
STATE_BITS = 12
MOST_STATE_BITS = 16
#: Weights of a ring, where outputs divide so; and what they are a multiple of, if they can be.
MOST_OF_RING = 256
LANES = 16
# The sum of the bytes of a hash has this mean and this deviation, over all states.
_HASH, _MEAN, _DEVIATION = 0x83DCD12D, 510, 147.8
# How many symbols of a ring's other end are looked at before it is closed: as many as fill a state so many times.
_AHEAD = 8
# Costs that are compared at once.
_COSTS_AT_ONCE = 1 << 21
# What threads share is cut into pieces of so many states, some 50 µs each, for a thread takes about as long to wake.
_STATES_PER_PIECE = 1 << 20


def code_values(state_bits: int, device: torch.device | str = "cpu") -> Tensor:
    """What each of the 2^L states stands for, float32: near to a standard normal distribution."""
    hash_S = torch.arange(2**state_bits, device=device) * _HASH & 0xFFFFFFFF
    sum_S = (hash_S & 255) + (hash_S >> 8 & 255) + (hash_S >> 16 & 255) + (hash_S >> 24)
    return (sum_S - _MEAN).float() / _DEVIATION


def ring_of(outputs: int, bits: int, state_bits: int = STATE_BITS) -> tuple[int, int]:
    """T and L for a weight of so many outputs.

    T is the largest divisor of them that is at most 256 and gives a state as many bits as it has, and of such divisors one of
    those that are multiples of 16, if there are any. Where there is none, all outputs are one ring, and L may be less.
    """
    fitting = [T for T in range(1, min(outputs, MOST_OF_RING) + 1) if outputs % T == 0 and T * bits >= state_bits]
    T = max([T for T in fitting if T % LANES == 0] or fitting or [outputs])
    return T, min(state_bits, T * bits)


def windows(symbol_NT: Tensor, bits: int, state_bits: int) -> Tensor:
    """The state of every weight, int32: the last dimension is the ring, whose symbols are uint8."""
    state_NT = torch.zeros_like(symbol_NT, dtype=torch.int32)
    for later in range(-(-state_bits // bits)):
        state_NT |= symbol_NT.roll(-later, -1).int() << later * bits
    return state_NT.bitwise_and_(2**state_bits - 1)


def decode(symbol_NT: Tensor, bits: int, state_bits: int) -> Tensor:
    """What every weight stands for, float32: the last dimension is the ring, whose symbols are uint8."""
    return code_values(state_bits, symbol_NT.device)[windows(symbol_NT, bits, state_bits)]


def encode(x_NT: Tensor, bits: int, state_bits: int) -> tuple[Tensor, Tensor]:
    """The symbols, uint8 `[N, T]`, that come nearest to each row of x, in squares, or nearly so; and what they stand for.

    A ring is closed by a search about its seam, and a second one of all of it whose ends are bound to what the first has found.

    Args:
        x_NT: float32, finite.
        bits: K.
        state_bits: L, from K to T·K.
    """
    if not HAVE_NATIVE or x_NT.device.type != "cpu" or bits not in _NATIVE_BITS:
        return encode_torch(x_NT, bits, state_bits)
    x_NT = x_NT.contiguous()
    N, T = x_NT.shape
    symbol_NT, value_NT = torch.empty(N, T, dtype=torch.uint8), torch.empty(N, T)
    addresses = x_NT.data_ptr(), symbol_NT.data_ptr(), value_NT.data_ptr()
    threads = torch.get_num_threads()
    pieces = max(1, min(N, (N * T << state_bits) // _STATES_PER_PIECE)) if threads > 1 else 1
    form = bits, state_bits, min(T // 2, ahead_of(bits, state_bits))

    def run(i: int) -> bool:
        _native.encode(_isa, addresses, (N * i // pieces, N * (i + 1) // pieces, T), form)
        return True

    run_pieces(run, pieces, min(threads, pieces))
    return symbol_NT, value_NT


def encode_torch(x_NT: Tensor, bits: int, state_bits: int) -> tuple[Tensor, Tensor]:
    """`encode` in plain torch, on any device."""
    at_once = max(1, _COSTS_AT_ONCE >> state_bits)
    symbol_NT = torch.cat([_encode(x, bits, state_bits) for x in x_NT.float().split(at_once)])
    return symbol_NT, decode(symbol_NT, bits, state_bits)


def _encode(x_NT: Tensor, bits: int, state_bits: int) -> Tensor:
    code_S = code_values(state_bits, x_NT.device)
    x_NT = x_NT.flip(1)
    T = x_NT.shape[1]
    ahead = min(T // 2, ahead_of(bits, state_bits))
    # What the two ends have in common is what the best path about them has where they meet.
    seam_NU = torch.cat((x_NT[:, T - ahead :], x_NT[:, : max(ahead, 1)]), 1)
    seam_N = _search(seam_NU, code_S, bits, None)[:, ahead] >> bits
    state_NT = _search(x_NT, code_S, bits, seam_N)
    return (state_NT & 2**bits - 1).to(torch.uint8).flip(1)


def _search(x_NU: Tensor, code_S: Tensor, bits: int, seam_N: Tensor | None) -> Tensor:
    """The states of the path that comes nearest to x; with a seam, of those paths that begin and end with it."""
    B = 2**bits
    N, J = len(x_NU), len(code_S) // B
    least_NJ = x_NU.new_zeros(N, J)
    if seam_N is not None:
        least_NJ.fill_(torch.inf).scatter_(1, seam_N[:, None], 0)
    choices = []
    for x_N in x_NU.unbind(1):
        cost_NS = (x_N[:, None] - code_S).square_().add_(least_NJ.repeat_interleave(B, 1))
        least_NJ, choice_NJ = cost_NS.view(N, B, J).min(1)
        choices.append(choice_NJ.to(torch.uint8))
    common_N = least_NJ.argmin(1) if seam_N is None else seam_N
    states = []
    for choice_NJ in reversed(choices):
        state_N = choice_NJ.gather(1, common_N[:, None])[:, 0].long() * J + common_N
        states.append(state_N)
        common_N = state_N >> bits
    return torch.stack(states[::-1], 1)


def ahead_of(bits: int, state_bits: int) -> int:
    """How many weights on either side of the seam tell how a ring is best closed."""
    return _AHEAD * -(-state_bits // bits)
