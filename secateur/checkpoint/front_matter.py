"""What the hub reads of a model card: the YAML that it begins with."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import yaml

#: It has to stand first.
FRONT_MATTER = re.compile(r"\A---[ \t]*\r?\n(.*?)^---[ \t]*\r?$\n?", re.DOTALL | re.MULTILINE)
_LARGEST = 2**16  # characters; YAML can be written that takes long to read
_UNKNOWN = "unknown"


def read_matter(text: str) -> dict[str, Any] | None:
    """What the YAML of a card says; None where it is no mapping that can be read."""
    if len(text) > _LARGEST or "&" in text:  # of anchors, a few lines may stand for gigabytes
        return None
    try:
        found = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return None
    if found is None:
        return {}
    return found if isinstance(found, dict) and all(isinstance(key, str) for key in found) else None


def write_matter(matter: Mapping[str, Any]) -> str:
    """The YAML that a card begins with."""
    body = yaml.safe_dump(dict(matter), sort_keys=False, allow_unicode=True, width=120)
    return f"---\n{body}---\n"


def renewed(
    said: Mapping[str, Any], *, base_model: str | None, library: str, files: Iterable[str], results: Any
) -> dict[str, Any]:
    """What the card of a new checkpoint says, by what that of its source said.

    Figures of the source are not those of the new one, and are left out. A license that is not known is said to be unknown.

    Args:
        said: by the source.
        base_model: its name on the hub, if it came from there.
        library: what opens the new one.
        files: the names of those in the folder, among which may be a license.
        results: the figures that were measured, for `model-index`.
    """
    matter = {key: value for key, value in said.items() if key != "model-index"}
    if base_model is not None:
        matter["base_model"] = base_model
    if not matter.get("license"):
        own = next((name for name in files if re.match(r"(?i)licen[cs]e", name)), None)
        matter["license"] = _UNKNOWN if own is None else "other"
        if own is not None:
            matter["license_link"] = own
    tags = matter.get("tags")
    kept = [tag for tag in tags if isinstance(tag, str)] if isinstance(tags, list) else []
    matter["tags"] = list(dict.fromkeys([*kept, "secateur"]))
    matter["library_name"] = library
    matter["pipeline_tag"] = matter.get("pipeline_tag") or "text-generation"
    if results:
        matter["model-index"] = results
    return matter


def license_in_words(matter: Mapping[str, Any]) -> str:
    """What a reader of the card is to know of its license."""
    name = matter.get("license")
    if name == _UNKNOWN:
        return "License: unknown, for its source says none."
    link = matter.get("license_link")
    return f"License: that of its source, {name}" + (f" (see `{link}`)." if link else ".")
