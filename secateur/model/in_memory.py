"""A model object of transformers in the place of a path: run as it is, or, where files are read, saved to a folder first."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel

from secateur.errors import UsageError, one_line
from secateur.folder.paths import scratch_folder
from secateur.folder.reader import LoadedTensors
from secateur.formats.layouts.packed_weight import DecodedWeights
from secateur.model.source import Source, open_source, with_revision


def open_model(
    model: str | Path | PreTrainedModel,
    tokenizer: Any = None,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    verify: bool = False,
    dtype: torch.dtype | None = None,
) -> Source:
    """Open a model to run it: by its name as `open_source` does, or an object as it is.

    Args:
        model: what `open_source` takes, or a model of transformers.
        tokenizer: of an object, which has none with it; a name has its own.
        revision, trust_remote_code, verify, dtype: of a name, see `with_revision` and `open_source`.

    Raises:
        SecateurError: see `open_source`; `UsageError` too where something is given that is not for such a model.
    """
    if not _is_object(model, tokenizer):
        return open_source(with_revision(model, revision), trust_remote_code, verify, dtype)
    if verify or revision is not None:
        raise UsageError(
            f"`{'verify' if verify else 'revision'}` is for files, and the model is in memory: leave it out"
        )
    loaded: Any = model
    return Source(
        _name_of(loaded),
        loaded.config,
        DecodedWeights(LoadedTensors({})),
        loaded.dtype,
        loaded.dtype,
        (),
        None,
        loaded=loaded.eval(),
        own_tokenizer=tokenizer,
    )


@contextmanager
def open_files(
    model: str | Path | PreTrainedModel,
    tokenizer: Any,
    out: str | Path,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    dtype: torch.dtype | None = None,
) -> Iterator[Source]:
    """Open a model to read its files: those of an object are in a folder beside `out`, which is removed at the end.

    Raises:
        SecateurError: see `open_source`; `UsageError` too where the folder cannot be made, or something is given that is not
            for such a model.
    """
    if not _is_object(model, tokenizer):
        yield open_source(with_revision(model, revision), trust_remote_code, dtype=dtype)
        return
    if revision is not None:
        raise UsageError("`revision` is for files, and the model is in memory: leave it out")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("processes of torchrun share no object: save the model, and give the folder to all of them")
    with scratch_folder(Path(out).absolute().parent, ".secateur-model-") as folder:
        try:
            loaded: Any = model
            loaded.save_pretrained(folder)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
        except (OSError, SafetensorError) as error:
            raise UsageError(f"the model cannot be saved in {folder.parent}: {one_line(error)}") from error
        yield replace(open_source(str(folder), trust_remote_code, dtype=dtype), name=_name_of(loaded))


def _name_of(model: Any) -> str:
    """What an object is called: as it was when it was loaded, else as its class."""
    return str(model.config._name_or_path or type(model).__name__)


def _is_object(model: Any, tokenizer: Any) -> bool:
    """Whether a model is given as an object. Raises UsageError where it is none of transformers, or a name has a tokenizer."""
    if isinstance(model, PreTrainedModel):
        return True
    if tokenizer is not None and isinstance(model, str | Path):
        raise UsageError(f"`tokenizer` is for a model object, and {model} comes with its own: leave it out")
    return False
