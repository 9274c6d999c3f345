"""Checkpoints of compressed-tensors 0.8 to 0.13 that are quantized, below a bit mask or not: read, run, and moved over.

`fixtures/make_sparse_quantized.py` made the folders with those releases; `dense.safetensors.expected` beside each holds what
the same release rounds its weights to.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import secateur
from secateur.checkpoint.export import export
from secateur.checkpoint.inspect import inspect
from secateur.errors import CheckpointError
from secateur.foreign.compressed_tensors import CompressedTensors
from secateur.model.source import open_source
from secateur.plugin.packed_modules import packed_linears

FIXTURES = Path(__file__).parents[1] / "fixtures"
FOLDERS = sorted((FIXTURES / "sparse_quantized").iterdir())
EACH = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
FP8_24, MARLIN, OLD = (
    next(f for f in FOLDERS if f.name == name) for name in ("0.13.0-fp8-24", "0.9.4-marlin-24", "0.8.1-int4-bitmask")
)
#: The layouts of ours that hold the weights of each folder.
OURS = {
    "fp8": {"dense"},
    "fp8-24": {"nm"},
    "fp8-bitmask": {"bitmap"},
    "int4-bitmask": {"packed-int"},
    "int8": {"packed-int"},
    "int8-24": {"sparse-int"},
    "int8-bitmask": {"sparse-int"},
    "marlin-24": {"sparse-int"},
}


def kind(folder):
    return folder.name.partition("-")[2]


def expected(folder):
    return {name: tensor + 0 for name, tensor in load_file(folder / "dense.safetensors.expected").items()}


def equal(found, wanted):
    return all(found[n].dtype == t.dtype and torch.equal(found[n].detach() + 0, t) for n, t in wanted.items())


def spoiled(folder, out, change, **config):
    """A copy with changed tensors and keys in its section."""
    shutil.copytree(folder, out)
    tensors = load_file(out / "model.safetensors")
    change(tensors)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    content = json.loads((out / "config.json").read_text())
    content["quantization_config"].update(config)
    (out / "config.json").write_text(json.dumps(content))
    return out


def test_the_releases_and_kinds():
    assert {kind(folder) for folder in FOLDERS} == set(OURS)
    assert {folder.name.partition("-")[0] for folder in FOLDERS} == {"0.8.1", "0.9.4", "0.11.0", "0.13.0"}


@EACH
def test_weights_are_what_the_release_rounded_to(folder):
    source = open_source(str(folder))
    assert expected(folder).keys() <= source.weights.packed.keys()
    assert equal(source.weights, expected(folder))
    assert source.rounded


@EACH
def test_it_runs_packed_where_a_layout_holds_it(folder):
    ids_NS = torch.arange(2, 26).view(2, 12)
    dense, packed = secateur.load(folder, "dense"), secateur.load(folder)
    assert equal(dict(dense.named_parameters()), expected(folder))
    found = dict(packed_linears(packed))
    wanted = {} if kind(folder) == "fp8" else expected(folder)
    assert found.keys() >= {name.removesuffix(".weight") for name in wanted}
    for name, weight in wanted.items():
        assert torch.equal(found[name.removesuffix(".weight")].dense() + 0, weight)
    with torch.no_grad():
        wanted, logits = dense(ids_NS).logits, packed(ids_NS).logits
    assert torch.allclose(logits.float(), wanted.float(), atol=wanted.abs().max().item() / 64)


@EACH
def test_it_is_moved_over_without_loss(folder, tmp_path):
    notes = export(str(folder), tmp_path / "ours", "secateur")
    assert bool(notes) == (kind(folder) == "fp8")
    assert all("no layout of secateur's" in note for note in notes)
    layouts = {f"{linear.name}.weight": linear.layout for linear in inspect(tmp_path / "ours").linears}
    assert {layouts[name] for name in expected(folder)} == OURS[kind(folder)]
    assert not [problem for problem in secateur.verify(tmp_path / "ours") if problem.where != "tokenizer"]
    assert equal(dict(secateur.load(tmp_path / "ours", "dense").named_parameters()), expected(folder))
    export(str(folder), tmp_path / "dense", "dense")
    assert equal(load_file(tmp_path / "dense" / "model.safetensors"), expected(folder))
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())


@EACH
def test_it_is_inspected_and_saved_again(folder, tmp_path):
    linears = {linear.name: linear for linear in inspect(folder).linears}
    for name, weight in expected(folder).items():
        zeros = (weight == 0).float().mean().item() if kind(folder) in ("fp8-bitmask", "int8-bitmask") else 0
        zeros = 0.5 if "24" in kind(folder) else zeros
        assert linears[name.removesuffix(".weight")].sparsity == pytest.approx(zeros)
    secateur.load(folder).save_pretrained(tmp_path / "again")
    assert equal(dict(secateur.load(tmp_path / "again", "dense").named_parameters()), expected(folder))


@pytest.mark.parametrize("status", ["compressed", "frozen"])
@pytest.mark.parametrize("release", ["0.9.1-sparse-24-bitmask", "0.13.0-sparse-bitmask"])
def test_a_section_that_says_more_but_quantizes_nothing(release, status, tmp_path):
    """What models that are only pruned say once transformers' own config has been through it."""
    folder = FIXTURES / "compressed_tensors" / release
    more = {
        "config_groups": {}, "format": "dense", "quantization_status": status, "ignore": ["lm_head"],
        "global_compression_ratio": None, "kv_cache_scheme": None, "transform_config": {},
    }  # fmt: skip
    again = spoiled(folder, tmp_path / "again", lambda tensors: None, **more)
    assert equal(open_source(str(again)).weights, expected(folder))


UP, Q = "model.layers.0.mlp.up_proj", "model.layers.0.self_attn.q_proj"
DAMAGED = {
    "a mask of too many bits": (FP8_24, f"{UP}.bitmask", lambda t: t | 1, "bits set"),
    "fewer values": (FP8_24, f"{UP}.compressed", lambda t: t[1:], "bits set"),
    "a shape of no size": (FP8_24, f"{UP}.shape", lambda t: t * 0, "not two positive sizes"),
    "a huge shape": (FP8_24, f"{UP}.shape", lambda t: t + 2**30, "not one bit for each"),
    "scales of other rows": (FP8_24, f"{UP}.weight_scale", lambda t: t[1:], "no number for each row"),
    "scales that are none": (FP8_24, f"{UP}.weight_scale", lambda t: t * torch.nan, "not finite"),
    "no scale": (FP8_24, f"{UP}.weight_scale", None, "'compressed' has dtype torch.float8_e4m3fn"),
    "a mask of codes that is gone": (FP8_24, f"{UP}.bitmask", None, "'bitmask' is missing"),
    "offsets of others": (OLD, f"{UP}.weight_packed.row_offsets", lambda t: t.flip(0), "row_offsets"),
    "words of another kind": (OLD, f"{UP}.weight_packed.compressed", lambda t: t.float(), "weight_packed"),
    "two places at once": (MARLIN, f"{UP}.meta", lambda t: t * 0, "two places in order"),
    "half of the places": (MARLIN, f"{UP}.meta", lambda t: t[:, ::2], "its meta has"),
    "half of the words": (MARLIN, f"{Q}.weight_packed", lambda t: t[:, ::2], "of no weight of 4 or 8 bits"),
    "scales of 63 rows": (MARLIN, f"{UP}.scale_packed", lambda t: t[:, 1:], "of no weight of 4 or 8 bits"),
    "infinite scales": (MARLIN, f"{UP}.scale_packed", lambda t: t / 0, "not finite"),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_what_is_damaged_is_named(what, tmp_path):
    folder, key, change, message = DAMAGED[what]

    def spoil(tensors):
        tensor = tensors.pop(key)
        if change is not None:
            tensors[key] = change(tensor).contiguous()

    broken = spoiled(folder, tmp_path / "broken", spoil)
    for backend in ("auto", "dense"):
        with pytest.raises(CheckpointError, match=message) as caught:
            secateur.load(broken, backend)
        assert "\n" not in str(caught.value)


WEIGHTS = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True, "dynamic": False}
REFUSED = {
    "blocks": ({**WEIGHTS, "strategy": "block"}, "strategy 'block'"),
    "floats of 4 bits": ({**WEIGHTS, "num_bits": 4, "type": "float"}, "num_bits 4"),
    "16 bits": ({**WEIGHTS, "num_bits": 16}, "num_bits 16"),
    "dynamic": ({**WEIGHTS, "dynamic": True}, "dynamic True"),
    "groups in another order": ({**WEIGHTS, "actorder": "group"}, "actorder 'group'"),
    "nothing": (None, "no 'weights'"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_read_is_refused(what):
    weights, message = REFUSED[what]
    section = {"format": "int-quantized", "config_groups": {"group_0": {"weights": weights}}}
    with pytest.raises(CheckpointError, match=message) as caught:
        CompressedTensors.packed_weights({}, {"quant_method": "compressed-tensors", **section})
    assert "secateur reads" in str(caught.value)
