"""How much of a model may stay in memory, and how large the pieces are that the rest is read in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import psutil
from torch import nn

from secateur.errors import UsageError
from secateur.folder.reader import MAPPED_BYTES
from secateur.kernels.packed import PADDING
from secateur.model.weights import ModelWeights
from secateur.offload.link import Link
from secateur.offload.streamer import ALIGNED
from secateur.units import enough, words

# What activations, logits and the libraries themselves take beside weights.
_SPARE = 64 * 2**20
# The same on a device, where weights are expanded to multiply many tokens with.
_SPARE_THERE = 512 * 2**20


@dataclass(frozen=True)
class Limits:
    """Bytes that a model may take.

    Attributes:
        host: of the host's memory, all that the process has in use.
        device: of that of a device, which the link leads to.
        link: None: it runs on the CPU.
    """

    host: int
    device: int = 0
    link: Link | None = None


@dataclass(frozen=True)
class Sizes:
    """Bytes of what is read at a time.

    Attributes:
        block: the largest.
        part: the largest module of a block.
        loading: what a block takes while it is loaded.
        kept: keys and values, and what can be kept of the head.
        head: of the head.
    """

    block: int
    part: int
    loading: int
    kept: int
    head: int

    @classmethod
    def of(cls, weights: ModelWeights, blocks: Mapping[str, nn.Module], cache: int, head: int) -> Sizes:
        """Of a model whose blocks are on the meta device still."""
        sizes = {prefix: _stored_sizes(weights, prefix, block) for prefix, block in blocks.items()}
        packed = max(sum(size for size, is_packed in each if is_packed) for each in sizes.values())
        return cls(
            block=max(sum(size for size, _ in each) for each in sizes.values()),
            part=max(size for each in sizes.values() for size, _ in each),
            # What is not packed is not touched; what is, is looked at twice.
            loading=packed + min(MAPPED_BYTES, 2 * packed),
            kept=cache + head,
            head=head,
        )


def _stored_sizes(weights: ModelWeights, prefix: str, block: nn.Module) -> list[tuple[int, bool]]:
    """Of each weight of a block, and whether it is packed."""
    found = []
    for name, tensor in block.state_dict().items():
        packed = weights.packed(f"{prefix}.{name}")
        parts = [] if packed is None else weights.parts(f"{prefix}.{name}").values()
        size = tensor.nbytes if packed is None else sum(part.nbytes + PADDING + ALIGNED for part in parts)
        found.append((size + ALIGNED, packed is not None))
    weights.release()
    return found


def room_here(name: str, limit: int, sizes: Sizes) -> int:
    """Bytes that blocks may keep in the host's memory, beside what is there, two buffers of a block's size, and what is kept.

    Less than 0: there is no room for the head. Less than minus its size: nor for buffers of a block's size.

    Raises:
        UsageError: there is not even room for those of its parts.
    """
    used = psutil.Process().memory_info().rss + _SPARE + sizes.kept
    least = used - sizes.head + max(2 * sizes.part, sizes.loading)
    if limit < least:
        raise UsageError(f"`max_memory` {words(limit)} is too little for {name}, which needs {enough(least)} at least")
    return limit - used - max(2 * sizes.block, sizes.loading)


def room_there(name: str, limit: int, sizes: Sizes, model: nn.Module) -> int:
    """The same of a device's memory, which holds what is outside the blocks."""
    outside = sum(
        each.nbytes for each in (*model.parameters(), *model.buffers()) if each.device.type not in ("meta", "cpu")
    )
    used = outside + _SPARE_THERE + sizes.kept
    least = used - sizes.head + 2 * sizes.part
    if limit < least:
        raise UsageError(
            f"`max_memory` of the device, {words(limit)}, is too little for {name}, which needs {enough(least)} there"
        )
    return limit - used - 2 * sizes.block


def cache_bytes(model: Any, tokens: int) -> int:
    """Keys and values of so many tokens in all blocks, at most."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", 1)
    width = getattr(config, "head_dim", None) or config.hidden_size // getattr(config, "num_attention_heads", 1)
    return int(2 * config.num_hidden_layers * heads * width * tokens * model.dtype.itemsize)
