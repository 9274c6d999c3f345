"""A hook of mkdocs: pages from beside `docs/`, and those made from the commands, the registry and the docstrings."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
#: Files of the repository, and folders with all that is in them, which pages link to; the site has them under the same paths.
BESIDE = ["SECURITY.md", "CHANGELOG.md", "CONTRIBUTING.md", "CODE_OF_CONDUCT.md", "LICENSE"]
BESIDE += ["benchmarks", "examples", "tests/README.md"]
_LINK = re.compile(r"(?<=\]\()([^)#\s:]+)(?=[)#])")


def on_files(files: Any, config: Any) -> Any:
    """Add what lies beside `docs/`."""
    for path in (found for name in BESIDE for found in (ROOT / name, *sorted((ROOT / name).rglob("*")))):
        if path.is_file() and "__pycache__" not in path.parts:
            files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links between `docs/` and the rest of the repository become those of the site; pages of the reference are filled."""
    uri = page.file.src_uri
    folder = posixpath.dirname(uri if uri in BESIDE or uri.split("/")[0] in BESIDE else f"docs/{uri}")

    def in_site(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, link[1]))
        return posixpath.relpath(target.removeprefix("docs/"), posixpath.dirname(uri) or ".")

    made = _REFERENCE.get(uri, lambda: "")()
    return _LINK.sub(in_site, markdown) + made


def _commands() -> str:
    from secateur.commands.command import build
    from secateur.commands.find_commands import find, names

    parts = []
    for name in names():
        find(name)
        command = build(name)
        arguments = " ".join(each.name.upper() for each in command.params if each.param_type_name == "argument")
        rows = [_row(each) for each in command.params if not getattr(each, "hidden", False)]
        parts += [f"\n## {name}\n", f"```\nsecateur {name} {arguments} [OPTIONS]\n```\n", f"{command.help}\n"]
        parts += ["| | meaning | default |\n|---|---|---|", *rows, ""]
    return "\n".join(parts)


def _row(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        name = parameter.name.upper()
    else:
        name = ", ".join(f"`{each}`" for each in (*parameter.opts, *parameter.secondary_opts))
    known = not parameter.required and isinstance(parameter.default, str | int | float)
    plain = known and not isinstance(parameter.default, bool)
    return f"| {name} | {_cell(parameter.help or '')} | {f'`{parameter.default}`' if plain else ''} |"


def _methods() -> str:
    from dataclasses import fields

    import secateur.recipes.methods  # noqa: F401 - it registers all methods
    from secateur.core.options import options_of
    from secateur.core.registry import LOW_RANKERS, ROLES

    parts = []
    for role, methods in {**ROLES, "low-rank-method": LOW_RANKERS}.items():
        for name, method in sorted(methods.items()):
            paper = f"\n{method.paper}\n" if method.paper else ""
            parts += [f"\n## --{role.replace('_', '-')} {name}\n", f"{(method.__doc__ or '').strip()}\n", paper]
            defaults = {field.name: field.default for field in fields(method)}
            rows = [
                f"| `{key}` | {_cell(each.help)} | {_cell(each.range)} | `{defaults[key]}` |"
                for key, each in options_of(method).items()
            ]
            if rows:
                parts += ["| option | meaning | values | default |\n|---|---|---|---|", *rows]
    return "\n".join(parts) + "\n"


def _api() -> str:
    import secateur

    found = [getattr(secateur, name) for name in secateur.__all__ if not name.startswith("__")]
    return "".join(f"\n::: {each.__module__}.{each.__qualname__}\n" for each in found)


def _cell(text: str) -> str:
    return re.sub(r"([|\[\]])", r"\\\1", " ".join(text.split()))


_REFERENCE = {"reference/commands.md": _commands, "reference/methods.md": _methods, "reference/api.md": _api}
