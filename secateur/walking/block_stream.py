"""A model whose blocks are read when their turn comes: any text passes with one of them in memory.

N: windows, S: tokens of a window, H: features, V: vocabulary.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.errors import CheckpointError, UsageError
from secateur.folder.extents import OpenFiles
from secateur.folder.reader import MAPPED_BYTES
from secateur.formats.layouts.layout import all_finite
from secateur.memory.footprint import Footprint, Polynomial, Settings
from secateur.memory.live_bytes import PROBES, LiveBytes
from secateur.mixture.skipping import skip_experts
from secateur.model.source import Source
from secateur.model.structure import build_skeleton, find_blocks, parameters_outside, shared_parameters
from secateur.model.weights import ModelWeights, materialise, release, tie
from secateur.unfinished.hidden import HiddenStates
from secateur.walking.capture import BlockCall, BlockCalls, NotInTurn
from secateur.walking.placing import keep_mapped, move_buffers, read_shared
from secateur.walking.walk import in_batches

# Weights of a head that are converted at a time.
_HEAD_VALUES = 2**22


class SlicedHead(nn.Module):
    """x W^T + bias for a head whose weight stays in its file, in its own dtype: a slice of the vocabulary at a time.

    Args:
        fetch: maps the weight `[V, H]` anew, so that what was looked at of it before need not stay in memory.
    """

    def __init__(self, fetch: Callable[[], Tensor], bias_V: Tensor | None) -> None:
        super().__init__()
        self._fetch = fetch
        self.bias = None if bias_V is None else nn.Parameter(bias_V, requires_grad=False)

    def slices(self) -> Iterator[tuple[slice, Tensor]]:
        """Consecutive rows, and their weights."""
        V, H = self._fetch().shape
        step = max(1, _HEAD_VALUES // H)
        for start in range(0, V, step):
            rows = slice(start, min(start + step, V))
            yield rows, self._fetch()[rows]

    def forward(self, x: Tensor) -> Tensor:
        logits = x.new_empty(*x.shape[:-1], len(self._fetch()))
        for rows, W_RH in self.slices():
            bias = None if self.bias is None else self.bias[rows].to(x.dtype)
            logits[..., rows] = F.linear(x, W_RH.to(x.device, x.dtype), bias)
        return logits


@dataclass
class Text:
    """Windows on their way through the blocks.

    Attributes:
        batches: the windows, as many as run at a time.
        calls: of each batch, how each block is called.
        hiddens: the inputs of the next block.
        settings: how they are run.
    """

    batches: list[Tensor]
    calls: list[list[BlockCall]]
    hiddens: HiddenStates
    settings: Settings


class BlockStream:
    """The skeleton of a model, with what is outside its blocks in place; tables of embeddings and the head stay in their files.

    Args:
        source: the model.
        dtype: in which it is run.
        device: where.
        limit: on the memory of the host, in bytes; None: most of what is free.
        batch_tokens: run at a time; None: what fits.

    Raises:
        UsageError: the model cannot be run block by block.
        CheckpointError: a weight is missing or damaged, or a file was changed meanwhile.
    """

    def __init__(
        self, source: Source, dtype: torch.dtype, device: torch.device, limit: int | None, batch_tokens: int | None
    ) -> None:
        self.name, self.device = source.name, device
        self._limit, self._batch_tokens = limit, batch_tokens
        self.model: Any = build_skeleton(source, dtype).eval()
        skip_experts(self.model, source.quantization)
        found = find_blocks(self.model).modules
        self.block_names, self.blocks = list(found), list(found.values())
        self._twins = shared_parameters(self.model)
        self._weights = ModelWeights(source, self.model)
        self._opened = OpenFiles(source.files)
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        self._files = 0
        self._place_outside(dtype)
        base = psutil.Process().memory_info().rss
        self._read(0)
        probe_1S = torch.zeros(1, PROBES[-1], dtype=torch.int64, device=device)
        try:
            self._catcher = BlockCalls(self.model, self.blocks, probe_1S)
        except NotInTurn as error:
            raise UsageError(f"{self.name} cannot be run block by block: {error}; leave `max_memory` out") from error
        self._footprint = self._measure(dtype, base)
        release(self.blocks[0])

    def _place_outside(self, dtype: torch.dtype) -> None:
        head, model, weights = self.model.get_output_embeddings(), self.model, self._weights
        sliced = head if type(head) is nn.Linear else None
        for name, _ in parameters_outside(model, self.blocks):
            owner = model.get_submodule(name.rpartition(".")[0])
            if owner is not sliced and not keep_mapped(model, name, weights, dtype, self.device):
                materialise(model, "", [name], weights, self.device)
        tie(model)
        if sliced is not None:
            name = next(name for name, module in model.named_modules() if module is sliced)
            bias_V = weights.checked(f"{name}.bias", sliced.bias) if sliced.bias is not None else None
            place = f"{name}.weight"
            if place not in weights:  # tied
                place = next(each for each, parameter in model.named_parameters() if parameter is sliced.weight)
            head = SlicedHead(self._fetching(place, sliced.weight), bias_V)
            if not all(all_finite(W_RH) for _, W_RH in head.slices()):
                raise CheckpointError(f"{place} holds NaN or infinity: the checkpoint is damaged")
            model.set_submodule(name, head)
        weights.release()
        move_buffers(model, self.device)

    def _fetching(self, name: str, expected: Tensor) -> Callable[[], Tensor]:
        """What maps a tensor anew; one that has to be decoded stays in memory."""
        weights = self._weights
        W_VH = weights.checked(name, expected, check_finite=False)
        return partial(weights.__getitem__, name) if weights.packed(name) is None else lambda: W_VH

    def _measure(self, dtype: torch.dtype, base: int) -> Footprint:
        """What a text takes, from the first block, which is in place, and of what the process took before it was."""
        tensors = [list(block.state_dict().values()) for block in self.blocks]
        largest = max(tensors, key=lambda each: sum(t.numel() for t in each))
        peaks = []
        for count in PROBES:
            call = self._catcher.catch(torch.zeros(1, count, dtype=torch.int64, device=self.device))[0]
            with LiveBytes() as live, torch.no_grad():
                call.run(self.blocks[0], call.hidden)
            peaks.append((count, live.peak))
        return Footprint(
            base=base,
            mapped=MAPPED_BYTES + 4 * max(t.numel() for t in largest),
            outside=0,
            embeddings=0,
            block=dtype.itemsize * sum(t.numel() for t in largest),
            written=0,
            hidden=call.hidden.nbytes // count,
            forward=Polynomial.through(peaks),
            groups=(),
            tokens=0,
            seq_len=0,
            device=self.device.type,
        )

    def _read(self, number: int) -> None:
        self._opened.check()  # what is mapped, and no longer there, ends a process without a word
        block, prefix = self.blocks[number], self.block_names[number]
        names = list(block.state_dict())
        materialise(block, prefix, names, self._weights, self.device, check_finite=False)
        read_shared(block, prefix, names, self._weights, self._twins, self.device)

    @contextmanager
    def block(self, number: int) -> Iterator[nn.Module]:
        """A block; its weights are in memory while the context lasts."""
        try:
            self._read(number)
            yield self.blocks[number]
        finally:
            release(self.blocks[number])

    @torch.no_grad()
    def enter(self, ids_NS: Tensor, texts: int = 1, blocks: int = 1) -> Text:
        """Windows that stand before the first block.

        Args:
            texts, blocks: how many times such windows, and blocks, are in memory: two models may be taken through side by side.

        Raises:
            UsageError: the limit on memory is too little.
        """
        on_device = torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else None
        one = self._footprint
        need = replace(one, tokens=ids_NS.numel() * texts, seq_len=ids_NS.shape[1], block=one.block * blocks)
        settings = need.choose(self._limit, on_device, self._batch_tokens)
        text = Text([], [], self._waiting(settings), settings)
        for batch_NS in in_batches(ids_NS.to(self.device), settings.batch_tokens):
            calls = self._catcher.catch(batch_NS)
            text.hiddens.append(calls[0].hidden)
            for call in calls:
                call.hidden = call.hidden[:0, :0].clone()
            text.batches.append(batch_NS)
            text.calls.append(calls)
        return text

    def _waiting(self, settings: Settings) -> HiddenStates:
        """What the inputs of a block are collected in."""
        if settings.hidden != "file":
            keep_on = torch.device("cpu") if settings.hidden == "host" else self.device
            return HiddenStates(keep_on)
        if self._scratch is None:
            self._scratch = tempfile.TemporaryDirectory(prefix="secateur-")
        self._files += 1
        return HiddenStates(torch.device("cpu"), Path(self._scratch.name) / str(self._files))

    @torch.no_grad()
    def outputs(self, text: Text, number: int) -> Iterator[tuple[int, Tensor]]:
        """Run windows through a block, which is in place; gives each batch's number and output, and has them wait there."""
        outputs, inputs = self._waiting(text.settings), text.hiddens
        for i, calls in enumerate(text.calls):
            output = calls[number].run(self.blocks[number], inputs.take(i))
            outputs.append(output)
            yield i, output
            del output
        text.hiddens = outputs
        if inputs.file is not None:
            inputs.file.unlink()

    @torch.no_grad()
    def logits(self, x_NSH: Tensor) -> Tensor:
        """What the model makes of outputs of its last block, `[N, S, V]`."""
        self._opened.check()  # the head is mapped
        found: Tensor = self._catcher.finish(self.model, x_NSH).logits
        return found
