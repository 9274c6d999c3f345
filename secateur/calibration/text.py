"""Where text comes from: a file, a folder or data set of the hub, or the reference text that every CPython carries."""

from __future__ import annotations

import codecs
import io
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from secateur.errors import SecateurError, UsageError, one_line

#: Characters read from a data set when the caller sets no limit: some of them are larger than any disk.
STREAM_CHARS = 16_000_000

_SUFFIXES = (".txt", ".jsonl", ".parquet")
# Short names: hub id, config, and the split that holds what no model should have been trained on.
_ALIASES = {
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", "test"),
    "c4": ("allenai/c4", "en", "validation"),
}
# Their rows are the lines of one running text. Joined by an empty line, as everyone who reports its perplexity does.
_ROWS_ARE_LINES = {"Salesforce/wikitext", "wikitext"}
_SPLITS = {"train", "validation", "test"}
# The longer marks first: UTF-32's begins with UTF-16's.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_CHUNK_BYTES = 1 << 20


def read_text(
    spec: str, text_field: str = "text", max_chars: int | None = None, *, held_out: bool = False
) -> list[str]:
    """The documents that a spec names, in their order, those without text left out.

    Args:
        spec: one of, and the first that applies:
            a file: `.txt` (one document), `.jsonl` or `.parquet` (a document a row);
            `docs`: the topics of Python's own language reference;
            `wikitext2` or `c4`, or `wikitext2:test` for a split of theirs;
            `id[:config][:split]`: a folder, or a data set of the hub, through the package `datasets`. `id:train`,
            `id:validation` and `id:test` name the split, any other single word the config; without one it is train.
        text_field: where the text of a row stands.
        max_chars: stop after so many characters; the last document is cut. None reads files whole, and
            `STREAM_CHARS` characters of a data set.
        held_out: where `wikitext2` or `c4` stand without a split, take the test or validation split instead of train.

    Raises:
        UsageError: there is no such text, it cannot be read as text, or it is empty.
        SecateurError: the hub cannot be reached.
    """
    if not spec:
        raise UsageError("the name of a text is empty: name one, such as docs")
    path = os.path.expanduser(spec)
    name, *rest = path.split(":")
    if os.path.isfile(path):
        documents = _read_file(Path(path), text_field, max_chars)
    elif spec == "docs":
        documents = _take((topics[topic] for topic in sorted(topics)), max_chars)
    elif name in _ALIASES:
        if len(rest) > 1:
            raise UsageError(f"{spec!r} is not a text: {name} takes a split at most, like {name}:test")
        hub_id, config, held_out_split = _ALIASES[name]
        split = rest[0] if rest else held_out_split if held_out else "train"
        documents = _read_dataset(hub_id, config, split, text_field, max_chars)
    else:
        if _looks_like_file(name):
            raise UsageError(f"no such file: {spec}")
        if len(rest) > 2 or not (os.path.isdir(name) or re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name)):
            raise UsageError(
                f"{spec!r} is not a text: give a {_or(_SUFFIXES)} file, docs, {_or(_ALIASES)}, "
                "or hub-id[:config][:split] for a data set of the hub"
            )
        if len(rest) == 1 and rest[0] in _SPLITS:
            rest = ["", rest[0]]
        config, split = (*rest, "", "")[:2]
        documents = _read_dataset(name, config or None, split or "train", text_field, max_chars)
    documents = [document for document in documents if document and not document.isspace()]
    if not documents:
        raise UsageError(f"{spec} holds no text: give one that is not empty")
    return documents


def _or(words: Iterable[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} or {last}"


def _looks_like_file(name: str) -> bool:
    return not os.path.isdir(name) and (
        name.endswith(_SUFFIXES) or name.startswith((".", "/", "~")) or name.count("/") > 1
    )


def _take(documents: Iterable[str], max_chars: int | None) -> list[str]:
    """The first documents, until they have `max_chars` characters; no more of them is read."""
    taken: list[str] = []
    left = max_chars
    for document in documents:
        taken.append(document[:left])
        if left is not None:
            left -= len(taken[-1])
            if left <= 0:
                break
    return taken


def _no_field(text_field: str, names: Iterable[str], where: str) -> UsageError:
    return UsageError(
        f"{where} has no field {text_field!r}: it has {', '.join(map(repr, names)) or 'none'}; name one by `text_field`"
    )


def _field(row: Any, text_field: str, where: str) -> str:
    """The text of a row; a null is no text."""
    if not isinstance(row, dict):
        raise UsageError(f'{where} is not an object: a line should look like {{"{text_field}": "..."}}')
    if text_field not in row:
        raise _no_field(text_field, row, where)
    text = row[text_field]
    if text is not None and not isinstance(text, str):
        raise UsageError(
            f"field {text_field!r} of {where} holds {type(text).__name__}, not text: name another by `text_field`"
        )
    return text or ""


# Files


def _read_file(path: Path, text_field: str, max_chars: int | None) -> list[str]:
    try:
        suffix = path.suffix.lower()
        if suffix == ".txt":
            return ["".join(_take(_decode(path), max_chars))]
        if suffix == ".jsonl":
            return _take(_read_jsonl(path, text_field), max_chars)
        if suffix == ".parquet":
            return _take(_read_parquet(path, text_field), max_chars)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or one_line(error)}") from error
    raise UsageError(f"{path} is of no known kind: text is read from {_or(_SUFFIXES)}")


def _decode(path: Path) -> Iterator[str]:
    """The text of a file piece by piece: UTF-8, or what its byte-order mark says; line ends become `\\n`."""
    with path.open("rb") as file:
        head = file.read(4)
        mark, encoding = next(((m, e) for m, e in _MARKS if head.startswith(m)), (b"", "utf-8"))
        file.seek(len(mark))
        at = len(mark)
        decoder = codecs.getincrementaldecoder(encoding)()
        newlines = io.IncrementalNewlineDecoder(None, translate=True)
        while True:
            chunk = file.read(_CHUNK_BYTES)
            pending = len(decoder.getstate()[0])
            # Bytes in UTF-16 without a mark, and much that is not text at all, can be valid UTF-8 but for this.
            zero = chunk.find(0) if encoding == "utf-8" else -1
            try:
                text = decoder.decode(chunk, final=not chunk)
                wrong = at + zero if zero >= 0 else None
            except UnicodeDecodeError as error:
                wrong = at - pending + error.start
            if wrong is not None:
                tried = encoding.removesuffix("-le").removesuffix("-be").upper()
                raise UsageError(
                    f"{path} is not text in a known encoding: byte {wrong} is not {tried} text; "
                    "save it as UTF-8, or as UTF-16 with a byte-order mark"
                )
            yield newlines.decode(text, final=not chunk)
            if not chunk:
                return
            at += len(chunk)


def _read_jsonl(path: Path, text_field: str) -> Iterator[str]:
    for number, line in enumerate(_lines(_decode(path)), 1):
        if not line or line.isspace():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"line {number} of {path} is not valid JSON: {one_line(error)}") from error
        # JSON can spell half of a surrogate pair, which no tokenizer takes.
        yield _field(row, text_field, f"line {number} of {path}").encode("utf-8", "replace").decode()


def _lines(pieces: Iterable[str]) -> Iterator[str]:
    # Not `splitlines`: it also splits at characters that JSON allows within a string.
    rest = ""
    for piece in pieces:
        *lines, rest = (rest + piece).split("\n")
        yield from lines
    yield rest


def _read_parquet(path: Path, text_field: str) -> Iterator[str]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UsageError(f'{path} needs the package pyarrow to be read: pip install "secateur[data]"') from error
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if text_field not in names:
                raise _no_field(text_field, names, str(path))
            for batch in file.iter_batches(columns=[text_field], batch_size=1024):
                for row in batch.to_pylist():
                    yield _field(row, text_field, str(path))
    except pyarrow.ArrowException as error:
        raise UsageError(f"{path} is damaged or not a Parquet file: {one_line(error)}") from error


# Data sets


def _read_dataset(name: str, config: str | None, split: str, text_field: str, max_chars: int | None) -> list[str]:
    rows = _rows(name, config, split)
    what = ":".join((name, config or "", split))
    documents = _take((_field(row, text_field, what) for row in rows), STREAM_CHARS if max_chars is None else max_chars)
    return ["\n\n".join(documents)] if name in _ROWS_ARE_LINES else documents


def _rows(name: str, config: str | None, split: str) -> Iterator[Any]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise UsageError(
            f'{name} is a data set, which needs the package datasets: pip install "secateur[data]", '
            f"or give a {_or(_SUFFIXES)} file"
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
            f"or give a {_or(_SUFFIXES)} file"
        ) from error
    finally:
        client.setLevel(level)
