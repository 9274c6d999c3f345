"""Interrupted runs: whatever ends a run, `resume` goes on with it, and the result has the same bytes."""

import errno
import json
import os
import shutil
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

import processes
import pytest
import torch
from conftest import config_of

import secateur
from secateur.errors import CheckpointError, SecateurError, UsageError
from secateur.folder import writer
from secateur.memory.footprint import Settings
from secateur.pipeline import run as run_module
from secateur.unfinished import kept_inputs
from secateur.unfinished import partial as partial_module
from secateur.walking import walker

BLOCKS = 5
SAMPLES, SEQ_LEN = 8, 24
RECIPES = {
    "magnitude": {"prune": "magnitude", "sparsity": 0.5},
    "sparsegpt": {"prune": "sparsegpt", "sparsity": 0.5},
    "dense": {"prune": "wanda", "pattern": "2:4", "format": "dense"},
    "spqr": {"quantize": "spqr"},
    "matched": {"quantize": "gptq", "quantization": {"damping": "auto"}, "match_dense": True},
    "squeezellm": {"quantize": "squeezellm", "prune": "wanda", "sparsity": 0.5},
    "structured": {"prune": "sparsegpt", "pattern": "structured", "sparsity": 0.2, "multiple": 8},
}


class StopError(Exception):
    pass


@pytest.fixture
def always_save(monkeypatch):
    """Inputs of blocks are put on disk after every block."""
    monkeypatch.setattr(kept_inputs, "_HIDDEN_EVERY", -1.0)
    monkeypatch.setattr(kept_inputs, "_HIDDEN_SHARE", 0)


@pytest.fixture(scope="module")
def sharded(build, tmp_path_factory):
    """A model in several files. Not to be written to."""
    config = config_of("llama", num_hidden_layers=BLOCKS)
    return build(tmp_path_factory.mktemp("sharded") / "model", config, shard="40kB")


@pytest.fixture
def recipe(text_file):
    def make(name="sparsegpt", **options):
        calibration = secateur.Calibration(str(text_file), SAMPLES, SEQ_LEN)
        return secateur.Recipe(**{**RECIPES[name], "calibration": calibration, **options})

    return make


@pytest.fixture(scope="module")
def whole(sharded, text_file, tmp_path_factory):
    """The files that an uninterrupted run makes."""
    made = {}

    def make(name="sparsegpt"):
        if name not in made:
            out = tmp_path_factory.mktemp("whole") / "out"
            calibration = secateur.Calibration(str(text_file), SAMPLES, SEQ_LEN)
            secateur.compress(str(sharded), out, secateur.Recipe(**RECIPES[name], calibration=calibration))
            made[name] = contents(out)
        return made[name]

    return make


def contents(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


@pytest.fixture
def stop_after(monkeypatch):
    """`stop_after(3)`: a run stops at the beginning of the block that follows the third; `stop_after(None)`: no more."""
    stop = {"after": None}

    def stopping(original):
        def begin(run, *args):
            if args[-1] == run.partial.blocks == stop["after"]:
                raise StopError
            original(run, *args)

        return begin

    for name in ("solve_block", "solve_block_without_inputs"):
        monkeypatch.setattr(run_module, name, stopping(getattr(run_module, name)))
    return lambda blocks: stop.update(after=blocks)


@pytest.fixture
def interrupted(sharded, recipe, stop_after, tmp_path):
    """An unfinished run; returns where its result is to be."""

    def make(blocks=3, name="sparsegpt"):
        stop_after(blocks)
        with pytest.raises(StopError):
            secateur.compress(str(sharded), tmp_path / "out", recipe(name))
        stop_after(None)
        return tmp_path / "out"

    return make


def left(folder):
    return sorted(path.name for path in folder.iterdir())


# --- going on


@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        # After the first block as after others, by default each method with one of the two.
        pytest.param(name, blocks, marks=[pytest.mark.slow] * ((name in ("sparsegpt", "matched")) != (blocks == 1)))
        for name in RECIPES
        for blocks in (1, BLOCKS - 1)
    ],
)
def test_a_resumed_run_has_the_same_bytes(name, blocks, sharded, recipe, whole, interrupted, tmp_path):
    out = interrupted(blocks, name)
    assert left(tmp_path) == ["out.partial"]
    told = []
    report = secateur.compress(str(sharded), out, recipe(name), resume=True, progress=told.append)
    assert contents(out) == whole(name)
    assert left(tmp_path) == ["out"]
    assert len(report.linears) == (1 if name == "structured" else 7) * BLOCKS
    solved = [step.block for step in told if step.linear is not None]
    assert sorted(set(solved)) == list(range(blocks, BLOCKS))


def test_blocks_are_not_run_again_whose_inputs_were_saved(
    sharded, recipe, whole, interrupted, always_save, monkeypatch
):
    out = interrupted()
    runs = []
    monkeypatch.setattr(run_module, "run_again", lambda *args: runs.append(args))
    secateur.compress(str(sharded), out, recipe(), resume=True)
    assert runs == []
    assert contents(out) == whole()


def test_a_damaged_file_of_inputs_is_done_without(
    sharded, recipe, whole, interrupted, always_save, monkeypatch, tmp_path
):
    out = interrupted()
    (file,) = (tmp_path / "out.partial").glob("hidden-00003-*")
    spoiled = bytearray(file.read_bytes())
    spoiled[100] ^= 1
    file.write_bytes(spoiled)
    runs, run_again = [], run_module.run_again

    def spy(*args):
        runs.append(args)
        run_again(*args)

    monkeypatch.setattr(run_module, "run_again", spy)
    secateur.compress(str(sharded), out, recipe(), resume=True)
    assert len(runs) == 3
    assert contents(out) == whole()


def test_resuming_what_was_never_begun_begins_it(sharded, recipe, whole, tmp_path):
    secateur.compress(str(sharded), tmp_path / "out", recipe(), resume=True)
    assert contents(tmp_path / "out") == whole()


@pytest.mark.parametrize("when", ["before it has its name", "after it has its name"])
def test_a_run_that_was_interrupted_at_its_very_end(when, sharded, recipe, whole, monkeypatch, tmp_path):
    place = partial_module.put_in_place

    def interrupted(*args):
        if when.startswith("after"):
            place(*args)
        raise StopError

    monkeypatch.setattr(partial_module, "put_in_place", interrupted)
    with pytest.raises(StopError):
        secateur.compress(str(sharded), tmp_path / "out", recipe())
    monkeypatch.undo()
    assert "out.partial" in left(tmp_path)
    report = secateur.compress(str(sharded), tmp_path / "out", recipe(), resume=True)
    assert left(tmp_path) == ["out"]
    assert contents(tmp_path / "out") == whole()
    assert len(report.linears) == 7 * BLOCKS
    assert report.bytes == sum(len(content) for name, content in whole().items() if name.endswith(".safetensors"))


@pytest.mark.parametrize("removals", range(2))
def test_a_run_that_was_interrupted_while_it_cleaned_up(removals, sharded, recipe, whole, monkeypatch, tmp_path):
    remove, done = partial_module._remove, []

    def interrupted(path):
        if len(done) == removals:
            raise StopError
        done.append(path)
        remove(path)

    monkeypatch.setattr(partial_module, "_remove", interrupted)
    with pytest.raises(StopError):
        secateur.compress(str(sharded), tmp_path / "out", recipe())
    monkeypatch.undo()
    assert left(tmp_path) == ["out", "out.partial"]
    secateur.compress(str(sharded), tmp_path / "out", recipe(), resume=True)
    assert left(tmp_path) == ["out"]
    assert contents(tmp_path / "out") == whole()


def test_overwriting_keeps_the_old_folder_until_the_end(sharded, recipe, whole, stop_after, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    writer.write_manifest(out, {})
    stop_after(2)
    with pytest.raises(StopError):
        secateur.compress(str(sharded), out, recipe(), overwrite=True)
    stop_after(None)
    assert left(tmp_path) == ["out", "out.partial"]
    assert left(out) == ["old", "secateur.json"]
    with pytest.raises(UsageError, match="out exists already"):
        secateur.compress(str(sharded), out, recipe(), resume=True)
    secateur.compress(str(sharded), out, recipe(), resume=True, overwrite=True)
    assert contents(out) == whole()


@pytest.mark.thin(3)
@pytest.mark.parametrize(("pause", "hidden"), [(True, "device"), (False, "device"), (False, "host"), (False, "file")])
def test_how_a_run_is_carried_out_does_not_change_it(
    pause, hidden, sharded, recipe, always_save, stop_after, monkeypatch, tmp_path
):
    batch = 2 * SEQ_LEN
    secateur.compress(str(sharded), tmp_path / "plain", recipe(), batch_tokens=batch)
    monkeypatch.setattr(run_module, "choose_settings", lambda *_: Settings(batch, pause, hidden))
    secateur.compress(str(sharded), tmp_path / "out", recipe())
    assert contents(tmp_path / "out") == contents(tmp_path / "plain")
    stop_after(3)
    with pytest.raises(StopError):
        secateur.compress(str(sharded), tmp_path / "resumed", recipe())
    stop_after(None)
    secateur.compress(str(sharded), tmp_path / "resumed", recipe(), resume=True)
    assert contents(tmp_path / "resumed") == contents(tmp_path / "plain")


def test_weights_that_are_read_ahead_are_the_same(sharded, recipe, whole, monkeypatch, tmp_path):
    monkeypatch.setattr(walker, "_READ_AHEAD", ("cpu",))
    secateur.compress(str(sharded), tmp_path / "out", recipe())
    assert contents(tmp_path / "out") == whole()


def test_random_numbers_go_on_where_they_were(sharded, recipe, interrupted, monkeypatch):
    torch.manual_seed(7)
    torch.rand(5)
    wanted = torch.get_rng_state()
    out = interrupted(2)
    torch.manual_seed(1)
    seen = []
    solve_block = run_module.solve_block
    monkeypatch.setattr(
        run_module, "solve_block", lambda run, *a, **k: (seen.append(torch.get_rng_state()), solve_block(run, *a, **k))
    )
    secateur.compress(str(sharded), out, recipe(), resume=True)
    assert torch.equal(seen[0], wanted)


# --- what ends a run


def test_four_kills(sharded, text_file, tmp_path):
    kill(sharded, text_file, tmp_path, 4)


@pytest.mark.slow
def test_forty_kills(sharded, text_file, tmp_path):
    kill(sharded, text_file, tmp_path, 40)


def kill(sharded, text_file, folder, times):
    """Every other run puts the inputs of all blocks on disk, so that both ways of going on are met."""
    jobs = []
    for every in (-1.0, 5.0):
        root = folder / f"{every}"
        root.mkdir()
        calibration = {"source": str(text_file), "samples": SAMPLES, "seq_len": SEQ_LEN}
        jobs.append(
            {
                "what": "kills",
                "root": str(root),
                "model": str(sharded),
                "recipe": {"prune": "sparsegpt", "sparsity": 0.5, "calibration": calibration},
                "seed": times,
                "kills": times // 2,
                "hidden_every": every,
                "hidden_share": 0,
            }
        )
    found = [run for runs in in_a_process(*jobs)[1] for run in runs]
    assert len(found) == times
    assert all(run["same"] for run in found), found
    assert sum(killed for run in found for killed, _ in run["deaths"]) >= times // 2, (
        "most were over before they were killed"
    )


def in_a_process(*jobs):
    """What jobs of `forked.py` found, after the lines that their processes printed."""
    done = processes.file(Path(__file__).parents[1] / "forked.py", json.dumps(jobs))
    assert done.returncode == 0, done.stderr
    *said, found = done.stdout.splitlines()
    return said, json.loads(found)


@pytest.mark.thin(2)
@pytest.mark.parametrize("number", [1, 2, 4, 6])
def test_a_disk_that_is_full_for_a_while(number, sharded, recipe, whole, monkeypatch, tmp_path):
    save, calls = writer.save_file, []

    def full(*args, **kwargs):
        calls.append(args)
        if len(calls) == number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(*args, **kwargs)

    monkeypatch.setattr(writer, "save_file", full)
    with pytest.raises(SecateurError, match="the disk is full") as caught:
        secateur.compress(str(sharded), tmp_path / "out", recipe())
    blocks = number - 2
    assert ("1 block is kept" in str(caught.value)) == (blocks == 1)
    assert (f"{blocks} blocks are kept" in str(caught.value)) == (blocks > 1)
    assert ("nothing is left behind" in str(caught.value)) == (blocks < 1)
    assert left(tmp_path) == (["out.partial"] if blocks > 0 else [])
    secateur.compress(str(sharded), tmp_path / "out", recipe(), resume=True)
    assert contents(tmp_path / "out") == whole()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 300 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_really_full(small_disk, sharded, recipe, whole):
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(100_000))
    with pytest.raises(SecateurError, match=r"the disk is full; \d blocks? (is|are) kept in .*`resume`"):
        secateur.compress(str(sharded), small_disk / "out", recipe())
    with pytest.raises(SecateurError, match="the disk is full"):
        secateur.compress(str(sharded), small_disk / "out", recipe(), resume=True)
    ballast.unlink()
    subprocess.run(["mount", "-o", "remount,size=2m", str(small_disk)], check=True)
    secateur.compress(str(sharded), small_disk / "out", recipe(), resume=True)
    assert contents(small_disk / "out") == whole()


def test_a_shard_that_vanishes_midway(sharded, recipe, whole, tmp_path):
    model = shutil.copytree(sharded, tmp_path / "model")
    away = tmp_path / "away"
    index = json.loads((model / "model.safetensors.index.json").read_text())["weight_map"]
    shard = index["model.layers.3.mlp.down_proj.weight"]

    def vanish(step):
        if step.linear is not None and step.block == 1 and (model / shard).exists():
            (model / shard).rename(away)

    with pytest.raises(CheckpointError, match=rf"{shard}.*; [1-3] blocks? (is|are) kept in .*`resume`"):
        secateur.compress(str(model), tmp_path / "out", recipe(), progress=vanish)
    away.rename(model / shard)
    secateur.compress(str(model), tmp_path / "out", recipe(), resume=True)
    found, wanted = contents(tmp_path / "out"), whole()
    assert found["model.safetensors"] == wanted["model.safetensors"]
    manifest = json.loads(found["secateur.json"])
    assert manifest["linears"] == json.loads(wanted["secateur.json"])["linears"]


# --- what is not the same run


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: replace(r, sparsity=0.6), "another recipe sparsity, 0.5 and not 0.6"),
        (
            lambda r: replace(r, calibration=replace(r.calibration, seed=1)),
            "another recipe calibration seed, 0 and not 1",
        ),
        (lambda r: replace(r, ignore=("*.o_proj",)), r"another recipe ignore, \[\] and not \[\"\*.o_proj\"\]"),
    ],
)
def test_another_recipe(change, words, sharded, recipe, interrupted, tmp_path):
    out = interrupted()
    with pytest.raises(
        UsageError, match=f"out.partial was begun with {words}: give what it was begun with, or `overwrite`"
    ):
        secateur.compress(str(sharded), out, change(recipe()), resume=True)
    assert left(tmp_path) == ["out.partial"], "it is still there to be resumed"


def test_another_text_of_the_same_name(sharded, recipe, text_file, stop_after, tmp_path):
    text = tmp_path / "text.txt"
    shutil.copy(text_file, text)
    wanted = replace(recipe(), calibration=secateur.Calibration(str(text), SAMPLES, SEQ_LEN))
    stop_after(2)
    with pytest.raises(StopError):
        secateur.compress(str(sharded), tmp_path / "out", wanted)
    stop_after(None)
    text.write_text(text.read_text()[::-1])
    with pytest.raises(UsageError, match="was begun with another calibration text"):
        secateur.compress(str(sharded), tmp_path / "out", wanted, resume=True)


def test_another_model(sharded, recipe, stop_after, tmp_path):
    model = shutil.copytree(sharded, tmp_path / "model")
    stop_after(2)
    with pytest.raises(StopError):
        secateur.compress(str(model), tmp_path / "out", recipe())
    stop_after(None)
    shard = sorted(model.glob("*.safetensors"))[-1]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UsageError, match=rf"was begun with another model {shard.name}"):
        secateur.compress(str(model), tmp_path / "out", recipe(), resume=True)


@pytest.mark.parametrize(
    ("where", "what", "words"),
    [
        ("__version__", "0.0.1", 'another versions secateur, ".*" and not "0.0.1"'),
        ("torch.get_num_threads", lambda: 77, "another number of threads, 1 and not 77"),
    ],
)
def test_other_circumstances(where, what, words, sharded, recipe, interrupted, monkeypatch):
    out = interrupted()
    monkeypatch.setattr(f"secateur.pipeline.run.{where}", what)
    with pytest.raises(UsageError, match=f"was begun with {words}"):
        secateur.compress(str(sharded), out, recipe(), resume=True)


def test_other_batches(sharded, recipe, whole, interrupted):
    out = interrupted()
    with pytest.raises(UsageError, match="was begun with `batch_tokens` 2048: give the same, or leave it out"):
        secateur.compress(str(sharded), out, recipe(), resume=True, batch_tokens=24)
    secateur.compress(str(sharded), out, recipe(), resume=True, batch_tokens=2048)
    assert contents(out) == whole()


def test_an_unfinished_run_is_neither_resumed_nor_lost_by_accident(sharded, recipe, interrupted, tmp_path):
    out = interrupted()
    before = contents(tmp_path / "out.partial")
    with pytest.raises(
        UsageError, match=r"out.partial holds a run .* after 3 blocks: give `resume` .*, or `overwrite`"
    ):
        secateur.compress(str(sharded), out, recipe())
    assert contents(tmp_path / "out.partial") == before


@pytest.mark.parametrize("damage", ["changed", "shorter", "gone"])
def test_a_damaged_part(damage, sharded, recipe, interrupted, tmp_path):
    out = interrupted()
    part = sorted((tmp_path / "out.partial").glob("shard-*"))[1]
    content = bytearray(part.read_bytes())
    content[-1] ^= 255
    part.write_bytes(content if damage == "changed" else content[:-1])
    if damage == "gone":
        part.unlink()
    with pytest.raises(
        CheckpointError, match=f"{part.name} is missing or damaged: run again with `overwrite` to begin again"
    ):
        secateur.compress(str(sharded), out, recipe(), resume=True)


@pytest.mark.parametrize("content", ["", "{", "[]", "\0"])
def test_a_damaged_journal(content, sharded, recipe, interrupted, tmp_path):
    out = interrupted()
    (tmp_path / "out.partial" / "journal.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"journal\.json"):
        secateur.compress(str(sharded), out, recipe(), resume=True)


_HOLD = """
import sys, time
from pathlib import Path
import torch
from secateur.unfinished.partial import Partial
from secateur.core.ranks import Ranks
Partial(Path(sys.argv[1]), Ranks(torch.device("cpu"))).open(False, False)
print("held", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("resume", [False, True])
def test_two_runs_at_a_time(resume, sharded, recipe, whole, tmp_path):
    holder = processes.Process.of_code(_HOLD, tmp_path / "out")
    try:
        holder.wait_for("held\n", "stdout")
        with pytest.raises(UsageError, match=r"out\.partial is being written by another process"):
            secateur.compress(str(sharded), tmp_path / "out", recipe(), resume=resume, overwrite=True)
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.end()
    secateur.compress(str(sharded), tmp_path / "out", recipe())
    assert contents(tmp_path / "out") == whole()
