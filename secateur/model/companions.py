"""The files that come along with a model besides its weights: which they are, in a folder and on the hub, and copying them."""

from __future__ import annotations

import glob
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from secateur.errors import UsageError, one_line
from secateur.folder.entries import is_inner_name, leads_out
from secateur.folder.manifest import MANIFEST_NAME
from secateur.folder.writer import write_json

# All files of a checkpoint come along with what is made of it, but those that are made anew, and by their endings: weights and
# what belongs to them, in whatever form, optimizer states, pickles and archives, in which all of these may be; and code.
# Files in which GPTQ and AWQ said how weights were packed that no longer are.
_MADE_ANEW = {"config.json", MANIFEST_NAME, "quantize_config.json", "quant_config.json"}
_SAFE = ".safetensors"
_STATES = (
    *(".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".dill", ".npy", ".npz", ".distcp", ".nemo"),
    *(".gguf", ".ggml", ".onnx", ".onnx_data", ".ort", ".h5", ".hdf5", ".keras", ".msgpack", ".pb"),
    *(".tflite", ".mlmodel", ".mlpackage", ".engine", ".trt", ".pdparams", ".pdopt", ".params", ".pte"),
    *(".zip", ".tar", ".tgz", ".7z", ".whl", ".jar"),
)
_CODE = (
    ".py",
    ".pyc",
    ".pyd",
    ".so",
    ".dll",
    ".dylib",
    ".exe",
    ".ipynb",
    ".sh",
    ".bat",
    ".ps1",
    ".js",
    ".c",
    ".cpp",
    ".cu",
)
# No tokenizer, picture or template is that large, and there are not so many.
_LARGEST, _LARGEST_IN_ALL, _MOST = 256 * 2**20, 2**30, 1000


def copy_companions(name: str, come_from: Path, folder: Path, code: bool) -> list[str]:
    """Put what comes with a model into the folder of what is made of it.

    Links out of the source are not followed. Configurations, that in `folder` among them, name no code that is not there.

    Args:
        name: what the user calls the model.
        come_from: its folder.
        folder: what is written at the moment, which may lie in it.
        code: whether Python files are among them.

    Returns:
        What a user should know of files that did not come along.
    """
    count, total, left = 0, 0, []
    for path in _companions(come_from, folder, code):
        file, target = come_from / path, folder / path
        readable = is_inner_name(path) and not leads_out(file, come_from) and os.access(file, os.R_OK)
        size = file.stat().st_size if readable and file.is_file() else None
        if size is None or size > _LARGEST or total + size > _LARGEST_IN_ALL or count == _MOST:
            left.append(path)
            continue
        count, total = count + 1, total + size
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    drop_absent_code(folder)
    if not left:
        return []
    some = ", ".join(left[:3]) + (f" and {len(left) - 3} more" if len(left) > 3 else "")
    return [f"not taken along from {name}, being too large, too many, links or unreadable: {some}"]


def _companions(folder: Path, apart: Path, code: bool) -> Iterator[str]:
    """The files of a checkpoint that are not its weights, at any depth, as they are called from its folder.

    Args:
        folder: of the checkpoint.
        apart: what is written at the moment, which may lie in it.
        code: whether Python files are among them.
    """
    home, written = os.path.realpath(folder), os.path.realpath(apart)
    for root, folders, files in os.walk(home):
        for name in list(folders):
            path = os.path.join(root, name)
            # A folder with a configuration of its own is another checkpoint.
            other = os.path.exists(os.path.join(path, "config.json")) or f"{written}{os.sep}".startswith(
                f"{path}{os.sep}"
            )
            if other or not _is_companion(name, code):
                folders.remove(name)
            elif os.path.islink(path):  # which is not walked into
                files.append(name)
        folders.sort()
        for name in sorted(files):
            path = Path(root, name).relative_to(home).as_posix()
            if path not in _MADE_ANEW and _is_companion(name, code):
                yield path


def _is_companion(name: str, code: bool) -> bool:
    """Whether a file, or folder, of that name comes along with a model, as far as the name tells."""
    endings = PurePosixPath(name.lower()).suffixes
    if name.startswith((".", "__pycache__")) or name.endswith((".index", ".index.json")):
        return False
    return not any(
        ending == _SAFE
        or ending.startswith(".data-")
        or ending in _STATES
        or (ending in _CODE and not (code and ending == ".py"))
        for ending in endings
    )


def drop_absent_code(folder: Path) -> None:
    """Take out of the configurations in a folder what they say of code that is not there: it could not be loaded."""
    for file in folder.glob("*config.json"):
        try:
            content = json.loads(file.read_bytes())
            kept = _without_absent_code(content, folder)
        except (ValueError, RecursionError):
            continue  # somebody else's to refuse
        if kept != content:
            write_json(file, kept)


def _without_absent_code(value: Any, folder: Path) -> Any:
    if isinstance(value, list):
        return [_without_absent_code(inner, folder) for inner in value]
    if not isinstance(value, dict):
        return value
    kept = {}
    for key, inner in value.items():
        if key in ("auto_map", "custom_pipelines") and isinstance(inner, dict):
            inner = {name: code for name, code in inner.items() if _has_code(code, folder)}
            if inner:
                kept[key] = inner
        else:
            kept[key] = _without_absent_code(inner, folder)
    return kept


def _has_code(code: Any, folder: Path) -> bool:
    """Whether the modules of `module.Class`, one or a list of them, are there, or in a repository of their own."""
    if isinstance(code, dict):
        code = code.get("impl")
    named = [each for each in (code if isinstance(code, list) else [code]) if each is not None]
    return bool(named) and all(
        isinstance(each, str) and ("--" in each or (folder / f"{each.split('.')[0]}.py").is_file()) for each in named
    )


def download(model: str, trust_remote_code: bool) -> Path:
    """The folder of a model of the hub's, with its weights and what comes along.

    Args:
        model: its id; `@` and a branch, tag or commit may stand behind.
        trust_remote_code: whether its code comes along.

    Raises:
        UsageError: it cannot be had.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    missing = f"no such model: {model!r} is not a folder or .gguf file here"
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise UsageError(missing)
    try:
        name, _, revision = model.partition("@")
        ignored = [*_not_wanted(trust_remote_code), *_too_large(name, revision or None)]
        return Path(snapshot_download(name, revision=revision or None, ignore_patterns=ignored))
    except HFValidationError as error:
        raise UsageError(f"{missing}, and not the name of a model on the hub") from error
    except Exception as error:
        raise UsageError(f"{missing}, and could not be had from the hub: {one_line(error)}") from error


def _not_wanted(code: bool) -> list[str]:
    """Patterns of the names of files on the hub that are neither weights nor companions, see `_is_companion`."""
    endings = [*_STATES, *(ending for ending in _CODE if not (code and ending == ".py"))]
    hidden = [".*", "*/.*", "__pycache__/*", "*/__pycache__/*"]
    return [
        *hidden,
        "*/*.safetensors",
        *(f"*{ending}{rest}" for ending in endings for rest in ("", ".*")),
        "*.data-*",
        "*.index",
    ]


def _too_large(model: str, revision: str | None = None) -> list[str]:
    """Patterns of the files of a model on the hub that no companion is as large as."""
    from huggingface_hub import HfApi

    try:
        files = HfApi().model_info(model, revision=revision, files_metadata=True).siblings or []
    except Exception:
        return []  # the download says why
    return [
        glob.escape(file.rfilename)
        for file in files
        if (file.size or 0) > _LARGEST and not file.rfilename.endswith(_SAFE)
    ]
