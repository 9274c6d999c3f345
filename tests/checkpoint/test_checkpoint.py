"""Checkpoint folders: what is read, how damage is reported, and that writing leaves either the whole folder or nothing."""

import contextlib
import errno
import json
import os
import shutil

import processes
import pytest
import torch
import transformers
from conftest import FAMILIES, VOCABULARY
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import secateur
from secateur.errors import CheckpointError, SecateurError, UsageError
from secateur.folder import writer
from secateur.folder.manifest import MANIFEST_NAME, sha256
from secateur.folder.reader import INDEX_NAME, SINGLE_NAME, StoredTensors, weight_files
from secateur.folder.writer import ShardWriter, assemble, staged_folder, write_manifest
from secateur.formats.stored_weights import Entries, find_entry
from secateur.model.source import open_source

pytestmark = pytest.mark.usefixtures("dense_backend")

HALF = secateur.Recipe(prune="magnitude", sparsity=0.5)
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def single(own_model):
    """A Llama in one file, to be spoiled."""
    return own_model("llama")


@pytest.fixture(scope="module")
def shards(build, tmp_path_factory):
    """The same Llama in several files. Not to be written to."""
    options = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1, **FAMILIES["llama"].options}
    folder = tmp_path_factory.mktemp("shards") / "model"
    build(folder, transformers.LlamaConfig(**options), shard="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


@pytest.fixture
def sharded(shards, tmp_path):
    """The Llama in several files, to be spoiled."""
    return shutil.copytree(shards, tmp_path / "sharded")


@pytest.fixture(scope="module")
def packed_folder(model_of, tmp_path_factory):
    out = tmp_path_factory.mktemp("packed") / "model"
    secateur.compress(str(model_of("llama")), out, HALF)
    return out


@pytest.fixture
def packed(packed_folder, tmp_path):
    """The Llama compressed by secateur, to be spoiled."""
    return shutil.copytree(packed_folder, tmp_path / "packed")


def set_config(folder, **changes):
    """Change keys of `config.json`; None takes a key out."""
    content = {**json.loads((folder / "config.json").read_text()), **changes}
    content = {key: value for key, value in content.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(content))


def quantization(folder, **changes):
    return {**json.loads((folder / "config.json").read_text())["quantization_config"], **changes}


def set_tensors(folder, change):
    tensors = load_file(folder / SINGLE_NAME)
    change(tensors)
    save_file(tensors, folder / SINGLE_NAME, metadata={"format": "pt"})


def set_index(folder, change):
    content = json.loads((folder / INDEX_NAME).read_text())
    change(content)
    (folder / INDEX_NAME).write_text(json.dumps(content))


def read_all(folder):
    """What any command does with a model: open it, then read every weight."""
    return dict(open_source(str(folder)).weights)


def fails(folder, error, *words, use=read_all):
    """Using the folder raises just that error, in one line of reasonable length with all the words in it."""
    with pytest.raises(SecateurError) as caught:
        use(folder)
    assert type(caught.value) is error
    message = str(caught.value)
    for word in words:
        assert word in message
    assert "\n" not in message
    assert len(message) < 500 + 3 * len(str(folder))


# --- reading what is sound


def test_one_file_and_several_hold_the_same(model_of, shards):
    expected = AutoModelForCausalLM.from_pretrained(model_of("llama")).state_dict()
    for folder in (model_of("llama"), shards):
        found = read_all(folder)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        source = open_source(str(folder))
        assert len(source.weights) == len(expected)
        assert source.dtype == torch.float32
        assert sorted(source.files) == sorted(folder.glob("*.safetensors"))
    assert weight_files(model_of("llama")) == [model_of("llama") / SINGLE_NAME]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_is_that_of_the_weights(dtype, model_of):
    source = open_source(str(model_of("llama", dtype=dtype)))
    assert source.dtype == source.config.dtype == dtype


def test_files_without_an_index_are_read_all(single):
    """Some folders come in several files and without the index; each tensor is there once."""
    tensors = load_file(single / SINGLE_NAME)
    (single / SINGLE_NAME).unlink()
    names = sorted(tensors)
    save_file({name: tensors[name] for name in names[::2]}, single / "a.safetensors")
    save_file({name: tensors[name] for name in names[1::2]}, single / "b.safetensors")
    found = read_all(single)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_what_the_weights_were_is_found_again(packed, model_of):
    before = load_file(model_of("llama") / SINGLE_NAME)
    found = read_all(packed)
    assert found.keys() == before.keys()
    assert torch.equal(found["lm_head.weight"], before["lm_head.weight"])
    W_OI, old_OI = found[UP], before[UP]
    assert (W_OI == 0).float().mean() == 0.5
    assert torch.equal(W_OI[W_OI != 0], old_OI[W_OI != 0])
    assert not hasattr(open_source(str(packed)).config, "quantization_config")


def test_the_exact_name_comes_before_a_pattern():
    modules = Entries({"*": 1, "a.*.c": 2, "a.1.c": 3})
    assert [find_entry(modules, name) for name in ("a.1.c", "a.2.c", "b")] == [3, 1, 1]
    assert find_entry(Entries({"a.*.c": 2}), "a.1.d") is None


# --- reading what is not


def test_no_such_model(tmp_path):
    fails(tmp_path / "nothing", UsageError, "no such model", str(tmp_path / "nothing"))
    fails("./nothing", UsageError, "no such model")
    fails(tmp_path / "nothing.gguf", UsageError, "no such model", "nothing.gguf")


def test_a_file_that_is_not_a_model(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    fails(tmp_path / "notes.txt", UsageError, "notes.txt is a file")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    fails(tmp_path / "model.gguf", CheckpointError, "model.gguf cannot be read")


def test_an_empty_folder(tmp_path):
    fails(tmp_path, CheckpointError, str(tmp_path), "no config.json")


def test_a_folder_without_weights(single):
    (single / SINGLE_NAME).unlink()
    fails(single, CheckpointError, "holds no weights", SINGLE_NAME)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_a_pickle_is_named_and_never_opened(name, single):
    (single / SINGLE_NAME).unlink()

    class Trap:
        def __reduce__(self):
            return os._exit, (77,)

    torch.save(Trap(), single / name)
    fails(single, CheckpointError, name, "pickle")


@pytest.mark.parametrize("left", [0, 5, 8, 200, -1], ids=lambda n: f"{n} bytes")
def test_a_truncated_file(left, single):
    content = (single / SINGLE_NAME).read_bytes()
    (single / SINGLE_NAME).write_bytes(content[:left])
    fails(single, CheckpointError, str(single / SINGLE_NAME), "truncated or not a safetensors file")


def test_a_truncated_shard(sharded):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    os.truncate(shard, shard.stat().st_size // 2)
    fails(sharded, CheckpointError, str(shard), "truncated")


def test_a_file_that_is_something_else(single):
    (single / SINGLE_NAME).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n" * 9)
    fails(single, CheckpointError, str(single / SINGLE_NAME), "not a safetensors file")


def test_a_header_that_promises_exabytes(single):
    header = {"a": {"dtype": "F32", "shape": [2**31, 2**29], "data_offsets": [0, 2**62]}}
    encoded = json.dumps(header).encode()
    (single / SINGLE_NAME).write_bytes(len(encoded).to_bytes(8, "little") + encoded)
    fails(single, CheckpointError, str(single / SINGLE_NAME))
    (single / SINGLE_NAME).write_bytes((2**62).to_bytes(8, "little") + encoded)
    fails(single, CheckpointError, str(single / SINGLE_NAME))


def test_a_shard_that_the_index_names_is_missing(sharded):
    shard = sorted(sharded.glob("*.safetensors"))[2]
    shard.unlink()
    fails(sharded, CheckpointError, str(shard), "is missing", INDEX_NAME)


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "sub/model.safetensors", "{outside}", "..", ".", "", "model.bin", "a\\..\\b"]
)
def test_an_index_that_names_something_outside(name, sharded, tmp_path):
    """The file is there and sound, but it is not the folder's."""
    outside = tmp_path / SINGLE_NAME
    save_file({"lm_head.weight": torch.ones(VOCABULARY, 32)}, outside)
    (sharded / "sub").mkdir()
    shutil.copy(outside, sharded / "sub" / SINGLE_NAME)
    name = name.format(outside=outside)
    set_index(sharded, lambda index: index["weight_map"].update({"lm_head.weight": name}))
    fails(sharded, CheckpointError, INDEX_NAME, repr(name), "not a safetensors file in this folder")


@pytest.mark.parametrize("weight_map", [None, [], "x", {"a": 1}, {"a": None}, {"a": ["b.safetensors"]}], ids=str)
def test_an_index_without_a_usable_map(weight_map, sharded):
    set_index(sharded, lambda index: index.update(weight_map=weight_map))
    fails(sharded, CheckpointError, INDEX_NAME, "no usable 'weight_map'")


@pytest.mark.parametrize("name", [INDEX_NAME, "config.json"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[]", "JSON object"),
        (b"null", "JSON object"),
    ],
    ids=["empty", "cut", "not text", "deep", "list", "null"],
)
def test_json_that_is_not(name, content, words, sharded):
    (sharded / name).write_bytes(content)
    fails(sharded, CheckpointError, str(sharded / name), words)


def test_a_config_that_cannot_be_opened(single):
    (single / "config.json").unlink()
    (single / "config.json").mkdir()
    fails(single, CheckpointError, "config.json cannot be read")


def test_a_config_that_transformers_refuses(single):
    set_config(single, dtype="float33")
    fails(single, CheckpointError, "config.json cannot be used")


def test_a_tensor_in_two_files(sharded):
    first, second, *_ = sorted(sharded.glob("*.safetensors"))
    name = next(iter(load_file(first)))
    save_file({**load_file(second), name: torch.zeros(2)}, second)
    fails(sharded, CheckpointError, repr(name), str(first), str(second))


def test_a_folder_without_matrices(single):
    save_file({"a": torch.zeros(3), "b": torch.zeros(2, 2, dtype=torch.int32)}, single / SINGLE_NAME)
    fails(single, CheckpointError, "no weight matrices")


def test_a_tensor_that_went_away_while_the_folder_was_open(single):
    """Files are opened again at each access: a model that is replaced meanwhile must not crash the reader."""
    stored = StoredTensors([single / SINGLE_NAME])
    save_file({"other": torch.zeros(2)}, single / SINGLE_NAME)
    with pytest.raises(CheckpointError, match=r"tensor 'lm_head\.weight' in .*model\.safetensors cannot be read"):
        stored["lm_head.weight"]


@pytest.mark.parametrize("version", [0, 2, "1", None, [1], 1.5])
def test_an_unknown_layout_version(version, packed):
    set_config(packed, quantization_config=quantization(packed, layout_version=version))
    fails(packed, CheckpointError, f"layout version {version!r}", "reads 1")


@pytest.mark.parametrize("entry", [{"layout": "zip"}, {}, "bitmap", None, {"layout": "nm", "n": 4, "m": 2}], ids=str)
def test_an_unknown_layout(entry, packed):
    set_config(packed, quantization_config=quantization(packed, modules={"model.*": entry}))
    fails(packed, CheckpointError, "layout")


@pytest.mark.parametrize("modules", [None, [], "all"])
def test_a_config_without_modules(modules, packed):
    set_config(packed, quantization_config=quantization(packed, modules=modules))
    fails(packed, CheckpointError, "no 'modules'")


def test_a_packed_weight_that_the_config_does_not_name(packed):
    set_config(packed, quantization_config=quantization(packed, modules={"model.layers.0.*": {"layout": "bitmap"}}))
    fails(packed, CheckpointError, "model.layers.1.", "stored packed, but the config does not name its layout")


@pytest.mark.parametrize("part", ["compressed", "bitmask", "shape"])
def test_a_packed_weight_without_one_of_its_parts(part, packed):
    set_tensors(packed, lambda tensors: tensors.pop(f"{UP}.{part}"))
    fails(packed, CheckpointError, UP, f"'{part}' is missing")
    fails(packed, CheckpointError, UP, f"'{part}' is missing", use=secateur.load)


def test_a_packed_weight_without_any_of_its_parts(packed):
    set_tensors(packed, lambda tensors: [tensors.pop(f"{UP}.{part}") for part in ("compressed", "bitmask", "shape")])
    fails(packed, CheckpointError, UP, use=secateur.load)
    fails(packed, CheckpointError, UP, use=lambda f: secateur.compress(str(f), f.parent / "out", HALF))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t[f"{UP}.bitmask"].bitwise_or_(255), "bits set but there are"),
        (lambda t: t.update({f"{UP}.compressed": t[f"{UP}.compressed"][1:].clone()}), "bits set but there are"),
        (lambda t: t.update({f"{UP}.row_offsets": torch.arange(64)}), "row_offsets are out of order"),
        (lambda t: t[f"{UP}.shape"].add_(8), "bitmask is [64, 4]"),
        (lambda t: t[f"{UP}.shape"].neg_(), "not two positive sizes"),
        (lambda t: t[f"{UP}.shape"].fill_(2**40), "not two positive sizes"),
    ],
    ids=["popcount", "values", "offsets", "shape", "negative shape", "enormous shape"],
)
def test_a_damaged_packed_weight(change, words, packed):
    set_tensors(packed, change)
    fails(packed, CheckpointError, UP, "'bitmap'", words)
    fails(packed, CheckpointError, UP, words, use=lambda f: secateur.compress(str(f), f.parent / "out", HALF))
    assert not (packed.parent / "out").exists()


@pytest.mark.parametrize("stored", ["transposed", "vector"])
def test_a_weight_of_another_shape_than_the_models(stored, single):
    change = {"transposed": lambda W: W.T.contiguous(), "vector": lambda W: W[0].clone()}[stored]
    set_tensors(single, lambda tensors: tensors.update({UP: change(tensors[UP])}))
    words = (UP, "in the checkpoint, but [64, 32] in the model")
    fails(single, CheckpointError, *words, use=secateur.load)
    fails(single, CheckpointError, *words, use=lambda f: secateur.compress(str(f), f.parent / "out", HALF))


def test_a_weight_that_is_not_there(single):
    set_tensors(single, lambda tensors: tensors.pop(UP))
    fails(single, CheckpointError, "lacks 1 of the model's tensors", UP, use=secateur.load)
    fails(single, CheckpointError, UP, use=lambda f: secateur.compress(str(f), f.parent / "out", HALF))


@pytest.mark.parametrize(
    "section",
    [{"quant_method": "hqq", "bits": 4}, {"quant_method": "bitsandbytes"}, {"bits": 4}, {}, [], "gptq", 4],
    ids=str,
)
def test_weights_that_another_library_quantized(section, single):
    set_config(single, quantization_config=section)
    method = section.get("quant_method") if isinstance(section, dict) else None
    fails(single, CheckpointError, f"quantized with {method!r}", "secateur reads dense checkpoints")


# --- models of the wrong kind


TINY = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def test_an_encoder_is_not_a_decoder(tmp_path):
    transformers.BertModel(transformers.BertConfig(**TINY)).save_pretrained(tmp_path)
    fails(tmp_path, UsageError, "BertModel", "not a decoder-only language model")
    transformers.BertForMaskedLM(transformers.BertConfig(**TINY)).save_pretrained(tmp_path)
    fails(tmp_path, UsageError, "BertForMaskedLM", "not a decoder-only language model")


def test_an_encoder_decoder_is_not_a_decoder(tmp_path):
    transformers.T5Config(architectures=["T5ForConditionalGeneration"]).save_pretrained(tmp_path)
    fails(tmp_path, UsageError, "T5ForConditionalGeneration", "not a decoder-only language model")
    transformers.T5Config().save_pretrained(tmp_path)
    fails(tmp_path, UsageError, "'t5'", "not offer as a causal language model")
    transformers.BartConfig().save_pretrained(tmp_path)
    fails(tmp_path, UsageError, "encoder-decoder")


def test_a_model_that_nobody_knows(single):
    set_config(single, model_type="no-such-type", architectures=None)
    fails(single, UsageError, "'no-such-type'")
    set_config(single, model_type=None)
    fails(single, CheckpointError, "config.json has no 'model_type'")


def test_code_from_a_checkpoint_is_not_run(single):
    (single / "modeling_x.py").write_text("import os\nos._exit(77)\n")
    set_config(
        single, model_type="x", architectures=["XForCausalLM"], auto_map={"AutoModelForCausalLM": "modeling_x.X"}
    )
    fails(single, UsageError, "XForCausalLM")


def test_a_base_model_without_its_head(model_of, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(model_of("llama"))
    model.model.save_pretrained(tmp_path / "base")
    fails(tmp_path / "base", UsageError, "LlamaModel", "without the head", use=secateur.load)
    set_config(tmp_path / "base", architectures=None)
    fails(tmp_path / "base", CheckpointError, "lm_head.weight", use=secateur.load)


def test_a_base_model_whose_head_is_tied_to_the_embeddings(model_of, tmp_path):
    """Nothing is missing from it but a prefix of the names: GPT-2 was published so."""
    model = AutoModelForCausalLM.from_pretrained(model_of("gpt2"))
    model.transformer.save_pretrained(tmp_path / "base")
    set_config(tmp_path / "base", architectures=None)
    assert "h.0.mlp.c_fc.weight" in load_file(tmp_path / "base" / SINGLE_NAME)
    found = secateur.load(tmp_path / "base").state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())


# --- writing a folder


def left_in(folder):
    return sorted(p.name for p in folder.iterdir())


def tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def write_and_fail(out, overwrite, error):
    with staged_folder(out, overwrite) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a.txt").write_text("half")
        raise error


@pytest.fixture
def old(tmp_path):
    """A folder of secateur's that stands where a new one is to go."""
    folder = tmp_path / "out"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.txt").write_text("old")
    (folder / "sub" / "b.txt").write_text("old")
    write_manifest(folder, {})
    return folder


def test_a_folder_appears_when_the_block_ends(tmp_path):
    out = tmp_path / "deep" / "er" / "out"
    with staged_folder(out, overwrite=False) as folder:
        assert folder.parent == out.parent
        assert not out.exists()
        (folder / "a").write_text("new")
    assert tree(out) == {"a": b"new"}
    assert left_in(out.parent) == ["out"]
    # Its permissions are those of any folder, and not of a private one.
    plain = tmp_path / "plain"
    plain.mkdir()
    assert out.stat().st_mode == plain.stat().st_mode


def test_a_relative_name_is_that_of_the_start(tmp_path, monkeypatch):
    """Code that changes the working directory in between does not move the result."""
    monkeypatch.chdir(tmp_path)
    with staged_folder(writer.Path("out"), overwrite=False) as folder:
        (folder / "a").write_text("new")
        (tmp_path / "elsewhere").mkdir()
        os.chdir(tmp_path / "elsewhere")
    assert tree(tmp_path / "out") == {"a": b"new"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, CheckpointError])
@pytest.mark.parametrize("overwrite", [False, True])
def test_nothing_is_left_of_a_run_that_failed(error, overwrite, tmp_path):
    with pytest.raises(error, match="now"):
        write_and_fail(tmp_path / "out", overwrite, error("now"))
    assert left_in(tmp_path) == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_run_that_failed_leaves_the_old_folder(error, old, tmp_path):
    before = tree(old)
    with pytest.raises(error, match="now"):
        write_and_fail(old, True, error("now"))
    assert left_in(tmp_path) == ["out"]
    assert tree(old) == before


def test_an_existing_folder_is_not_overwritten(old, tmp_path):
    before = tree(old)
    with pytest.raises(UsageError, match=r"out exists already.*`overwrite`"), staged_folder(old, overwrite=False):
        pytest.fail("the work was begun")
    assert tree(old) == before
    assert left_in(tmp_path) == ["out"]


def test_a_folder_that_appeared_meanwhile_is_not_overwritten(tmp_path):
    """Two runs with one name: the one that ends later must not take the other's place."""
    out = tmp_path / "out"

    def run(name):
        with staged_folder(out, overwrite=False) as folder:
            (folder / "a").write_text(name)
            if name == "second":
                run("first")

    with pytest.raises(UsageError, match="out exists already"):
        run("second")
    assert tree(out) == {"a": b"first"}
    assert left_in(tmp_path) == ["out"]


def test_an_existing_folder_is_replaced_as_a_whole(old, tmp_path):
    before = tree(old)
    with staged_folder(old, overwrite=True) as folder:
        (folder / "c.txt").write_text("new")
        assert tree(old) == before  # until the end
    assert tree(old) == {"c.txt": b"new"}
    assert left_in(tmp_path) == ["out"]


@pytest.mark.parametrize(
    ("error", "moment"),
    [(OSError(errno.EACCES, "no"), "before"), (KeyboardInterrupt(), "before"), (KeyboardInterrupt(), "after")],
    ids=["denied", "interrupted before", "interrupted after"],
)
@pytest.mark.parametrize("step", [1, 2])
def test_a_replacement_that_fails_half_way(error, moment, step, old, tmp_path, monkeypatch):
    """Wherever it stops between the two renames, one of the folders stands under the name, whole."""
    before = tree(old)
    rename, done = writer.Path.rename, []

    def failing(self, target):
        done.append(self)
        if len(done) != step:
            return rename(self, target)
        if moment == "after":
            rename(self, target)
        raise error

    monkeypatch.setattr(writer.Path, "rename", failing)
    with pytest.raises(type(error)), staged_folder(old, overwrite=True) as folder:
        (folder / "c.txt").write_text("new")
    monkeypatch.undo()
    assert tree(old) == ({"c.txt": b"new"} if (moment, step) == ("after", 2) else before)
    assert left_in(tmp_path) == ["out"]


def test_a_file_is_not_replaced(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(UsageError, match="out is a file"), staged_folder(tmp_path / "out", overwrite=True):
        pytest.fail("the work was begun")
    assert (tmp_path / "out").read_text() == "mine"


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("x")
    out = tmp_path / "file" / "out"
    with pytest.raises(UsageError, match="out cannot be created"), staged_folder(out, overwrite=False):
        pytest.fail("the work was begun")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_full_disk_is_said_and_leaves_nothing(number, overwrite, single, tmp_path, monkeypatch):
    out = tmp_path / "out"
    if overwrite:
        out.mkdir()
        (out / "a").write_text("old")
        write_manifest(out, {})
    before, save = left_in(tmp_path), writer.save_file

    def full(tensors, path, **kwargs):
        save(dict(list(tensors.items())[:2]), path, **kwargs)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(writer, "save_file", full)
    with pytest.raises(SecateurError, match="out could not be written: the disk is full; nothing is left behind"):
        secateur.compress(str(single), out, HALF, overwrite=overwrite)
    assert left_in(tmp_path) == before
    assert not overwrite or left_in(out) == ["a", MANIFEST_NAME]


def test_a_full_disk_as_safetensors_reports_it(tmp_path):
    """It is written in Rust: there the number of the error is in the text only."""
    full = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    with pytest.raises(SecateurError, match="out could not be written: the disk is full; nothing is left behind"):
        write_and_fail(tmp_path / "out", False, full)
    assert left_in(tmp_path) == []


def test_another_error_of_the_system_is_not_called_a_full_disk(tmp_path):
    with pytest.raises(PermissionError):
        write_and_fail(tmp_path / "out", False, PermissionError(errno.EACCES, "no"))
    assert left_in(tmp_path) == []


def test_a_file_that_may_not_grow(single, tmp_path):
    """The kernel itself refuses to write on, in the middle of a shard."""
    program = """
        import resource, signal, sys
        import secateur
        from secateur.errors import SecateurError
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try:
            secateur.compress(sys.argv[1], sys.argv[2], secateur.Recipe(prune="magnitude", sparsity=0.5))
        except SecateurError as error:
            print("said:", error)
    """
    found = processes.script(program, single, tmp_path / "out")
    assert found.returncode == 0, found.stderr
    assert found.stdout.startswith(f"said: {tmp_path / 'out'} could not be written: ")
    assert len(found.stdout.splitlines()) == 1
    assert left_in(tmp_path) == [single.name]


# --- shards and manifest


def test_small_shards_are_what_transformers_reads(model_of, tmp_path):
    tensors = load_file(model_of("llama") / SINGLE_NAME)
    shutil.copy(model_of("llama") / "config.json", tmp_path)
    shards = ShardWriter(tmp_path, shard_bytes=10_000)
    for name, tensor in tensors.items():
        shards.add(name, tensor)
    shards.flush()
    assemble(shards.files, tmp_path, tmp_path, 10_000)

    index = json.loads((tmp_path / INDEX_NAME).read_text())
    files = sorted(p.name for p in tmp_path.glob("*.safetensors"))
    assert len(files) > 5
    assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    assert left_in(tmp_path) == sorted([*files, INDEX_NAME, "config.json"])
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert list(index["weight_map"]) == sorted(tensors)
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / file)
    # Each is closed as soon as there is enough, by the tensor that made it so.
    for file in files[:-1]:
        sizes = [t.nbytes for t in load_file(tmp_path / file).values()]
        assert sum(sizes) >= 10_000 > sum(sizes) - max(sizes)

    model, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert all(torch.equal(found, tensors[name]) for name, found in model.state_dict().items())
    assert all(torch.equal(found, tensors[name]) for name, found in read_all(tmp_path).items())


@pytest.mark.parametrize("count", [0, 1, 3])
def test_few_tensors_make_one_file(count, tmp_path):
    shards = ShardWriter(tmp_path)
    for i in range(count):
        shards.add(f"t{i}", torch.arange(6).view(2, 3).T + i)  # not contiguous
    shards.flush()
    assemble(shards.files, tmp_path, tmp_path)
    assert left_in(tmp_path) == [SINGLE_NAME]
    found = load_file(tmp_path / SINGLE_NAME)
    assert len(found) == count
    assert all(torch.equal(found[f"t{i}"], torch.arange(6).view(2, 3).T + i) for i in range(count))


def test_a_tensor_that_fills_the_last_shard_makes_no_empty_one(tmp_path):
    shards = ShardWriter(tmp_path, shard_bytes=8)
    for name in "ab":
        shards.add(name, torch.zeros(2))
    shards.flush()
    assemble(shards.files, tmp_path, tmp_path, 8)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


@pytest.mark.parametrize("stop", range(6))
def test_assembling_goes_on_where_it_was_interrupted(stop, tmp_path, monkeypatch):
    (tmp_path / "parts").mkdir()
    (tmp_path / "out").mkdir()
    shards = ShardWriter(tmp_path / "parts")
    for i in range(5):
        shards.add(f"t{i}", torch.full((100,), float(i)))
        shards.flush()
    replace, moves = os.replace, []

    def interrupted(*args):
        if len(moves) == stop:
            raise KeyboardInterrupt
        moves.append(args)
        replace(*args)

    monkeypatch.setattr(writer.os, "replace", interrupted)
    for _ in range(2):
        with contextlib.suppress(KeyboardInterrupt):
            assemble(shards.files, tmp_path / "parts", tmp_path / "out", 900)
        stop = 99
    assert left_in(tmp_path / "parts") == []
    assert left_in(tmp_path / "out") == [f"model-{i}-of-00003.safetensors" for i in ("00001", "00002", "00003")] + [
        INDEX_NAME
    ]
    index = json.loads((tmp_path / "out" / INDEX_NAME).read_text())
    assert index["metadata"]["total_size"] == 5 * 400
    found = {name: load_file(tmp_path / "out" / file)[name] for name, file in index["weight_map"].items()}
    assert found.keys() == {f"t{i}" for i in range(5)}
    assert all((found[f"t{i}"] == i).all() for i in range(5))


def test_the_manifest_tells_the_hash_of_every_file(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"abc")
    (tmp_path / "big").write_bytes(bytes(range(256)) * 10_000)
    (tmp_path / MANIFEST_NAME).write_text("stale")
    write_manifest(tmp_path, {"recipe": {"prune": "wanda"}})
    content = json.loads((tmp_path / MANIFEST_NAME).read_text())
    assert content["recipe"] == {"prune": "wanda"}
    assert content["files"].keys() == {"a.txt", "big"}
    assert content["files"]["a.txt"] == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert content["files"]["big"] == sha256(tmp_path / "big")


def test_the_manifest_of_a_compressed_folder_covers_it(packed):
    files = json.loads((packed / MANIFEST_NAME).read_text())["files"]
    assert files.keys() == {p.name for p in packed.iterdir()} - {MANIFEST_NAME}
    assert all(sha256(packed / name) == digest for name, digest in files.items())
