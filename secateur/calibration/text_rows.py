"""The text of a row of a data set or file: a field of it, or a chat in it as the model's template writes it."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterable
from typing import Any

from secateur.calibration.tokens import bos_ids
from secateur.errors import UsageError, one_line

#: The field in which data sets of chats keep them.
MESSAGES = "messages"
#: Writes a chat, a list of messages with `role` and `content`, as text.
Template = Callable[[list[dict[str, Any]]], str]


def chat_template(tokenizer: Any) -> Template:
    """The template of a model's tokenizer. Without what the tokenizer puts before every text by itself."""

    def write(messages: list[dict[str, Any]]) -> str:
        if not getattr(tokenizer, "chat_template", None):
            raise UsageError("the text holds chats, and the model has no chat template: give plain text")
        try:
            text: str = tokenizer.apply_chat_template(messages, tokenize=False)
        except Exception as error:  # templates are programs, and raise whatever they like
            raise UsageError(
                f"the model's chat template refuses {reprlib.repr(messages)}: {one_line(error)}"
            ) from error
        begin = bos_ids(tokenizer)
        return text.removeprefix(tokenizer.decode(begin)) if begin else text

    return write


def field(row: Any, text_field: str, where: str, template: Template | None) -> str:
    """The text of a row; a null is no text.

    A row without the field is taken for a chat if it has `messages`, and so is a field that holds a list of messages.

    Raises:
        UsageError: it has no such field, or that holds something else.
    """
    if not isinstance(row, dict):
        raise UsageError(f'{where} is not an object: a line should look like {{"{text_field}": "..."}}')
    name = text_field if text_field in row or MESSAGES not in row else MESSAGES
    if name not in row:
        raise no_field(text_field, row, where)
    value = row[name]
    if isinstance(value, list) and value and all(isinstance(each, dict) and "role" in each for each in value):
        if template is None:
            raise UsageError(f"field {name!r} of {where} holds a chat, which has no place here: give plain text")
        return template(value)
    if value is not None and not isinstance(value, str):
        raise UsageError(
            f"field {name!r} of {where} holds {type(value).__name__}, not text: name another by `text_field`"
        )
    # JSON can spell half of a surrogate pair, which no tokenizer takes.
    return (value or "").encode("utf-8", "replace").decode()


def no_field(text_field: str, names: Iterable[str], where: str) -> UsageError:
    """The error of a row or table without the field."""
    return UsageError(
        f"{where} has no field {text_field!r}: it has {', '.join(map(repr, names)) or 'none'}; name one by `text_field`"
    )
