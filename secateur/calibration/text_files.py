"""Reading text from files: plain, JSON, tables, and any of these compressed by gzip."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, cast

from secateur.calibration.text_rows import MESSAGES, Template, field, no_field
from secateur.errors import UsageError, one_line

# The longer marks first: UTF-32's begins with UTF-16's.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_CHUNK_BYTES = 1 << 20
_ZIPPED = ".gz"

Read = Callable[[Path, str, Template | None], Iterator[str]]


def take(documents: Iterable[str], max_chars: int | None) -> list[str]:
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


def read_file(path: Path, text_field: str, max_chars: int | None, template: Template | None) -> list[str]:
    """The documents of a file: a whole file of text, or the rows of others; no more of it is read than is needed.

    Raises:
        UsageError: it cannot be read, is of no known kind, or a row has no text where it should be.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    kind = suffixes[-2] if len(suffixes) > 1 and suffixes[-1] == _ZIPPED else suffixes[-1] if suffixes else ""
    try:
        if kind in _PLAIN:
            return ["".join(take(_decode(path), max_chars))]
        if kind in _ROWS:
            return take(_ROWS[kind](path, text_field, template), max_chars)
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"{path} cannot be read: {getattr(error, 'strerror', None) or one_line(error)}") from error
    raise UsageError(
        f"{path} is of no known kind: text is read from {', '.join(KINDS)}, and from these with .gz behind"
    )


def _open(path: Path) -> IO[bytes]:
    if path.suffix.lower() == _ZIPPED:
        return cast(IO[bytes], gzip.open(path, "rb"))
    return path.open("rb")


def _decode(path: Path) -> Iterator[str]:
    """The text of a file piece by piece: UTF-8, or what its byte-order mark says; line ends become `\\n`."""
    with _open(path) as file:
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


def _read_jsonl(path: Path, text_field: str, template: Template | None) -> Iterator[str]:
    for number, line in enumerate(_lines(_decode(path)), 1):
        if not line or line.isspace():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"line {number} of {path} is not valid JSON: {one_line(error)}") from error
        yield field(row, text_field, f"line {number} of {path}", template)


def _lines(pieces: Iterable[str]) -> Iterator[str]:
    # Not `splitlines`: it also splits at characters that JSON allows within a string.
    rest = ""
    for piece in pieces:
        *lines, rest = (rest + piece).split("\n")
        yield from lines
    yield rest


def _read_json(path: Path, text_field: str, template: Template | None) -> Iterator[str]:
    """A list of rows, of texts, or of chats."""
    try:
        rows = json.loads("".join(_decode(path)))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not valid JSON: {one_line(error)}") from error
    if not isinstance(rows, list):
        raise UsageError(
            f"{path} holds no list: it should be a list of texts, of objects with {text_field!r}, or of chats"
        )
    for number, row in enumerate(rows, 1):
        if isinstance(row, str):
            row = {text_field: row}
        elif isinstance(row, list):
            row = {MESSAGES: row}
        yield field(row, text_field, f"item {number} of {path}", template)


def _read_csv(path: Path, text_field: str, template: Template | None) -> Iterator[str]:
    """A table with a head, its fields set apart by commas."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        table = csv.DictReader(io.StringIO("".join(_decode(path)), newline=""), strict=True)
        if text_field not in (table.fieldnames or ()):
            raise no_field(text_field, table.fieldnames or (), str(path))
        for row in table:
            yield row[text_field] or ""
    except csv.Error as error:
        raise UsageError(f"{path} is not a table of comma-separated values: {one_line(error)}") from error
    finally:
        csv.field_size_limit(before)


def _read_parquet(path: Path, text_field: str, template: Template | None) -> Iterator[str]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UsageError(f'{path} needs the package pyarrow to be read: pip install "secateur[hub]"') from error
    try:
        with _open(path) as stream, parquet.ParquetFile(stream) as file:
            names = file.schema_arrow.names
            name = text_field if text_field in names or MESSAGES not in names else MESSAGES
            if name not in names:
                raise no_field(text_field, names, str(path))
            for batch in file.iter_batches(columns=[name], batch_size=1024):
                for row in batch.to_pylist():
                    yield field(row, text_field, str(path), template)
    except pyarrow.ArrowException as error:
        raise UsageError(f"{path} is damaged or not a Parquet file: {one_line(error)}") from error


_PLAIN = (".txt", ".md")
_ROWS: dict[str, Read] = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}
#: The endings of files that are read; `.gz` may stand behind.
KINDS = (*_PLAIN, *_ROWS)


def is_text_file(name: str) -> bool:
    """Whether a name ends as that of a file that is read."""
    return name.lower().removesuffix(_ZIPPED).endswith(KINDS)


def is_row_file(name: str) -> bool:
    """Whether it ends as that of a file of rows."""
    return name.lower().removesuffix(_ZIPPED).endswith(tuple(_ROWS))
