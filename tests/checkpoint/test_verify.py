"""`verify`: what is sound passes, whatever is broken is named, and no single byte can change unseen.

O: output features, I: input features.
"""

import json
import os
import re
import shutil
import socket
from itertools import chain, zip_longest
from pathlib import Path

import processes
import pytest
import torch
from conftest import EVERY_KIND
from safetensors.torch import load_file, save_file
from tiny import RECIPES, make_source, make_tiny, reseal, set_json

import secateur
from secateur.errors import CheckpointError, UsageError
from secateur.folder.manifest import MANIFEST_NAME, check_files
from secateur.folder.reader import INDEX_NAME, SINGLE_NAME
from secateur.folder.writer import ShardWriter, assemble
from secateur.model.source import open_source

LAYER = "model.layers.0"
UP = f"{LAYER}.mlp.up_proj"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The tiny model of a kind in a layout. Not to be written to."""
    root, found = tmp_path_factory.mktemp("tiny"), {}

    def make(layout, kind="llama"):
        if kind not in found:
            found[kind] = make_source(root / kind, kind)
        if (kind, layout) not in found:
            found[kind, layout] = make_tiny(root / f"{kind}-{layout}", layout, found[kind])
        return found[kind, layout]

    return make


@pytest.fixture
def own(made, tmp_path):
    """The same to be spoiled."""
    return lambda *which: Path(shutil.copytree(made(*which), tmp_path / "own"))


def set_tensors(folder, change, file=SINGLE_NAME):
    """Change the tensors of a file, and the manifest with it."""
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / file).items()}
    change(tensors)
    save_file(tensors, folder / file, metadata={"format": "pt"})
    reseal(folder)


def set_config(folder, change):
    set_json(folder / "config.json", change)
    reseal(folder)


def problems(folder):
    return [(problem.where, problem.what) for problem in secateur.verify(folder)]


def says_only(folder, where, *words):
    """There is just one problem, in that place, with all the words in it."""
    found = problems(folder)
    assert len(found) == 1, found
    assert found[0][0] == where
    for word in words:
        assert word in found[0][1]
    assert "\n" not in found[0][1]


def shard(folder, size=100):
    """Put the tensors of a folder into several files."""
    tensors = load_file(folder / SINGLE_NAME)
    (folder / SINGLE_NAME).unlink()
    writer = ShardWriter(folder, shard_bytes=size)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.flush()
    assemble(writer.files, folder, folder, size)
    reseal(folder)
    return sorted(file.name for file in folder.glob("*.safetensors"))


# --- what is sound


@pytest.mark.thin(2)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("layout", list(RECIPES))
def test_what_compress_writes_is_sound(layout, kind, made):
    assert problems(made(layout, kind)) == []
    assert problems(str(made(layout, kind))) == []


@pytest.mark.thin(2)
@pytest.mark.parametrize("family", EVERY_KIND)
def test_every_family_is_sound(family, model_of, tmp_path):
    """Tied heads, renamed tensors and modules that keep their weights transposed are no problems."""
    secateur.compress(str(model_of(family)), tmp_path / "out", secateur.Recipe(prune="magnitude", sparsity=0.5))
    assert problems(tmp_path / "out") == []


@pytest.mark.parametrize("recipe", ["packed-int", "spqr"])
def test_what_is_exported_is_sound(recipe, made, tmp_path, model_of):
    from secateur.checkpoint.export import export

    export(str(made(recipe)), tmp_path / "dense", "dense")
    assert problems(tmp_path / "dense") == []
    export(str(made("bitmap")), tmp_path / "same", "secateur")
    assert problems(tmp_path / "same") == []
    large = secateur.Recipe(quantize="rtn", quantization={"bits": 4, "group_size": 16})
    secateur.compress(str(model_of("llama")), tmp_path / "large", large)
    export(str(tmp_path / "large"), tmp_path / "ct", "compressed-tensors")
    assert problems(tmp_path / "ct") == []


def test_several_files_are_sound(own):
    folder = own("bitmap")
    assert len(shard(folder)) > 3
    assert problems(folder) == []


def test_prose_and_hidden_files_may_stand_beside(own):
    folder = own("bitmap")
    for name in ("MORE.md", "LICENSE", "LICENSE.txt", "NOTICE", ".gitattributes", "loss.png"):
        (folder / name).write_text("x")
    (folder / ".git").mkdir()
    (folder / ".git" / "config.json").write_text("x")
    assert problems(folder) == []


def test_a_tensor_that_no_module_has_may_be_named_in_the_manifest(own):
    folder = own("bitmap")
    set_tensors(folder, lambda tensors: tensors.update(extra=torch.zeros(2)))
    says_only(folder, "extra", "in no module")
    reseal(folder, unused=["extra"])
    assert problems(folder) == []


def test_a_tensor_that_transformers_ignores_may_be_there(own, made):
    """Checkpoints of GPT-2 carry the causal masks that its modules compute."""
    folder = own("bitmap", "gpt2")
    set_tensors(folder, lambda tensors: tensors.update({"transformer.h.0.attn.bias": torch.ones(1, 1, 16, 16)}))
    found = problems(folder)
    patterns = secateur.load(folder, "dense")._keys_to_ignore_on_load_unexpected
    assert (found == []) == bool(patterns and any("attn" in pattern for pattern in patterns))


# --- files


def test_no_such_folder(tmp_path):
    with pytest.raises(UsageError, match="no such folder"):
        secateur.verify(tmp_path / "nothing")


@pytest.mark.parametrize("name", ["config.json", SINGLE_NAME, "tokenizer.json", "generation_config.json"])
def test_a_file_that_is_missing(name, own):
    folder = own("bitmap")
    (folder / name).unlink()
    assert (name, f"is missing: {MANIFEST_NAME} names it") in problems(folder)


@pytest.mark.parametrize(
    "name",
    [
        "evil.safetensors",
        "adapter_config.json",
        "x.jinja",
        "x.model",
        "x.txt",
        "x.py",
        "pytorch_model.bin",
        "x.pt",
        "x",
    ],
)
def test_a_file_that_nobody_named(name, own):
    folder = own("bitmap")
    (folder / name).write_text("{}")
    assert problems(folder)[0] == (
        name,
        f"is not named in {MANIFEST_NAME}, and could be read with the model: take it away",
    )


def test_a_file_in_a_folder_that_nobody_named(own):
    folder = own("bitmap")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "x.jinja").write_text("x")
    says_only(folder, "additional_chat_templates/x.jinja", "is not named")


def test_a_link_to_a_hidden_folder_that_nobody_named(own):
    folder = own("bitmap")
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "x.jinja").write_text("x")
    assert problems(folder) == []
    (folder / "additional_chat_templates").symlink_to(".hidden")
    says_only(folder, "additional_chat_templates", "is not named")


def test_no_manifest(own):
    folder = own("bitmap")
    (folder / MANIFEST_NAME).unlink()
    says_only(folder, MANIFEST_NAME, "is missing")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 10**5, b'{"files": []}', b'{"files": {}}\n'])
def test_a_manifest_that_is_none(content, own):
    folder = own("bitmap")
    (folder / MANIFEST_NAME).write_bytes(content)
    assert problems(folder)[0][0] == MANIFEST_NAME


@pytest.mark.parametrize(
    "name",
    [
        "../config.json",
        "/etc/hostname",
        "..",
        ".",
        "",
        "a//b",
        "a/",
        "a/../../b",
        "a\\b",
        "c:x",
        "a\0",
        "\ud800",
        MANIFEST_NAME,
    ],
)
def test_a_manifest_that_names_something_outside(name, own):
    folder = own("bitmap")
    (folder.parent / "config.json").write_text("{}")
    files = {**json.loads((folder / MANIFEST_NAME).read_text())["files"], name: "0" * 64}
    write_sealed(folder, files=files)
    says_only(folder, MANIFEST_NAME, repr(name), "not the name of another file")


def write_sealed(folder, **changes):
    from secateur.folder.manifest import seal

    content = json.loads((folder / MANIFEST_NAME).read_text())
    content.pop("sha256")
    (folder / MANIFEST_NAME).write_bytes(seal({**content, **changes}))


def test_files_that_changed_places(own):
    folder = own("bitmap")
    first, second, *_ = shard(folder)
    (folder / first).rename(folder / "x")
    (folder / second).rename(folder / first)
    (folder / "x").rename(folder / second)
    found = problems(folder)
    assert [where for where, what in found[:2] if "was changed" in what] == [first, second]
    reseal(folder)
    assert {where for where, _ in problems(folder)} == {INDEX_NAME}
    assert secateur.load(folder) is not None  # all of it is there


def test_a_shard_that_cannot_be_opened(own):
    folder = own("bitmap")
    first, second, *_ = shard(folder)
    for name in (first, second):
        os.truncate(folder / name, 20)
    reseal(folder)
    found = problems(folder)
    assert [where for where, _ in found] == [first, second]
    assert all("truncated" in what for _, what in found)


def test_the_seal_is_of_the_bytes_of_the_manifest(own):
    """As docs/format.md says: the SHA-256 of the file with zeros in its place."""
    import hashlib

    content = (own("bitmap") / MANIFEST_NAME).read_text()
    told = json.loads(content)["sha256"]
    assert list(json.loads(content))[-1] == "sha256"
    assert content.count(told) == 1
    assert hashlib.sha256(content.replace(told, "0" * 64).encode()).hexdigest() == told


# --- config and tensors


def test_a_tensor_that_is_missing(own):
    folder = own("bitmap")
    set_tensors(folder, lambda tensors: [tensors.pop(f"{LAYER}.{name}.weight") for name in NORMS])
    assert problems(folder) == [(f"{LAYER}.{name}.weight", MISSING) for name in NORMS]


NORMS = ["input_layernorm", "post_attention_layernorm"]
MISSING = "is missing: the model that config.json describes has it"


def test_all_damaged_linears_are_named(own):
    folder = own("bitmap")
    weights = [f"{LAYER}.mlp.{name}_proj.weight" for name in ("gate", "up", "down")]
    set_tensors(folder, lambda tensors: [tensors[f"{weight}.bitmask"].fill_(255) for weight in weights])
    found = problems(folder)
    assert [where for where, _ in found] == weights
    assert all("bits set but there are" in what for _, what in found)


def test_a_weight_of_another_shape_than_the_models(own):
    folder = own("bitmap")
    set_tensors(
        folder, lambda t: t.update({"model.embed_tokens.weight": t["model.embed_tokens.weight"].T.contiguous()})
    )
    says_only(folder, "model.embed_tokens.weight", "is [8, 4] in the files, but [4, 8] in the model")


def test_a_packed_weight_of_another_shape_than_the_models(own):
    folder = own("bitmap")
    set_config(folder, lambda config: config.update(intermediate_size=16))
    names = [f"{LAYER}.mlp.{name}_proj" for name in ("gate", "up", "down")]
    found = problems(folder)
    assert {where for where, _ in found} == {*names, *(f"{name}.weight" for name in names)} - set(names)


def test_a_weight_that_is_no_float(own):
    folder = own("bitmap")
    set_tensors(folder, lambda t: t.update({"model.norm.weight": t["model.norm.weight"].int()}))
    says_only(folder, "model.norm.weight", "torch.int32")
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is torch\.int32"):
        secateur.load(folder)


VALUES = {"bitmap": "compressed", "nm": "compressed", "packed-int": "scale", "spqr": "second", "codebook": "table"}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("layout", [*VALUES, "sparse-int", "outlier"])
def test_values_that_are_not_finite(value, layout, own):
    folder = own({"outlier": "spqr"}.get(layout, layout))
    part = {"sparse-int": "scale", "outlier": "outlier_value", **VALUES}[layout]
    set_tensors(folder, lambda tensors: tensors[f"{UP}.weight.{part}"].view(-1)[-1:].fill_(value))
    says_only(folder, f"{UP}.weight")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight", f"{UP}.weight"])
def test_a_dense_value_that_is_not_finite(value, name, own):
    folder = own("dense")
    set_tensors(folder, lambda tensors: tensors[name].view(-1)[:1].fill_(value))
    assert (name, "holds NaN or infinity") in problems(folder)


def test_codes_that_stand_for_values_beyond_the_dtype(own):
    folder = own("packed-int")
    set_tensors(folder, lambda tensors: tensors[f"{UP}.weight.scale"].fill_(60000))
    says_only(folder, f"{UP}.weight", "beyond torch.float16")


def test_nm_that_does_not_hold(own):
    """Two bits move from one group to the next: their number is right, and the weight would expand."""
    folder = own("nm")

    def move(tensors):
        tensors[f"{UP}.weight.bitmask"][3] = 0b0000_1111

    set_tensors(folder, move)
    says_only(folder, f"{UP}.weight", "group of 4 without exactly 2 bits set")


PARTS = {
    "bitmap": ["shape", "bitmask", "compressed"],
    "nm": ["shape", "bitmask", "compressed"],
    "packed-int": ["shape", "codes", "scale", "zero"],
    "spqr": [
        "shape",
        "codes",
        "scale_codes",
        "zero_codes",
        "second",
        "outlier_count",
        "outlier_column",
        "outlier_value",
    ],
    "codebook": ["shape", "codes", "table", "outlier_count", "outlier_column", "outlier_value"],
    "sparse-int": ["shape", "bitmask", "codes", "scale", "zero"],
}


@pytest.mark.parametrize(("layout", "part"), [(layout, part) for layout, parts in PARTS.items() for part in parts])
def test_parts_that_do_not_fit(layout, part, own):
    folder, name = own(layout), f"{UP}.weight.{part}"
    set_tensors(folder, lambda tensors: tensors.update({name: tensors[name][:-1].clone()}))
    says_only(folder, f"{UP}.weight")


def test_a_config_that_does_not_name_a_packed_linear(own):
    folder = own("bitmap")
    set_config(folder, lambda config: config["quantization_config"]["modules"].pop("model.layers.*.mlp.up_proj"))
    says_only(folder, "own", f"{UP}.weight is stored packed, but the config does not name its layout")


def test_a_config_that_names_what_is_not_packed(own):
    folder = own("dense")
    modules = {"model.layers.*.mlp.up_proj": {"layout": "bitmap"}, "nothing": {"layout": "nm", "n": 1, "m": 2}}
    section = {"quant_method": "secateur", "layout_version": 1, "modules": modules}
    set_config(folder, lambda config: config.update(quantization_config=section))
    found = problems(folder)
    assert (UP, "is dense in the files, but config.json says that it has layout 'bitmap'") in found
    assert ("config.json", "names a layout for 'nothing', which no packed weight is called") in found


@pytest.mark.parametrize("transposed", [True, False])
def test_a_config_that_says_wrong_how_modules_keep_their_weights(transposed, own):
    """The weights are square: their shapes do not tell."""
    folder = own("bitmap", "llama" if transposed else "gpt2")
    name = "model.layers.*.mlp.up_proj" if transposed else "transformer.h.*.mlp.c_proj"
    set_config(folder, lambda config: config["quantization_config"]["modules"][name].update(transposed=transposed))
    says_only(folder, name.replace("*", "0"), "transposed by config.json, and its module keeps it otherwise")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("sparsity", 0.25),
        ("sparsity", None),
        ("layout", "nm"),
        ("bytes", 1),
        ("bits", 2.0),
        ("shape", [8, 4]),
        ("outliers", 1),
    ],
)
def test_a_manifest_that_tells_otherwise_of_a_linear(key, value, own):
    folder = own("bitmap")
    linears = json.loads((folder / MANIFEST_NAME).read_text())["linears"]
    linears[UP][key] = value
    reseal(folder, linears=linears)
    says_only(folder, UP, key, repr(value), MANIFEST_NAME)


def test_a_manifest_that_tells_of_other_linears(own):
    folder = own("bitmap")
    linears = json.loads((folder / MANIFEST_NAME).read_text())["linears"]
    linears["other"] = linears.pop(UP)
    reseal(folder, linears=linears)
    assert [where for where, _ in problems(folder)] == [UP, "other"]
    reseal(folder, linears={**linears, UP: 3})
    assert (UP, f"is 3 in {MANIFEST_NAME}") in problems(folder)


def test_a_dense_folder_whose_weights_are_not_as_sparse_as_it_says(own):
    folder = own("dense")
    set_tensors(folder, lambda tensors: tensors[f"{UP}.weight"].fill_(1))
    says_only(folder, UP, "sparsity")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_tokenizer_that_does_not_load(name, own):
    folder = own("bitmap")
    (folder / name).write_text("[]")
    reseal(folder)
    says_only(folder, "tokenizer", "no usable tokenizer")


def test_no_tokenizer(own):
    folder = own("bitmap")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    reseal(folder)
    says_only(folder, "tokenizer", "no usable tokenizer")


# --- links


@pytest.mark.parametrize("name", [SINGLE_NAME, "config.json", "tokenizer.json", MANIFEST_NAME, "notes.txt"])
def test_a_link_out_of_the_folder(name, own, tmp_path):
    folder = own("bitmap")
    if (folder / name).exists():
        (folder / name).rename(tmp_path / "elsewhere")
    else:
        (tmp_path / "elsewhere").write_text("secret")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    says_only(folder, name, "a link that leads out of the folder")
    for use in (secateur.load, lambda f: secateur.compress(str(f), tmp_path / "out", RECIPES["bitmap"])):
        with pytest.raises(CheckpointError, match=rf"{name} is a link that leads out of the folder"):
            use(folder)
    assert not (tmp_path / "out").exists()


def test_a_link_out_of_the_folder_of_a_shard_and_an_index(own, tmp_path):
    folder = own("bitmap")
    for name in (shard(folder)[2], INDEX_NAME):
        (folder / name).rename(tmp_path / name)
        (folder / name).symlink_to(tmp_path / name)
        with pytest.raises(CheckpointError, match="leads out of the folder"):
            open_source(str(folder))
        (folder / name).unlink()
        (tmp_path / name).rename(folder / name)
    open_source(str(folder))


def test_a_pipe_is_not_waited_for(own):
    folder = own("bitmap")
    (folder / "generation_config.json").unlink()
    os.mkfifo(folder / "generation_config.json")
    says_only(folder, "generation_config.json", "neither a file nor a folder")
    with pytest.raises(CheckpointError, match="neither a file nor a folder"):
        secateur.load(folder)


def test_a_link_within_the_folder_is_followed(own):
    folder = own("bitmap")
    (folder / SINGLE_NAME).rename(folder / "weights.md")
    (folder / SINGLE_NAME).symlink_to("weights.md")
    assert problems(folder) == []


@pytest.fixture
def cached(own, tmp_path):
    """The checkpoint as Hugging Face's cache keeps it."""
    repository = tmp_path / "hub" / "models--org--name"
    snapshot = repository / "snapshots" / "abc"
    snapshot.parent.mkdir(parents=True)
    own("bitmap").rename(snapshot)
    (repository / "blobs").mkdir()
    shared = tmp_path / "hub" / "blobs" / "ab"
    shared.mkdir(parents=True)
    for i, file in enumerate(sorted(snapshot.iterdir())):
        blob = repository / "blobs" / f"hash{i}"
        file.rename(blob)
        if file.name == SINGLE_NAME:  # huggingface_hub 2 keeps large ones once for all models
            blob.rename(shared / ("ab" * 32))
            blob.symlink_to(f"../../blobs/ab/{'ab' * 32}")
        file.symlink_to(f"../../blobs/{blob.name}")
    return snapshot


def test_the_links_of_the_hubs_cache_are_right(cached, tmp_path):
    assert problems(cached) == []
    assert secateur.load(cached, verify=True) is not None
    secateur.compress(str(cached), tmp_path / "out", RECIPES["dense"])
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    (tmp_path / "link").symlink_to(cached)
    assert problems(tmp_path / "link") == []


@pytest.mark.parametrize("target", ["../../../secret", "../../refs/main", "../../../blobs/ab/short", "../other/x"])
def test_other_links_in_the_hubs_cache_are_not(target, cached):
    (cached / "notes.txt").symlink_to(target)
    place = cached / target
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text("secret")
    says_only(cached, "notes.txt", "leads out of the folder")


# --- loading with verify


def test_loading_verifies_on_request(own):
    folder = own("bitmap")
    assert secateur.load(folder, verify=True) is not None
    content = bytearray((folder / "generation_config.json").read_bytes())
    content[-1] = 32  # a space where a new line was
    (folder / "generation_config.json").write_bytes(content)
    assert secateur.load(folder) is not None
    with pytest.raises(CheckpointError, match=r"own/generation_config\.json: was changed"):
        secateur.load(folder, verify=True)
    (folder / MANIFEST_NAME).unlink()
    with pytest.raises(CheckpointError, match=r"secateur\.json: is missing"):
        secateur.load(folder, verify=True)


def test_the_first_file_that_differs_is_named(own):
    folder = own("bitmap")
    for name in (SINGLE_NAME, "config.json"):
        with (folder / name).open("ab") as file:
            file.write(b" ")
    with pytest.raises(CheckpointError, match=r"own/config\.json: was changed"):
        secateur.load(folder, verify=True)


def test_nothing_is_opened_before_it_is_verified(own, monkeypatch):
    folder = own("bitmap")
    (folder / "config.json").write_text("{}")
    monkeypatch.setattr("secateur.model.source.open_folder", lambda *_: pytest.fail("it was opened"))
    with pytest.raises(CheckpointError, match=r"config\.json: was changed"):
        secateur.load(folder, verify=True)


def test_a_file_that_the_manifest_does_not_name_is_not_loaded(own):
    folder = own("bitmap")
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": {}}))
    with pytest.raises(CheckpointError, match=rf"{INDEX_NAME}: is not named"):
        secateur.load(folder, verify=True)


def test_a_gguf_cannot_be_verified():
    with pytest.raises(CheckpointError, match=r"demo cannot be verified: it has no secateur\.json"):
        secateur.load("demo", verify=True)


# --- the command


def test_the_command_on_a_sound_folder(made, says):
    folder = made("bitmap")
    assert says("verify", folder) == (0, "", f"{folder} is sound: 7 files, 7 linears\n")
    assert says("verify", folder, "--quiet") == (0, "", "")


def test_the_command_on_a_broken_folder(own, says, tmp_path):
    folder = own("bitmap")
    set_tensors(folder, lambda tensors: tensors["model.norm.weight"].fill_(float("nan")))
    (folder / "x.py").write_text("")
    lines = f"x.py: is not named in {MANIFEST_NAME}, and could be read with the model: take it away\n"
    lines += "model.norm.weight: holds NaN or infinity\n"
    assert says("verify", folder) == (1, "", lines)
    assert says("verify", folder, "--quiet") == (1, "", lines)
    code, out, err = says("verify", folder, "--json", "-")
    assert (code, err) == (1, "")
    found = json.loads(out)
    assert found["sound"] is False
    assert found["problems"][1] == {"where": "model.norm.weight", "what": "holds NaN or infinity"}
    assert says("verify", folder, "--json", tmp_path / "found.json")[0] == 1
    assert json.loads((tmp_path / "found.json").read_text()) == found
    assert says("verify", tmp_path / "nothing")[0] == 2


def test_what_tensors_are_called_does_not_reach_the_terminal_as_commands(own, says):
    folder = own("bitmap")
    set_tensors(folder, lambda tensors: tensors.update({"a\x1b[2J\nb": torch.zeros(1)}))
    code, _, err = says("verify", folder)
    assert code == 1
    assert "\x1b" not in err
    assert len(err.splitlines()) == 1


def test_eval_and_generate_verify_on_request(own, says, text_file):
    folder = own("bitmap")
    evaluate = ["eval", folder, "--data", "docs", "--seq-len", 8, "--windows", 1, "--quiet", "--verify"]
    for command in (evaluate, ["generate", folder, "a b", "--max-new-tokens", 2, "--verify"]):
        assert says(*command)[0] == 0
    (folder / "x.py").write_text("")
    for command in (evaluate, ["generate", folder, "a b", "--max-new-tokens", 2, "--verify"]):
        code, _, err = says(*command)
        assert code == 1
        assert "x.py: is not named" in err


# --- every byte


def each_change(file):
    """Change each byte of a file in turn: which file, and where. Every byte is put back."""
    handle = os.open(file, os.O_WRONLY)
    for i, byte in enumerate(file.read_bytes()):
        os.pwrite(handle, bytes([byte ^ (1 << i % 8 if i % 3 else 1 + i * 7 % 255)]), i)
        yield file.name, i
        os.pwrite(handle, bytes([byte]), i)
    os.close(handle)


@pytest.mark.slow
def test_every_changed_byte_is_found_by_the_files_hashes(own):
    """By the stage of `verify` that reads files whole; the next test, and the slow one, run all of it.

    Each file has a hash of its own, so that one byte of each is changed at a time; the manifest, which names them, is last.
    """
    folder = own("bitmap")
    files = sorted(folder.iterdir(), key=lambda file: file.name == MANIFEST_NAME)
    seen = 0
    for together in (files[:-1], files[-1:]):
        for changed in zip_longest(*(each_change(file) for file in together)):
            found = {problem.where for problem in check_files(folder)}
            assert {name for name, _ in filter(None, changed)} <= found, changed
            seen += len(changed) - changed.count(None)
    assert seen == sum(file.stat().st_size for file in files) > 5000
    assert list(check_files(folder)) == []


@pytest.mark.parametrize("stride", [pytest.param(211, id="some"), pytest.param(1, id="all", marks=pytest.mark.slow)])
def test_every_changed_byte_is_found_by_verify(stride, own):
    folder = own("bitmap")
    changes = chain.from_iterable(map(each_change, sorted(folder.iterdir())))
    for count, (name, i) in enumerate(changes):
        if count % stride == 0:
            assert name in {problem.where for problem in secateur.verify(folder)}, (name, i)
    assert secateur.verify(folder) == []


# --- what secateur never does


def test_no_source_file_of_secateur_can_unpickle():
    """Neither does it import a pickle, nor does it call what opens one."""
    import ast

    package = Path(secateur.__file__).parent
    seen = 0
    for file in package.rglob("*.py"):
        seen += 1
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Attribute):
                names = [f"{node.value.id}.{node.attr}"] if isinstance(node.value, ast.Name) else []
                names += ["allow_pickle"] if node.attr == "allow_pickle" else []
            elif isinstance(node, ast.keyword):
                names = [node.arg or ""]
            for name in names:
                parts = name.split(".")
                assert not {"pickle", "cPickle", "dill", "joblib", "cloudpickle", "shelve", "marshal"} & set(parts), (
                    file
                )
                assert name not in ("torch.load", "torch.jit", "numpy.load", "np.load", "allow_pickle"), (file, name)
    assert seen > 50


def test_no_pickle_is_opened_by_transformers_either(own, tmp_path):
    """Where names differ from the model's, transformers loads the folder; it would take a pickle first."""
    folder = own("dense")
    set_tensors(folder, lambda tensors: tensors.pop("model.norm.weight"))
    (folder / SINGLE_NAME).rename(folder / "weights.safetensors")

    class Trap:
        def __reduce__(self):
            return os._exit, (77,)

    torch.save(Trap(), folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"lacks 1 of the model's tensors.*safetensors"):
        secateur.load(folder)


def test_no_socket_is_opened_for_a_local_folder(made, tmp_path):
    """In a process of its own, which may use the hub as far as its settings go."""
    program = """
        import socket, sys

        def refuse(*args, **kwargs):
            raise SystemExit(f"a socket was opened: {args}")

        socket.socket.connect = socket.socket.connect_ex = refuse
        socket.getaddrinfo = socket.create_connection = refuse
        import huggingface_hub.constants
        huggingface_hub.constants.HF_HUB_OFFLINE = False
        import secateur
        from secateur.runs.generate import generate
        from secateur.checkpoint.export import export
        folder, out, text = sys.argv[1:]
        assert secateur.verify(folder) == []
        secateur.load(folder, verify=True)
        generate(folder, "a b", max_new_tokens=2)
        recipe = secateur.Recipe(prune="wanda", sparsity=0.5, calibration=secateur.Calibration(text, samples=2, seq_len=8))
        secateur.compress(folder, out, recipe)
        export(out, out + "-dense", "dense")
        print("done")
        try:
            generate("someone/model", "a b", max_new_tokens=2)
        except SystemExit as stop:
            print(stop)
    """
    (tmp_path / "text.txt").write_text("a b " * 100)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    found = processes.script(program, made("dense"), tmp_path / "out", tmp_path / "text.txt", env=environment)
    assert re.search(r"done\na socket was opened: .*\n$", found.stdout), found.stderr
    assert hasattr(socket.socket, "connect")
