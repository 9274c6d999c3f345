"""Checkpoints that old releases of compressed-tensors wrote: read, run, moved over, and refused where they hold more.

`fixtures/make_compressed_tensors.py` made the folders with those releases; `dense.safetensors.expected` beside each holds
what the same release read back.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import secateur
from secateur.checkpoint.export import export
from secateur.errors import CheckpointError, UsageError
from secateur.foreign.compressed_tensors import CompressedTensors
from secateur.model.source import open_source

pytestmark = pytest.mark.usefixtures("dense_backend")

FOLDERS = sorted((Path(__file__).parents[1] / "fixtures" / "compressed_tensors").iterdir())
EACH = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
BITMASK = next(f for f in FOLDERS if f.name == "0.13.0-sparse-bitmask")
OLDEST = next(f for f in FOLDERS if f.name == "0.4.0-sparse-bitmask")
TWO_FOUR = next(f for f in FOLDERS if f.name == "0.13.0-sparse-24-bitmask")
DENSE_LINEAR = "model.layers.1.self_attn.o_proj.weight"
UP = "model.layers.0.mlp.up_proj"


def expected(folder):
    """The weights that the release itself read back; what it kept of minus zero does not count."""
    return {name: tensor + 0 for name, tensor in load_file(folder / "dense.safetensors.expected").items()}


def same_bytes(found, wanted):
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype == torch.bfloat16, name
        assert found[name].shape == tensor.shape, name
        # Weights that were left dense may hold minus zero.
        assert torch.equal((found[name] + 0).view(torch.int16), tensor.view(torch.int16)), name


def parameters(model):
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def copy_of(folder, out, tensors=None, **config):
    """A copy with other tensors or other keys in its config."""
    shutil.copytree(folder, out)
    content = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**content, **config}))
    if tensors is not None:
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def section(folder, **changes):
    return {**json.loads((folder / "config.json").read_text())["quantization_config"], **changes}


def test_every_release_is_there():
    assert [folder.name for folder in FOLDERS] == [
        "0.13.0-sparse-24-bitmask", "0.13.0-sparse-bitmask", "0.4.0-sparse-bitmask", "0.8.1-sparse-bitmask",
        "0.9.1-sparse-24-bitmask", "0.9.1-sparse-bitmask",
    ]  # fmt: skip


@EACH
def test_weights_are_read_to_the_bit(folder):
    source = open_source(str(folder))
    same_bytes(dict(source.weights), expected(folder))
    assert len(source.weights) == len(expected(folder))
    assert source.dtype == torch.bfloat16
    # The releases before 0.9 packed all there is, norms included.
    packed = source.weights.packed.keys()
    assert ("model.norm.weight" in packed) == (folder.name[:3] in ("0.4", "0.8"))
    assert (DENSE_LINEAR in packed) == (folder.name[:3] in ("0.4", "0.8"))
    assert f"{UP}.weight" in packed


@EACH
def test_load_runs_the_model(folder):
    model = secateur.load(folder)
    same_bytes(parameters(model), expected(folder))
    plain = AutoModelForCausalLM.from_config(model.config, dtype=torch.bfloat16).eval()
    plain.load_state_dict(expected(folder))
    ids_NS = torch.arange(2, 26).view(2, 12)
    with torch.no_grad():
        logits = model(ids_NS).logits
        assert torch.isfinite(logits).all()
        assert torch.equal(logits, plain(ids_NS).logits)


@EACH
def test_export_moves_a_folder_over_without_loss(folder, tmp_path):
    out = tmp_path / "new"
    export(str(folder), out, "secateur")
    model = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    same_bytes(parameters(model), expected(folder))
    content = json.loads((out / "config.json").read_text())
    assert content["quantization_config"]["quant_method"] == "secateur"
    assert "compression_config" not in content
    layout = {"layout": "nm", "n": 2, "m": 4} if "24" in folder.name else {"layout": "bitmap"}
    assert all(entry == layout for entry in content["quantization_config"]["modules"].values())
    stored = load_file(out / "model.safetensors")
    assert (DENSE_LINEAR in stored) == (DENSE_LINEAR not in open_source(str(folder)).weights.packed)
    assert f"{UP}.weight.bitmask" in stored
    assert "model.norm.weight" in stored
    for table in ("model.embed_tokens.weight", "lm_head.weight"):  # some releases packed these, too
        assert (table in stored) == (table not in open_source(str(folder)).weights.packed)


@EACH
def test_an_old_folder_can_be_compressed(folder, tmp_path):
    """It is a MODEL like any other: half of what is left goes."""
    recipe = secateur.Recipe(prune="magnitude", sparsity=0.75)
    report = secateur.compress(str(folder), tmp_path / "out", recipe)
    assert len(report.linears) == 14
    assert all(0.75 <= linear.sparsity < 0.8 for linear in report.linears)  # a row was zero as a whole
    found, wanted = parameters(secateur.load(tmp_path / "out")), expected(folder)
    for linear in report.linears:
        kept = found[f"{linear.name}.weight"]
        assert torch.equal(kept[kept != 0], wanted[f"{linear.name}.weight"][kept != 0])


@pytest.mark.parametrize("folder", [OLDEST, BITMASK, TWO_FOUR], ids=lambda folder: folder.name)
@pytest.mark.parametrize("part", ["compressed", "bitmask", "shape"])
def test_a_missing_part_is_named(folder, part, tmp_path):
    tensors = load_file(folder / "model.safetensors")
    key = f"{UP}.{part}" if f"{UP}.{part}" in tensors else f"{UP}.weight.{part}"
    del tensors[key]
    broken = copy_of(folder, tmp_path / "broken", tensors)
    with pytest.raises(CheckpointError, match=rf"up_proj\.weight cannot be decoded from .*'{part}' is missing"):
        secateur.load(broken)


@pytest.mark.parametrize("change", ["offsets", "values", "padding", "shape"])
def test_a_damaged_bitmask_is_named(change, tmp_path):
    tensors = load_file(BITMASK / "model.safetensors")
    if change == "offsets":
        offsets = tensors[f"{UP}.row_offsets"]
        tensors[f"{UP}.row_offsets"] = offsets.flip(0).clone()
    elif change == "values":
        tensors[f"{UP}.compressed"] = tensors[f"{UP}.compressed"][1:].clone()
    elif change == "padding":
        UPPER = "model.layers.0.mlp.down_proj"  # 36 features: four bits of its last byte are not used
        tensors[f"{UPPER}.bitmask"][0, -1] |= 128
    else:
        tensors[f"{UP}.shape"] = tensors[f"{UP}.shape"] - 1
    broken = copy_of(BITMASK, tmp_path / "broken", tensors)
    with pytest.raises(CheckpointError, match=r"(up|down)_proj\.weight cannot be decoded from layout 'sparse-bitmask'"):
        secateur.load(broken)


@pytest.mark.parametrize("wrong", [float("inf"), float("nan"), 3.0, 2**62, -1, 0], ids=str)
def test_a_vector_with_a_shape_that_makes_no_sense(wrong, tmp_path):
    """Vectors were packed too, up to 0.8."""
    tensors = load_file(OLDEST / "model.safetensors")
    assert tensors["model.norm.weight.shape"].tolist() == [16]
    tensors["model.norm.weight.shape"] = torch.tensor([wrong])
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight cannot be decoded .*'shape'"):
        secateur.load(copy_of(OLDEST, tmp_path / "broken", tensors))


def test_a_2_4_mask_with_three_in_a_group_is_refused(tmp_path):
    tensors = load_file(TWO_FOUR / "model.safetensors")
    bitmask_OB = tensors[f"{UP}.bitmask"]
    assert bitmask_OB[0, 0] & 15 != 0b0111
    bitmask_OB[0, 0] = bitmask_OB[0, 0] & 240 | 0b0111
    with pytest.raises(CheckpointError, match=r"up_proj\.weight .*a group of 4 without exactly 2 bits"):
        secateur.load(copy_of(TWO_FOUR, tmp_path / "broken", tensors))


REFUSED = {
    "quantized": ({"config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4}}}}, "config_groups"),
    "all that llm-compressor writes": (
        {"config_groups": {}, "format": "pack-quantized", "ignore": []},
        "config_groups",
    ),
    "transformed": ({"transform_config": {"config_groups": {"u": {}}}}, "transform_config"),
    "another sparse format": ({"sparsity_config": {"format": "marlin-24"}}, "'marlin-24' is not known"),
    "a format that is no word": ({"sparsity_config": {"format": ["sparse-bitmask"]}}, "is not known"),
    "no sparse format": ({"sparsity_config": {"global_sparsity": 0.5}}, "format None is not known"),
    "a section that is no section": ({"sparsity_config": "sparse-bitmask"}, "format None is not known"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_more_than_sparse_is_refused(what, tmp_path):
    changes, message = REFUSED[what]
    folder = copy_of(BITMASK, tmp_path / "more", quantization_config=section(BITMASK, **changes))
    for use in (secateur.load, open_source, lambda f: export(f, tmp_path / "out", "secateur")):
        with pytest.raises(CheckpointError, match=message) as caught:
            use(str(folder))
        assert "secateur reads" in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_config_group_under_the_old_name_is_refused(tmp_path):
    old = json.loads((OLDEST / "config.json").read_text())["compression_config"]
    folder = copy_of(OLDEST, tmp_path / "more", compression_config={**old, "config_groups": {"group_0": {}}})
    with pytest.raises(
        CheckpointError, match=r"quantized or transformed by compressed-tensors \(config_groups with format None\)"
    ):
        open_source(str(folder))


def test_a_section_that_packs_nothing_is_read(tmp_path):
    dense = section(BITMASK, sparsity_config={"format": "dense"})
    folder = copy_of(BITMASK, tmp_path / "dense", expected(BITMASK), quantization_config=dense)
    same_bytes(dict(open_source(str(folder)).weights), expected(BITMASK))
    assert CompressedTensors.packed_weights({}, {"quant_method": "compressed-tensors"}) == {}


def test_export_refuses_an_unknown_form(tmp_path):
    with pytest.raises(UsageError, match="'onnx' is not known: it can be dense, secateur"):
        export(str(BITMASK), tmp_path / "out", "onnx")


def test_export_to_dense(tmp_path):
    export(str(TWO_FOUR), tmp_path / "dense", "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    same_bytes(load_file(tmp_path / "dense" / "model.safetensors"), expected(TWO_FOUR))
