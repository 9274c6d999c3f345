"""Where text comes from: a file, a folder or data set of the hub, or the reference text that every CPython carries."""

from __future__ import annotations

import glob
import logging
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from secateur.calibration.text_files import KINDS, is_text_file, read_file, take
from secateur.calibration.text_rows import Template, field
from secateur.errors import SecateurError, UsageError, one_line

#: Characters read from a data set when the caller sets no limit: some of them are larger than any disk.
STREAM_CHARS = 16_000_000

# Short names: hub id, config, and the split that holds what no model should have been trained on.
_ALIASES = {
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", "test"),
    "c4": ("allenai/c4", "en", "validation"),
}
# Their rows are the lines of one running text. Joined by an empty line, as everyone who reports its perplexity does.
_ROWS_ARE_LINES = {"Salesforce/wikitext", "wikitext"}
_SPLITS = {"train", "validation", "test"}


def read_text(
    spec: str,
    text_field: str = "text",
    max_chars: int | None = None,
    *,
    held_out: bool = False,
    template: Template | None = None,
) -> list[str]:
    """The documents that a spec names, in their order, those without text left out.

    Args:
        spec: one of, and the first that applies:
            a file: `.txt` or `.md` (one document), `.jsonl`, `.json`, `.csv` or `.parquet` (a document a row), also with
            `.gz` behind; or several, with commas between them or by a pattern such as `notes/*.md`;
            `docs`: the topics of Python's own language reference;
            `wikitext2` or `c4`, or `wikitext2:test` for a split of theirs;
            `id[:config][:split]`: a folder, or a data set of the hub, through the package `datasets`. `id:train`,
            `id:validation` and `id:test` name the split, any other single word the config; without one it is train.
        text_field: where the text of a row stands. A row that lacks it may have a chat in `messages`.
        max_chars: stop after so many characters; the last document is cut. None reads files whole, and
            `STREAM_CHARS` characters of a data set.
        held_out: where `wikitext2` or `c4` stand without a split, take the test or validation split instead of train.
        template: writes chats as text; None: they are refused.

    Raises:
        UsageError: there is no such text, it cannot be read as text, or it is empty.
        SecateurError: the hub cannot be reached.
    """
    if not spec:
        raise UsageError("the name of a text is empty: name one, such as docs")
    files = files_of(spec)
    name, *rest = os.path.expanduser(spec).split(":")
    if files:
        found = (text for file in files for text in read_file(Path(file), text_field, max_chars, template))
        documents = take(found, max_chars)
    elif spec == "docs":
        documents = take((topics[topic] for topic in sorted(topics)), max_chars)
    elif name in _ALIASES:
        if len(rest) > 1:
            raise UsageError(f"{spec!r} is not a text: {name} takes a split at most, like {name}:test")
        hub_id, config, held_out_split = _ALIASES[name]
        split = rest[0] if rest else held_out_split if held_out else "train"
        documents = _read_dataset(hub_id, config, split, text_field, max_chars, template)
    else:
        hub_id, config, split = _data_set(spec, name, rest)
        documents = _read_dataset(hub_id, config or None, split or "train", text_field, max_chars, template)
    documents = [document for document in documents if document and not document.isspace()]
    if not documents:
        raise UsageError(f"{spec} holds no text: give one that is not empty")
    return documents


def files_of(spec: str) -> list[str]:
    """The files that a spec names: one, several with commas between them, or those of a pattern; none where it names none.

    Raises:
        UsageError: one of several is not there, or a pattern matches nothing.
    """
    whole = os.path.expanduser(spec)
    if os.path.isfile(whole):
        return [whole]
    found: list[str] = []
    parts = [os.path.expanduser(part.strip()) for part in spec.split(",")]
    for part in parts:
        if os.path.isfile(part):
            found.append(part)
        elif glob.has_magic(part):
            matching = sorted(file for file in glob.glob(part, recursive=True) if os.path.isfile(file))
            if not matching:
                raise UsageError(f"no file is called like {part}")
            found += matching
        elif len(parts) > 1:
            raise UsageError(f"no such file: {part}")
    return found


def inputs_of(what: str, spec: str) -> dict[str, str]:
    """What a text is read from, by what it is called: files each, where there are several."""
    files = files_of(spec) or [spec]
    return {what: files[0]} if len(files) == 1 else {f"{what}, {file}": file for file in files}


def _data_set(spec: str, name: str, rest: list[str]) -> tuple[str, str, str]:
    """The name, config and split of a data set. Raises UsageError where a spec is none."""
    if _looks_like_file(name):
        raise UsageError(f"no such file: {spec}")
    if len(rest) > 2 or not (os.path.isdir(name) or re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name)):
        raise UsageError(
            f"{spec!r} is not a text: give a {_or(KINDS)} file, docs, {_or(_ALIASES)}, "
            "or hub-id[:config][:split] for a data set of the hub"
        )
    if len(rest) == 1 and rest[0] in _SPLITS:
        rest = ["", rest[0]]
    config, split = (*rest, "", "")[:2]
    return name, config, split


def _or(words: Iterable[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} or {last}"


def _looks_like_file(name: str) -> bool:
    return not os.path.isdir(name) and (is_text_file(name) or name.startswith((".", "/", "~")) or name.count("/") > 1)


# Data sets


def _read_dataset(
    name: str, config: str | None, split: str, text_field: str, max_chars: int | None, template: Template | None
) -> list[str]:
    rows = _rows(name, config, split)
    what = ":".join((name, config or "", split))
    texts = (field(row, text_field, what, template) for row in rows)
    documents = take(texts, STREAM_CHARS if max_chars is None else max_chars)
    return ["\n\n".join(documents)] if name in _ROWS_ARE_LINES else documents


def _rows(name: str, config: str | None, split: str) -> Iterator[Any]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise UsageError(
            f'{name} is a data set, which needs the package datasets: pip install "secateur[hub]", '
            f"or give a {_or(KINDS)} file"
        ) from error
    # The hub's client reports every try; what comes of them is reported below, once.
    client = logging.getLogger("huggingface_hub")
    level = client.level
    client.setLevel(logging.ERROR)
    try:
        yield from load_dataset(name, config, split=split, streaming=True)
    except (ValueError, FileNotFoundError) as error:
        raise UsageError(f"data set {name} cannot be read as asked: {one_line(error)}") from error
    except Exception as error:
        raise SecateurError(
            f"data set {name} cannot be read: {one_line(error)}; check the name and the connection, "
            f"or give a {_or(KINDS)} file"
        ) from error
    finally:
        client.setLevel(level)
