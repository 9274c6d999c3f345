"""Sweeps: the points are those of separate runs, whatever interrupts them, and what goes wrong is told."""

import dataclasses
import json
import math
import shlex
import shutil

import pytest
import torch
from conftest import prose

import secateur
from secateur.errors import CheckpointError, Interrupted, SecateurError, UsageError
from secateur.evaluation import reference
from secateur.evaluation.eval_text import Text
from secateur.evaluation.quality import Runner, evaluate
from secateur.pipeline import gradients
from secateur.pipeline import run as run_module
from secateur.pipeline import shared as shared_module
from secateur.recipes.command_line import flags_of
from secateur.recipes.recipe import Recipe
from secateur.recipes.strings import parse_recipes
from secateur.report.sweep_result import SweepResult
from secateur.runs import sweep as module
from secateur.runs.sweep import Sweep, sweep

RECIPES = "magnitude:0.5, wanda:0.3..0.5/0.2, sparsegpt:2:4, squeezellm:3, squeezellm:4"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "held-out.txt"
    file.write_text(prose(1500, seed=7), encoding="utf-8")
    return Text(str(file), seq_len=24, windows=6)


@pytest.fixture(scope="module")
def asked(model_of, text, text_file):
    """`asked("wanda:0.5")`: what a sweep of a tiny Llama goes through."""
    calibration = secateur.Calibration(str(text_file), 12, 24)

    def make(recipes=RECIPES, **options):
        named = [(name, dataclasses.replace(r, calibration=calibration)) for name, r in parse_recipes(recipes)]
        # Whole distributions, so that divergences are those of a separate run.
        return Sweep(str(model_of("llama")), named, text, cache_tokens=None, **options)

    return make


@pytest.fixture(scope="module")
def swept(asked, tmp_path_factory):
    """A sweep with its checkpoints left, and its folder."""
    out = tmp_path_factory.mktemp("swept") / "report"
    return sweep(asked(keep_models=True), out), out


def contents(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def folders(result, out):
    """The checkpoints, in the order of the points."""
    return [out / "models" / f"{module._plain(p.name)}-{module._key(p.name, p.asked)}" for p in result.points]


def test_each_point_is_what_its_recipe_gives_alone(swept, tmp_path):
    result, out = swept
    models = folders(result, out)
    assert len(result.points) == len(models) == 6
    for number, (point, folder) in enumerate(zip(result.points, models, strict=True)):
        alone = tmp_path / f"alone-{number}"
        report = secateur.compress(result.model, alone, Recipe.from_dict(point.asked))
        assert contents(alone) == contents(folder)
        assert report.recipe == point.recipe
        assert (report.sparsity, report.bits) == (point.sparsity, point.bits)
        assert {x.name: x.error for x in report.linears} == {name: x.error for name, x in point.linears.items()}


def test_each_point_measures_what_eval_does(swept, text):
    result, out = swept
    for point, folder in zip(result.points, folders(result, out), strict=True):
        found = evaluate(str(folder), result.model, text)
        measured = point.measured
        assert measured.perplexity == pytest.approx(found.quality.perplexity)
        assert measured.kl == pytest.approx(found.quality.kl, rel=1e-4)
        assert measured.agreement == found.quality.agreement
        assert measured.perplexity_interval == pytest.approx(found.quality.perplexity_interval)
        assert measured.bits_per_byte == pytest.approx(found.bits_per_byte)
        assert (measured.bytes, measured.bits_per_weight) == (found.size.bytes, found.size.bits_per_weight)
    dense = evaluate(result.model, None, text)
    assert result.dense.perplexity == pytest.approx(dense.quality.perplexity)
    assert (result.dense.kl, result.dense.agreement) == (None, None)


def test_the_command_of_a_point_repeats_it(swept, says, tmp_path):
    """Every flag is one that the command line has, and means the same recipe."""
    result, out = swept
    for number, (point, folder) in enumerate(zip(result.points, folders(result, out), strict=True)):
        program, *command = shlex.split(point.command)
        assert program == "secateur"
        again = tmp_path / f"again-{number}"
        code, _, err = says(*(str(again) if word == "OUT" else word for word in command), "--quiet")
        assert code == 0, err
        assert contents(again) == contents(folder)


@pytest.mark.parametrize(
    "options",
    [
        {
            "prune": "wanda",
            "pattern": "2:4",
            "refine": "dsnot",
            "targets": ["*.q_proj", "*.o_proj"],
            "dtype": "float32",
        },
        {
            "quantize": "gptq",
            "quantization": {"bits": 3, "group_size": "row", "symmetric": True, "search_range": False},
        },
        {"quantize": "gptq", "quantization": {"symmetric": False, "search_range": True, "damping": 1e-05}},
        {"prune": "magnitude", "sparsity": 0.3, "ignore": ["*.v_proj"], "format": "dense"},
        {
            "prune": "wanda",
            "sparsity": 0.5,
            "calibration": {"source": "a b.txt", "samples": 3, "seed": 4, "text_field": "x"},
        },
    ],
)
def test_flags_give_the_recipe_that_they_are_of(options, says, monkeypatch, tmp_path):
    recipe = Recipe.from_dict(options)
    seen = []

    def catch(model, out, given, **_):
        seen.append(given)
        raise UsageError("enough")

    monkeypatch.setattr("secateur.runs.compress.compress", catch)
    says("compress", "demo", tmp_path / "out", *flags_of(recipe))
    assert seen == [recipe]


def test_what_is_left_on_disk(swept, asked, tmp_path):
    _, out = swept
    report = {"index.html", "points.csv", "frontier.png", "sweep.json"}
    assert {path.name for path in out.iterdir()} == report | {"models"}
    sweep(asked("magnitude:0.5"), tmp_path / "report")
    assert {path.name for path in (tmp_path / "report").iterdir()} == report
    assert [path.name for path in tmp_path.iterdir()] == ["report"]


def test_the_result_is_kept_as_it_was(swept, tmp_path):
    result, out = swept
    assert SweepResult.read(out / "sweep.json") == result
    hopeless = dataclasses.replace(result.points[0].measured, perplexity=math.inf, perplexity_interval=(5.0, math.inf))
    result = dataclasses.replace(result, points=(dataclasses.replace(result.points[0], measured=hopeless),))
    (tmp_path / "sweep.json").write_text(result.to_json())
    assert "Infinity" not in result.to_json()
    assert SweepResult.read(tmp_path / "sweep.json") == result


def test_squared_gradients_and_text_are_had_once(asked, monkeypatch, tmp_path):
    seen = []

    def counting(owner, name):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args: seen.append(name) or original(*args))

    counting(shared_module, "calibration_ids")
    counting(gradients.KeptFisher, "gather")
    sweep(asked("squeezellm:3, squeezellm:4, wanda:0.5"), tmp_path / "report")
    assert seen == ["calibration_ids", "gather"]


# --- going on


class Stopping:
    """Raises at the so-manyth recipe."""

    def __init__(self, monkeypatch, at, error=Interrupted):
        self.compressed = []
        original = module.compress

        def compress(opened, out, *args, **options):
            self.compressed.append(out.name)
            if len(self.compressed) == at:
                raise error
            return original(opened, out, *args, **options)

        monkeypatch.setattr(module, "compress", compress)


def without_times(result):
    def plain(measured):
        return dataclasses.replace(measured, seconds=0)

    points = [dataclasses.replace(p, measured=plain(p.measured), seconds=0, peak_bytes=0) for p in result.points]
    return dataclasses.replace(result, dense=plain(result.dense), points=tuple(points))


def test_an_interrupted_sweep_goes_on(asked, monkeypatch, tmp_path):
    recipes = "magnitude:0.5, wanda:0.5, sparsegpt:0.5"
    out, kept = tmp_path / "report", tmp_path / "report.partial"
    stopping = Stopping(monkeypatch, at=3)
    with pytest.raises(Interrupted) as stop:
        sweep(asked(recipes), out)
    assert stop.value.left == f"what is done is kept in {kept}: run again with `resume` to go on"
    assert not out.exists()
    with pytest.raises(UsageError, match="holds a sweep that was interrupted: give `resume`"):
        sweep(asked(recipes), out)
    # Two are asked for that were not, before and behind the others, and one no more.
    again = "rtn:8, wanda:0.5, sparsegpt:0.5, rtn:4"
    found = sweep(asked(again), out, resume=True)
    names = [name.rpartition("-")[0] for name in stopping.compressed]
    assert names == ["magnitude-0.5", "wanda-0.5", "sparsegpt-0.5", "rtn-8", "sparsegpt-0.5", "rtn-4"]
    assert [path.name for path in tmp_path.iterdir()] == ["report"]
    assert without_times(found) == without_times(sweep(asked(again), tmp_path / "whole"))


def test_points_that_were_not_come_to_again_are_kept_until_the_end(asked, monkeypatch, tmp_path):
    """The second run is interrupted before it has come to what the first has done."""
    Stopping(monkeypatch, at=3)
    with pytest.raises(Interrupted):
        sweep(asked("magnitude:0.5, wanda:0.5, rtn:8"), tmp_path / "report")
    Stopping(monkeypatch, at=1)
    with pytest.raises(Interrupted):
        sweep(asked("rtn:4, magnitude:0.5, wanda:0.5"), tmp_path / "report", resume=True)
    kept = SweepResult.read(tmp_path / "report.partial" / "sweep.json")
    assert [point.name for point in kept.points] == ["magnitude:0.5", "wanda:0.5"]


def test_an_interrupted_compression_goes_on(asked, monkeypatch, tmp_path):
    """In the first recipe, too: the dense model is not measured again, nor are blocks solved again."""
    original, stopped, measured = run_module.solve_block, [], []

    def solve_block(run, journey, number):
        if run.partial.blocks == 1 and not stopped:
            stopped.append(number)
            raise Interrupted
        original(run, journey, number)

    monkeypatch.setattr(run_module, "solve_block", solve_block)
    keeping = reference._keep
    monkeypatch.setattr(reference, "_keep", lambda *args: measured.append(1) or keeping(*args))
    with pytest.raises(Interrupted):
        sweep(asked("sparsegpt:0.5"), tmp_path / "report")
    assert (stopped, len(measured)) == ([1], 6)
    told = []
    sweep(asked("sparsegpt:0.5"), tmp_path / "report", resume=True, progress=lambda step: told.append(step.stage))
    assert len(measured) == 6
    assert any(stage.startswith("resuming at block ") for stage in told)


def test_what_failed_is_tried_again(asked, monkeypatch, tmp_path):
    original, failing = module.compress, [True]

    def compress(opened, out, recipe, **options):
        if failing and recipe.prune == "wanda":
            raise SecateurError("the disk is full; 1 block is kept") from SecateurError("the disk is full")
        if failing and recipe.quantize:
            raise Interrupted
        return original(opened, out, recipe, **options)

    monkeypatch.setattr(module, "compress", compress)
    with pytest.raises(Interrupted):
        sweep(asked("wanda:0.5, rtn:4"), tmp_path / "report")
    kept = SweepResult.read(tmp_path / "report.partial" / "sweep.json")
    assert [point.failure for point in kept.points] == ["the disk is full"]
    failing.clear()
    found = sweep(asked("wanda:0.5, rtn:4"), tmp_path / "report", resume=True)
    assert [point.failure for point in found.points] == [None, None]


@pytest.mark.thin(2)
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), torch.linalg.LinAlgError("singular")])
def test_memory_and_matrices_fail_a_recipe_only(error, asked, monkeypatch, tmp_path):
    original = module.compress

    def compress(opened, out, recipe, **options):
        if recipe.prune == "wanda":
            raise error
        return original(opened, out, recipe, **options)

    monkeypatch.setattr(module, "compress", compress)
    found = sweep(asked("wanda:0.5, rtn:4"), tmp_path / "report")
    assert [point.failure for point in found.points] == [str(error), None]


def test_a_folder_that_is_no_sweep_is_left_alone(asked, model_of, tmp_path):
    for name in ("report.partial", "model.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("mine")
    for resume in (False, True):
        with pytest.raises(UsageError, match="stands in the way"):
            sweep(asked("rtn:4"), tmp_path / "report", resume=resume)
        with pytest.raises(UsageError, match="stands in the way and holds mine"):
            secateur.compress(str(model_of("llama")), tmp_path / "model", Recipe(quantize="rtn"), resume=resume)
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("*/*")} == {
        "report.partial/mine",
        "model.partial/mine",
    }


def test_a_sweep_and_a_run_do_not_take_each_others_folder(asked, model_of, monkeypatch, tmp_path):
    Stopping(monkeypatch, at=2)
    with pytest.raises(Interrupted):
        sweep(asked("rtn:4, wanda:0.5"), tmp_path / "report")
    with pytest.raises(UsageError, match="stands in the way"):
        secateur.compress(str(model_of("llama")), tmp_path / "report", Recipe(quantize="rtn"), resume=True)
    assert len(SweepResult.read(tmp_path / "report.partial" / "sweep.json").points) == 1


def test_kept_checkpoints_are_those_of_the_points(asked, monkeypatch, tmp_path):
    """One is there already, one was asked for and is not any more, and one has to be made again."""
    Stopping(monkeypatch, at=4)
    with pytest.raises(Interrupted):
        sweep(asked("magnitude:0.5, rtn:8, rtn:4, wanda:0.5", keep_models=True), tmp_path / "report")
    made = {path.name.rpartition("-")[0]: path for path in (tmp_path / "report.partial" / "models").iterdir()}
    shutil.rmtree(made["rtn-4"])
    found = sweep(asked("magnitude:0.5, rtn:4", keep_models=True), tmp_path / "report", resume=True)
    kept = folders(found, tmp_path / "report")
    assert sorted((tmp_path / "report" / "models").iterdir()) == sorted(kept)
    assert all(secateur.verify(folder) == [] for folder in kept)


def test_another_sweep_is_not_gone_on_with(asked, monkeypatch, tmp_path):
    Stopping(monkeypatch, at=2)
    with pytest.raises(Interrupted):
        sweep(asked("magnitude:0.5, wanda:0.5"), tmp_path / "report")
    other = dataclasses.replace(asked("wanda:0.5"), text=dataclasses.replace(asked().text, windows=5))
    with pytest.raises(UsageError, match="was begun with another text windows, 6 and not 5"):
        sweep(other, tmp_path / "report", resume=True)
    assert len(sweep(other, tmp_path / "report", overwrite=True).points) == 1


def test_a_sweep_that_was_stopped_before_the_dense_model_was_measured_leaves_nothing(asked, monkeypatch, tmp_path):
    def stop(*_):
        raise Interrupted

    monkeypatch.setattr(reference, "_keep", stop)
    with pytest.raises(Interrupted) as stopped:
        sweep(asked("magnitude:0.5"), tmp_path / "report")
    assert stopped.value.left == "nothing is left behind"
    assert list(tmp_path.iterdir()) == []


def test_damaged_results_are_said(asked, monkeypatch, tmp_path):
    Stopping(monkeypatch, at=2)
    with pytest.raises(Interrupted):
        sweep(asked("magnitude:0.5, wanda:0.5"), tmp_path / "report")
    kept = tmp_path / "report.partial" / "sweep.json"
    for content in ("{", "[]", json.dumps({"layout": 99}), json.dumps({"layout": 1})):
        kept.write_text(content)
        with pytest.raises(CheckpointError, match=r"sweep\.json .*again"):
            SweepResult.read(kept)


# --- what goes wrong


def test_a_recipe_that_fails_is_told_and_the_others_go_on(says, model_of, text, text_file, tmp_path):
    """32 input features do not divide into groups of 7."""
    out = tmp_path / "report"
    code, stdout, err = says(
        *("sweep", model_of("llama"), "--recipes", "wanda:0.5, wanda:3:7, magnitude:0.5", "--out", out),
        *("--calibration", text_file, "--samples", 12, "--calibration-seq-len", 24),
        *("--data", text.data, "--seq-len", 24, "--windows", 6),
    )
    assert code == 1
    assert "failed: wanda:3:7: model.layers.0." in err
    assert "which do not divide into groups of 7" in err
    assert "Traceback" not in err
    names = [point.name for point in SweepResult.read(out / "sweep.json").points if point.failure is None]
    assert names == ["wanda:0.5", "magnitude:0.5"]
    assert "wanda:0.5" in stdout
    assert "3:7" in (out / "index.html").read_text(encoding="utf-8")
    assert not list(out.glob("**/*.partial"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--recipes": "wandaa:0.5"}, "character 1 in"),
        ({"--recipes": ""}, "--recipes is empty"),
        ({"--recipes": " "}, "character 2 in"),
        ({"--windows": 0}, "--windows"),
        ({"--windows": 100000}, "give more text, or lower --windows"),
        ({"--data": "missing.txt"}, "missing.txt"),
        ({"--stride": 25}, "--stride 25"),
        ({"--max-memory": "banana"}, "'banana' is not a size"),
        ({"--recipes": "wanda:0.5", "--calibration": "missing.txt"}, "missing.txt"),
        ({"--device": "gpu"}, "--device gpu"),
    ],
)
def test_wrong_usage_starts_nothing(change, message, says, model_of, text, tmp_path):
    options = {"--recipes": "magnitude:0.5", "--data": text.data, "--seq-len": 24, "--windows": 6, **change}
    words = [word for pair in options.items() for word in pair]
    code, stdout, err = says("sweep", model_of("llama"), "--out", tmp_path / "report", *words)
    assert (code, stdout) == (2, "")
    assert message in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_a_report_that_exists_is_not_overwritten(asked, tmp_path):
    out = tmp_path / "report"
    out.mkdir()
    (out / "mine").write_text("mine")
    with pytest.raises(UsageError, match="exists already"):
        sweep(asked("magnitude:0.5"), out)
    with pytest.raises(UsageError, match="is not replaced: secateur did not write mine, which would be lost"):
        sweep(asked("magnitude:0.5"), out, overwrite=True)
    assert (out / "mine").read_text() == "mine"


@pytest.mark.thin(2)
@pytest.mark.parametrize("keep_models", [False, True])
def test_a_report_is_replaced(keep_models, asked, tmp_path):
    out = tmp_path / "report"
    sweep(asked("magnitude:0.5", keep_models=keep_models), out)
    with pytest.raises(UsageError, match="give `overwrite` to replace it"):
        sweep(asked("rtn:4"), out)
    if keep_models:  # what somebody put into a model's folder is not lost either
        (model,) = (out / "models").iterdir()
        (model / "adapter").write_text("mine")
        with pytest.raises(UsageError, match=f"did not write models/{model.name}/adapter, which would be lost"):
            sweep(asked("rtn:4"), out, overwrite=True)
        (model / "adapter").unlink()
    sweep(asked("rtn:4"), out, overwrite=True)
    assert [point.name for point in SweepResult.read(out / "sweep.json").points] == ["rtn:4"]
    assert [path.name for path in tmp_path.iterdir()] == ["report"]


def test_a_model_without_a_tokenizer(own_model, asked, tmp_path):
    folder = own_model("llama")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(CheckpointError, match="has no usable tokenizer"):
        sweep(dataclasses.replace(asked("magnitude:0.5"), model=str(folder)), tmp_path / "report")
    assert [path.name for path in tmp_path.iterdir()] == ["own-llama"]


def test_many_processes_are_refused(asked, monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="runs in one process"):
        sweep(asked("magnitude:0.5"), tmp_path / "report")


def test_evaluation_runs_as_it_is_told(asked, tmp_path):
    found = sweep(asked("magnitude:0.5", runner=Runner(dtype="bfloat16", batch_tokens=48)), tmp_path / "report")
    assert found.machine["dtype"] == "bfloat16"
    exact = sweep(asked("magnitude:0.5"), tmp_path / "exact")
    assert found.points[0].measured.perplexity == pytest.approx(exact.points[0].measured.perplexity, rel=0.02)
    assert found.points[0].measured.perplexity != exact.points[0].measured.perplexity


def test_a_single_window_has_no_intervals(asked, text, tmp_path):
    one = dataclasses.replace(asked("magnitude:0.5"), text=dataclasses.replace(text, windows=1))
    found = sweep(one, tmp_path / "report")
    assert found.points[0].measured.perplexity_interval is None
    assert (tmp_path / "report" / "index.html").stat().st_size > 10_000
