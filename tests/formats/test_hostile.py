"""Hostile checkpoints: verifying and loading end in a clear error or a model, whatever the files say."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hostile import GREEDY, Worker, mutate
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import RECIPES, make_source, make_tiny, set_json

import secateur
from secateur.errors import CheckpointError, SecateurError
from secateur.folder.manifest import MANIFEST_NAME
from secateur.folder.reader import INDEX_NAME, SINGLE_NAME


class Draw:
    def __init__(self, data):
        self.data = data

    def number(self, low, high):
        return self.data.draw(st.integers(low, high))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("hostile")
    kinds = {kind: make_source(root / kind, kind) for kind in ("llama", "gpt2")}
    return [make_tiny(root / f"{kind}-{layout}", layout, kinds[kind]) for kind in kinds for layout in RECIPES]


@pytest.fixture(scope="module")
def worker(folders):
    found = Worker(folders[0])
    yield found
    found.stop()


def changed(data, folders, worker, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "changed"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(folders[data.draw(st.integers(0, len(folders) - 1))], folder)
    mutate(folder, Draw(data))
    assert worker.attempt(folder) == []


@pytest.mark.parametrize("times", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_whatever_is_changed_there_is_an_error_or_a_model(times, folders, worker, tmp_path_factory):
    """Those that had found something before come first. What each test below changes can come up here, too."""
    some = settings(max_examples=times, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
    some(given(data=st.data())(changed))(folders=folders, worker=worker, tmp_path_factory=tmp_path_factory)


HUGE = [2**31, 10**9, 2**40, 2**62]
SIZES = ["hidden_size", "intermediate_size", "head_dim", "vocab_size", "max_position_embeddings", "num_attention_heads"]
COUNTS = ["num_hidden_layers", "num_labels", "num_key_value_heads"]


def refused(folder, worker):
    """It is neither sound nor loaded, and the worker lives."""
    assert worker.attempt(folder) == []
    with pytest.raises(SecateurError):
        secateur.load(folder)
    assert secateur.verify(folder)


@pytest.mark.parametrize("value", HUGE)
@pytest.mark.parametrize("key", [*SIZES, *COUNTS])
def test_a_config_that_asks_for_a_huge_model(key, value, folders, worker, tmp_path):
    """A few bytes of text do not become gigabytes of modules, lists or buffers."""
    folder = shutil.copytree(folders[0], tmp_path / "own")
    set_json(folder / "config.json", lambda config: config.update({key: value}))
    if key == "max_position_embeddings":  # nothing of a Llama has this size
        assert worker.attempt(folder) == []
    else:
        refused(folder, worker)


@pytest.mark.parametrize("key", ["n_positions", "n_embd", "n_inner", "n_layer", "n_head", "vocab_size"])
def test_a_config_that_asks_for_a_huge_model_by_other_names(key, folders, worker, tmp_path):
    folder = shutil.copytree(next(f for f in folders if f.name == "gpt2-bitmap"), tmp_path / "own")
    set_json(folder / "config.json", lambda config: config.update({key: 10**6}))
    refused(folder, worker)


def test_a_model_of_more_tensors_than_there_are(folders, worker, tmp_path):
    """As many layers as pass the first look, each of many modules."""
    folder = shutil.copytree(folders[0], tmp_path / "own")
    set_json(folder / "config.json", lambda config: config.update(num_hidden_layers=120))
    with pytest.raises(CheckpointError, match="many more tensors than its files have"):
        secateur.load(folder)
    refused(folder, worker)


@pytest.mark.parametrize("layout", [layout for layout in RECIPES if layout != "dense"])
@pytest.mark.parametrize("shape", [(2**31 - 1, 2**31 - 1), (2**31 - 1, 1), (1, 2**31 - 1), (8, 2**31 - 8)])
def test_a_shape_that_claims_a_huge_weight(shape, layout, folders, worker, tmp_path):
    folder = shutil.copytree(next(f for f in folders if f.name == f"llama-{layout}"), tmp_path / "own")
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / SINGLE_NAME).items()}
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[f"{name}.shape"] = torch.tensor(shape)
    for part in ("bitmask", "compressed"):
        if f"{name}.{part}" in tensors:
            tensors[f"{name}.{part}"] = torch.empty((0, 8), dtype=tensors[f"{name}.{part}"].dtype)
    save_file(tensors, folder / SINGLE_NAME)
    refused(folder, worker)


@pytest.mark.parametrize("name", ["config.json", INDEX_NAME, MANIFEST_NAME])
def test_json_larger_than_any_has_to_be(name, folders, worker, tmp_path):
    """A list of empty lists takes 25 times its size in memory."""
    folder = shutil.copytree(folders[0], tmp_path / "own")
    (folder / name).write_text(f'{{"a": [{"[]," * 2**22} 1]}}')
    assert worker.attempt(folder) == []
    assert any("far too many beside weight files" in str(problem) for problem in secateur.verify(folder))


def test_a_header_longer_than_any_has_to_be(folders, worker, tmp_path):
    """A million tensors of no bytes took a gigabyte."""
    folder = shutil.copytree(folders[0], tmp_path / "own")
    entries = (f'"{i:x}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' for i in range(2**20))
    header = f"{{{','.join(entries)}}}".encode()
    (folder / SINGLE_NAME).write_bytes(len(header).to_bytes(8, "little") + header)
    refused(folder, worker)
    with pytest.raises(CheckpointError, match="far too many for a file of"):
        secateur.load(folder)


def test_the_worker_sees_what_it_should(folders, worker, tmp_path):
    """A process that dies or runs out of memory is told of: the tests above could not fail otherwise."""
    program = "import sys, {}\nfor line in sys.stdin: {}\n"
    for imports, action in (("os", "os.abort()"), ("os", "bytearray(2**40)")):
        dying = Worker(folders[0])
        dying.process = subprocess.Popen(
            [sys.executable, "-c", program.format(imports, action)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        (complaint,) = dying.attempt(tmp_path)
        assert complaint.startswith("the process died")
    (complaint, *_) = worker.attempt(f"{folders[0]}{GREEDY}")
    assert "MemoryError" in complaint
    assert worker.attempt(folders[0]) == []


@pytest.mark.slow
def test_atheris_finds_nothing_in_a_minute(folders, tmp_path):
    pytest.importorskip("atheris")
    harness = Path(__file__).parents[1] / "fuzz" / "checkpoint.py"
    found = subprocess.run(
        [sys.executable, harness, folders[0].parent, tmp_path, "-max_total_time=60", "-timeout=60", "-rss_limit_mb=4096"],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr[-3000:]
    runs = re.search(r"Done (\d+) runs", found.stderr)
    assert runs is not None, found.stderr[-3000:]
    assert int(runs[1]) > 100
