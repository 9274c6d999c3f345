"""The tasks that a user names, opened: those that lm-eval brings by name, one's own by the YAML file that defines them."""

from __future__ import annotations

import difflib
import glob
import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from lm_eval.tasks import TaskManager

from secateur.errors import SecateurError, UsageError, one_line
from secateur.evaluation.tasks.task_quiet import no_metric_code


class _Loader(yaml.SafeLoader):
    """Reads `!function module.name` as text: nothing is imported before lm-eval builds the task."""


def _function(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> str:
    return str(loader.construct_scalar(node))


_Loader.add_constructor("!function", _function)


def open_tasks(specs: Sequence[str], few_shot: int | None, trust_remote_code: bool) -> dict[str, dict[str, Any]]:
    """What `lm_eval.evaluate` takes as tasks: `tasks` and `groups`, each by name, with their data.

    Args:
        specs: names of tasks, groups and tags of lm-eval, and YAML files.
        few_shot: examples in a prompt; None leaves that to the task. A task that wants none gets none.
        trust_remote_code: whether metrics may be code of the hub.

    Raises:
        UsageError: there is no such task, a file does not define one, two give tasks of one name, or a task runs code.
        SecateurError: a task's data cannot be had.
    """
    with tempfile.TemporaryDirectory() as folder:
        own = _OwnFiles(Path(folder))
        names: dict[str, str] = {}
        for spec in dict.fromkeys(specs):
            if not spec:
                raise UsageError("`tasks` has an empty name in it: give names with single commas between")
            is_file = spec.endswith((".yaml", ".yml")) or os.sep in spec
            names[spec] = own.add(Path(spec).expanduser()) if is_file else spec
        # Reading the thousands of files that lm-eval brings takes seconds.
        manager = TaskManager(
            include_path=folder, include_defaults=not own.names.keys() >= {*names.values(), *own.members}
        )
        _check_known(manager, names)
        found: dict[str, dict[str, Any]] = {"tasks": {}, "groups": {}}
        origin: dict[str, str] = {}
        for spec, name in names.items():
            with no_metric_code(trust_remote_code):
                loaded = _load(manager, spec, name)
            if not loaded["tasks"]:
                raise UsageError(f"{spec} is a group without tasks: leave it out")
            for task in loaded["tasks"]:
                if task in origin:
                    raise UsageError(f"{origin[task]} and {spec} both have the task {task}: name one of them")
                origin[task] = spec
            for kind in found:
                found[kind].update(loaded[kind])
    for name, task in found["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise UsageError(f"task {name} runs code that the model writes, which secateur does not: leave it out")
        given = task.get_config("num_fewshot")
        if given is None or (few_shot is not None and given != 0):
            task.set_config(key="num_fewshot", value=few_shot or 0)
    return found


def _check_known(manager: Any, names: dict[str, str]) -> None:
    known = manager.all_tasks
    for spec, name in names.items():
        if name in known:
            continue
        if spec != name:
            raise UsageError(f"lm-eval does not read {name} in {spec}: compare it with the tasks that lm-eval brings")
        near = ", ".join(difflib.get_close_matches(name, known))
        raise UsageError(
            f"{spec!r} is not a task of lm-eval{f' (near it: {near})' if near else ''}: "
            "`lm-eval ls tasks` lists them, and one of your own is named by its .yaml file"
        )


def _load(manager: Any, spec: str, name: str) -> Any:
    try:
        return manager.load([name])
    except ModuleNotFoundError as error:
        raise UsageError(f"task {spec} needs the package {error.name}, which is not installed") from error
    except ConnectionError as error:
        raise SecateurError(
            f"the data of task {spec} cannot be had: {one_line(error)}; check the connection, or leave that task out"
        ) from error
    except Exception as error:
        problem = f"task {spec} cannot be loaded: {type(error).__name__}: {one_line(error)}"
        raise (SecateurError(problem) if spec == name else UsageError(f"{problem}; correct its file")) from error


# Files


class _OwnFiles:
    """Files of tasks and groups, shown to lm-eval in a folder of files that each include one of them.

    So data files can be looked for where the file lies, which lm-eval does in the current folder only.

    Attributes:
        names: of the tasks and groups in them, with the file of each.
        members: what the groups consist of, by name.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.names: dict[str, Path] = {}
        self.members: set[str] = set()

    def add(self, path: Path) -> str:
        """The name of the task or group in a file. What lies beside a group may be part of it, and is added, too."""
        if path.is_dir():
            raise UsageError(f"{path} is a folder: name the .yaml file of a task or group in it")
        config = _read(path)
        name = _name(config)
        if name is None:
            raise UsageError(f"{path} defines no task: it has no `task: NAME`")
        if name not in self.names:
            self._show(path, config, name)
        elif self.names[name] != path.resolve():
            raise UsageError(f"{path} and {self.names[name]} both define {name}: rename one of them")
        for other in sorted(path.parent.glob("*.yaml")) if "group" in config else ():
            # One that is broken may be none of this group's; if it is, lm-eval will miss it.
            with suppress(UsageError):
                config = _read(other)
                beside = _name(config)
                if beside is not None and beside not in self.names:
                    self._show(other, config, beside)
        return name

    def _show(self, path: Path, config: dict[str, Any], name: str) -> None:
        lines: dict[str, Any] = {"include": str(path.resolve())}
        if "dataset_kwargs" in config:
            lines["dataset_kwargs"] = config["dataset_kwargs"]
        (self._folder / f"{len(self.names):06}.yaml").write_text(yaml.safe_dump(lines), encoding="utf-8")
        self.names[name] = path.resolve()
        members = config.get("task")
        if "group" in config and isinstance(members, list):
            self.members |= {
                str(each.get("task", each.get("group")) if isinstance(each, dict) else each) for each in members
            }


def _name(config: dict[str, Any]) -> str | None:
    name = config.get("group", config.get("task"))
    return name if isinstance(name, str) else None


def _beside(folder: Path, files: Any) -> Any:
    """Data files, with the folder before those that are in it."""
    if isinstance(files, dict):
        return {split: _beside(folder, each) for split, each in files.items()}
    if isinstance(files, list):
        return [_beside(folder, each) for each in files]
    there = glob.glob(os.path.join(glob.escape(str(folder)), files), recursive=True) if isinstance(files, str) else []
    return os.path.join(folder, files) if there else files


def _read(path: Path, within: tuple[Path, ...] = ()) -> dict[str, Any]:
    """What a YAML file holds, with what it includes. Data files that lie beside the file that names them have its folder.

    Raises:
        UsageError: it, or one that it includes, cannot be read or is not a mapping, or they include each other.
    """
    try:
        config = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or one_line(error)}") from error
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise UsageError(f"{path} is not YAML: {one_line(error)}") from error
    if not isinstance(config, dict):
        raise UsageError(f"{path} defines no task: it holds {type(config).__name__}, not keys and values")
    options = config.get("dataset_kwargs")
    if isinstance(options, dict) and "data_files" in options:
        options["data_files"] = _beside(path.parent.resolve(), options["data_files"])
    includes = config.pop("include", [])
    merged: dict[str, Any] = {}
    for each in includes if isinstance(includes, list) else [includes]:
        other = path.parent / str(each)
        if other.resolve() in (*within, path.resolve()):
            raise UsageError(f"{path} includes itself by way of {other}")
        merged |= _read(other, (*within, path.resolve()))
    return merged | config
