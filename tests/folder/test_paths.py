"""What may be written where: folders that are replaced, empty names, files that cannot be written, what a failed run leaves."""

import json
import os
import stat
from pathlib import Path

import pytest
import torch

import secateur
from secateur.checkpoint.export import export
from secateur.errors import UsageError
from secateur.evaluation.eval_text import Text
from secateur.evaluation.gate.baseline import Baseline
from secateur.evaluation.perplexity import CutText
from secateur.evaluation.reference import keep_reference
from secateur.folder.manifest import MANIFEST_NAME
from secateur.folder.paths import check_file, check_free
from secateur.folder.writer import staged_folder, write_manifest
from secateur.pipeline import run as run_module
from secateur.recipes.recipe import Calibration, Recipe
from secateur.runs.sweep import Sweep, sweep

RTN = Recipe(quantize="rtn")
LONG = "x" * 300


def tree(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def written(folder, **files):
    """A folder as secateur leaves it."""
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_text(content)
    write_manifest(folder, {})
    return folder


def each_command(model, out, *, data="docs", calibration="docs"):
    """All that takes a folder OUT and may be told to replace it, in Python and as a command."""
    recipe = Recipe("wanda", 0.5, calibration=Calibration(str(calibration), 8, 24))
    text = Text(str(data), 24, 2)
    return {
        "compress": lambda: secateur.compress(str(model), out, recipe, overwrite=True),
        "export": lambda: export(str(model), out, "dense", overwrite=True),
        "sweep": lambda: sweep(Sweep(str(model), [("one", recipe)], text), out, overwrite=True),
    }


def command(name, model, out):
    options = {
        "compress": ["compress", model, out, "--quantize", "rtn"],
        "export": ["export", model, out, "--to", "dense"],
        "sweep": ["sweep", model, "--recipes", "rtn:4", "--out", out, "--windows", 2, "--seq-len", 24],
    }
    return [*options[name], "--overwrite", "--quiet"]


COMMANDS = ("compress", "export", "sweep")


# --- what --overwrite replaces


@pytest.mark.parametrize("name", COMMANDS)
def test_what_others_wrote_is_not_replaced(name, says, model_of, tmp_path):
    project = tmp_path / "project"
    (project / "src").mkdir(parents=True)
    for file in ("a.py", "b.txt", "src/c.py", ".git"):
        (project / file).write_text("precious")
    before = tree(tmp_path)
    for given in ("project", "project/../project", "link"):
        if given == "link":
            (tmp_path / "link").symlink_to("project")
            before.add("link")
        code, out, err = says(*command(name, model_of("llama"), tmp_path / given))
        assert (code, out) == (2, "")
        assert err == (
            f"error: {project} is not replaced: secateur did not write .git, a.py, b.txt and 1 more, which would be lost; "
            "choose another folder, or remove it yourself\n"
        )
        assert tree(tmp_path) == before


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("where", [".", "..", "inside/.."])
def test_the_current_folder_is_not_replaced(name, where, says, model_of, tmp_path, monkeypatch):
    here = written(tmp_path / "here", a="1")
    (here / "inside").mkdir()
    monkeypatch.chdir(here / "inside" if where == ".." else here)
    code, _, err = says(*command(name, model_of("llama"), where))
    assert code == 2
    said = "holds" if where == ".." else "is"
    assert f"{here} is not replaced: it {said} the current folder, and a, inside, secateur.json would be lost" in err
    assert tree(tmp_path) == {"here", "here/a", "here/inside", f"here/{MANIFEST_NAME}"}


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("up", [0, 1, 2])
def test_a_folder_that_holds_the_model_is_not_replaced(name, up, own_model, tmp_path):
    """Nor if secateur wrote it, as where a checkpoint is compressed further; whichever way the two are called."""
    model = tmp_path / "a" / "b" / "model"
    export(str(own_model("llama")), model, "dense")
    for folder in (model.parent, model.parent.parent):
        write_manifest(folder, {})
    (tmp_path / "link").symlink_to(model)
    before, out = tree(tmp_path), [model, *model.parents][up]
    for called in (model, tmp_path / "link", tmp_path / "a" / ".." / "a" / "b" / "model"):
        with pytest.raises(UsageError, match=f"{out} is not replaced: it {'holds' if up else 'is'} MODEL, and .* lost"):
            each_command(called, out)[name]()
        assert tree(tmp_path) == before


@pytest.mark.parametrize("name", ["compress", "sweep"])
def test_a_folder_that_holds_the_text_is_not_replaced(name, model_of, text_file, tmp_path):
    out = written(tmp_path / "out", **{"text.txt": text_file.read_text()})
    before = tree(out)
    with pytest.raises(UsageError, match="out is not replaced: it holds the calibration text"):
        each_command(model_of("llama"), out, calibration=out / "text.txt")[name]()
    if name == "sweep":
        with pytest.raises(UsageError, match="out is not replaced: it holds the text of `data`"):
            each_command(model_of("llama"), out, data=out / "text.txt")[name]()
    assert tree(out) == before


def test_a_data_set_with_a_config_and_a_split_is_an_input_too(tmp_path):
    out = written(tmp_path / "out")
    check_free(out, True, {"MODEL": None, "the text": f"{tmp_path}/other:plain:train"})
    with pytest.raises(UsageError, match="it is the text"):
        check_free(out, True, {"the text": f"{out}:plain:train"})


@pytest.mark.thin(2)
@pytest.mark.parametrize("name", COMMANDS)
def test_what_secateur_wrote_and_empty_folders_are_replaced(name, says, model_of, tmp_path):
    """Whatever it is: a checkpoint, a dense export, a report."""
    (tmp_path / "out").mkdir()
    for before in ("compress", "export", "sweep"):
        assert says(*command(before, model_of("llama"), tmp_path / "out"))[0] == 0
        assert says(*command(name, model_of("llama"), tmp_path / "out"))[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_was_put_beside_is_not_lost(model_of, tmp_path):
    out = tmp_path / "out"
    secateur.compress(str(model_of("llama")), out, RTN)
    (out / "runs").mkdir()
    (out / "runs" / "adapter.safetensors").write_text("mine")
    with pytest.raises(UsageError, match=r"secateur did not write runs/adapter\.safetensors, which would be lost"):
        secateur.compress(str(model_of("llama")), out, RTN, overwrite=True)
    # Nor is it advised, where it would not help.
    with pytest.raises(UsageError, match="exists already: choose another folder; `overwrite` does not replace it"):
        secateur.compress(str(model_of("llama")), out, RTN)
    assert (out / "runs" / "adapter.safetensors").read_text() == "mine"


def test_what_was_put_there_while_a_run_went_on_is_not_lost(tmp_path):
    out = written(tmp_path / "out", a="old")

    def run():
        with staged_folder(out, overwrite=True) as folder:
            (folder / "a").write_text("new")
            (out / "mine").write_text("mine")

    with pytest.raises(UsageError, match="did not write mine"):
        run()
    assert (out / "a").read_text() == "old"


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"files": 1}'])
def test_a_file_that_is_called_like_a_manifest_is_none(content, tmp_path):
    (tmp_path / "out").mkdir()
    for name in (MANIFEST_NAME, "sweep.json"):
        (tmp_path / "out" / name).write_text(content)
        with pytest.raises(UsageError, match=rf"did not write .*{name}"):
            check_free(tmp_path / "out", overwrite=True)


def test_the_link_stays_and_what_it_leads_to_is_replaced(model_of, tmp_path):
    place = written(tmp_path / "disk" / "place", a="old")
    (tmp_path / "out").symlink_to(place)
    secateur.compress(str(model_of("llama")), tmp_path / "out", RTN, overwrite=True)
    assert (tmp_path / "out").is_symlink()
    assert not (place / "a").exists()
    assert secateur.verify(tmp_path / "out") == []
    assert {path.name for path in tmp_path.iterdir()} == {"disk", "out"}
    assert [path.name for path in place.parent.iterdir()] == ["place"]


def test_a_link_that_leads_nowhere_yet(model_of, tmp_path):
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "place")
    export(str(model_of("llama")), tmp_path / "out", "dense")
    assert secateur.verify(tmp_path / "disk" / "place") == []


def test_the_root_is_no_place(model_of):
    for run in each_command(model_of("llama"), "/").values():
        with pytest.raises(UsageError, match="is the root of all folders"):
            run()


# --- OUT.partial


@pytest.mark.parametrize("name", ["compress", "sweep"])
@pytest.mark.parametrize("file", ["mine", "out", "models"])
def test_a_neighbour_that_only_has_the_name_is_not_removed(name, file, model_of, tmp_path):
    (tmp_path / "out.partial" / file).mkdir(parents=True)
    (tmp_path / "out.partial" / file / "precious").write_text("mine")
    with pytest.raises(UsageError, match=f"out.partial stands in the way and holds {file}, which is of no .*: move it"):
        each_command(model_of("llama"), tmp_path / "out")[name]()
    assert tree(tmp_path) == {"out.partial", f"out.partial/{file}", f"out.partial/{file}/precious"}


def test_an_unfinished_run_is_not_removed_that_holds_the_model(own_model, tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "lock").touch()
    model = own_model("llama").rename(tmp_path / "out.partial" / "out")
    before = tree(tmp_path)
    with pytest.raises(
        UsageError, match=r"out\.partial stands in the way and is not removed, since it holds MODEL: move"
    ):
        secateur.compress(str(model), tmp_path / "out", RTN, overwrite=True)
    assert tree(tmp_path) == before


# --- empty names


@pytest.mark.parametrize(
    ("args", "name"),
    [
        (["compress", "", "OUT", "--quantize", "rtn"], "MODEL"),
        (["compress", "M", "", "--quantize", "rtn", "--overwrite"], "OUT"),
        (["compress", "M", "OUT", "--quantize", "rtn", "--plot", ""], "--plot"),
        (["compress", "M", "OUT", "--quantize", "rtn", "--calibration", ""], "--calibration"),
        (["compress", "M", "OUT", "--recipe", ""], "--recipe"),
        (["plan", "M", "--quantize", "rtn", "--out", ""], "--out"),
        (["export", "M", "", "--to", "dense", "--overwrite"], "OUT"),
        (["export", "", "OUT", "--to", "dense"], "MODEL"),
        (["sweep", "M", "--recipes", "rtn:4", "--out", "", "--overwrite"], "--out"),
        (["sweep", "M", "--recipes", "rtn:4", "--out=", "--overwrite"], "--out"),
        (["sweep", "M", "--recipes", "rtn:4", "--out", "OUT", "--data", ""], "--data"),
        (["eval", "M", "--reference", ""], "--reference"),
        (["eval", "M", "--reference", "M", "--reference-cache", ""], "--reference-cache"),
        (["eval", "M", "--json="], "--json"),
        (["eval", "M", "--tasks", ""], "--tasks"),
        (["gate", "M", "--baseline", ""], "--baseline"),
        (["gate", "M", "--baseline", "B", "--junit", ""], "--junit"),
        (["verify", ""], "OUT"),
        (["inspect", ""], "MODEL"),
        (["bench", ""], "MODEL"),
        (["generate", "", "word"], "MODEL"),
        (["recipes", ""], "NAME"),
    ],
)
def test_an_empty_name_is_refused(args, name, says, own_model, tmp_path, monkeypatch):
    """The current folder is a model here, and one that may be replaced: what an empty path used to mean."""
    export(str(own_model("llama")), tmp_path / "here", "dense")
    monkeypatch.chdir(tmp_path / "here")
    before = tree(tmp_path)
    code, out, err = says(*[str(tmp_path / "own-llama") if word == "M" else word for word in args])
    assert (code, out) == (2, "")
    assert err == f"error: {name} is empty: give a value, or leave it out (the current folder is called '.')\n"
    assert tree(tmp_path) == before


def test_an_empty_name_is_refused_in_python(own_model, tmp_path, monkeypatch):
    model = str(own_model("llama"))
    monkeypatch.chdir(model)
    text = Text("docs", 24, 2)
    for run in (
        lambda: secateur.compress("", tmp_path / "out", RTN),
        lambda: secateur.compress(model, "", RTN, overwrite=True),
        lambda: secateur.forecast(model, RTN, out=""),
        lambda: secateur.load(""),
        lambda: secateur.verify(""),
        lambda: export(model, "", "dense", overwrite=True),
        lambda: sweep(Sweep(model, [("rtn", RTN)], text), "", overwrite=True),
        lambda: Calibration(""),
        lambda: Text(""),
    ):
        with pytest.raises(UsageError, match="is empty"):
            run()


# --- files that cannot be written


@pytest.fixture
def idle(monkeypatch):
    """No model is opened: whoever tries has begun the work."""

    def fail(*_, **__):
        raise AssertionError("the work was begun")

    for place in ("secateur.model.source.open_folder", "secateur.model.source.download"):
        monkeypatch.setattr(place, fail)


def with_file(option, file, model, tmp_path):
    """The commands that have an option for a file, with this file."""
    baseline = tmp_path / "kept.json"
    commands = {
        "--plot": [["compress", model, tmp_path / "out", "--quantize", "rtn"], ["bench", model]],
        "--json": [
            ["eval", model],
            ["gate", model, "--baseline", baseline],
            ["sweep", model, "--recipes", "rtn:4", "--out", tmp_path / "out"],
            ["verify", model],
            ["bench", model],
        ],
        "--junit": [["gate", model, "--baseline", baseline]],
        "--markdown": [["gate", model, "--baseline", baseline]],
        "--baseline": [["gate", model, "--write"], ["gate", model, "--write", "--overwrite"]],
    }
    return [[*args, option, file] for args in commands[option]]


@pytest.mark.parametrize("option", ["--plot", "--json", "--junit", "--markdown", "--baseline"])
@pytest.mark.parametrize("what", ["a folder", "no folder", "a name that is too long", "a file as a folder"])
def test_a_file_that_cannot_be_written_is_said_before_the_work(option, what, idle, says, model_of, tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder.png").mkdir()
    file, why = {
        "a folder": (tmp_path / "folder.png", "Is a directory"),
        "no folder": (tmp_path / "no" / "x.png", f"there is no folder {tmp_path / 'no'}"),
        "a name that is too long": (tmp_path / f"{LONG}.png", "File name too long"),
        "a file as a folder": (tmp_path / "file" / "x.png", ""),
    }[what]
    before = tree(tmp_path)
    for args in with_file(option, file, model_of("llama"), tmp_path):
        code, out, err = says(*args)
        assert (code, out) == (2, ""), (args, err)
        assert err.startswith(f"error: {option} {file} cannot be written: {why}"), (args, err)
        assert len(err.splitlines()) == 1
        assert tree(tmp_path) == before


@pytest.mark.parametrize("option", ["--json", "--plot", "--baseline"])
def test_a_run_that_fails_leaves_its_files_alone(option, says, tmp_path):
    """One that is there keeps its bytes, and none is made."""
    file = tmp_path / "x.png"
    for content in (None, '{"layout": 1'):
        if content is not None:
            file.write_text(content)
        for args in with_file(option, file, tmp_path / "no-model", tmp_path):
            code, _, err = says(*args)
            assert code != 0
            assert f"{file} cannot be written" not in err
            assert (file.read_text() if file.exists() else None) == content


def test_a_file_in_the_folder_that_is_made_anew(idle, says, model_of, tmp_path):
    for args, option, file in (
        (["compress", model_of("llama"), tmp_path / "out", "--quantize", "rtn"], "--plot", tmp_path / "out" / "a.png"),
        (command("sweep", model_of("llama"), tmp_path / "out"), "--json", tmp_path / "x" / ".." / "out" / "a" / "b"),
    ):
        code, _, err = says(*args, option, file)
        assert (code, err) == (
            2,
            f"error: {option} {file} lies in {tmp_path / 'out'}, which is made anew as a whole: name a file outside of it\n",
        )


def test_devices_pipes_and_links_are_files_too(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("elsewhere")
    for file in (Path("/dev/null"), tmp_path / "pipe", tmp_path / "link", Path("-"), tmp_path / "new"):
        check_file("--json", file)
    assert {path.name for path in tmp_path.iterdir()} == {"pipe", "link"}


def test_only_a_baseline_is_replaced_by_a_baseline(idle, says, own_model):
    model = own_model("llama")
    file, before = model / "config.json", (model / "config.json").read_bytes()
    code, _, err = says("gate", model, "--write", "--baseline", file, "--overwrite")
    assert (code, err) == (
        2,
        f"error: {file} exists already and is no baseline, which would be lost: choose another name\n",
    )
    assert file.read_bytes() == before


def test_a_folder_is_no_baseline(says, model_of, tmp_path):
    with pytest.raises(UsageError, match=f"no baseline {tmp_path}, which is a folder"):
        Baseline.read(tmp_path)


def test_the_table_comes_before_the_files(says, model_of, text_file, tmp_path, monkeypatch):
    """A disk may be full by the time."""

    def full(*_, **__):
        raise UsageError("--json x cannot be written: No space left on device")

    monkeypatch.setattr("secateur.commands.result_files.write_text", full)
    code, out, err = says(
        *("eval", model_of("llama"), "--data", text_file, "--windows", 2, "--seq-len", 24),
        *("--json", tmp_path / "x"),
    )
    assert code == 2
    assert "perplexity" in out
    assert err == "error: --json x cannot be written: No space left on device\n"


def test_a_cache_that_cannot_be_written_is_found_before_the_model_runs(tmp_path):
    def load():
        raise AssertionError("the model was loaded")

    (tmp_path / "file").write_text("x")
    ids_KS = torch.zeros(2, 4, dtype=torch.long)
    for cache in (tmp_path / "file", tmp_path / "file" / "in", tmp_path / LONG):
        with pytest.raises(UsageError, match=f"{cache} cannot be written: "):
            keep_reference(cache, {}, load, CutText(ids_KS))
    with pytest.raises(AssertionError, match="was loaded"):
        keep_reference(tmp_path / "a" / "b", {}, load, CutText(ids_KS))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# --- errors of the system, what is left, permissions


@pytest.fixture
def nobody(tmp_path, monkeypatch):
    """A user for whom some folders are locked."""
    if os.getuid() == 0:
        os.seteuid(65534)
        yield
        os.seteuid(0)
    else:
        yield


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("out", [LONG, f"{LONG}/out", f"a/{LONG}", "file/out", "a/b/" + "y" * 252])
def test_a_folder_that_cannot_be_made_is_one_line(name, out, says, model_of, tmp_path):
    (tmp_path / "file").write_text("x")
    code, _, err = says(*command(name, model_of("llama"), tmp_path / out))
    if name == "export" and out.endswith("y"):
        assert code == 0  # it needs no neighbour of a longer name
        return
    assert code == 2
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    assert "OSError" not in err
    assert "cannot be created: " in err
    assert tree(tmp_path) == {"file"}


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("mode", [0o000, 0o555])
def test_a_locked_parent_is_one_line(name, mode, says, model_of, tmp_path, request):
    model = model_of("llama")
    (tmp_path / "locked").mkdir()
    (tmp_path / "locked").chmod(mode)
    opened = [folder for folder in tmp_path.parents if not folder.stat().st_mode & 0o001]
    modes = {folder: stat.S_IMODE(folder.stat().st_mode) for folder in (*opened, tmp_path)}
    for folder in modes:
        folder.chmod(0o711)
    for folder in (model, *model.parents[:2]):
        modes.setdefault(folder, stat.S_IMODE(folder.stat().st_mode))
        folder.chmod(0o755)
    try:
        request.getfixturevalue("nobody")
        code, _, err = says(*command(name, model, tmp_path / "locked" / "new" / "out"))
    finally:
        if os.getuid() == 0:
            os.seteuid(0)
        for folder, before in modes.items():
            folder.chmod(before)
    assert code == 2
    assert err.startswith("error: ")
    assert err.endswith("cannot be created: Permission denied\n")
    assert len(err.splitlines()) == 1


def test_a_model_of_a_name_that_is_too_long(says, tmp_path):
    for args in (
        ["inspect", tmp_path / LONG],
        ["export", tmp_path / LONG, tmp_path / "out", "--to", "dense"],
        ["verify", tmp_path / LONG],
        ["gate", "x", "--baseline", tmp_path / LONG],
        ["plan", tmp_path / LONG, "--quantize", "rtn", "--out", tmp_path / LONG, "--quiet"],
    ):
        code, _, err = says(*args)
        assert code == 2, err
        assert "OSError" not in err
        assert len(err.splitlines()) == 1


@pytest.mark.parametrize("name", COMMANDS)
def test_parents_are_gone_when_a_run_fails(name, model_of, tmp_path, monkeypatch):
    out, begun = tmp_path / "a" / "b" / "out", []

    def fail(*_, **__):
        begun.append((tmp_path / "a" / "b").exists())
        raise secateur.CheckpointError("no such luck")

    for place in ("model.in_memory.open_source", "checkpoint.export.open_source"):
        monkeypatch.setattr(f"secateur.{place}", fail)
    with pytest.raises(secateur.SecateurError, match="no such luck"):
        each_command(model_of("llama"), out)[name]()
    assert begun == [True]
    assert tree(tmp_path) == set()


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_weight_files_have_the_permissions_of_any_file(umask, model_of, tmp_path):
    before = os.umask(umask)
    try:
        secateur.compress(str(model_of("llama")), tmp_path / "packed", RTN)
        export(str(tmp_path / "packed"), tmp_path / "dense", "dense")
        assert os.umask(umask) == umask  # as it was
    finally:
        os.umask(before)
    for folder in ("packed", "dense"):
        for file in (tmp_path / folder).iterdir():
            assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~umask, file


def test_notes_come_once_after_resuming(model_of, text_file, tmp_path, monkeypatch):
    class StopError(Exception):
        pass

    # Fewer tokens than inputs, which is said of every group of linears.
    recipe = Recipe("sparsegpt", 0.5, calibration=Calibration(str(text_file), 1, 8))
    whole = secateur.compress(str(model_of("llama")), tmp_path / "whole", recipe)
    assert len(whole.notes) == len(set(whole.notes)) > 4
    solve = run_module.solve_block

    def stop(run, journey, number):
        if number == 1:
            raise StopError
        solve(run, journey, number)

    monkeypatch.setattr(run_module, "solve_block", stop)
    with pytest.raises(StopError):
        secateur.compress(str(model_of("llama")), tmp_path / "out", recipe)
    monkeypatch.undo()
    again = secateur.compress(str(model_of("llama")), tmp_path / "out", recipe, resume=True)
    assert again.notes == whole.notes
    assert json.loads((tmp_path / "out" / MANIFEST_NAME).read_text())["notes"] == whole.notes
