"""Tasks of lm-eval against loops in float64, and what can be wrong with a task."""

import json
import logging
import math
import socket
import statistics
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch

pytest.importorskip("lm_eval")

import datasets
import evaluate
import lm_eval
from lm_eval.tasks import TaskManager

import secateur
from secateur.errors import SecateurError, UsageError
from secateur.evaluation.tasks import task_files, tasks
from secateur.evaluation.tasks.tasks import TaskScore, run_tasks

HERE = Path(__file__).parents[1] / "tasks"
WORDS, LAST, GROUP = (str(HERE / f"words{name}.yaml") for name in ("", "_last", "_group"))
ROWS, EXAMPLES = (
    [json.loads(line) for line in (HERE / f"words{name}.jsonl").read_text().splitlines()] for name in ("", "_examples")
)
QUESTION = 'output_type: multiple_choice\ndoc_to_text: "{{question}}:"\ndoc_to_choice: choices\ndoc_to_target: answer\n'
DATA = f"dataset_path: json\ntest_split: test\ndataset_kwargs: {{data_files: {{test: {HERE / 'words.jsonl'}}}}}\n"


@pytest.fixture(autouse=True, scope="module")
def own_data_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        yield


@pytest.fixture(scope="module")
def dense(model_of):
    return secateur.load(model_of("llama"))


@pytest.fixture(scope="module")
def half(model_of, tmp_path_factory):
    """The folder of the same at 50 % by magnitude."""
    out = tmp_path_factory.mktemp("half") / "out"
    secateur.compress(str(model_of("llama")), out, secateur.Recipe("magnitude", 0.5))
    return out


@pytest.fixture
def own_task(tmp_path):
    """Write a task's file: `own_task("a", text)`; its path."""

    def write(name, text):
        path = tmp_path / f"{name}.yaml"
        path.write_text(text)
        return str(path)

    return write


@torch.no_grad()
def loglikelihood(model, tokenizer, prompt, answer):
    """Of an answer after a prompt, in float64."""
    begun = len(tokenizer(prompt).input_ids)
    ids = tokenizer(prompt + answer).input_ids
    assert begun < len(ids) <= 64
    log_p_SV = model.eval()(torch.tensor([ids])).logits[0].double().log_softmax(1)
    return sum(log_p_SV[i - 1, ids[i]].item() for i in range(begun, len(ids)))


def right(model, tokenizer, rows=ROWS, examples=(), mark=":"):
    """For each sample whether the answer is the likeliest, and whether it is the likeliest by its letters."""
    shown = "".join(f"{row['question']}{mark} {row['choices'][row['answer']]}\n\n" for row in examples)
    found = []
    for row in rows:
        sums = [
            loglikelihood(model, tokenizer, f"{shown}{row['question']}{mark}", f" {each}") for each in row["choices"]
        ]
        means = [total / len(each) for total, each in zip(sums, row["choices"], strict=True)]
        found.append([scores.index(max(scores)) == row["answer"] for scores in (sums, means)])
    return [list(each) for each in zip(*found, strict=True)]


def by_name(scores):
    return {(score.task, score.metric): score for score in scores}


@pytest.mark.parametrize(("few_shot", "batch"), [(None, 1), (1, 1), (None, 7)])
def test_scores_are_those_of_a_loop_in_float64(dense, tokenizer, few_shot, batch):
    found = run_tasks(dense, tokenizer, [WORDS], few_shot=few_shot, batch=batch)
    assert [(score.task, score.metric) for score in found] == [
        ("secateur_words", "acc"),
        ("secateur_words", "acc_norm"),
    ]
    expected = right(dense, tokenizer, examples=EXAMPLES[: few_shot or 0])
    assert expected[0] != expected[1]
    for score, answers in zip(found, expected, strict=True):
        p, n = sum(answers) / 30, 30
        assert 0 < p < 1
        assert score.value == pytest.approx(p)
        assert score.stderr == pytest.approx(math.sqrt(p * (1 - p) / (n - 1)))
        assert (score.samples, score.few_shot, score.higher_is_better) == (30, few_shot or 0, True)
        assert score.reference_value is score.reference_stderr is score.difference is score.difference_stderr is None


def test_a_packed_model_beside_the_dense_one(dense, half, tokenizer):
    packed = secateur.load(half, "torch")
    assert any("acked" in type(module).__name__ for module in packed.modules())
    found = run_tasks(packed, tokenizer, [WORDS, LAST], reference=dense)
    unpacked = secateur.load(half, "dense")
    for rows, mark, task in ((ROWS, ":", "secateur_words"), (EXAMPLES, " =", "secateur_words_last")):
        for k, metric in enumerate(("acc", "acc_norm")):
            score = by_name(found)[task, metric]
            mine, other = (right(model, tokenizer, rows, mark=mark)[k] for model in (unpacked, dense))
            assert score.value == pytest.approx(sum(mine) / len(rows))
            assert score.reference_value == pytest.approx(sum(other) / len(rows))
            assert score.difference == pytest.approx(score.value - score.reference_value)
            differences = [a - b for a, b in zip(mine, other, strict=True)]
            assert score.difference_stderr == pytest.approx(statistics.stdev(differences) / math.sqrt(len(rows)))
    score = by_name(found)["secateur_words", "acc_norm"]
    assert 0 < score.difference_stderr < math.hypot(score.stderr, score.reference_stderr)
    same = run_tasks(dense, tokenizer, [WORDS], reference=dense)
    assert [(score.difference, score.difference_stderr) for score in same] == [(0, 0)] * 2


def test_a_group_is_measured_over_the_samples_of_its_tasks(dense, half, tokenizer):
    found = run_tasks(secateur.load(half, "dense"), tokenizer, [GROUP], reference=dense)
    assert [score.task for score in found] == ["secateur_words"] * 2 + ["secateur_words_last"] * 2 + [
        "secateur_words_group"
    ]
    first, last, group = (by_name(found)[f"secateur_words{name}", "acc"] for name in ("", "_last", "_group"))
    assert group.value == pytest.approx((30 * first.value + 4 * last.value) / 34)
    assert group.samples == 34
    models = secateur.load(half, "dense"), dense
    mine, other = (right(each, tokenizer)[0] + right(each, tokenizer, EXAMPLES, mark=" =")[0] for each in models)
    differences = [a - b for a, b in zip(mine, other, strict=True)]
    assert group.difference_stderr == pytest.approx(statistics.stdev(differences) / math.sqrt(34))


def test_limit_takes_the_first_samples(dense, tokenizer):
    score = run_tasks(dense, tokenizer, [WORDS], limit=7)[0]
    assert score.samples == 7
    assert score.value == pytest.approx(sum(right(dense, tokenizer, ROWS[:7])[0]) / 7)
    assert run_tasks(dense, tokenizer, [WORDS], limit=1)[0].stderr is None


def test_a_task_that_wants_no_examples_gets_none(dense, tokenizer, own_task):
    path = own_task("none", f"include: {WORDS}\ntask: none_at_all\nnum_fewshot: 0\n")
    assert [score.few_shot for score in run_tasks(dense, tokenizer, [path], few_shot=1)] == [0, 0]


def test_both_models_are_shown_the_same_examples(dense, tokenizer, own_task):
    path = own_task("drawn", f"include: {WORDS}\ntask: drawn\nfewshot_config: {{sampler: default}}\n")
    found = run_tasks(dense, tokenizer, [path], few_shot=1, reference=dense)
    # It would be None if the prompts differed.
    assert [score.difference_stderr for score in found] == [0, 0]
    assert run_tasks(dense, tokenizer, [path], few_shot=1, reference=dense) == found


def test_data_beside_the_file_is_found_from_anywhere(dense, tokenizer, tmp_path, monkeypatch):
    (tmp_path / "deep").mkdir()
    for name in ("words.yaml", "words.jsonl", "words_examples.jsonl"):
        (tmp_path / "deep" / name).write_text((HERE / name).read_text())
    monkeypatch.chdir(tmp_path)
    assert run_tasks(dense, tokenizer, ["deep/words.yaml"]) == run_tasks(dense, tokenizer, [WORDS])
    (tmp_path / "deep" / "words.jsonl").rename("words.jsonl")
    assert run_tasks(dense, tokenizer, ["deep/words.yaml"])[0].samples == 30, "else in the current folder"


# Each row as a prompt and the first letter of an answer.
LOGLIKELIHOOD = DATA + (
    'task: likely\noutput_type: loglikelihood\ndoc_to_text: "{{question}}:"\ndoc_to_target: "{{choices[answer][0]}}"\n'
    "metric_list: [{metric: acc}, {metric: perplexity}]\n"
)


def test_a_score_that_is_no_mean_has_no_paired_error(dense, half, tokenizer, own_task, capfd):
    found = by_name(run_tasks(dense, tokenizer, [own_task("a", LOGLIKELIHOOD)], reference=secateur.load(half, "dense")))
    perplexity = found["likely", "perplexity"]
    losses = [-loglikelihood(dense, tokenizer, f"{row['question']}:", row["choices"][row["answer"]][0]) for row in ROWS]
    assert perplexity.value == pytest.approx(math.exp(statistics.fmean(losses)), rel=1e-5)
    assert perplexity.higher_is_better is False
    # The bootstrap's, about that of the mean loss times the value.
    assert perplexity.stderr == pytest.approx(perplexity.value * statistics.stdev(losses) / math.sqrt(30), rel=0.5)
    assert perplexity.difference == perplexity.value - perplexity.reference_value
    assert perplexity.difference_stderr is None
    assert found["likely", "acc"].difference_stderr == 0.0
    assert capfd.readouterr() == ("", "")


def test_tasks_that_read_on_or_write(dense, half, tokenizer, own_task):
    rolling = own_task(
        "rolling",
        DATA + 'task: rolling\noutput_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{question}}"\n'
        "metric_list: [{metric: bits_per_byte}]\n",
    )
    writing = own_task(
        "writing",
        DATA + 'task: writing\noutput_type: generate_until\ndoc_to_text: "{{question}}:"\ndoc_to_target: "?"\n'
        "generation_kwargs: {max_gen_toks: 4, until: ['.']}\nmetric_list: [{metric: exact_match}]\n",
    )
    packed = secateur.load(half, "torch")
    bits, exact = run_tasks(packed, tokenizer, [rolling, writing], limit=5)
    # lm-eval begins with <s>, and so does the tokenizer: the second is scored.
    total = sum(loglikelihood(packed, tokenizer, "", f"<s>{row['question']}") for row in ROWS[:5])
    assert bits.value == pytest.approx(-total / math.log(2) / sum(len(row["question"]) for row in ROWS[:5]), rel=1e-5)
    assert (exact.value, exact.samples) == (0, 5)


def test_progress_may_print_and_nothing_else_does(dense, tokenizer, capfd):
    seen, level = [], logging.getLogger("datasets").level

    def tell(done, total):
        seen.append((done, total))
        print(f"{done} of {total}")

    run_tasks(dense, tokenizer, [WORDS], progress=tell)
    assert seen == [(64, 90), (90, 90)]
    assert capfd.readouterr() == ("64 of 90\n90 of 90\n", "")
    assert logging.getLogger("datasets").level == level


def test_the_tokenizer_is_left_as_it_is(dense, tokenizer):
    before = tokenizer.pad_token_id
    run_tasks(dense, tokenizer, [WORDS], limit=1)
    assert tokenizer.pad_token_id is before is None


def test_no_network_for_tasks_of_local_data(dense, tokenizer, monkeypatch):
    asked = []
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", True)
    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, lambda *args, **_: asked.append(args) or 1 / 0)
    run_tasks(dense, tokenizer, [GROUP], limit=1)
    assert asked == []
    assert datasets.config.HF_UPDATE_DOWNLOAD_COUNTS is True


# --- the command


def test_eval_shows_both_models(says, model_of, half, text_file, tmp_path):
    options = ("--data", text_file, "--seq-len", 32, "--windows", 1, "--tasks", f"{WORDS},{LAST}", "--few-shot", 1)
    figures = tmp_path / "figures.json"
    code, out, err = says("eval", half, "--reference", model_of("llama"), *options, "--limit", 20, "--json", figures)
    assert (code, err) == (0, "")
    found = json.loads(figures.read_text())
    assert found["quality"]["perplexity"] > 1
    scores = [TaskScore(**each) for each in found["tasks"]]
    assert [(score.task, score.samples, score.few_shot) for score in scores] == [
        ("secateur_words", 20, 1),
        ("secateur_words", 20, 1),
        ("secateur_words_last", 4, 1),
        ("secateur_words_last", 4, 1),
    ]
    for score in scores:
        assert (
            f" {score.value:.4f} ± {score.stderr:.4f} {score.reference_value:.4f} ± {score.reference_stderr:.4f} "
            f"{score.difference:+.4f} ± {score.difference_stderr:.4f}"
        ) in " ".join(out.split())
    assert all(word in out for word in ("secateur_words", "1-shot", "20", "acc ↑", "acc_norm ↑", "difference"))
    code, out, err = says("eval", half, *options, "--json", "-")
    assert (code, err) == (0, "")
    alone = [TaskScore(**each) for each in json.loads(out)["tasks"]]
    assert alone[2].value == scores[2].value
    assert alone[2].difference is None


def test_eval_without_tasks_has_none(says, model_of, text_file):
    options = ("--data", text_file, "--seq-len", 32, "--windows", 1)
    assert json.loads(says("eval", model_of("llama"), *options, "--json", "-")[1])["tasks"] == []
    for flag in ("--few-shot", "--limit"):
        code, out, err = says("eval", model_of("llama"), *options, flag, 3)
        assert (code, out) == (2, "")
        assert err == f"error: {flag} 3 is for tasks: name some by --tasks\n"


# --- what can be wrong


@pytest.fixture
def some_of_lm_evals(monkeypatch):
    """A few of the tasks that lm-eval brings: to read all of them takes seconds."""
    folders = [Path(lm_eval.tasks.__file__).parent / name for name in ("arc", "hellaswag", "humaneval")]

    def manager(include_path, include_defaults):
        assert include_defaults
        return TaskManager(include_path=[*folders, include_path], include_defaults=False)

    monkeypatch.setattr(task_files, "TaskManager", manager)


@pytest.mark.usefixtures("some_of_lm_evals")
def test_a_name_that_is_not_known(dense, tokenizer):
    with pytest.raises(UsageError, match=r"'helaswag' is not a task of lm-eval \(near it: hellaswag\): .*lm-eval ls"):
        run_tasks(dense, tokenizer, ["helaswag"])
    with pytest.raises(UsageError, match=r"'§§§§' is not a task of lm-eval: `lm-eval ls tasks` lists them"):
        run_tasks(dense, tokenizer, ["§§§§"])


@pytest.mark.usefixtures("some_of_lm_evals")
def test_data_that_cannot_be_had(dense, tokenizer, monkeypatch):
    def unreachable(*args, **kwargs):
        raise ConnectionError("Couldn't reach the Hub\n(no route)")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(
        SecateurError, match=r"the data of task hellaswag cannot be had: .*\(no route\); check"
    ) as error:
        run_tasks(dense, tokenizer, ["hellaswag"])
    assert error.value.exit_code == 1
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: 1 / 0)
    with pytest.raises(SecateurError, match=r"task arc_easy cannot be loaded: ZeroDivisionError") as error:
        run_tasks(dense, tokenizer, ["arc_easy"])
    assert error.value.exit_code == 1


def test_code_of_the_hub_runs_only_if_allowed(dense, tokenizer, own_task, monkeypatch):
    class Half:
        def compute(self, **_):
            return 0.5

    monkeypatch.setattr(evaluate, "load", lambda name: Half())
    metric = "metric_list: [{metric: a_half, hf_evaluate: true, aggregation: mean, higher_is_better: true}]\n"
    writing = (
        'output_type: generate_until\ngeneration_kwargs: {max_gen_toks: 4}\ndoc_to_text: ":"\ndoc_to_target: "?"\n'
    )
    path = own_task("a", f"task: a\n{DATA}{writing}{metric}")
    with pytest.raises(
        UsageError, match=r"a task's metric 'a_half' is not lm-eval's but code of the hub: .*`trust_remote_code=True`"
    ):
        run_tasks(dense, tokenizer, [path])
    (score,) = run_tasks(dense, tokenizer, [path], limit=2, trust_remote_code=True)
    assert (score.metric, score.value) == ("a_half", 0.5)


@pytest.mark.usefixtures("some_of_lm_evals")
def test_tasks_of_lm_evals_own_may_want_code_of_the_hub(dense, tokenizer):
    with pytest.raises(UsageError, match=r"a task's metric 'code_eval' is not lm-eval's"):
        run_tasks(dense, tokenizer, ["humaneval"])


def test_code_that_a_model_writes_is_not_run(dense, tokenizer, own_task):
    path = own_task("a", f"task: a\nunsafe_code: true\n{DATA}{QUESTION}")
    with pytest.raises(UsageError, match="task a runs code that the model writes, which secateur does not"):
        run_tasks(dense, tokenizer, [path], trust_remote_code=True)


def test_code_beside_a_task_runs(dense, tokenizer, own_task, tmp_path):
    (tmp_path / "mine.py").write_text("def first(rows):\n    return rows.select(range(3))\n")
    path = own_task("a", f"task: a\nprocess_docs: !function mine.first\n{DATA}{QUESTION}")
    assert run_tasks(dense, tokenizer, [path])[0].samples == 3
    path = own_task("a", f"task: a\nprocess_docs: !function other.first\n{DATA}{QUESTION}")
    with pytest.raises(UsageError, match=r"a\.yaml cannot be loaded: ImportError: .*'other'.*; correct its file"):
        run_tasks(dense, tokenizer, [path])
    (tmp_path / "mine2.py").write_text("import a_package_that_is_not_there\n")
    path = own_task("a", f"task: a\nprocess_docs: !function mine2.first\n{DATA}{QUESTION}")
    with pytest.raises(UsageError, match=r"a\.yaml needs the package a_package_that_is_not_there, which is not inst"):
        run_tasks(dense, tokenizer, [path])


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("task: [a\n", r"a\.yaml is not YAML: .*line 2"),
        ("task: \x00\n", r"a\.yaml is not YAML: .*character #x0000"),
        ("task: !unknown a\n", r"a\.yaml is not YAML: .*!unknown"),
        ("- task\n", r"a\.yaml defines no task: it holds list, not keys and values"),
        ("", r"a\.yaml defines no task: it holds NoneType"),
        (DATA, r"a\.yaml defines no task: it has no `task: NAME`"),
        ("task: [one, two]\n", r"a\.yaml defines no task: it has no `task: NAME`"),
        ("task: a\ninclude: none.yaml\n", r"none\.yaml cannot be read: No such file"),
        ("task: a\ninclude: a.yaml\n", r"a\.yaml includes itself by way of .*a\.yaml"),
        ("task: a\n", r"a\.yaml cannot be loaded: .*; correct its file"),
        (f"task: a\n{DATA}{QUESTION}fewshots: 3\n", r"a\.yaml cannot be loaded: TypeError: .*'fewshots'"),
        (f"task: a\n{DATA}{QUESTION}test_split: tset\n", r"a\.yaml cannot be loaded: KeyError: 'tset'"),
        (f"task: a\n{DATA.replace('words.', 'none.')}{QUESTION}", r"a\.yaml cannot be loaded: .*none\.jsonl"),
        (f"task: a\n{DATA}{QUESTION}doc_to_text: '{{{{no}}}}'\n", r"a\.yaml cannot be loaded: UndefinedError: .*'no'"),
        (
            f"task: a\n{DATA}{QUESTION}metric_list: [{{metric: brier}}]\n",
            r"'brier' is not lm-eval's.*correct the name",
        ),
        (f"task: a\n{DATA}{QUESTION}metric_list: [{{metric: bleu}}]\n", r"task a gives no metric that is a number"),
        ("group: a\ntask: []\n", r"a\.yaml is a group without tasks"),
        ("group: a\n", r"a\.yaml is a group without tasks"),
    ],
)
def test_a_file_that_is_no_task(dense, tokenizer, own_task, text, problem, capfd):
    with pytest.raises(UsageError, match=problem) as error:
        run_tasks(dense, tokenizer, [own_task("a", text)])
    assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")


def test_a_group_of_what_is_not_there(dense, tokenizer, own_task, monkeypatch):
    # Without lm-eval's own, which take seconds to read.
    monkeypatch.setattr(
        task_files, "TaskManager", lambda include_path, include_defaults: TaskManager(None, include_path, False)
    )
    with pytest.raises(UsageError, match=r"a\.yaml cannot be loaded: "):
        run_tasks(dense, tokenizer, [own_task("a", "group: a\ntask: [b]\n")])


def test_a_file_that_lm_eval_does_not_read(dense, tokenizer, own_task):
    # It takes this for a circle.
    own_task("c", DATA)
    own_task("b", f"include: c.yaml\n{QUESTION}")
    with pytest.raises(UsageError, match=r"lm-eval does not read a in .*a\.yaml: compare it"):
        run_tasks(dense, tokenizer, [own_task("a", "include: [b.yaml, c.yaml]\ntask: a\n")])


def test_paths_without_a_task(dense, tokenizer, tmp_path):
    with pytest.raises(UsageError, match=r"none\.yaml cannot be read: No such file"):
        run_tasks(dense, tokenizer, [str(tmp_path / "none.yaml")])
    with pytest.raises(UsageError, match=r"is a folder: name the \.yaml file of a task or group in it"):
        run_tasks(dense, tokenizer, [str(tmp_path)])
    (tmp_path / "bytes.yaml").write_bytes(b"task: \xff")
    with pytest.raises(UsageError, match=r"bytes\.yaml is not YAML: .*byte 0xff"):
        run_tasks(dense, tokenizer, [str(tmp_path / "bytes.yaml")])


def test_names_that_clash(dense, tokenizer, own_task):
    with pytest.raises(UsageError, match="`tasks` has an empty name in it"):
        run_tasks(dense, tokenizer, [WORDS, ""])
    other = own_task("other", f"task: secateur_words\n{DATA}{QUESTION}")
    with pytest.raises(UsageError, match=r"other\.yaml and .*words\.yaml both define secateur_words: rename one"):
        run_tasks(dense, tokenizer, [WORDS, other])
    with pytest.raises(UsageError, match=r"words_group\.yaml and .*words\.yaml both have the task secateur_words"):
        run_tasks(dense, tokenizer, [GROUP, WORDS])
    assert run_tasks(dense, tokenizer, [WORDS, WORDS], limit=1) == run_tasks(dense, tokenizer, [WORDS], limit=1)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"few_shot": -1}, "`few_shot` -1 is too small: it starts at 0"),
        ({"limit": 0}, "`limit` 0 is too small: it starts at 1"),
        ({"batch": 0}, "`batch` 0 is too small: it starts at 1"),
    ],
)
def test_numbers_that_are_too_small(options, problem):
    with pytest.raises(UsageError, match=problem):
        run_tasks(None, None, [WORDS], **options)


def test_more_examples_than_there_are(dense, tokenizer):
    with pytest.raises(SecateurError, match=r"a task cannot be answered: AssertionError: .*4 that are available") as e:
        run_tasks(dense, tokenizer, [WORDS], few_shot=5)
    assert "\n" not in str(e.value)


def test_a_model_that_gives_nan_is_not_ranked(dense, tokenizer, model_of):
    damaged = secateur.load(model_of("llama"))
    damaged.model.norm.weight.data[0] = torch.nan
    with pytest.raises(SecateurError, match="log-likelihood of an answer is nan: its weights are damaged"):
        run_tasks(damaged, tokenizer, [WORDS])


@pytest.mark.parametrize(
    ("name", "found", "problem"),
    [
        ("lm_eval", None, "`tasks` needs lm_eval 0.4.12 or later, not none: pip install"),
        ("lm_eval", "0.4.9.2", "`tasks` needs lm_eval 0.4.12 or later, not 0.4.9.2: pip install"),
        ("datasets", "3.6.0", r'`tasks` needs datasets 4 or later, not 3.6.0: pip install "secateur\[tasks\]"'),
    ],
)
def test_packages_that_are_missing_or_old(monkeypatch, name, found, problem):
    def version(asked):
        if asked == name and found is None:
            raise PackageNotFoundError(asked)
        return found if asked == name else "9.9"

    monkeypatch.setattr(tasks, "version", version)
    with pytest.raises(UsageError, match=problem):
        run_tasks(None, None, ["hellaswag"])
