"""`secateur bench` on mixtures of experts: what a step of decoding activates, counted slowly."""

import json

import pytest
import torch
from mixtures import known, random_model

import secateur
from secateur import Recipe
from secateur.kernels.module import PackedLinear
from secateur.kernels.packed import nbytes
from secateur.speed.bench import bench
from secateur.speed.decoding import STEPS, WARM_UP, Costs, decode

FAMILIES = known(["mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss", "llama4_text"])


@pytest.fixture(scope="module")
def folder(tokenizer, text_file, tmp_path_factory):
    """`folder("mixtral")`: a tiny mixture with packed codes. Not to be written to."""
    made = {}

    def make(name):
        if name not in made:
            source = tmp_path_factory.mktemp(name)
            random_model(name).save_pretrained(source)
            tokenizer.save_pretrained(source)
            made[name] = tmp_path_factory.mktemp(name) / "out"
            recipe = Recipe(quantize="rtn", quantization={"bits": 4, "group_size": 8})
            secateur.compress(str(source), made[name], recipe)
        return made[name]

    return make


def written(model, texts):
    """What `decode` finds, and the tokens of all texts that it wrote on the way."""
    pieces = []
    handle = model.register_forward_pre_hook(lambda _, __, kwargs: pieces.append(kwargs["input_ids"]), with_kwargs=True)
    found = decode(model, texts)
    handle.remove()
    return found, torch.cat(pieces, 1)


def chosen_by_hand(model, ids_BS):
    """For each layer the two experts with the largest logits, of every token."""
    found = []
    gates = [layer.mlp.gate for layer in model.model.layers]
    handles = [
        gate.register_forward_pre_hook(lambda gate, args: found.append(args[0].reshape(-1, 32) @ gate.weight.T))
        for gate in gates
    ]
    with torch.no_grad():
        model(ids_BS)
    for handle in handles:
        handle.remove()
    return [logits.topk(2).indices.view(*ids_BS.shape, 2) for logits in found]


@pytest.mark.parametrize("texts", [1, 3])
@pytest.mark.parametrize("backend", ["torch", "dense"])
def test_experts_bytes_and_operations_are_those_of_a_slow_count(backend, texts, folder):
    model = secateur.load(folder("mixtral"), backend, dtype=torch.float32)
    found, ids_BS = written(model, texts)
    assert ids_BS.shape == (texts, 8 + WARM_UP + STEPS)
    layers = chosen_by_hand(model, ids_BS)
    steps = range(ids_BS.shape[1] - STEPS, ids_BS.shape[1])
    distinct = [len(set(layer[:, s].flatten().tolist())) for s in steps for layer in layers]
    assert found.experts == pytest.approx(sum(distinct) / len(distinct))
    assert found.of == 4
    # Of one expert three matrices of 16 by 32; outside of experts attention, routers, norms and the head.
    weights = 3 * 16 * 32
    attention = 2 * (32 * 32 + 16 * 32)
    outside = 2 * (attention + 4 * 32) + 320 * 32
    if backend == "dense":
        expert, rest = 4 * weights, 4 * (outside + 5 * 32)
    else:
        packed = [m for name, m in model.named_modules() if isinstance(m, PackedLinear)]
        of_experts = [m for name, m in model.named_modules() if isinstance(m, PackedLinear) and "experts" in name]
        size = {id(m): nbytes(m.prepared.weight) for m in packed}
        expert = sum(size[id(m)] for m in of_experts) / 8
        rest = sum(size.values()) - 8 * expert + 4 * (2 * 4 * 32 + 320 * 32 + 5 * 32)
    cache = [2 * 2 * texts * 2 * 8 * (s + 1) for s in steps]  # layers, keys and values, texts, heads, features, tokens
    row = texts * 32 * 4
    per_step = [sum(distinct[2 * i : 2 * i + 2]) * expert + 4 * kept for i, kept in enumerate(cache)]
    assert found.bytes == pytest.approx(rest + row + sum(per_step) / STEPS)
    # Every token goes through two experts a layer; two heads of queries read each key and value.
    flops = 2 * texts * (outside + 2 * 2 * weights)
    assert found.flops == pytest.approx(flops + sum(2 * 2 * kept for kept in cache) / STEPS)
    assert found.seconds > 0


@pytest.mark.thin(2)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_kind_of_mixture_is_counted(name, folder):
    model = secateur.load(folder(name), dtype=torch.float32)
    one, many = decode(model, 1), decode(model, 6)
    config = model.config
    k = config.num_experts_per_tok
    assert one.experts == k
    assert k < many.experts <= many.of
    assert one.bytes < many.bytes
    assert many.flops > 5 * one.flops


def test_tied_embeddings_count_as_the_head():
    apart, tied = (random_model("mixtral", tie_word_embeddings=tie) for tie in (False, True))
    assert Costs.of(apart).rest == Costs.of(tied).rest


@pytest.mark.usefixtures("small_cache")
def test_the_command_shows_the_whole_model(says, folder, tmp_path, monkeypatch):
    monkeypatch.setitem(bench.__kwdefaults__, "seconds", 0.01)
    file = tmp_path / "figures.json"
    code, out, _ = says("bench", folder("qwen2_moe"), "--backend", "torch", "--tokens", "1,2", "--json", file)
    assert code == 0
    lines = out[out.index("the whole model as it writes so many texts at a time") :].splitlines()
    assert lines[1].split() == [
        "texts", "ms", "a", "step", "tokens/s", "experts", "of", "a", "layer", "MB", "GB/s", "S-MBU", "S-MFU",
    ]  # fmt: skip
    assert lines[2].split()[0] == "1"
    assert "2.0 of 4" in lines[2]
    assert "GFLOP/s" in out
    kept = json.loads(file.read_text())
    assert [each["tokens"] for each in kept["decoding"]] == [1, 2]
    for each in kept["decoding"]:
        assert each["s_mbu"] == pytest.approx(each["bytes"] / each["seconds"] / kept["copy_bandwidth"])
        assert each["s_mfu"] == pytest.approx(each["flops"] / each["seconds"] / kept["product_flops"])
