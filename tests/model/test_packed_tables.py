"""Tables of embeddings and heads in codes: compressed, loaded, run and saved in every family.

V: vocabulary, I: features.
"""

import copy
import json
import pickle

import pytest
import torch
from conftest import EVERY_KIND, VOCABULARY
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

import secateur
from secateur.checkpoint.export import export
from secateur.checkpoint.inspect import inspect
from secateur.checkpoint.verify import verify
from secateur.errors import UsageError
from secateur.kernels.cpu import cpu_backend
from secateur.kernels.embedding import PackedEmbedding
from secateur.kernels.module import PackedLinear
from secateur.plugin.packed_modules import memory_footprint, packed_linears

has_cpu = pytest.mark.skipif(cpu_backend.missing() is not None, reason=str(cpu_backend.missing()))
BACKENDS = [pytest.param("cpu", marks=has_cpu), "torch"]
IDS_NS = torch.randint(2, 300, (2, 12), generator=torch.Generator().manual_seed(3))
BF16 = torch.bfloat16


def logits(model):
    with torch.no_grad():
        return model(IDS_NS).logits.float()


def tensors(folder):
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


@pytest.fixture(scope="module")
def folder(shared, model_of, text_file):
    """`folder("llama")`: a tiny model with 8 bits for its embeddings, 6 for its head and 4 for its linears."""

    def make(family, dtype=torch.float32, **options):
        recipe = {
            "quantize": "gptq",
            "quantization": {"bits": 4, "group_size": 16},
            "embeddings": 8,
            "head": 6,
        } | options
        recipe["calibration"] = {"source": str(text_file), "samples": 8, "seq_len": 32}
        model = str(model_of(family, dtype=dtype))
        name = "-".join([family, "tables", str(dtype), *(f"{k}={v}" for k, v in sorted(options.items()))])
        return shared(name.replace("/", "_"), lambda made: secateur.compress(model, made / "packed", recipe)) / "packed"

    return make


def roles(model):
    return model.get_input_embeddings(), model.get_output_embeddings()


@pytest.mark.thin(2)
@pytest.mark.parametrize("name", EVERY_KIND)
def test_every_family_is_quantized_loads_and_is_saved_as_it_was(name, folder, tmp_path):
    path = folder(name, BF16)
    assert verify(path) == []
    ours, theirs, dense = (
        secateur.load(path, "torch"),
        AutoModelForCausalLM.from_pretrained(path),
        secateur.load(path, "dense"),
    )
    embeddings, head = roles(ours)
    tied = dense.get_input_embeddings().weight is dense.get_output_embeddings().weight
    assert isinstance(embeddings, PackedEmbedding)
    assert isinstance(head, PackedLinear)
    assert (embeddings.linear is head) == tied
    assert [m.__class__ for m in roles(dense)] == [type(roles(dense)[0]), nn.Linear]
    assert isinstance(embeddings, type(roles(dense)[0]))
    # In bfloat16 a scaled embedding is rounded twice either way.
    torch.testing.assert_close(embeddings(IDS_NS), roles(dense)[0](IDS_NS), rtol=0, atol=0)
    wanted = logits(secateur.load(path, "dense", dtype=torch.float32))
    torch.testing.assert_close(
        logits(secateur.load(path, "torch", dtype=torch.float32)),
        wanted,
        rtol=1e-4,
        atol=1e-4 * float(wanted.abs().max()),
    )
    stored = tensors(path)
    names = {module: name for name, module in dense.named_modules()}
    for model, folder_name in ((ours, "ours"), (theirs, "theirs"), (dense, "dense")):
        model.save_pretrained(tmp_path / folder_name)
        saved = tensors(tmp_path / folder_name)
        assert saved.keys() == stored.keys() or folder_name != "ours"
        assert sorted(t.nbytes for t in saved.values()) == sorted(t.nbytes for t in stored.values())
        again = secateur.load(tmp_path / folder_name, "torch")
        assert torch.equal(logits(again), logits(ours))
    weight = f"{names[roles(dense)[0]]}.weight"
    assert weight not in stored
    config = json.loads((path / "config.json").read_text())
    entries = [e for name, e in config["quantization_config"]["modules"].items() if "*" not in name]
    assert sorted(e["bits"] for e in entries if e["bits"] != 4) == ([8] if tied else [6, 8])
    # Tables of positions are not of the vocabulary.
    assert all(not isinstance(m, PackedEmbedding) for m in ours.modules() if m is not embeddings)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gemma3", "opt"])
def test_what_is_packed_is_what_inspect_export_and_the_manifest_tell(name, folder, model_of, tmp_path):
    path = folder(name, BF16)
    tables = {table.name: table for table in inspect(path).tables}
    said = json.loads((path / "secateur.json").read_text())["tables"]
    assert list(tables) == list(said)
    for module, table in tables.items():
        assert (said[module]["bytes"], said[module]["bits"], said[module]["error"]) == (
            table.bytes,
            table.bits,
            table.error,
        )
        assert table.layout == "packed-int"
        assert 0 < table.error < (1e-3 if table.bits > 8 else 1e-2)
        found = sum(tensor.nbytes for part, tensor in tensors(path).items() if part.startswith(f"{module}.weight."))
        assert found == table.bytes
    export(str(path), tmp_path / "dense", "dense")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert torch.equal(logits(plain), logits(secateur.load(path, "dense")))
    export(str(path), tmp_path / "again", "secateur")
    assert tensors(tmp_path / "again").keys() == tensors(path).keys()
    assert all(torch.equal(tensor, tensors(path)[part]) for part, tensor in tensors(tmp_path / "again").items())
    assert verify(tmp_path / "again") == []


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gemma3"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_models_are_copied_cast_and_pickled(name, backend, folder):
    model = secateur.load(folder(name), backend)
    wanted = logits(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        embeddings, head = roles(twin)
        assert type(embeddings) is type(roles(model)[0])
        assert (embeddings.linear is head) == (roles(model)[0].linear is roles(model)[1])
        assert torch.equal(logits(twin), wanted)
    half = copy.deepcopy(model).to(BF16)
    assert roles(half)[0](IDS_NS).dtype == BF16
    if name != "gemma3":  # whose factor has been rounded
        assert torch.equal(roles(half.to(torch.float32))[0](IDS_NS), roles(model)[0](IDS_NS))


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gemma3", "gpt2"])
def test_made_dense_again_it_is_tied_as_it_was(name, folder):
    path = folder(name)
    model, dense = secateur.load(path, "torch"), secateur.load(path, "dense")
    size, wanted = memory_footprint(model), logits(dense)
    back = model.dequantize()
    assert not list(packed_linears(back))
    embeddings, head = roles(back)
    assert type(embeddings) is type(roles(dense)[0])
    assert (embeddings.weight is head.weight) == (roles(dense)[0].weight is roles(dense)[1].weight)
    assert torch.equal(logits(back), wanted)
    assert size < memory_footprint(back)
    back.resize_token_embeddings(VOCABULARY + 7)
    assert len(roles(back)[0].weight) == VOCABULARY + 7


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_they_have_no_room_for_other_tokens(name, folder):
    for model in (secateur.load(folder(name)), AutoModelForCausalLM.from_pretrained(folder(name))):
        with pytest.raises(UsageError, match="are packed, and have no room for other tokens"):
            model.resize_token_embeddings(VOCABULARY + 1)
        model.tie_weights()
        assert isinstance(roles(model)[0], PackedEmbedding)


def test_the_body_alone_has_packed_embeddings(folder):
    body = AutoModel.from_pretrained(folder("llama-tied"))
    whole = secateur.load(folder("llama-tied"))
    assert torch.equal(body.get_input_embeddings()(IDS_NS), roles(whole)[0](IDS_NS))


def test_ids_beyond_the_vocabulary_are_refused(folder):
    embeddings = roles(secateur.load(folder("llama"), "torch"))[0]
    for ids in ([VOCABULARY], [-1], [3, VOCABULARY + 5]):
        with pytest.raises(IndexError, match="are asked for"):
            embeddings(torch.tensor(ids))
    assert embeddings(torch.empty(2, 0, dtype=torch.long)).shape == (2, 0, embeddings.embedding_dim)


def test_a_device_map_places_them(folder):
    model = AutoModelForCausalLM.from_pretrained(folder("llama-tied"), device_map="auto")
    assert torch.equal(logits(model), logits(secateur.load(folder("llama-tied"))))
    model = secateur.load(folder("llama"), device_map={"": "cpu"})
    assert torch.equal(logits(model), logits(secateur.load(folder("llama"))))


def test_the_one_tensor_of_tied_ones_is_in_memory_once(folder):
    model = secateur.load(folder("llama-tied"), "torch")
    embeddings, head = roles(model)
    assert embeddings.linear.packed().codes_S.data_ptr() == head.packed().codes_S.data_ptr()
    assert sum(linear is head for _, linear in packed_linears(model)) == 1
    assert "lm_head.weight.codes" not in tensors(folder("llama-tied"))


def test_adapters_train_on_its_linears(folder):
    peft = pytest.importorskip("peft")
    model = secateur.load(folder("llama-tied"), "torch")
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    tuned.enable_input_require_grads()
    tuned(IDS_NS, labels=IDS_NS).loss.backward()
    grads = [p.grad for p in tuned.parameters() if p.requires_grad]
    assert grads
    assert all(g is not None for g in grads)
