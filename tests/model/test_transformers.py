"""transformers reads what secateur wrote, and writes it again: nothing but `import secateur` is asked of the user."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import secateur
from secateur.errors import CheckpointError, UsageError
from secateur.folder.writer import ShardWriter, assemble
from secateur.plugin import quantizer as hf

pytestmark = pytest.mark.usefixtures("dense_backend")

IDS_NS = torch.randint(2, 300, (2, 12), generator=torch.Generator().manual_seed(3))
# Llama; GPT-2, whose Conv1D are transposed and whose head is tied; Qwen2, which has biases.
MODELS = ["llama", "gpt2", "qwen2"]
HALF = {"sparsity": 0.5}
TWO_FOUR = {"pattern": "2:4"}
SHARES = pytest.mark.parametrize("share", [HALF, TWO_FOUR], ids=["bitmap", "nm"])


@pytest.fixture(scope="module")
def compressed(model_of, tmp_path_factory) -> Callable[..., tuple[Path, dict[str, torch.Tensor]]]:
    """`compressed("llama", sparsity=0.5)`: a compressed bfloat16 folder, and its weights as the dense folder of the same
    recipe holds them. Not to be written to."""
    made = {}

    def make(family, **share):
        key = (family, *share.items())
        if key not in made:
            source, folder = str(model_of(family, dtype=torch.bfloat16)), tmp_path_factory.mktemp(family)
            secateur.compress(source, folder / "packed", secateur.Recipe(prune="magnitude", **share))
            secateur.compress(source, folder / "dense", secateur.Recipe(prune="magnitude", format="dense", **share))
            # Pruning a negative weight may leave minus zero; packed, minus zero is zero.
            dense = load_file(folder / "dense" / "model.safetensors")
            made[key] = folder / "packed", {name: tensor + 0 for name, tensor in dense.items()}
        return made[key]

    return make


def sharded(packed, out, shard_bytes=4096):
    """The same folder in shards so small that the parts of one weight lie in several."""
    out.mkdir()
    for file in packed.glob("*.json"):
        (out / file.name).write_bytes(file.read_bytes())
    writer = ShardWriter(out, shard_bytes)
    for name, tensor in load_file(packed / "model.safetensors").items():
        writer.add(name, tensor)
    writer.flush()
    assemble(writer.files, out, out, shard_bytes)
    assert len(list(out.glob("*.safetensors"))) > 3
    return out


def damaged(packed, out, change):
    """The same folder after `change` was made to its tensors by name."""
    out.mkdir()
    for file in packed.glob("*.json"):
        (out / file.name).write_bytes(file.read_bytes())
    tensors = load_file(packed / "model.safetensors")
    change(tensors)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def stored(folder):
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def quantization(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def same_bytes(a, b):
    """Tensors under the same names with the same bytes."""
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert a[name].shape == b[name].shape, name
        assert torch.equal(a[name].flatten().view(torch.uint8), b[name].flatten().view(torch.uint8)), name


def has_weights(model, expected, dtype=torch.bfloat16):
    """The model's parameters are the expected ones to the bit, all on the CPU; a tied head is its embeddings."""
    parameters = dict(model.named_parameters())
    assert parameters.keys() == expected.keys()
    same_bytes({name: p.detach() for name, p in parameters.items()}, {n: t.to(dtype) for n, t in expected.items()})
    assert {p.device.type for p in parameters.values()} == {"cpu"}
    assert not model.training


def packed_names(folder):
    return {name.removesuffix(".bitmask") for name in stored(folder) if name.endswith(".bitmask")}


# --- loading


@pytest.mark.parametrize("family", MODELS)
@SHARES
def test_from_pretrained_gives_the_pruned_weights(family, share, compressed):
    packed, expected = compressed(family, **share)
    names = packed_names(packed)
    assert names == {
        f"{FAMILIES[family].prefix}.{i}.{part}.weight" for i in range(2) for part in FAMILIES[family].linears
    }
    assert not names & stored(packed).keys()
    model = AutoModelForCausalLM.from_pretrained(packed, dtype="auto")
    has_weights(model, expected)
    for name in names:
        assert (model.get_parameter(name) == 0).float().mean() == 0.5
    assert torch.isfinite(model(IDS_NS).logits).all()
    assert model.config.quantization_config.to_dict() == quantization(packed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_from_pretrained_in_another_dtype(family, dtype, compressed):
    packed, expected = compressed(family, **HALF)
    model = AutoModelForCausalLM.from_pretrained(packed, dtype=dtype)
    has_weights(model, expected, dtype)
    assert model.dtype == dtype


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}], ids=str)
@SHARES
def test_from_pretrained_with_a_device_map(device_map, share, compressed, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # what `auto` means here
    packed, expected = compressed("llama", **share)
    has_weights(AutoModelForCausalLM.from_pretrained(packed, dtype="auto", device_map=device_map), expected)


@pytest.mark.parametrize("family", MODELS)
def test_from_pretrained_of_shards(family, compressed, tmp_path):
    packed, expected = compressed(family, **HALF)
    shards = sharded(packed, tmp_path / "shards")
    has_weights(AutoModelForCausalLM.from_pretrained(shards, dtype="auto"), expected)
    has_weights(secateur.load(shards), expected)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_base_model_alone(family, compressed):
    """`AutoModel` names modules without the prefix that the config's patterns have."""
    packed, expected = compressed(family, **HALF)
    model = AutoModel.from_pretrained(packed, dtype="auto")
    prefix = f"{model.base_model_prefix}."
    has_weights(model, {n.removeprefix(prefix): t for n, t in expected.items() if n.startswith(prefix)})


def test_only_some_linears_are_packed(model_of, tmp_path):
    """What was ignored lies dense beside what was packed, in the same kind of module."""
    source, out = model_of("llama", dtype=torch.bfloat16), tmp_path / "out"
    recipe = secateur.Recipe(prune="magnitude", sparsity=0.5, ignore=("*.1.mlp.up_proj", "*.o_proj"))
    secateur.compress(str(source), out, recipe)
    assert len(packed_names(out)) == 2 * 7 - 3
    model = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    before = stored(source)
    for name in ["model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.o_proj.weight"]:
        assert torch.equal(model.get_parameter(name), before[name])
    model.save_pretrained(tmp_path / "again")
    same_bytes(stored(tmp_path / "again"), stored(out))


@pytest.mark.parametrize("family", MODELS)
@SHARES
def test_load_gives_the_same_model(family, share, compressed):
    packed, expected = compressed(family, **share)
    model = secateur.load(packed)
    has_weights(model, expected)
    assert type(model) is type(AutoModelForCausalLM.from_pretrained(packed))
    has_weights(secateur.load(str(packed), "dense", dtype=torch.float32), expected, torch.float32)


def test_load_refuses_an_unknown_backend(compressed):
    with pytest.raises(UsageError, match="backend 'nope' is not known: it can be auto, cpu,"):
        secateur.load(compressed("llama", **HALF)[0], backend="nope")


def test_registering_twice_changes_nothing():
    before = hf.AUTO_QUANTIZER_MAPPING[hf.QUANT_METHOD]
    hf.register()
    assert hf.AUTO_QUANTIZER_MAPPING[hf.QUANT_METHOD] is before is hf.SecateurQuantizer


# --- saving


@pytest.mark.parametrize("family", MODELS)
@SHARES
def test_save_pretrained_writes_the_same_folder(family, share, compressed, tmp_path):
    packed, expected = compressed(family, **share)
    again, third = tmp_path / "again", tmp_path / "third"
    AutoModelForCausalLM.from_pretrained(packed, dtype="auto").save_pretrained(again)
    same_bytes(stored(again), stored(packed))
    assert quantization(again) == quantization(packed)
    model = AutoModelForCausalLM.from_pretrained(again, dtype="auto")
    has_weights(model, expected)
    has_weights(secateur.load(again), expected)
    model.save_pretrained(third, max_shard_size="6KB")
    assert len(list(third.glob("*.safetensors"))) > 2
    same_bytes(stored(third), stored(packed))
    has_weights(AutoModelForCausalLM.from_pretrained(third, dtype="auto"), expected)


def test_save_pretrained_of_what_load_returns(compressed, tmp_path):
    packed, _ = compressed("gpt2", **TWO_FOUR)
    secateur.load(packed).save_pretrained(tmp_path / "again")
    same_bytes(stored(tmp_path / "again"), stored(packed))
    assert quantization(tmp_path / "again") == quantization(packed)


def test_save_pretrained_in_another_dtype(compressed, tmp_path):
    packed, expected = compressed("llama", **HALF)
    AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32).save_pretrained(tmp_path / "again")
    found = stored(tmp_path / "again")
    assert {t.dtype for name, t in found.items() if name.endswith(".compressed")} == {torch.float32}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype="auto")
    has_weights(model, expected, torch.float32)


def test_the_base_model_alone_is_saved_and_loads(compressed, tmp_path):
    packed, _ = compressed("llama", **HALF)
    model = AutoModel.from_pretrained(packed, dtype="auto")
    model.save_pretrained(tmp_path / "base")
    assert len(packed_names(tmp_path / "base")) == 14
    again = AutoModel.from_pretrained(tmp_path / "base", dtype="auto")
    has_weights(again, dict(model.named_parameters()))


def test_changed_weights_are_saved_as_they_are_now(compressed, tmp_path):
    """A bitmap holds whatever there is: fewer zeros make a larger file, not a wrong one."""
    model = AutoModelForCausalLM.from_pretrained(compressed("llama", **HALF)[0], dtype="auto")
    with torch.no_grad():
        model.get_parameter("model.layers.0.mlp.up_proj.weight").fill_(0.5)
    model.save_pretrained(tmp_path / "again")
    has_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype="auto"), dict(model.named_parameters()))


def test_weights_that_no_longer_fit_their_pattern_are_not_saved(compressed, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(compressed("llama", **TWO_FOUR)[0], dtype="auto")
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.up_proj.weight")[3] = 0.5
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight no longer fits layout 'nm': row 3"):
        model.save_pretrained(tmp_path / "again")
    assert not list(tmp_path.glob("again/*.safetensors"))


# --- damage


def _drop(part):
    return lambda tensors, name: tensors.pop(f"{name}.{part}")


def _drop_all(tensors, name):
    for key in [key for key in tensors if key.startswith(f"{name}.")]:
        del tensors[key]


def _fewer_values(tensors, name):
    tensors[f"{name}.compressed"] = tensors[f"{name}.compressed"][:-1].clone()


def _padding_bit(tensors, name):
    tensors[f"{name}.bitmask"] = tensors[f"{name}.bitmask"] | 255


def _other_shape(tensors, name):
    tensors[f"{name}.shape"] = tensors[f"{name}.shape"] + 8


def _transposed(tensors, name):
    """A sound weight, but of another shape than the model's."""
    O, I = tensors[f"{name}.shape"].tolist()
    assert O != I
    tensors[f"{name}.bitmask"] = tensors[f"{name}.bitmask"].reshape(I, O // 8).clone()
    tensors[f"{name}.shape"] = torch.tensor([I, O])


def _values_as_integers(tensors, name):
    tensors[f"{name}.compressed"] = tensors[f"{name}.compressed"].to(torch.int32)


DAMAGES = {
    "no values": (_drop("compressed"), "'compressed' is missing"),
    "no mask": (_drop("bitmask"), "'bitmask' is missing"),
    "no shape": (_drop("shape"), "'shape' is missing"),
    "nothing at all": (_drop_all, "tensors are missing"),
    "too few values": (_fewer_values, "bits set but there are"),
    "too many bits": (_padding_bit, "bits set but there are"),
    "another shape": (_other_shape, "bitmask is"),
    "not the model's shape": (_transposed, r"is \[\d+, \d+\] in the \w+, but \[\d+, \d+\] in the model"),
    "wrong dtype": (_values_as_integers, "int32"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_damaged_weight_stops_the_loading(damage, family, compressed, tmp_path):
    """transformers fills what it cannot read with random numbers and says so in the log: that is not enough here."""
    change, message = DAMAGES[damage]
    name = f"{FAMILIES[family].prefix}.1.{ {'llama': 'mlp.up_proj', 'gpt2': 'mlp.c_fc'}[family] }.weight"
    folder = damaged(compressed(family, **HALF)[0], tmp_path / "damaged", lambda tensors: change(tensors, name))
    with pytest.raises(CheckpointError) as caught:
        AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)
    caught.match(message)
    with pytest.raises(CheckpointError) as caught:
        secateur.load(folder)
    assert name in str(caught.value)
    caught.match(message)


def test_load_misses_a_tensor_that_is_not_packed(compressed, tmp_path):
    folder = damaged(compressed("llama", **HALF)[0], tmp_path / "damaged", lambda t: t.pop("model.norm.weight"))
    with pytest.raises(CheckpointError, match=r"lacks 1 of the model's tensors, such as model\.norm\.weight"):
        secateur.load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layout_version": 2}, "layout version 2, and this secateur reads 1"),
        ({"layout_version": None}, "layout version None"),
        ({"modules": None}, "no 'modules'"),
        ({"modules": {"model.layers.*": {"layout": "zip"}}}, "layout 'zip' is not known"),
        (
            {"modules": {"model.layers.*.up_proj": {"layout": "bitmap"}}},
            "down_proj.weight is stored packed, but the config",
        ),
    ],
    ids=str,
)
def test_a_config_that_does_not_fit_stops_the_loading(change, message, compressed, tmp_path):
    folder = damaged(compressed("llama", **HALF)[0], tmp_path / "damaged", lambda _: None)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"].update(change)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(CheckpointError, match=message):
        secateur.load(folder)


def test_a_dense_model_is_not_quantized_on_the_fly(model_of):
    """The quantizer reads; to compress is another command."""
    config = hf.SecateurConfig(1, {"model.layers.*": {"layout": "bitmap"}})
    with pytest.raises(ValueError, match="secateur does require the model to be pre-quantized"):
        AutoModelForCausalLM.from_pretrained(model_of("llama"), quantization_config=config)


def test_the_config_alone_can_be_read(compressed):
    packed, _ = compressed("llama", **HALF)
    assert AutoConfig.from_pretrained(packed).quantization_config == quantization(packed)
