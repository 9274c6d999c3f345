"""Measuring a model that memory does not hold: all windows pass a block before the next one is read.

N: windows, S: tokens of a window, P: predictions of one window, B: predictions taken at a time, V: vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import Tensor

from secateur.evaluation.distributions import Window, window_of
from secateur.evaluation.routing import Routing, routing_of, watched
from secateur.walking.block_stream import BlockStream, Text

# Logits computed at a time, each of 4 bytes: as many as keep a product with the head's weight busy.
_LOGITS = 2**24


class StreamedModel:
    """What `predict` takes in the place of a model of transformers."""

    def __init__(self, stream: BlockStream) -> None:
        self.stream = stream
        self._progress: Callable[[int, int], None] = lambda done, total: None
        self._latest: tuple[Any, int, Tensor] | None = None

    @property
    def config(self) -> Any:
        """Its config."""
        return self.stream.model.config

    def get_input_embeddings(self) -> Any:
        """The module that holds its table of embeddings."""
        return self.stream.model.get_input_embeddings()

    def report(self, progress: Callable[[int, int], None]) -> None:
        """Tell of (blocks done, blocks in total) from here on."""
        self._progress = progress

    def predict(self, ids_NS: Tensor, scored: list[int], routing: bool) -> list[Window]:
        """See `distributions.predict`; windows read their logits when they are asked for some."""
        stream = self.stream
        text = stream.enter(ids_NS, texts=2 if routing else 1)  # a reference waits beside it
        found: list[list[Routing]] = [[] for _ in scored]
        for number in range(len(stream.blocks)):
            with stream.block(number) as block:
                first = 0
                outputs = stream.outputs(text, number)
                for batch_NS in text.batches:
                    with ExitStack() as stack:
                        calls = stack.enter_context(watched(block)) if routing else []
                        next(outputs)
                    W, S = batch_NS.shape
                    for w, layers in enumerate(routing_of(calls, W, S, scored[first : first + W])):
                        found[first + w].append(layers)
                    first += W
                next(outputs, None)  # lets it end
            self._progress(number + 1, len(stream.blocks))
        return [
            self._window(text, k, ids_NS[k], count, tuple(layer for layers in found[k] for layer in layers))
            for k, count in enumerate(scored)
        ]

    def _window(self, text: Text, k: int, ids_S: Tensor, count: int, routing: Routing) -> Window:
        size = len(text.batches[0])
        first = len(ids_S) - 1 - count
        V = self.config.get_text_config().vocab_size
        most = max(1, _LOGITS // V)

        def logits(chunk: slice) -> Tensor:
            known = self._latest
            if (
                known is None
                or known[0] is not key
                or not known[1] <= chunk.start < chunk.stop <= known[1] + len(known[2])
            ):
                self._latest = known = None
                places = slice(first + chunk.start, first + min(max(chunk.start + most, chunk.stop), count))
                x_1BH = text.hiddens.read(k // size)[k % size, places][None]
                known = self._latest = (key, chunk.start, self.stream.logits(x_1BH)[0])
            return known[2][chunk.start - known[1] : chunk.stop - known[1]]

        key = object()
        return window_of(logits, count, V, ids_S[-count:], routing)
