"""A packed model shared out between devices and disk, as far as a machine with a CPU alone can tell."""

import shutil
import warnings
from types import SimpleNamespace

import pytest
import torch
from fake_link import FakeLink
from transformers import AutoModelForCausalLM

import secateur
from secateur.errors import UsageError
from secateur.plugin import offloaded
from secateur.plugin.packed_modules import main_device, packed_linears, place_named

IDS_NS = torch.randint(2, 300, (2, 12), generator=torch.Generator().manual_seed(3))
LOAD = {"secateur": secateur.load, "transformers": AutoModelForCausalLM.from_pretrained}
LAYERS = {f"model.layers.{i}": place for i, place in enumerate(["cpu", "disk"])}
BY_HAND = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk", **LAYERS}


def logits(model):
    with torch.no_grad():
        return model(IDS_NS).logits


@pytest.fixture
def load(packed_of, tmp_path):
    """`load("secateur", "packed-int", "auto", device_map=…)`: a model, and what was warned of its packed linears."""

    def load(loader, layout, backend, **options):
        with warnings.catch_warnings(record=True) as caught, secateur.backend(backend):
            warnings.simplefilter("always")
            model = LOAD[loader](packed_of("qwen2", layout), offload_folder=str(tmp_path / "offload"), **options)
        return model, [str(warning.message) for warning in caught if "packed" in str(warning.message)]

    return load


@pytest.mark.thin(2)
@pytest.mark.parametrize("loader", LOAD)
@pytest.mark.parametrize("backend", ["auto", "torch", "dense"])
@pytest.mark.parametrize("layout", ["nm", "spqr"])
def test_a_part_on_disk(load, packed_of, tmp_path, layout, backend, loader):
    """What is dense is offloaded; packed linears of blocks are read when they run, and what is small stays in memory."""
    model, said = load(loader, layout, backend, device_map=BY_HAND)
    wanted = logits(secateur.load(packed_of("qwen2", layout), backend))
    for _ in range(2):
        assert torch.equal(logits(model), wanted)
    assert model.lm_head.weight.is_meta
    assert not said
    linears = dict(packed_linears(model))
    assert [name for name, linear in linears.items() if linear.away] == [name for name in linears if ".1." in name]
    assert all(linear.prepared.device.type == "cpu" for linear in linears.values())
    assert any(p.is_meta for p in model.model.layers[1].parameters()) == (not linears)
    assert bool(linears) == (getattr(model, "streamer", None) is not None and model.streamer.bytes_read > 0)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(secateur.load(tmp_path / "again", backend)), wanted)


@pytest.mark.parametrize("loader", LOAD)
@pytest.mark.parametrize("device_map", ["auto", "balanced", "sequential"])
def test_the_sizes_of_packed_linears_are_known(load, packed_of, loader, device_map):
    path = packed_of("qwen2", "packed-int")
    whole = secateur.load(path)
    sizes = [sum(m.nbytes for _, m in packed_linears(layer)) for layer in whole.model.layers]
    dense = sum(p.nbytes for p in whole.parameters())
    # Room for the dense weights, and for those of one layer to be brought in, but not for packed ones beside them.
    most = dense + max(sizes) // 2
    assert most > dense
    model, _ = load(loader, "packed-int", "auto", device_map=device_map, max_memory={"cpu": most})
    assert "disk" in model.hf_device_map.values()
    assert torch.equal(logits(model), logits(whole))
    model, said = load(
        loader, "packed-int", "auto", device_map=device_map, max_memory={"cpu": 4 * (dense + sum(sizes))}
    )
    assert set(getattr(model, "hf_device_map", {"": "cpu"}).values()) <= {"cpu", torch.device("cpu")}
    assert not said
    assert {name.rpartition(".")[2] for name, _ in model.named_parameters()} == {"weight", "bias"}


@pytest.mark.parametrize("loader", LOAD)
def test_one_device(load, packed_of, loader):
    model, said = load(loader, "packed-int", "auto", device_map="cpu")
    assert torch.equal(logits(model), logits(secateur.load(packed_of("qwen2", "packed-int"))))
    assert not said


def test_where_most_of_a_model_computes():
    assert main_device({"a": "cpu", "b": "disk"}) == main_device({"a": "disk"}) == torch.device("cpu")
    assert main_device({"a": "disk", "b": "cuda:1", "c": "cuda:0"}) == torch.device("cuda:1")
    assert main_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert main_device(None) == torch.get_default_device()


def test_inputs_are_brought_to_a_packed_linear(packed_of):
    """What is around it may be on a GPU: where its weight is kept in the CPU's memory, it computes there."""
    model = secateur.load(packed_of("qwen2", "packed-int"))
    linear = next(module for _, module in packed_linears(model))
    x_TI = torch.randn(3, linear.in_features)
    wanted_TO = linear(x_TI)
    moved = []
    elsewhere = SimpleNamespace(device=torch.device("meta"), to=lambda device: moved.append(device) or x_TI)
    linear.place(torch.device("cpu"), fetch=True)
    assert torch.equal(linear(x_TI), wanted_TO)
    y_TO = linear(elsewhere)
    assert (y_TO.device.type, y_TO.shape) == ("meta", wanted_TO.shape)
    assert moved == [torch.device("cpu")]
    linear.bfloat16()
    assert linear(elsewhere).device.type == "meta"
    linear.place(torch.device("cpu"))
    with pytest.raises(UsageError, match="the input is on meta, but the weight on cpu"):
        linear(torch.empty(3, linear.in_features, device="meta"))


def test_what_cannot_be_shared_out_is_said(packed_of):
    path = packed_of("qwen2", "packed-int")
    for options, message in (
        ({"device_map": "nowhere"}, "device_map 'nowhere' cannot be used"),
        ({"device_map": {"model": "cpu"}}, "cannot be shared out between devices"),
        ({"device_map": {"": "disk"}}, r"name a folder for it, offload_folder="),
        ({"max_memory": {"cpu": "1kB"}}, "is too little for"),
    ):
        with pytest.raises(UsageError, match=message):
            secateur.load(path, **options)


@pytest.mark.parametrize("loader", LOAD)
@pytest.mark.parametrize("room", [0, 10**12])
@pytest.mark.parametrize("device_map", [BY_HAND, "sequential"], ids=["by hand", "shared out"])
def test_weights_that_there_is_no_room_for_on_the_way(load, packed_of, loader, room, device_map, monkeypatch):
    """Where they would go is not known when they are checked: most are let go of, and those that stay are read again."""
    monkeypatch.setattr(offloaded, "free_memory", lambda: room)
    path = packed_of("qwen2", "packed-int")
    whole = secateur.load(path)
    dense = sum(p.nbytes for p in whole.parameters())
    sizes = [sum(m.nbytes for _, m in packed_linears(layer)) for layer in whole.model.layers]
    options = {} if device_map is BY_HAND else {"max_memory": {"cpu": dense + max(sizes) // 2}}
    model, said = load(loader, "packed-int", "auto", device_map=device_map, **options)
    assert torch.equal(logits(model), logits(whole))
    assert not said
    away = {name for name, linear in packed_linears(model) if linear.away}
    assert away == {name for name, _ in packed_linears(model) if place_named(model, name) == "disk"} != set()
    assert model.get_memory_footprint() >= sum(sizes)


def test_a_part_of_a_block_on_disk(load, packed_of):
    places = {f"model.layers.1.{name}": "cpu" for name in ("self_attn", "input_layernorm", "post_attention_layernorm")}
    rest = {key: "cpu" for key in BY_HAND if key != "model.layers.1"}
    model, _ = load("transformers", "bitmap", "auto", device_map={**rest, **places, "model.layers.1.mlp": "disk"})
    away = [name for name, linear in packed_linears(model) if linear.away]
    assert [name.rpartition(".")[0] for name in away] == ["model.layers.1.mlp"] * 3
    for _ in range(2):
        assert torch.equal(logits(model), logits(secateur.load(packed_of("qwen2", "bitmap"))))


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_blocks_beside_a_device(load, packed_of, place, monkeypatch):
    """What a GPU has no room for is brought there: from pinned memory, or from disk."""
    link = FakeLink(late=True)
    monkeypatch.setattr(offloaded, "link_to", lambda device: link)
    monkeypatch.setattr(offloaded, "_elsewhere", lambda model, device: [(*e, place) for e in packed_linears(model)])
    model, _ = load("transformers", "nm", "auto", device_map=BY_HAND)
    for _ in range(2):
        assert torch.equal(logits(model), logits(secateur.load(packed_of("qwen2", "nm"))))
    assert model.streamer.bytes_copied > 0
    assert (model.streamer.bytes_read > 0) == (place == "disk")


def test_files_that_change(packed_of, tmp_path):
    copied = tmp_path / "changes"
    shutil.copytree(packed_of("qwen2", "packed-int"), copied)
    model = AutoModelForCausalLM.from_pretrained(copied, device_map={**BY_HAND, "lm_head": "cpu"})
    logits(model)
    [file] = copied.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(secateur.CheckpointError, match="was changed while it was in use"):
        [logits(model) for _ in range(2)]
