"""Caches of transformers that have room for more tokens, so that a step does not copy all that is in them.

L: layers, B: texts, K: heads of keys and values, S: tokens, D: features of a head.
"""

from __future__ import annotations

from itertools import chain
from operator import is_
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from secateur.kernels.packed import FLOAT_DTYPES

# Room for so many tokens more, or for a quarter of those that there are.
_LEAST_ROOM = 64


class Room:
    """One tensor in which a cache's keys and values lie, with room after them.

    A layer of the cache has its part of it up to the last token, as a tensor of the shape that it would have otherwise. What
    any such tensor shows is never written again: who keeps one, or makes another cache of it, keeps what was there. Only a
    cache whose layers have the very tensors that were last put there goes on in the same room; any other (cropped,
    reordered, copied, grown by transformers) gets a new one.

    Attributes:
        slab: `[L, 2, B, K, room, D]`.
        filled: S.
    """

    def __init__(self, held: list[Tensor]) -> None:
        B, K, S, D = held[0].shape
        self.slab = held[0].new_empty(len(held) // 2, 2, B, K, S + max(_LEAST_ROOM, S // 4), D)
        self.filled = S
        self._shown: list[Tensor] = held
        for i, tensor in enumerate(held):
            self.slab[i // 2, i % 2, :, :, :S].copy_(tensor)

    def is_of(self, held: list[Tensor]) -> bool:
        """Whether a cache that holds these goes on here, and has place for a token."""
        shown = self._shown
        return self.filled < self.slab.shape[4] and len(held) == len(shown) and all(map(is_, held, shown))

    def grow(self, cache: DynamicCache) -> None:
        """Have the cache show one token more, which has been written."""
        self.filled += 1
        self._shown = list(self.slab.narrow(4, 0, self.filled).flatten(0, 1).unbind())
        shown = iter(self._shown)
        for layer in cache.layers:
            layer.keys, layer.values = next(shown), next(shown)


_ROOMS: WeakKeyDictionary[DynamicCache, Room] = WeakKeyDictionary()


def room_in(cache: Any, shape: tuple[int, int, int, int]) -> Room | None:
    """The room of a cache; None where it is none that grows so, or is of other sizes.

    Args:
        cache: whatever a model was given.
        shape: (L, B, K, D).
    """
    if type(cache) is not DynamicCache or len(cache.layers) != shape[0] or cache.offloading:
        return None
    if any(type(layer) is not DynamicLayer or not layer.is_initialized for layer in cache.layers):
        return None
    held = list(chain.from_iterable((layer.keys, layer.values) for layer in cache.layers))
    room = _ROOMS.get(cache)
    if room is None or not room.is_of(held):
        S, dtype = held[0].shape[-2] if held[0].ndim == 4 else 0, held[0].dtype
        want = (shape[1], shape[2], S, shape[3])
        if not S or dtype not in FLOAT_DTYPES:
            return None
        if any(t.shape != want or t.dtype != dtype or t.device.type != "cpu" for t in held):
            return None
        room = _ROOMS[cache] = Room(held)
    L, _, B, K, _, D = room.slab.shape
    return room if shape == (L, B, K, D) else None
