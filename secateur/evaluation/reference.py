"""A reference model's predictions for a text, kept on disk so that many models can be compared with it while it runs once.

K: windows, S: tokens of one window, P: predictions of one window, T: tokens kept of a distribution, V: vocabulary.
"""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from secateur.calibration.tokens import hash_of
from secateur.errors import CheckpointError, UsageError, one_line
from secateur.evaluation.distributions import Distributions, Window, predict, shortened
from secateur.evaluation.perplexity import (
    CutText,
    Quality,
    Scores,
    batches,
    check_finite,
    check_fits,
    padded,
    ready,
)
from secateur.evaluation.routing_files import ROUTING_PREFIX, kept_routing, layers_of, read_routing
from secateur.folder.manifest import hash_of_values
from secateur.folder.paths import check_named, drop_empty
from secateur.folder.writer import save_tensors, write_whole

_LAYOUT = 2
_ABOUT = "reference.json"
# Of each distribution, unless somebody says otherwise: most of the divergence is known from them, in 8 kB.
KEPT_TOKENS = 1024


class KeptReference:
    """Predictions in a folder, a file of safetensors for each window.

    Each has `loss` [P], `likeliest` [P], and either `log_p` [P, V], or `log_p` [P, T] with `token` [P, T] and `log_rest` [P]:
    see `Distributions`. Of a mixture of experts it also has what `kept_routing` says.

    Args:
        layers: of a mixture, of each layer how many experts it has and of how many log-probabilities are kept.
    """

    def __init__(
        self, folder: Path, tokens: int | None, vocabulary: int, cut: CutText, layers: Sequence[tuple[int, int]] = ()
    ) -> None:
        self.folder = folder
        self.tokens = tokens
        self.vocabulary = vocabulary
        self.layers = layers
        self.cut = cut

    def quality(self) -> Quality:
        """How well the reference itself predicts the text."""
        losses = [self._window(k, count).rows(slice(None)).loss_B for k, count in enumerate(self.cut.scored)]
        scores = Scores(padded(losses, self.cut.ids_KS.shape[1] - 1))
        return Quality.of(scores.of_text(self.cut.ids_KS, self.cut.bos))

    def windows(self, start: int, ids_WS: Tensor, scored: list[int]) -> list[Window]:
        """What was predicted in the windows from number `start` on.

        Raises:
            CheckpointError: a file is missing or damaged.
        """
        return [self._window(start + i, count) for i, count in enumerate(scored)]

    def _window(self, k: int, count: int) -> Window:
        file = _file(self.folder, k)
        try:
            kept = load_file(file)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file} cannot be read: remove its folder, to have it made again") from error
        T = self.tokens or self.vocabulary
        wanted: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "loss": ((count,), torch.float32),
            "likeliest": ((count,), torch.int32),
            "log_p": ((count, T), torch.float32),
        }
        if self.tokens is not None:
            wanted |= {"token": ((count, T), torch.int32), "log_rest": ((count,), torch.float32)}
        of_routers = {name: kept.pop(name) for name in list(kept) if name.startswith(ROUTING_PREFIX)}
        routing = read_routing(of_routers, self.layers, count)
        fits = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in kept.items()} == wanted
        ids = [kept[name] for name in ("token", "likeliest") if name in kept]
        if not fits or routing is None or any(int(id.min()) < 0 or int(id.max()) >= self.vocabulary for id in ids):
            raise CheckpointError(f"{file} does not hold what it should: remove its folder, to have it made again")

        def rows(chunk: slice) -> Distributions:
            token_BT = kept["token"][chunk].long() if self.tokens is not None else None
            rest_B = kept["log_rest"][chunk] if self.tokens is not None else None
            return Distributions(kept["log_p"][chunk], kept["loss"][chunk], kept["likeliest"][chunk], token_BT, rest_B)

        return Window(count, self.vocabulary, rows, routing)


def _check_cache(cache: Path) -> None:
    """Raise UsageError when nothing can be written to a cache, before models are loaded; what is made to try is removed."""
    made = [folder for folder in (cache, *cache.parents) if not os.path.lexists(folder)]
    try:
        if os.path.exists(cache) and not cache.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        cache.mkdir(parents=True, exist_ok=True)
        os.rmdir(tempfile.mkdtemp(dir=cache))
    except OSError as error:
        raise UsageError(f"{cache} cannot be written: {error.strerror or error}") from error
    finally:
        drop_empty(made)


@torch.no_grad()
def keep_reference(
    cache: Path,
    identity: dict[str, Any],
    load: Callable[[], Any],
    cut: CutText,
    *,
    tokens: int | None = KEPT_TOKENS,
    batch_tokens: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> KeptReference:
    """The predictions of a model for windows of text; those that the cache lacks are computed.

    Args:
        cache: a folder for any number of models and texts; made if need be.
        identity: tells the model and how it is run, in values that JSON holds.
        load: loads the model, if it has to run.
        cut: the windows.
        tokens: how many of the likeliest tokens of each distribution are kept, the others as one; None keeps all, in 4·V bytes
            a prediction.
        batch_tokens, progress: see `measure`.

    Raises:
        UsageError: the windows do not suit the model, or the cache cannot be written.
    """
    check_named(cache, "`cache`")
    K, S = cut.ids_KS.shape
    whole = {
        **identity,
        "layout": _LAYOUT,
        "text": hash_of(cut.ids_KS),
        "windows": [K, S, cut.stride or S],
        "bos": list(cut.bos),
        "tokens": tokens,
    }
    folder = cache / hash_of_values(whole)[:32]
    known = os.path.exists(folder / _ABOUT)
    missing = {k for k in range(K) if not known or not os.path.exists(_file(folder, k))}
    if missing:
        _check_cache(cache)
        model = load()
        check_fits(model, cut.ids_KS)
        ready(model, progress)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for some in batches(K, S, batch_tokens, model):
                if not missing.isdisjoint(range(K)[some]):
                    _predict(model, cut, some, folder, whole)
                    if progress is not None:
                        progress(some.stop, K)
        except (OSError, SafetensorError) as error:
            raise UsageError(
                f"{cache} cannot be written: {getattr(error, 'strerror', None) or one_line(error)}"
            ) from error
    vocabulary, layers = _about(folder / _ABOUT)
    return KeptReference(folder, None if tokens is None or tokens >= vocabulary else tokens, vocabulary, cut, layers)


def _predict(model: Any, cut: CutText, some: slice, folder: Path, whole: dict[str, Any]) -> None:
    """Write what a model predicts in some windows; a function of its own, so that no logits are left for the next ones."""
    found = predict(model, cut.ids_KS[some], cut.scored[some])
    for k, window in zip(range(len(cut.ids_KS))[some], found, strict=True):
        _keep(_file(folder, k), window, whole["tokens"], cut.place_of(k))
    layers = layers_of(found[0].routing)
    content = json.dumps({**whole, "vocabulary": found[0].vocabulary, "layers": layers}, indent=1)
    write_whole(folder / _ABOUT, lambda part: part.write_text(content, encoding="utf-8"))


def _about(about: Path) -> tuple[int, list[tuple[int, int]]]:
    """How many tokens a kept model has, and its layers of experts. Raises CheckpointError where its file does not tell."""
    try:
        said = json.loads(about.read_text(encoding="utf-8"))
        return int(said["vocabulary"]), [(int(experts), int(kept)) for experts, kept in said["layers"]]
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise CheckpointError(f"{about} cannot be read: remove its folder, to have it made again") from error


def _file(folder: Path, k: int) -> Path:
    return folder / f"window-{k:05d}.safetensors"


def _keep(file: Path, window: Window, tokens: int | None, where: str) -> None:
    pieces: list[dict[str, Tensor]] = []
    for chunk in window.chunks():
        found = window.rows(chunk)
        if tokens is not None and tokens < window.vocabulary:
            found = shortened(found, tokens)
        piece = {"loss": found.loss_B, "likeliest": found.likeliest_B.int(), "log_p": found.log_p_BT}
        if found.token_BT is not None and found.log_rest_B is not None:
            piece |= {"token": found.token_BT.int(), "log_rest": found.log_rest_B}
        pieces.append({name: tensor.cpu() for name, tensor in piece.items()})
    kept = {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}
    kept |= kept_routing(window.routing)
    check_finite(kept["loss"], "the reference's loss", where)
    write_whole(file, lambda part: save_tensors(kept, part))
