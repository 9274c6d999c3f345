"""`eval`: open a model by name, run it, say what came out."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from secateur._version import __version__
from secateur.calibration.tokens import hash_of
from secateur.errors import UsageError
from secateur.evaluation.blocks import BlockError, block_errors, streamed_block_errors
from secateur.evaluation.eval_text import Text, scored_bytes
from secateur.evaluation.perplexity import CutText, Quality, measure
from secateur.evaluation.reference import KEPT_TOKENS, KeptReference, keep_reference
from secateur.evaluation.streamed import StreamedModel
from secateur.evaluation.tasks.tasks import TaskScore, check_tasks, run_tasks
from secateur.gates.running import activations, as_if_written, told_of_gates
from secateur.gates.section import SECTION
from secateur.memory.room import limit_memory
from secateur.mixture.skipping import check_known, parse_skip, skip_experts
from secateur.model.in_memory import open_model
from secateur.model.load import load_source, open_device, parse_dtype
from secateur.model.located import conflicts, stored_names
from secateur.model.source import Source
from secateur.model.structure import build_skeleton
from secateur.plugin.packed_modules import memory_footprint, packed_linears
from secateur.walking.block_stream import BlockStream


@dataclass(frozen=True)
class Size:
    """What a model takes on disk: the bytes of its weight files, and their bits for each of its parameters."""

    bytes: int
    parameters: int

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.bytes / self.parameters

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "bits_per_weight": self.bits_per_weight}


@dataclass(frozen=True)
class Evaluation:
    """The figures of `eval`.

    Attributes:
        text: what was measured on, with `sha256` of the tokens, and `bytes` that the scored ones stand for. `bos` is whether
            windows did begin with it.
        bits_per_byte, reference_bits_per_byte: of text: the loss in bits, by which models with different tokenizers can be
            compared.
        blocks: where the error is made, if that was asked for.
        seconds: it took.
        tasks: scores in tasks, if that was asked for.
        cache_tokens: of the reference's predictions that `quality.kl` looks at one by one; None: all.
        activations: where not all inputs are read for a token that is written: the method, the level, how many tokens of a
            window are dense, and the share of the weights that was read for the others.
    """

    model: str
    reference: str | None
    text: dict[str, Any]
    quality: Quality
    bits_per_byte: float
    size: Size
    reference_size: Size | None
    blocks: tuple[BlockError, ...] | None
    seconds: float
    tasks: tuple[TaskScore, ...] = ()
    cache_tokens: int | None = None
    reference_bits_per_byte: float | None = None
    activations: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """All of it, the means over each window and at each position included, as JSON holds it."""
        scores = self.quality.scores
        quality = {f.name: getattr(self.quality, f.name) for f in dataclasses.fields(Quality) if f.name != "scores"}
        found = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {
            **found,
            "quality": quality,
            "size": self.size.to_dict(),
            "reference_size": self.reference_size.to_dict() if self.reference_size else None,
            "blocks": [dataclasses.asdict(block) for block in self.blocks] if self.blocks else None,
            "tasks": [dataclasses.asdict(score) for score in self.tasks],
            "per_window": scores.windows(),
            "per_position": scores.positions(),
        }


@dataclass(frozen=True)
class Runner:
    """How models are opened and run to be measured.

    Attributes:
        dtype: to compute in; `auto` is that of the files.
        device: where.
        batch_tokens: run at a time, see `measure`.
        trust_remote_code: whether code that comes with a model may run.
        max_memory: the most memory of the host that may be in use, in bytes or in words such as `4GiB`. With a limit models are
            run block by block, all windows through one before the next is read; None: whole.
        expert_skip: of mixtures that know which experts are weak, the share that is left out; None: as they were compressed
            with.
    """

    dtype: str = "float32"
    device: str = "cpu"
    batch_tokens: int | None = None
    trust_remote_code: bool = False
    max_memory: str | int | None = None
    expert_skip: float | None = None

    def open(self, model: str | PreTrainedModel, tokenizer: Any = None, **options: Any) -> Source:
        """Open whatever `compress` takes as MODEL; `options` are those of `open_model`."""
        dtype = parse_dtype(self.dtype)
        return open_model(model, tokenizer, trust_remote_code=self.trust_remote_code, dtype=dtype, **options)

    def load(self, source: Source) -> Any:
        """The model of an open source, its weights unpacked, ready to run; a `StreamedModel` where memory is limited."""
        dtype, device = parse_dtype(self.dtype) or source.dtype, open_device(self.device)
        limit = limit_memory(self.max_memory)
        if limit is None or source.loaded is not None:
            model = load_source(source, dtype, device)
            self._skip(model, source)
            return model
        if source.quantization is not None and SECTION in source.quantization:
            raise UsageError(
                f"{source.name} leaves inputs unread while it writes, which `max_memory`, running blocks one by one, does not "
                "show: leave it out"
            )
        stream = BlockStream(source, dtype, device, limit, self.batch_tokens)
        self._skip(stream.model, source)
        return StreamedModel(stream)

    def _skip(self, model: Any, source: Source) -> None:
        # A reference that knows nothing of it runs as it is.
        if self.expert_skip is not None and parse_skip(source.quantization) is not None:
            skip_experts(model, source.quantization, self.expert_skip)

    def keep(
        self,
        source: Source,
        cut: CutText,
        cache: Path,
        tokens: int | None,
        progress: Callable[[int, int], None] | None = None,
    ) -> KeptReference:
        """What a model predicts, from the cache if it is there, see `keep_reference`."""
        identity: dict[str, Any] = {
            "model": source.hashes,
            "dtype": self.dtype,
            "device": open_device(self.device).type,
            "versions": [__version__, torch.__version__, transformers.__version__],
        }
        if self.expert_skip is not None:
            identity["expert_skip"] = self.expert_skip
        return keep_reference(
            cache,
            identity,
            lambda: self.load(source),
            cut,
            tokens=tokens,
            batch_tokens=self.batch_tokens,
            progress=progress,
        )

    def measure(
        self,
        model: Any,
        cut: CutText,
        reference: Any = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Quality:
        """See `measure`."""
        return measure(
            model,
            cut.ids_KS,
            reference,
            stride=cut.stride,
            bos=cut.bos,
            batch_tokens=self.batch_tokens,
            progress=progress,
        )


def evaluate(  # noqa: PLR0913 - users name them
    model: str | PreTrainedModel,
    reference: str | PreTrainedModel | None = None,
    text: Text = Text(),  # noqa: B008 - it is frozen
    *,
    tokenizer: Any = None,
    runner: Runner = Runner(),
    cache: Path | None = None,
    cache_tokens: int | None = KEPT_TOKENS,
    by_block: bool = False,
    tasks: Sequence[str] = (),
    few_shot: int | None = None,
    limit: int | None = None,
    activation_sparsity: float | None = None,
    verify: bool = False,
    revision: str | None = None,
    accept: Callable[[str], None] = lambda _: None,
    progress: Callable[[int, int], None] | None = None,
    task_progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Measure a model on the first windows of a text, and its distance from a reference if one is given.

    Args:
        model, reference: whatever `compress` takes as MODEL, or a model of transformers in memory, which runs as it is, in
            evaluation mode; its size is then that of its weights in memory.
        text: which windows of which text.
        tokenizer: of a model in memory.
        runner: how models are run that are opened here.
        cache: a folder where the reference's predictions are kept, and taken from if they are there. Divergences are then of
            the `cache_tokens` likeliest tokens and all others as one.
        cache_tokens: see `keep_reference`.
        by_block: also compare the two models block by block.
        tasks, few_shot, limit: what is measured besides, see `run_tasks`.
        activation_sparsity: the level at which inputs are left out, see `activations`; None: the model's own.
        verify: whether the model's files (not the reference's) have to be those that its manifest names.
        revision: of `model`, see `compress`; that of the reference stands in its name.
        accept: called with the hash of the text's tokens before any model is run; what it raises ends the evaluation.
        progress: called with (windows done, windows in total).
        task_progress: as `progress` of `run_tasks`.

    Raises:
        SecateurError: a model, the text or a task cannot be had, or something measured is not finite.
    """
    began = time.monotonic()
    check_tasks(tasks, few_shot, limit)
    if reference is None and (by_block or cache is not None):
        raise UsageError(f"`{'by_block' if by_block else 'cache'}` needs a `reference` to compare with")
    if tasks and runner.max_memory is not None:
        raise UsageError("`tasks` run a model whole: leave `max_memory` out, or the tasks")
    if cache is not None and isinstance(reference, PreTrainedModel):
        raise UsageError(
            "`cache` keeps what a model in files predicts, and `reference` is in memory: leave one of them out"
        )
    source = runner.open(model, tokenizer, verify=verify, revision=revision)
    check_known(source.quantization, runner.expert_skip)
    opened = _Opened.of(runner, source, reference, text, accept)
    kept = opened.keep(cache, cache_tokens, progress)
    loaded, dense = opened.load(dense=kept is None or by_block or bool(tasks))
    if activation_sparsity is not None:
        activations(loaded, activation_sparsity)
    with ExitStack() as stack:
        for each in (loaded, dense):
            stack.enter_context(as_if_written(each))
        # Before the text is measured, so that a task that is not known is found soon.
        asked: dict[str, Any] = {"few_shot": few_shot, "limit": limit, "trust_remote_code": runner.trust_remote_code}
        scores = run_tasks(loaded, opened.tokenizer, tasks, reference=dense, progress=task_progress, **asked)
        with as_if_written(loaded):
            found = opened.measure(loaded, dense, kept, progress)
            said = told_of_gates(loaded)
        compare = streamed_block_errors if isinstance(loaded, StreamedModel) else block_errors
        blocks = tuple(compare(loaded, dense, opened.cut.ids_KS, progress=progress)) if by_block else None
    return dataclasses.replace(found, blocks=blocks, tasks=scores, activations=said, seconds=time.monotonic() - began)


@dataclass(frozen=True)
class _Opened:
    """A model that is to be measured and its reference, open, with the windows to measure them on."""

    runner: Runner
    source: Source
    other: Source | None
    text: Text
    tokenizer: Any
    cut: CutText
    sha256: str

    @classmethod
    def of(
        cls,
        runner: Runner,
        source: Source,
        reference: str | PreTrainedModel | None,
        text: Text,
        accept: Callable[[str], None],
    ) -> _Opened:
        """Cut the text for a model that is open, and open the reference, see `evaluate`."""
        tokenizer = source.tokenizer()
        cut = text.cut(tokenizer)
        sha256 = hash_of(cut.ids_KS)
        accept(sha256)
        other = None if reference is None else runner.open(reference)
        return cls(runner, source, other, text, tokenizer, cut, sha256)

    def keep(
        self, cache: Path | None, tokens: int | None, progress: Callable[[int, int], None] | None
    ) -> KeptReference | None:
        """What the reference predicts, where that is to be kept in a cache."""
        if self.other is None or cache is None:
            return None
        return self.runner.keep(self.other, self.cut, cache, tokens, progress)

    def load(self, dense: bool) -> tuple[Any, Any]:
        """The model, ready to run, and the reference, if there is one and it has to run."""
        loaded = self.runner.load(self.source)
        return loaded, self.runner.load(self.other) if dense and self.other is not None else None

    def measure(
        self, loaded: Any, dense: Any, kept: KeptReference | None, progress: Callable[[int, int], None] | None
    ) -> Evaluation:
        """The figures of the text alone, by what is kept of the reference if there is anything."""
        cut, other = self.cut, self.other
        quality = self.runner.measure(loaded, cut, dense if kept is None else kept, progress)
        loss = quality.reference_loss
        size = scored_bytes(self.tokenizer, cut.ids_KS, cut.stride, cut.bos)
        said = {"bos": bool(cut.bos), "sha256": self.sha256, "bytes": size}
        return Evaluation(
            model=self.source.name,
            reference=None if other is None else other.name,
            text={**dataclasses.asdict(self.text), **said},
            quality=quality,
            bits_per_byte=bits_per_byte(quality.loss, quality.tokens, size),
            size=size_of(self.source),
            reference_size=None if other is None else size_of(other),
            blocks=None,
            seconds=0.0,
            cache_tokens=None if kept is None else kept.tokens,
            reference_bits_per_byte=None if loss is None else bits_per_byte(loss, quality.tokens, size),
        )


def bits_per_byte(loss: float, tokens: int, size: int) -> float:
    """A loss in bits for each of the `size` bytes that the scored tokens stand for; NaN where they stand for none."""
    return loss * tokens / math.log(2) / size if size > 0 else math.nan


def size_of(source: Source) -> Size:
    """What an open model takes on disk, or, where it has no files, its weights in memory."""
    if source.loaded is not None:
        packed = sum(linear.out_features * linear.in_features for _, linear in packed_linears(source.loaded))
        counted = sum(p.numel() for p in source.loaded.parameters())
        return Size(memory_footprint(source.loaded, return_buffers=False), counted + packed)
    model = build_skeleton(source, source.dtype)
    untied = conflicts(source.weights, stored_names(source.weights, model)[0], model)
    parameters = sum(p.numel() for p in [*model.parameters(), *map(model.get_parameter, untied)])
    return Size(sum(file.stat().st_size for file in source.files), parameters)
