"""Tensors of a folder's files that stay where the files are mapped."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file

import secateur
from secateur.errors import CheckpointError
from secateur.folder.reader import StoredTensors
from secateur.kernels.packed import PADDING, padded
from secateur.model.source import open_source
from secateur.plugin import names
from secateur.plugin.packed_modules import packed_linears

TENSORS = {"a": torch.arange(200, dtype=torch.int16).view(torch.bfloat16), "z": torch.arange(50, dtype=torch.uint8)}


def stored(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    return StoredTensors([tmp_path / "model.safetensors"])


def test_a_tensor_and_what_follows(tmp_path):
    found = stored(tmp_path)
    first = found.lasting("a", 48)
    assert torch.equal(first.view(torch.int16), TENSORS["a"].view(torch.int16))
    assert first.untyped_storage().nbytes() == first.nbytes + 48
    last = found.lasting("z", 48)
    assert last.untyped_storage().nbytes() == last.nbytes  # the file ends there
    assert torch.equal(last, TENSORS["z"])
    found.release()
    assert torch.equal(first.view(torch.int16), TENSORS["a"].view(torch.int16))


def test_odd_places(tmp_path):
    """The header of a file may be of any length."""
    header = {"a": {"dtype": "BF16", "shape": [200], "data_offsets": [0, 400]}}
    header["z"] = {"dtype": "U8", "shape": [100], "data_offsets": [400, 500]}
    text = json.dumps(header).encode()
    text += b" " * (1 - len(text) % 2)
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(range(250)) * 2)
    found = StoredTensors([file]).lasting("a", PADDING)
    assert found.view(torch.uint8).tolist() == [*range(250), *range(150)]
    assert padded(found).data_ptr() % 2 == 0


def test_other_dtypes_are_read(tmp_path):
    save_file({"i": torch.arange(6, dtype=torch.int32).view(2, 3), "a": TENSORS["a"]}, tmp_path / "model.safetensors")
    found = StoredTensors([tmp_path / "model.safetensors"]).lasting("i", PADDING)
    assert found.tolist() == [[0, 1, 2], [3, 4, 5]]


def test_files_are_at_hand_unless_a_disk_has_to_be_waited_for(tmp_path, monkeypatch):
    tensors = stored(tmp_path)
    read = []
    monkeypatch.setattr(os, "RWF_NOWAIT", 8, raising=False)
    monkeypatch.setattr(os, "preadv", lambda file, into, at, flags: read.append((at, flags)), raising=False)
    assert tensors.at_hand
    size = (tmp_path / "model.safetensors").stat().st_size
    assert read[0] == (0, 8)
    assert size * 0.9 < read[-1][0] < size

    def waits(*_):
        raise BlockingIOError

    monkeypatch.setattr(os, "preadv", waits, raising=False)
    assert not tensors.at_hand
    monkeypatch.delattr(os, "preadv")
    assert not tensors.at_hand


@pytest.mark.parametrize("at_hand", [True, False])
def test_weights_are_the_same_whether_threads_read_them_or_not(packed_of, at_hand, monkeypatch):
    folder = packed_of("llama", "bitmap")
    expected = dict(secateur.load(folder, "dense").named_parameters())
    monkeypatch.setattr(StoredTensors, "at_hand", at_hand)
    model = secateur.load(folder, "torch")
    found = {f"{name}.weight": linear.dense() for name, linear in packed_linears(model)}
    assert len(found) == 14
    assert all(torch.equal(W_OI, expected[name]) for name, W_OI in found.items())


def test_a_file_that_was_cut_off(tmp_path):
    found = stored(tmp_path)
    os.truncate(tmp_path / "model.safetensors", 100)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        found.lasting("a", PADDING)


@pytest.mark.parametrize("layout", ["bitmap", "packed-int"])
def test_values_stay_in_the_file_and_masks_do_not(packed_of, layout):
    """Of a model as it is loaded; masks lead kernels through the values, and nobody is to change them afterwards."""
    weights = open_source(str(packed_of("llama", layout, torch.bfloat16))).weights
    copied = 0
    for name, packed in weights.packed.items():
        weight, _ = packed.read(name, weights.stored)
        stream, part = (weight.values_V, "compressed") if layout == "bitmap" else (weight.codes_S, "codes")
        copied += stream.data_ptr() != weights.stored.lasting(packed.parts[part], PADDING).data_ptr()
        if layout == "bitmap":
            assert weight.bitmask_OB.data_ptr() != weights.stored.lasting(packed.parts["bitmask"], PADDING).data_ptr()
    assert copied <= 1  # the last of the file


def test_a_model_that_is_as_transformers_names_it_today(packed_of, monkeypatch):
    """The list of all that transformers renames takes longer than to read it."""

    def wanted(model):
        raise AssertionError("it was asked for")

    monkeypatch.setattr(names, "get_model_conversion_mapping", wanted)
    secateur.load(packed_of("llama", "bitmap"))


def test_a_head_is_not_copied_to_be_multiplied(packed_of):
    """As torch does with a weight that does not train, where the last of several tokens is given as a part of them all."""
    model = secateur.load(packed_of("llama", "bitmap"))
    strides = []
    model.lm_head.register_forward_pre_hook(lambda module, args: strides.append(args[0].stride()))
    ids_NS = torch.arange(3, 9)[None]
    with torch.no_grad():
        last, whole = model(ids_NS, logits_to_keep=1).logits, model(ids_NS).logits
    torch.testing.assert_close(last, whole[:, -1:])
    H = model.config.hidden_size
    assert strides[0] == (H, H, 1)
