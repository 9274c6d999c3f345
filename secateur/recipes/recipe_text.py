"""The words of a recipe: YAML for people and JSON of a manifest, read and written so that each is taken for what it says."""

from __future__ import annotations

import json
import re
import reprlib
from pathlib import Path
from typing import Any

import yaml

# YAML 1.1 takes 2:4 for minutes and seconds, and 1e-3, which JSON writes, for a word. Here the one is a word and the other a
# number. What we write is quoted wherever either reading would not take it for the word that it is.
_INT = re.compile(r"[-+]?(?:0|[1-9][0-9]*)$")
_FLOAT = re.compile(
    r"(?:[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
_NUMBERS = {"tag:yaml.org,2002:int": _INT, "tag:yaml.org,2002:float": _FLOAT}
_ANY_WIDTH = 1 << 30  # lines are not folded
# Of a manifest, which is JSON; and of YAML, of which a second reads a tenth as much.
_MOST_BYTES, _MOST_YAML = 2**28, 2**20


class DuplicateKeyError(Exception):
    """Says which key is there twice, of which only the last would count."""

    def __init__(self, key: str, where: str = "") -> None:
        super().__init__(f"has the key {reprlib.repr(key)} twice{where}")


class _Loader(yaml.SafeLoader):
    def compose_mapping_node(self, anchor: Any) -> Any:
        # Not when values are made: `<<` has brought in others by then, which may be overridden.
        node: Any = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                name, line = (key.tag, key.value), key.start_mark.line + 1
                if name in lines:
                    raise DuplicateKeyError(key.value, f", in lines {lines[name]} and {line}")
                lines[name] = line
        return node


class _Dumper(yaml.SafeDumper):
    pass


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if tag not in _NUMBERS]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern in _NUMBERS.items():
    _Loader.add_implicit_resolver(_tag, _pattern, list("-+.0123456789"))
    _Dumper.add_implicit_resolver(_tag, _pattern, list("-+.0123456789"))


def read_limited(path: Path) -> str:
    size = path.stat().st_size
    if size > _MOST_BYTES:
        raise ValueError(f"it has {size} bytes, and a recipe {_MOST_BYTES} at most")
    return path.read_text(encoding="utf-8")


def parse(text: str) -> Any:
    # A manifest is JSON, of which YAML does not read all: characters that JSON escapes as two, for one.
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except ValueError as error:
        if len(text) > _MOST_YAML:
            raise ValueError(
                f"it has {len(text)} characters, and YAML may have {_MOST_YAML} at most; as JSON: {error}"
            ) from error
        return yaml.load(text, Loader=_Loader)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise DuplicateKeyError(next(name for name in names if names.count(name) > 1))
    return found


def dump(content: dict[str, Any]) -> str:
    """YAML that `parse` reads."""
    # In ASCII: PyYAML does not escape all line ends of Unicode otherwise, and reads them as spaces.
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, width=_ANY_WIDTH)
