"""What earlier versions wrote stays readable: tests/fixtures has every layout of version 1 (make_layouts.py)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import secateur
from secateur.folder.reader import read_json
from secateur.formats.layouts.block_types import BLOCK_TYPES
from secateur.formats.layouts.layout import LAYOUTS, layout_from_config
from secateur.model.source import open_source

pytestmark = pytest.mark.usefixtures("dense_backend")

FOLDER = Path(__file__).parents[1] / "fixtures" / "layout_v1"
BLOCKS = FOLDER.with_name("blocks_v1.safetensors")
#: Layouts that came later: `blocks` has a file of its own, of the others docs/format.md says how they lie.
SINCE = {"blocks", "ternary-dict", "columns", "columns-bitmap", "columns-int", "low-rank", "dictionary", "sq"}


@pytest.fixture(scope="module")
def expected():
    return load_file(FOLDER / "expected.safetensors")


def test_the_fixture_has_every_layout():
    entries = read_json(FOLDER / "config.json")["quantization_config"]["modules"].values()
    assert {entry["layout"] for entry in entries} == set(LAYOUTS) - SINCE
    assert {entry["codes"]["layout"] for entry in entries if "codes" in entry} == {"packed-int", "spqr", "codebook"}


def test_every_weight_is_unpacked_as_it_was(expected):
    weights = open_source(str(FOLDER)).weights
    assert set(weights.packed) == set(expected)
    for name, wanted in expected.items():
        assert weights[name].dtype == wanted.dtype
        assert torch.equal(weights[name], wanted), name


@pytest.mark.parametrize("load", [secateur.load, AutoModelForCausalLM.from_pretrained])
def test_the_model_loads(load, expected):
    state = load(FOLDER).state_dict()
    for name, wanted in expected.items():
        assert torch.equal(state[name], wanted), name


def test_blocks_of_every_type_are_unpacked_as_they_were():
    with safe_open(BLOCKS, framework="pt") as file:
        entries = file.metadata()
    tensors = load_file(BLOCKS)
    assert {json.loads(entry)["type"] for entry in entries.values()} == set(BLOCK_TYPES)
    for grid, entry in entries.items():
        parts = {name.removeprefix(f"{grid}."): t for name, t in tensors.items() if name.startswith(f"{grid}.")}
        assert torch.equal(layout_from_config(json.loads(entry)).unpack(parts), parts["expected"]), grid
