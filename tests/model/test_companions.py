"""What comes along with a model besides its weights, from a folder and from the hub, and which code configurations name."""

import json
import os
from types import SimpleNamespace

import pytest
from huggingface_hub.utils import filter_repo_objects

import secateur
from secateur.checkpoint.export import export
from secateur.folder.manifest import MANIFEST_NAME, sha256
from secateur.model import companions
from secateur.model.source import open_source
from secateur.recipes.recipe import Recipe

RTN = Recipe(quantize="rtn")
TAKEN = [
    "NOTICE", "LICENSE.md", "USE_POLICY", "README.md", "added_tokens.json", "merges.txt", "vocab.bpe", "source.spm",
    "sentencepiece.bpe.model", "bpe_vocab.txt.gz", "qwen.tiktoken", "chat_template.jinja", "trainer_state.json", "picture.png",
    "additional_chat_templates/tools.jinja", "additional_chat_templates/rag.jinja", "licenses/a/b.txt",
]  # fmt: skip
LEFT = [
    "pytorch_model.bin", "pytorch_model.bin.index.json", "tf_model.h5", "flax_model.msgpack", "model.gguf", "rust_model.ot.bin",
    "optimizer.pt", "scheduler.pt", "rng_state_0.pth", "training_args.bin", "state.pkl", "weights.npz", "code.zip",
    "onnx/model.onnx", "onnx/model.onnx_data", "original/consolidated.00.pth", "original/x.safetensors",
    "checkpoint-5/config.json", "checkpoint-5/tokenizer.json", ".gitattributes", ".git/HEAD", "__pycache__/x.pyc", "lib.so",
]  # fmt: skip
CODE = ["modeling_x.py", "tokenization_x.py", "parts/rope.py"]


def add(folder, names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}" if name.endswith(".json") else f"# {name}")


def files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["compress", "export"])
@pytest.mark.parametrize("trusted", [False, True])
def test_everything_comes_along_that_is_no_weight(name, trusted, own_model, tmp_path):
    model, out = own_model("llama"), tmp_path / "out"
    before = files(model)
    add(model, [*TAKEN, *LEFT, *CODE])
    if name == "compress":
        notes = secateur.compress(str(model), out, RTN, trust_remote_code=trusted).notes
    else:
        notes = export(str(model), out, "dense", trust_remote_code=trusted)
    assert notes == []
    assert files(out) == {*before, *TAKEN, *(CODE if trusted else ()), MANIFEST_NAME}
    assert (out / "README.md").read_bytes().endswith((model / "README.md").read_bytes())  # behind our own card
    for file in set(TAKEN) - {"README.md"}:
        assert (out / file).read_bytes() == (model / file).read_bytes()
    # The manifest has them all, at any depth, and they are as safe as others.
    said = json.loads((out / MANIFEST_NAME).read_text())["files"]
    assert said.keys() == files(out) - {MANIFEST_NAME}
    assert all(sha256(out / file) == digest for file, digest in said.items())
    assert secateur.verify(out) == []
    # What was made is a source like the one that it was made of.
    export(str(out), tmp_path / "again", "dense", trust_remote_code=trusted)
    assert files(tmp_path / "again") == files(out)


def test_templates_in_a_folder_are_used(own_model, tmp_path):
    model = own_model("llama")
    (model / "chat_template.jinja").write_text("plain")
    add(model, ["additional_chat_templates/tools.jinja"])
    export(str(model), tmp_path / "out", "dense")
    from transformers import AutoTokenizer

    found = AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    assert found == AutoTokenizer.from_pretrained(model).chat_template
    assert found["tools"] == "# additional_chat_templates/tools.jinja"


def test_verify_looks_into_folders(own_model, tmp_path):
    model, out = own_model("llama"), tmp_path / "out"
    add(model, ["additional_chat_templates/a.jinja", "more/b.txt", "more/c.txt"])
    export(str(model), out, "dense")
    assert secateur.verify(out) == []
    (out / "additional_chat_templates" / "a.jinja").write_text("changed")
    (out / "more" / "b.txt").unlink()
    (out / "more" / "c.txt").unlink()
    (out / "more" / "c.txt").symlink_to(model / "more" / "c.txt")
    (out / "more" / "d.txt").write_text("new")
    assert {(problem.where, problem.what.split(":")[0]) for problem in secateur.verify(out)} == {
        ("additional_chat_templates/a.jinja", "was changed"),
        ("more/b.txt", "is missing"),
        ("more/c.txt", "is a link that leads out of the folder"),
        ("more/d.txt", f"is not named in {MANIFEST_NAME}, and could be read with the model"),
    }
    with pytest.raises(secateur.CheckpointError):
        secateur.load(out, verify=True)


def test_what_is_too_large_a_link_or_no_file_is_left_and_said(own_model, tmp_path, monkeypatch):
    monkeypatch.setattr(companions, "_LARGEST", 2**20)
    model = own_model("llama")
    add(model, ["a/fits.txt"])
    with (model / "large.txt").open("wb") as stream:
        stream.truncate(2**20 + 1)
    (tmp_path / "secret").write_text("secret")
    (model / "a" / "link.txt").symlink_to(tmp_path / "secret")
    (model / "a" / "folder").symlink_to(tmp_path)
    os.mkfifo(model / "a" / "pipe")
    (model / "a" / "new\nline").touch()
    notes = export(str(model), tmp_path / "out", "dense")
    assert notes == [
        f"not taken along from {model}, being too large, too many, links or unreadable: large.txt, a/folder, a/link.txt "
        "and 2 more"
    ]
    assert json.loads((tmp_path / "out" / MANIFEST_NAME).read_text())["notes"] == notes
    assert files(tmp_path / "out") == {*files(model), MANIFEST_NAME, "README.md"} - {
        "large.txt",
        "a/link.txt",
        "a/new\nline",
    }
    assert secateur.verify(tmp_path / "out") == []


@pytest.mark.parametrize(("bound", "value"), [("_LARGEST_IN_ALL", 2**16), ("_MOST", 5)])
def test_all_together_are_bounded(bound, value, own_model, tmp_path, monkeypatch):
    model = own_model("llama")
    add(model, ["a/1.txt", *(f"b/{i}.txt" for i in range(5))])
    with (model / "a" / "2.txt").open("wb") as stream:
        stream.truncate(2**16)
    monkeypatch.setattr(companions, bound, value)
    (note,) = export(str(model), tmp_path / "out", "dense")
    assert ("a/2.txt" in note) if bound == "_LARGEST_IN_ALL" else "more" in note
    assert secateur.verify(tmp_path / "out") == []


@pytest.mark.parametrize("name", ["compress", "export"])
def test_a_folder_in_the_model_is_not_copied_into_itself(name, own_model):
    model = own_model("llama")
    before = files(model)
    for out in (model / "out", model / "a" / "out"):
        if name == "compress":
            secateur.compress(str(model), out, RTN)
        else:
            export(str(model), out, "dense")
        assert files(out) == {*before, MANIFEST_NAME, "README.md"}


@pytest.mark.parametrize("trusted", [False, True])
def test_the_hub_gives_the_same(trusted, own_model, monkeypatch):
    """What is downloaded is what a folder of the same files would give, its weights besides."""
    model = own_model("llama")
    before = files(model)
    add(model, [*TAKEN, *LEFT, *CODE, "too_large.txt", "model.safetensors.index.json"])
    everything = files(model)
    asked = {}

    def download(name, **options):
        asked.update(options, name=name)
        raise OSError("no network here")

    def about(self, name, revision, files_metadata):
        assert (name, revision, files_metadata) == ("someone/model", "v2", True)
        sizes = {"too_large.txt": 2**40, "model.safetensors": 2**40}
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=f, size=sizes.get(f, 5)) for f in everything])

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", about)
    with pytest.raises(secateur.UsageError, match="no network here"):
        open_source("someone/model@v2", trusted)
    assert (asked.pop("name"), asked.pop("revision")) == ("someone/model", "v2")
    got = set(filter_repo_objects(everything, **asked))
    wanted = {*before, *TAKEN, *(CODE if trusted else ()), "model.safetensors.index.json"}
    assert wanted - {"checkpoint-5/config.json"} <= got
    # A checkpoint of its own within is told by its config, which therefore comes, too.
    assert got - wanted == {"checkpoint-5/config.json", "checkpoint-5/tokenizer.json"}


def test_without_a_list_of_sizes_the_hub_is_asked_all_the_same(monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: 1 / 0)
    assert companions._too_large("someone/model") == []


# --- code that configurations name


AUTO = {"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "modeling_x.X"}
FROM_A_REPOSITORY = {"AutoModel": "someone/code--modeling_y.Y"}


@pytest.mark.parametrize("name", ["compress", "export"])
def test_configurations_name_no_code_that_is_not_there(name, own_model, tmp_path):
    model, out = own_model("llama"), tmp_path / "out"
    changes = {
        "config.json": {
            "auto_map": {**AUTO, **FROM_A_REPOSITORY},
            "custom_pipelines": {"x": {"impl": "pipe.X", "pt": ["AutoModelForCausalLM"]}},
        },
        "tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["tokenization_x.X", None]}, "note": "é"},
        "processor_config.json": {"auto_map": AUTO, "inner": [{"auto_map": AUTO, "kept": 1}]},
        "other_config.json": {"auto_map": "odd"},
    }
    for file, change in changes.items():
        content = json.loads((model / file).read_text()) if (model / file).exists() else {}
        (model / file).write_text(json.dumps({**content, **change}))
    add(model, ["modeling_x.py", "configuration_x.py", "tokenization_x.py"])
    if name == "compress":
        secateur.compress(str(model), out, RTN)
    else:
        export(str(model), out, "dense")
    found = {file: json.loads((out / file).read_text()) for file in changes}
    assert found["config.json"]["auto_map"] == FROM_A_REPOSITORY
    assert "custom_pipelines" not in found["config.json"]
    assert "auto_map" not in found["tokenizer_config.json"]
    assert found["tokenizer_config.json"]["note"] == "é"
    assert found["processor_config.json"] == {"inner": [{"kept": 1}]}
    assert found["other_config.json"] == {"auto_map": "odd"}
    assert secateur.verify(out) == []


def test_what_was_made_without_trust_opens_with_it(own_model, tmp_path):
    """The fault as it showed: the entry was there and its code was not."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, out = own_model("llama"), tmp_path / "out"
    for file, auto in (("config.json", AUTO), ("tokenizer_config.json", {"AutoTokenizer": ["tokenization_x.X", None]})):
        content = json.loads((model / file).read_text())
        (model / file).write_text(json.dumps({**content, "auto_map": auto}))
    add(model, ["modeling_x.py", "configuration_x.py", "tokenization_x.py"])
    secateur.compress(str(model), out, RTN)
    AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    AutoTokenizer.from_pretrained(out, trust_remote_code=True)


def test_trusted_code_is_kept_and_named(own_model, tmp_path):
    model, out = own_model("llama"), tmp_path / "out"
    content = json.loads((model / "config.json").read_text())
    auto = {"AutoConfig": "configuration_x.XConfig", "AutoModel": "gone.X"}
    (model / "config.json").write_text(json.dumps({**content, "model_type": "x_llama", "auto_map": auto}))
    (model / "configuration_x.py").write_text(
        "from transformers import LlamaConfig\nclass XConfig(LlamaConfig):\n    model_type = 'x_llama'\n"
    )
    (model / "modeling_x.py").write_text(
        "from transformers import LlamaForCausalLM\nfrom .configuration_x import XConfig\n"
        "class X(LlamaForCausalLM):\n    config_class = XConfig\n"
    )
    auto |= {"AutoModelForCausalLM": "modeling_x.X"}
    (model / "config.json").write_text(json.dumps({**content, "model_type": "x_llama", "auto_map": auto}))
    secateur.compress(str(model), out, RTN, trust_remote_code=True)
    assert {"configuration_x.py", "modeling_x.py"} <= files(out)
    said = json.loads((out / "config.json").read_text())["auto_map"]
    assert said == {"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "modeling_x.X"}
    secateur.load(out, trust_remote_code=True)
