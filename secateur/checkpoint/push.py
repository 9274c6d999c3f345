"""`push`: a finished folder to the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from secateur._version import __version__
from secateur.errors import SecateurError, UsageError, one_line
from secateur.folder.manifest import MANIFEST_NAME, require_files
from secateur.folder.paths import check_named
from secateur.folder.reader import read_json

_NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


def to_upload(out: str | Path, name: str) -> dict[str, int]:
    """The files of a folder that `push` uploads, each with its bytes: the manifest, and those that it names.

    Raises:
        UsageError: that is no name on the hub.
        CheckpointError: a file is not as secateur wrote it.
    """
    check_named(out, "OUT")
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"`name` {name!r} is no name on the hub: it is written as user/name, with letters, digits, -, _ and ."
        )
    folder = Path(out)
    if not folder.is_dir():
        raise UsageError(f"{out} is not a folder: give one that secateur made")
    require_files(folder)
    names = [*read_json(folder / MANIFEST_NAME)["files"], MANIFEST_NAME]
    return {name: (folder / name).stat().st_size for name in sorted(names)}


def push(
    out: str | Path,
    name: str,
    *,
    private: bool = False,
    branch: str | None = None,
    message: str | None = None,
    endpoint: str | None = None,
    token: str | None = None,
) -> str:
    """Upload a folder to the hub, in one commit; the repository is made if there is none.

    Args:
        out: a folder made by secateur.
        name: `user/name`.
        private: whether only its owner sees a repository that is new.
        branch: that the commit is for, made if there is none; None: `main`.
        message: of the commit.
        endpoint: address of the hub; None: what huggingface_hub knows.
        token: None: that of `hf auth login`, or of HF_TOKEN.

    Returns:
        The address of the repository.

    Raises:
        UsageError: there is no token, or it may not write there.
        SecateurError: the hub cannot be reached, or does not take it.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    files = to_upload(out, name)
    api = HfApi(endpoint=endpoint, token=token)
    added = [CommitOperationAdd(path_in_repo=file, path_or_fileobj=Path(out) / file) for file in files]
    try:
        address = api.create_repo(name, private=private or None, exist_ok=True)
        if branch is not None:
            api.create_branch(name, branch=branch, exist_ok=True)
        api.create_commit(name, added, commit_message=message or f"Upload by secateur {__version__}", revision=branch)
    except LocalTokenNotFoundError as error:
        raise UsageError(f"{name} cannot be written without a token: run `hf auth login`, or set HF_TOKEN") from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403):
            raise UsageError(
                f"{name} cannot be written with this token (the hub says {status}): log in by `hf auth login` as somebody "
                "who may write there, with a token that has the role write"
            ) from error
        raise SecateurError(f"{name} was not uploaded: {one_line(error)}") from error
    except Exception as error:
        raise SecateurError(f"{name} was not uploaded: {one_line(error)}") from error
    return str(address)
