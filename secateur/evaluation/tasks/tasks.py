"""Scores of a model in tasks of lm-eval, the evaluation harness of EleutherAI, beside those of the model it was made from."""

from __future__ import annotations

import math
import os
import random
import re
import statistics
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from numbers import Real
from typing import Any

import numpy as np
import torch

from secateur.errors import SecateurError, UsageError, one_line

# What `pip install "secateur[tasks]"` brings: lm-eval's loading of tasks by one call, and data sets that bring no code.
_NEEDED: dict[str, tuple[int, ...]] = {"lm_eval": (0, 4, 12), "datasets": (4,)}
# Draws for the standard error of a metric that has no formula for it. It is then good to a few per cent.
_BOOTSTRAP = 1000


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task or group of tasks.

    Attributes:
        task: its name.
        metric: its name; where the answers were filtered first, with the filter in brackets.
        value: of the model.
        stderr: its standard error over the choice of samples; None where lm-eval gives none.
        higher_is_better: None where lm-eval does not say.
        samples: how many were answered.
        few_shot: examples in a prompt; None for a group whose tasks differ in that.
        reference_value, reference_stderr: of the reference.
        difference: value − reference_value.
        difference_stderr: its standard error, from the differences sample by sample, which is smaller than the two apart would
            give. None where the value is not a mean over samples.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    higher_is_better: bool | None
    samples: int
    few_shot: int | None
    reference_value: float | None = None
    reference_stderr: float | None = None
    difference: float | None = None
    difference_stderr: float | None = None


def run_tasks(  # noqa: PLR0913 - users name them
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    reference: Any = None,
    few_shot: int | None = None,
    limit: int | None = None,
    batch: int = 1,
    trust_remote_code: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[TaskScore, ...]:
    """Measure a model in tasks, and a reference on the same samples and prompts.

    Few-shot examples and whatever else is drawn come from lm-eval's own default seeds: torch's, NumPy's and Python's global
    generators are seeded. While it runs, standard output and error of the process are silenced but for `progress`.

    Args:
        model: a causal language model of transformers, dense or with packed linears, on any device.
        tokenizer: of that model.
        tasks: names of tasks, groups and tags of lm-eval, and paths of YAML files that define some. None gives no scores.
        reference: another model with the same tokens.
        few_shot: examples in a prompt; None leaves that to each task, and a task that is defined to have none keeps to it.
        limit: the first samples of each task to take; None takes all.
        batch: requests run at a time.
        trust_remote_code: whether metrics that are code of the hub may run. Code that a task's own file names runs always.
        progress: called with (requests answered, requests in total), for each model and kind of request anew.

    Returns:
        In the order of the tasks, groups last, one for each metric.

    Raises:
        UsageError: a task is not known, cannot be used or has no metric, a number is too small, or lm-eval is not installed.
        SecateurError: data cannot be had, or a task fails with this model.
    """
    check_tasks(tasks, few_shot, limit, batch)
    if not tasks:
        return ()
    from secateur.evaluation.tasks.task_files import open_tasks
    from secateur.evaluation.tasks.task_quiet import no_metric_code, quiet

    with quiet(progress) as tell:
        found = open_tasks(tasks, few_shot, trust_remote_code)
        with no_metric_code(trust_remote_code):
            results = _answer(model, tokenizer, found, limit, batch, tell)
            others = _answer(reference, tokenizer, found, limit, batch, tell) if reference is not None else None
    return _scores(results, others)


def check_tasks(tasks: Sequence[str], few_shot: int | None, limit: int | None, batch: int = 1) -> None:
    """Raise UsageError where options make no sense, or lm-eval is not installed: what can be told without loading anything."""
    if not tasks:
        for name, value in (("few_shot", few_shot), ("limit", limit)):
            if value is not None:
                raise UsageError(f"`{name}` {value} is for tasks: name some by `tasks`")
        return
    for name, value, least in (("few_shot", few_shot, 0), ("limit", limit, 1), ("batch", batch, 1)):
        if value is not None and value < least:
            raise UsageError(f"`{name}` {value} is too small: it starts at {least}")
    for name, oldest in _NEEDED.items():
        try:
            found = version(name)
        except PackageNotFoundError:
            found = "none"
        if tuple(map(int, re.findall(r"\d+", found))) < oldest:
            wanted = ".".join(map(str, oldest))
            raise UsageError(f'`tasks` needs {name} {wanted} or later, not {found}: pip install "secateur[tasks]"')


def _answer(
    model: Any,
    tokenizer: Any,
    tasks: dict[str, dict[str, Any]],
    limit: int | None,
    batch: int,
    progress: Callable[[int, int], None],
) -> dict[str, Any]:
    """The results of lm-eval, samples included. Every call draws the same."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
    from lm_eval.evaluator import evaluate

    from secateur.evaluation.tasks.task_model import TaskModel

    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    torch.manual_seed(DEFAULT_OTHER_SEED)
    for task in tasks["tasks"].values():
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    # lm-eval would copy this process, model and all, once for each core.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    try:
        return evaluate(TaskModel(model, tokenizer, batch, progress), tasks, limit=limit, bootstrap_iters=_BOOTSTRAP)
    except SecateurError:
        raise
    except Exception as error:
        raise SecateurError(
            f"a task cannot be answered: {type(error).__name__}: {one_line(error)}; leave it out, or correct it if it is yours"
        ) from error


def _scores(results: dict[str, Any], others: dict[str, Any] | None) -> tuple[TaskScore, ...]:
    """All metrics of all tasks and groups, from the results of the model and, if there are any, of the reference."""
    scores = []
    for task, metrics in results["results"].items():
        keys = [key for key, value in metrics.items() if _is_metric(key) and isinstance(value, Real)]
        if not keys and task in results["samples"]:
            raise UsageError(f"task {task} gives no metric that is a number: look at the `metric_list` of its file")
        leaves = _leaves(results, task)
        for key in keys:
            metric, _, filtered = key.partition(",")
            score = TaskScore(
                task,
                metric if filtered == "none" else f"{metric} ({filtered})",
                float(metrics[key]),
                _stderr(metrics, key),
                results["higher_is_better"].get(task, {}).get(metric),
                sum(results["n-samples"][leaf]["effective"] for leaf in leaves),
                results["n-shot"].get(task),
            )
            if others is not None:
                value = float(others["results"][task][key])
                values, other_values = (_by_sample(each, leaves, metric, filtered) for each in (results, others))
                score = replace(
                    score,
                    reference_value=value,
                    reference_stderr=_stderr(others["results"][task], key),
                    difference=score.value - value,
                    difference_stderr=_paired_stderr(score.value, values, value, other_values),
                )
            scores.append(score)
    return tuple(scores)


def _is_metric(key: str) -> bool:
    """Whether a key of lm-eval's results is `metric,filter`, and not `metric_stderr,filter` or of something else."""
    metric, comma, _ = key.partition(",")
    return bool(comma) and not metric.endswith("_stderr")


def _stderr(metrics: dict[str, Any], key: str) -> float | None:
    found = metrics.get(key.replace(",", "_stderr,", 1))
    return float(found) if isinstance(found, Real) else None


def _leaves(results: dict[str, Any], name: str) -> list[str]:
    """The tasks of a group, at any depth; of a task, itself."""
    if name in results["samples"]:
        return [name]
    return [leaf for child in results["group_subtasks"][name] for leaf in _leaves(results, child)]


def _by_sample(results: dict[str, Any], tasks: list[str], metric: str, filtered: str) -> dict[tuple[Any, ...], Any]:
    """A metric's value for each sample of some tasks, by what tells the sample and its prompt from others."""
    return {
        (task, sample["doc_id"], sample["prompt_hash"]): sample[metric]
        for task in tasks
        for sample in results["samples"][task]
        if sample["filter"] == filtered and metric in sample
    }


def _paired_stderr(
    value: float, values: dict[tuple[Any, ...], Any], other: float, other_values: dict[tuple[Any, ...], Any]
) -> float | None:
    """Of the difference of two scores, over samples. None where a score is not the mean of its values."""
    if values.keys() != other_values.keys() or len(values) < 2:
        return None
    if not (_is_mean(value, values.values()) and _is_mean(other, other_values.values())):
        return None
    differences = [float(values[key]) - float(other_values[key]) for key in values]
    return statistics.stdev(differences) / math.sqrt(len(differences))


def _is_mean(score: float, values: Collection[Any]) -> bool:
    if not all(isinstance(value, Real) for value in values):
        return False
    return math.isclose(math.fsum(values) / len(values), score, rel_tol=1e-9, abs_tol=1e-12)
