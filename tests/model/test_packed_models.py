"""Models whose linears compute on packed weights: they say what the dense ones say, and save what was loaded."""

import copy
from pathlib import Path

import pytest
import torch
from conftest import PACKED as RECIPES
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import secateur
from secateur.errors import CheckpointError, UsageError
from secateur.kernels.cpu import cpu_backend
from secateur.kernels.module import PackedLinear
from secateur.plugin.packed_modules import packed_linears

IDS_NS = torch.randint(2, 300, (2, 12), generator=torch.Generator().manual_seed(3))
has_cpu = pytest.mark.skipif(cpu_backend.missing() is not None, reason=str(cpu_backend.missing()))
BACKENDS = [pytest.param("cpu", marks=has_cpu), "torch"]
# Llama; GPT-2, whose Conv1D are transposed; Qwen2, which has biases.
MODELS = ["llama", "gpt2", "qwen2"]


@pytest.fixture
def folder(packed_of):
    """`folder("llama", "bitmap", torch.bfloat16)`: a compressed folder. Not to be written to."""
    return packed_of


def logits(model):
    with torch.no_grad():
        return model(IDS_NS).logits.float()


@pytest.mark.thin(3)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", RECIPES)
@pytest.mark.parametrize("family", MODELS)
def test_logits_are_those_of_the_dense_model(folder, family, layout, backend):
    path = folder(family, layout)
    packed, dense = secateur.load(path, backend), secateur.load(path, "dense")
    modules = dict(packed_linears(packed))
    assert len(modules) == sum(isinstance(m, nn.Linear | Conv1D) for m in dense.modules()) - 1  # but for the head
    assert {m.prepared.backend.name for m in modules.values()} == {backend}
    wanted = logits(dense)
    torch.testing.assert_close(logits(packed), wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
    assert not torch.equal(wanted[0], wanted[1])


@pytest.mark.thin(2)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", RECIPES)
def test_in_bfloat16_too(folder, layout, backend):
    path = folder("llama", layout, torch.bfloat16)
    packed, dense = secateur.load(path, backend), secateur.load(path, "dense")
    exact = logits(secateur.load(path, "dense", dtype=torch.float32))
    # Neither is further from what float32 gives than bfloat16 is anyway.
    assert (logits(packed) - exact).norm() <= 1.5 * (logits(dense) - exact).norm()


@pytest.mark.thin(3)
@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("layout", RECIPES)
def test_transformers_loads_the_same(folder, family, layout, tmp_path):
    path = folder(family, layout)
    ours, theirs = secateur.load(path), AutoModelForCausalLM.from_pretrained(path)
    assert dict(packed_linears(ours)).keys() == dict(packed_linears(theirs)).keys() != set()
    assert torch.equal(logits(ours), logits(theirs))
    for name, model in (("ours", ours), ("theirs", theirs)):
        model.save_pretrained(tmp_path / name)
        again = load_file(tmp_path / name / "model.safetensors")
        stored = load_file(path / "model.safetensors")
        assert again.keys() == stored.keys()
        assert all(torch.equal(again[key], stored[key]) for key in stored)


def test_no_warning_and_nothing_is_missing(folder):
    path = folder("llama", "bitmap")
    _, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]


def test_the_model_without_its_head(folder):
    path = folder("llama", "nm")
    model = AutoModel.from_pretrained(path)
    assert len(list(packed_linears(model))) == 14
    with torch.no_grad(), secateur.backend("dense"):
        wanted = AutoModel.from_pretrained(path)(IDS_NS).last_hidden_state
        torch.testing.assert_close(model(IDS_NS).last_hidden_state, wanted, rtol=1e-4, atol=1e-4)


@has_cpu
def test_generate_takes_turns_of_many_tokens_and_of_one(folder):
    path = folder("llama", "bitmap")
    packed, dense = secateur.load(path, "cpu"), secateur.load(path, "dense")
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(packed.generate(IDS_NS, **options), dense.generate(IDS_NS, **options))


def test_the_backend_is_auto_unless_it_is_said(folder):
    path = folder("llama", "bitmap")
    chosen = "cpu" if cpu_backend.missing() is None else "dense"
    found = {m.prepared.backend.name for _, m in packed_linears(secateur.load(path))}
    assert found == ({"cpu"} if chosen == "cpu" else set())
    with secateur.backend("torch"):
        for model in (secateur.load(path), AutoModelForCausalLM.from_pretrained(path)):
            assert {m.prepared.backend.name for _, m in packed_linears(model)} == {"torch"}
        with secateur.backend("dense"):
            assert not list(packed_linears(AutoModelForCausalLM.from_pretrained(path)))
    with pytest.raises(UsageError, match="not known"), secateur.backend("nope"):
        pass


def test_without_compiled_kernels_weights_are_dense(folder, monkeypatch):
    monkeypatch.setattr(cpu_backend, "missing", lambda: "its compiled kernels are not installed")
    path = folder("llama", "bitmap")
    assert not list(packed_linears(secateur.load(path)))
    assert not list(packed_linears(AutoModelForCausalLM.from_pretrained(path)))
    with pytest.raises(
        UsageError, match="'cpu' cannot be used: its compiled kernels are not installed; until then use dense"
    ):
        secateur.load(path, "cpu")


@pytest.mark.parametrize("backend", BACKENDS)
def test_casting_and_copying_leave_packed_weights_alone(folder, backend):
    model = secateur.load(folder("qwen2", "spqr"), backend)
    wanted = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), wanted)
    moved = model.to("cpu")
    assert torch.equal(logits(moved), wanted)
    layer = next(m for _, m in packed_linears(model))
    scales = layer.prepared.weight.grid.second_TG4.clone()
    model.to(torch.bfloat16)
    assert torch.equal(layer.prepared.weight.grid.second_TG4, scales)
    assert layer.bias.dtype == torch.bfloat16
    # bfloat16 has eight bits.
    assert (logits(model) - wanted).norm() < 0.1 * wanted.norm()


@pytest.mark.parametrize("family", MODELS)
def test_it_can_be_made_dense_again(folder, family):
    path = folder(family, "packed-int")
    model = AutoModelForCausalLM.from_pretrained(path)
    model.dequantize()
    assert not list(packed_linears(model))
    assert torch.equal(logits(model), logits(secateur.load(path, "dense")))


def test_memory_is_that_of_the_packed_weights(folder):
    path = folder("llama", "spqr")
    stored = load_file(path / "model.safetensors")
    for name, module in packed_linears(secateur.load(path, "torch")):
        parts = [t.nbytes for key, t in stored.items() if key.startswith(f"{name}.weight.")]
        # Padding, and eight bytes a row that say where it begins: much in so small a model.
        assert module.nbytes <= 1.15 * sum(parts) + 128 + 16 * (module.out_features + 1)


def test_a_linear_that_does_more_than_multiply_is_left_dense(folder, monkeypatch):
    class Louder(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    path = folder("llama", "bitmap")
    from transformers.models.llama import modeling_llama

    original = modeling_llama.LlamaMLP.__init__

    def init(self, config):
        original(self, config)
        self.up_proj = Louder(config.hidden_size, config.intermediate_size, bias=False)

    monkeypatch.setattr(modeling_llama.LlamaMLP, "__init__", init)
    for model in (secateur.load(path, "torch"), AutoModelForCausalLM.from_pretrained(path)):
        kinds = {type(layer.mlp.up_proj) for layer in model.model.layers}
        assert kinds == {Louder}
        assert isinstance(model.model.layers[0].mlp.down_proj, PackedLinear) or cpu_backend.missing()
        stored = secateur.load(path, "dense").model.layers[1].mlp.up_proj.weight
        assert torch.equal(model.model.layers[1].mlp.up_proj.weight, stored)


def damaged(path: Path, out: Path, change) -> Path:
    out.mkdir()
    for file in path.glob("*.json"):
        (out / file.name).write_bytes(file.read_bytes())
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.mark.parametrize("load", [secateur.load, AutoModelForCausalLM.from_pretrained])
def test_damage_is_named(folder, tmp_path, load):
    name = "model.layers.1.mlp.up_proj.weight"
    with secateur.backend("torch"):

        def cut(tensors):
            tensors[f"{name}.compressed"] = tensors[f"{name}.compressed"][:-1].clone()

        with pytest.raises(CheckpointError, match=rf"{name} cannot be read from layout 'bitmap': the bit mask has"):
            load(damaged(folder("llama", "bitmap"), tmp_path / "cut", cut))

        def reshape(tensors):
            for part in ("bitmask", "compressed", "shape"):
                tensors[f"{name}.{part}"] = tensors[f"{name.replace('up_proj', 'down_proj')}.{part}"].clone()

        with pytest.raises(CheckpointError, match=rf"{name} is \[32, 64\] in the file, but \[64, 32\] in the model"):
            load(damaged(folder("llama", "bitmap"), tmp_path / "reshape", reshape))


def test_a_dense_model_has_nothing_for_a_backend(model_of):
    path = model_of("llama")
    with pytest.raises(UsageError, match="has no packed weights that backend 'torch' computes on"):
        secateur.load(path, "torch")
    assert not list(packed_linears(secateur.load(path, "auto")))


@has_cpu
def test_compile_goes_through(folder):
    model = secateur.load(folder("llama", "spqr"), "cpu")
    wanted = logits(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(logits(compiled), wanted, rtol=1e-4, atol=1e-4)
