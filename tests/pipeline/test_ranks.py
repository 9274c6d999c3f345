"""Runs of several processes: the same result but for the order of sums, one clear error when a process dies, and a way on."""

import json
import os
import re
import socket
from pathlib import Path

import processes
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_resume import in_a_process

import secateur
from secateur.calibration.text import read_text
from secateur.calibration.tokens import Named, windows
from secateur.core.ranks import Ranks
from secateur.errors import UsageError
from secateur.evaluation.perplexity import measure

SAMPLES, SEQ_LEN = 9, 32
BLOCKS = 4
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(model_of):
    return model_of("llama", num_hidden_layers=BLOCKS)


@pytest.fixture(scope="module")
def job(model, text_file):
    def make(recipe, runs, **more):
        calibration = {"source": str(text_file), "samples": SAMPLES, "seq_len": SEQ_LEN}
        return {
            "what": "ranks",
            "model": str(model),
            "recipe": {**recipe, "calibration": calibration},
            "runs": runs,
            **more,
        }

    return make


RECIPES = {
    "sparsegpt": {"prune": "sparsegpt", "sparsity": 0.5},
    "magnitude": {"prune": "magnitude", "sparsity": 0.5},
    "gptq": {"quantize": "gptq", "prune": "wanda", "pattern": "2:4"},
    "matched": {"prune": "sparsegpt", "sparsity": 0.5, "pruning": {"damping": "auto"}, "match_dense": True},
    "squeezellm": {"quantize": "squeezellm", "quantization": {"bits": 3}},
    "structured": {"prune": "wanda", "pattern": "structured", "sparsity": 0.2, "multiple": 8},
}


@pytest.mark.thin(2)
@pytest.mark.parametrize("name", RECIPES)
def test_the_number_of_processes_does_not_matter(name, job, model, text_file, tmp_path):
    sizes = (1, 2, 4) if name == "sparsegpt" else (1, 2)
    folders = [tmp_path / str(size) for size in sizes]
    runs = [[size, str(folder)] for size, folder in zip(sizes, folders, strict=True)]
    assert in_a_process(job(RECIPES[name], runs))[1] == [[[0] * size for size in sizes]]
    with secateur.backend("dense"):
        models = [secateur.load(folder) for folder in folders]
    names = [linear["name"] for linear in linears(folders[0])]
    weights = [torch.cat([m.get_submodule(linear).weight.flatten() for linear in names]) for m in models]
    ids_KS = windows(read_text(str(text_file), "text", 10**6), tokenizer_of(model), SEQ_LEN, 12, named=Named("text"))
    perplexity = [measure(m, ids_KS).perplexity for m in models]
    for found, quality in zip(weights[1:], perplexity[1:], strict=True):
        assert ((found == 0) == (weights[0] == 0)).float().mean() >= 0.999
        assert torch.linalg.norm(found - weights[0]) <= 0.02 * torch.linalg.norm(weights[0])
        assert quality == pytest.approx(perplexity[0], rel=1e-3)
    for folder in folders[1:]:
        assert [linear["name"] for linear in linears(folder)] == names
        stored, expected = (load_file(f / "model.safetensors") for f in (folder, folders[0]))
        assert stored.keys() == expected.keys()


def linears(folder):
    found = json.loads((folder / "secateur.json").read_text())["linears"]
    return [{"name": name, **linear} for name, linear in found.items()]


def tokenizer_of(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize(("size", "dies"), [(2, 0), pytest.param(3, 2, marks=pytest.mark.slow)])
def test_a_process_that_dies_ends_all_and_the_run_can_be_resumed(size, dies, job, tmp_path):
    recipe, out = RECIPES["sparsegpt"], [[size, str(tmp_path / "out")]]
    said, codes = in_a_process(
        job(recipe, [[size, str(tmp_path / "whole")]]), job(recipe, out, dies=[dies, 2]), job(recipe, out, resume=True)
    )
    assert codes == [[[0] * size], [[-9 if rank == dies else 1 for rank in range(size)]], [[0] * size]]
    (told,) = first_words(said)
    assert re.fullmatch(
        r"SecateurError: another process of this run is gone, and this one cannot go on alone: see what was said of it; "
        rf"2 blocks are kept in {re.escape(str(tmp_path))}/out.partial: run again with `resume` to go on",
        told,
    )
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def first_words(said):
    return [line for line in said if not line.startswith("ReportedError: another process of this run has said")]


def test_what_all_processes_meet_is_told_once(job, model, tmp_path):
    (tmp_path / "there").mkdir()
    few = job(RECIPES["sparsegpt"], [[4, str(tmp_path / "few")]])
    few["recipe"]["calibration"]["samples"] = 3
    dying = job(RECIPES["sparsegpt"], [[2, str(tmp_path / "out")]], dies=[1, 2])
    said, codes = in_a_process(job(RECIPES["sparsegpt"], [[3, str(tmp_path / "there")]]), few, dying)
    assert codes == [[[2, 1, 1]], [[2] * 4], [[1, -9]]]
    there, split, _ = first_words(said)
    assert "there exists already: choose another folder" in there
    assert split == "UsageError: 3 windows cannot be split over 4 processes: give more `samples`"
    recipe = secateur.Recipe.from_dict(dying["recipe"])
    with pytest.raises(UsageError, match="was begun with another number of processes, 2 and not 1"):
        secateur.compress(str(model), tmp_path / "out", recipe, resume=True)


def contents(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


# --- torchrun itself


@pytest.mark.slow
def test_two_machines_on_one(model, text_file, tmp_path):
    """Two launches, as on two machines, that meet at a port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["-m", "secateur", "compress", str(model), str(tmp_path / "out"), "--prune", "wanda", "--sparsity", "0.5"]
    command += ["--calibration", str(text_file), "--samples", str(SAMPLES), "--seq-len", str(SEQ_LEN)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    launches = []
    for node in range(2):
        meet = [
            "--nnodes=2",
            "--nproc-per-node=1",
            f"--node-rank={node}",
            "--master-addr=127.0.0.1",
            f"--master-port={port}",
        ]
        launches.append(
            processes.Process.of_module(
                "torch.distributed.run", *meet, *command, env=environment, cwd=Path(__file__).parents[2]
            )
        )
    done = [launch.end() for launch in launches]
    assert [launch.returncode for launch in done] == [0, 0], done
    assert "block 4 of 4" in done[0].stderr
    assert "block 4 of 4" not in done[1].stderr + done[1].stdout, "one process tells"
    assert len(linears(tmp_path / "out")) == 7 * BLOCKS


# --- pieces


def test_one_process_keeps_what_it_says():
    alone = Ranks(CPU)
    assert alone.first
    assert alone.share({"a": [1]}) == {"a": [1]}
    assert alone.gather(3) == [3]
    assert alone.mine(torch.arange(5)).tolist() == [0, 1, 2, 3, 4]


@given(costs=st.lists(st.floats(0.1, 100), max_size=12), size=st.integers(1, 5))
def test_work_is_dealt_out_whole_and_evenly(costs, size):
    hands = Ranks(CPU, 0, size).deal(costs)
    assert sorted(i for hand in hands for i in hand) == list(range(len(costs)))
    loads = [sum(costs[i] for i in hand) for hand in hands]
    # Nobody has more than the least laden would, if it took what he was given last.
    assert max(loads) <= min(loads) + max(costs, default=0) + 1e-9


@given(count=st.integers(1, 40), size=st.integers(1, 8))
def test_windows_are_split_without_rest(count, size):
    if count < size:
        with pytest.raises(UsageError, match="cannot be split over"):
            Ranks(CPU, 0, size).mine(torch.arange(count))
        return
    parts = [Ranks(CPU, rank, size).mine(torch.arange(count)).tolist() for rank in range(size)]
    assert [i for part in parts for i in part] == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
