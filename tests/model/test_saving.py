"""A packed model saves itself from memory: whatever became of the folder that it was loaded from, and wherever it went."""

import copy
import io
import json
import pickle
import shutil

import processes
import pytest
import torch
from conftest import PACKED
from random_weights import load_coded, load_sparse, make
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
)

import secateur
from secateur.errors import CheckpointError, UsageError
from secateur.formats.layouts.bitmap import Bitmap
from secateur.formats.layouts.choose import layout_for
from secateur.formats.layouts.packed_weight import PackedWeight
from secateur.kernels.cpu import cpu_backend
from secateur.plugin.packed_modules import PackedPlainLinear, packed_linears

has_cpu = pytest.mark.skipif(cpu_backend.missing() is not None, reason=str(cpu_backend.missing()))
BACKENDS = [pytest.param("cpu", marks=has_cpu), "torch", "dense"]
LOAD = {"secateur": secateur.load, "transformers": AutoModelForCausalLM.from_pretrained}
IDS_NS = torch.randint(2, 300, (2, 12), generator=torch.Generator().manual_seed(3))


def logits(model):
    with torch.no_grad():
        return model(IDS_NS).logits.float()


def same_files(a, b):
    """Tensors under the same names with the same bytes."""
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name].dtype, a[name].shape) == (b[name].dtype, b[name].shape), name
        assert torch.equal(a[name].flatten().view(torch.uint8), b[name].flatten().view(torch.uint8)), name


def stored(folder):
    """In memory of their own: files are written over here."""
    return {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}


@pytest.fixture
def own(packed_of, tmp_path):
    """A copy of a compressed folder that the test may spoil, and its tensors."""

    def make(family, layout):
        folder = tmp_path / "own"
        shutil.copytree(packed_of(family, layout), folder)
        return folder, stored(folder)

    return make


@pytest.mark.thin(4)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("layout", PACKED)
@pytest.mark.parametrize("loader", LOAD)
def test_saved_after_the_folder_is_gone(own, tmp_path, family, layout, backend, loader):
    folder, before = own(family, layout)
    with secateur.backend(backend):
        model = LOAD[loader](folder)
    shutil.rmtree(folder)
    model.save_pretrained(tmp_path / "again")
    same_files(stored(tmp_path / "again"), before)


@pytest.mark.thin(2)
@pytest.mark.parametrize("way", ["replaced", "written over", "cut short"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["bitmap", "spqr"])
def test_saved_after_the_folder_was_remade(own, packed_of, tmp_path, layout, backend, way):
    folder, before = own("llama", layout)
    model = secateur.load(folder, backend)
    if way == "replaced":
        shutil.rmtree(folder)
        shutil.copytree(packed_of("llama", "nm"), folder)
    else:  # the file stays the same one, in which other bytes lie
        other = (packed_of("llama", "nm") / "model.safetensors").read_bytes()
        with (folder / "model.safetensors").open("r+b") as file:
            file.write(other if way == "written over" else b"")
            file.truncate(len(other) if way == "written over" else 100)
    if way != "replaced" and (backend != "dense" or layout == "spqr"):
        # What its values, or its grid, were is lost, and wrong ones are not to be saved.
        with pytest.raises(CheckpointError):
            model.save_pretrained(tmp_path / "again")
        return
    packed = {name for name in before if ".weight." in name}
    state, _ = model.hf_quantizer.get_state_dict_and_metadata(model)
    same_files({name: state[name] for name in packed}, {name: before[name] for name in packed})


def test_saved_into_its_own_folder_and_again(own, tmp_path):
    folder, before = own("llama", "spqr")
    for backend in ("torch", "dense"):
        model = AutoModelForCausalLM.from_pretrained(folder)
        with secateur.backend(backend):
            model = AutoModelForCausalLM.from_pretrained(folder)
        for _ in range(2):
            model.save_pretrained(folder)
            same_files(stored(folder), before)


@pytest.mark.thin(3)
@pytest.mark.parametrize("layout", PACKED)
@pytest.mark.parametrize("backend", BACKENDS)
def test_copies(own, tmp_path, layout, backend):
    folder, before = own("qwen2", layout)
    model = secateur.load(folder, backend)
    file = io.BytesIO()
    torch.save(model, file)
    pickled = pickle.dumps(model)
    shutil.rmtree(folder)
    wanted = logits(model)
    twin = copy.deepcopy(model)
    file.seek(0)
    others = [
        twin,
        pickle.loads(pickled),
        torch.load(file, weights_only=False),
        pickle.loads(pickle.dumps(pickle.loads(pickled))),
    ]
    for i, other in enumerate([*others, *map(copy.deepcopy, others)]):
        assert torch.equal(logits(other), wanted)
        assert other.get_memory_footprint() == model.get_memory_footprint()
        other.save_pretrained(tmp_path / str(i))
        same_files(stored(tmp_path / str(i)), before)
        assert {m.prepared.backend.name for _, m in packed_linears(other)} == {backend} - {"dense"}
    # Weights of the copy are its own, but for packed ones, which do not change.
    with torch.no_grad():
        twin.model.embed_tokens.weight.zero_()
    assert torch.equal(logits(model), wanted)


_ANOTHER = """
import json, pickle, sys
from pathlib import Path
import torch
folder, ids_NS = Path(sys.argv[1]), torch.tensor(json.loads(sys.argv[2]))
models = pickle.loads((folder / "models").read_bytes())
for name, model in models.items():
    model.save_pretrained(folder / name)
with torch.no_grad():
    print(json.dumps([model(ids_NS).logits.tolist() for model in models.values()]))
"""


def test_another_process(own, tmp_path):
    folder, before = own("llama", "packed-int")
    models = {backend: secateur.load(folder, backend) for backend in ("auto", "dense")}
    (tmp_path / "models").write_bytes(pickle.dumps(models))
    done = processes.script(_ANOTHER, tmp_path, json.dumps(IDS_NS.tolist()))
    assert done.returncode == 0, done.stderr
    for (name, model), logits_NSV in zip(models.items(), json.loads(done.stdout), strict=True):
        torch.testing.assert_close(torch.tensor(logits_NSV), logits(model))
        same_files(stored(tmp_path / name), before)


def test_unpickled_where_the_backend_is_not(own, monkeypatch):
    folder, _ = own("llama", "packed-int")
    model = secateur.load(folder, "torch")
    for _, module in packed_linears(model):
        module.backend = "cpu"
    pickled = pickle.dumps(model)
    monkeypatch.setattr(cpu_backend, "missing", lambda: "its compiled kernels are not installed")
    with pytest.warns(UserWarning, match="'cpu' cannot be used.*backend 'torch' stands in"):
        again = pickle.loads(pickled)
    assert torch.equal(logits(again), logits(model))


FORMS = {
    "bitmap": lambda: (Bitmap(), Bitmap().pack(load_sparse(7, 20)[1])),
    **{
        name: (lambda kind=kind, options=options: packed_parts(make(kind, 7, 20, dtype=torch.bfloat16, **options)))
        for name, kind, options in [
            ("packed-int", "packed-int", {"order": True}),
            ("symmetric", "packed-int", {"symmetric": True}),
            ("spqr", "spqr", {"bits": 3, "outliers": "some", "order": True}),
            ("spqr of 8 bits a scale", "spqr", {"scale_bits": 6}),
            ("codebook", "codebook", {"bits": 3, "outliers": "a full row"}),
            ("sparse-int", "spqr", {"masked": "some", "outliers": "some", "order": True}),
            ("sparse-int of nothing", "packed-int", {"masked": "nothing"}),
        ]
    },
}


def packed_parts(weight):
    layout = layout_for(weight)
    return layout, layout.pack(weight)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("name", FORMS)
def test_parts_are_what_was_read(name, wide, backend):
    """Bit for bit, in whatever of the allowed forms they were."""
    layout, parts = FORMS[name]()
    if wide:
        narrow = ("order", "outlier_count", "outlier_column", "shape")
        parts = {part: tensor.int() if part in narrow else tensor for part, tensor in parts.items()}
        if name == "bitmap":
            count_O = (load_sparse(7, 20)[1] != 0).sum(1)
            parts = {**parts, "row_offsets": (count_O.cumsum(0) - count_O)[:, None], "shape": parts["shape"][None]}
    weight, form = PackedWeight(layout, {part: part for part in parts}).read("w", parts)
    linear = PackedPlainLinear(weight, None, backend, torch.float32, form)
    same_files(linear.parts(), parts)
    linear.place(torch.device("cpu"))
    same_files(linear.parts(), parts)


def test_a_packed_weight_is_read_and_not_written():
    weight, W_OI = load_coded("packed-int", 6, 8)
    linear = PackedPlainLinear(weight, None, "torch", torch.float32)
    linear.place(torch.device("cpu"))
    found = linear.weight
    assert (found.shape, found.dtype, found.device) == (W_OI.shape, W_OI.dtype, W_OI.device)
    assert torch.equal(found, W_OI)
    assert torch.equal(found[1:3].T, W_OI[1:3].T)
    assert (found.numpy() == W_OI.numpy()).all()
    assert torch.equal(found.to(torch.float64) @ torch.eye(8).double(), W_OI.double())
    assert torch.equal(copy.deepcopy(found), W_OI)
    for write in (
        lambda: found.add_(1),
        lambda: found.data.__iadd__(1),
        lambda: setattr(found, "data", W_OI),
        lambda: found.__setitem__(0, 1.0),
        lambda: torch.nn.init.normal_(found),
        lambda: torch.add(W_OI, 1, out=found),
        lambda: found.requires_grad_(),
    ):
        with pytest.raises(UsageError, match=r"cannot be written to.*call dequantize\(\) of the model first"):
            write()
    found.requires_grad = False
    assert torch.equal(linear.weight, W_OI)


def test_the_memory_of_packed_weights_is_counted(packed_of):
    path = packed_of("llama", "packed-int")
    packed, dense = AutoModelForCausalLM.from_pretrained(path), secateur.load(path, "dense")
    rest = sum(p.nbytes for p in packed.parameters()) + sum(b.nbytes for b in packed.buffers())
    found = sum(module.nbytes for _, module in packed_linears(packed))
    assert found > 0
    assert packed.get_memory_footprint() == rest + found < dense.get_memory_footprint()
    assert packed.get_memory_footprint(return_buffers=False) == found + sum(p.nbytes for p in packed.parameters())
    assert packed.model.get_memory_footprint() == packed.get_memory_footprint() - packed.lm_head.weight.nbytes
    packed.dequantize()
    assert packed.get_memory_footprint() == dense.get_memory_footprint()


@pytest.fixture(scope="module")
def vision_model(tmp_path_factory):
    """A Gemma 3 that sees, with a compressed text part. transformers saves it under names that are not those of modules."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    text = {"vocab_size": 320, "num_hidden_layers": 2, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8}
    config = Gemma3Config(
        text_config={**sizes, **text, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1},
        vision_config={**sizes, "num_hidden_layers": 1, "image_size": 28, "patch_size": 14},
        **{"mm_tokens_per_image": 4, "image_token_index": 300, "boi_token_index": 301, "eoi_token_index": 302},
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("gemma3")
    Gemma3ForConditionalGeneration(config).save_pretrained(folder / "dense")
    recipe = secateur.Recipe(quantize="rtn", quantization={"bits": 4, "group_size": 16})
    secateur.compress(str(folder / "dense"), folder / "packed", recipe)
    return folder / "packed"


@pytest.mark.thin(2)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("original", [True, False])
def test_a_model_that_is_saved_under_other_names(vision_model, tmp_path, backend, original):
    with secateur.backend(backend):
        model = AutoModelForImageTextToText.from_pretrained(vision_model)
        model.save_pretrained(tmp_path / "again", save_original_format=original)
        again, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not any(info.values())
    assert len(list(packed_linears(again))) == (0 if backend == "dense" else 14)
    wanted = logits(model)
    assert torch.equal(logits(again), wanted)
    assert torch.equal(logits(secateur.load(tmp_path / "again", backend)), wanted)
    again.save_pretrained(tmp_path / "third")
    assert torch.equal(logits(secateur.load(tmp_path / "third", backend)), wanted)


def test_a_model_without_its_head_is_saved(packed_of, tmp_path):
    model = AutoModel.from_pretrained(packed_of("llama", "packed-int"))
    model.save_pretrained(tmp_path / "again")
    again = AutoModel.from_pretrained(tmp_path / "again")
    assert len(list(packed_linears(again))) == len(list(packed_linears(model)))
    with torch.no_grad():
        assert torch.equal(again(IDS_NS).last_hidden_state, model(IDS_NS).last_hidden_state)


def test_a_changed_dense_weight_is_refused_whatever_the_folder_holds(own, tmp_path):
    folder, _ = own("llama", "spqr")
    model = secateur.load(folder, "dense")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    tensors = stored(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="is not the weight that was loaded"):
        model.save_pretrained(tmp_path / "again")
