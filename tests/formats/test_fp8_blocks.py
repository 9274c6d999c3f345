"""FP8 weights with scales per block or per tensor: as transformers makes them dense, and as a model of every command."""

import json
import shutil
from functools import partial

import pytest
import torch
import transformers
from block_codes import FP8, change, decode_fp8, fp8_blocks, set_config, to_fp8
from conftest import config_of
from hostile import Worker, mutate
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_examples import tries
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import secateur
from secateur.checkpoint.export import export
from secateur.checkpoint.inspect import inspect
from secateur.errors import CheckpointError
from secateur.foreign import fp8_blocks as subject
from secateur.foreign.fp8_blocks import FP8Blocks
from secateur.formats.layouts.packed_weight import DecodedWeights
from secateur.model.source import open_source

UP = "model.layers.1.mlp.up_proj"
SCALE = f"{UP}.weight_scale_inv"
BLOCK = (128, 128)
IDS_NS = torch.arange(2, 26).view(2, 12)
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu, torch.uint8]


def theirs(code, scale, dtype=torch.bfloat16):
    """What transformers makes of codes that blocks divide."""
    integration = pytest.importorskip("transformers.integrations.finegrained_fp8")
    found = integration.Fp8Dequantize(None)
    if not hasattr(found, "_dequantize_one"):
        pytest.skip("this release of transformers decodes FP8 by another function")
    return found._dequantize_one(code, scale, dtype)


def any_codes(shape, seed):
    """All codes that are numbers, at random."""
    draw = torch.Generator().manual_seed(seed)
    byte = torch.randint(0, 256, shape, generator=draw, dtype=torch.uint8)
    return torch.where(byte & 127 == 127, byte - 1, byte).view(FP8)


def any_scales(shape, dtype, seed):
    draw = torch.Generator().manual_seed(seed)
    if dtype in (torch.float8_e8m0fnu, torch.uint8):
        return torch.randint(100, 140, shape, generator=draw, dtype=torch.uint8).view(dtype)
    return (torch.rand(shape, generator=draw) * 0.01 + 1e-4).to(dtype)


def unpack(code, scale, block, dtype=torch.bfloat16):
    return subject.FP8(dtype, block).unpack({"weight": code, "weight_scale_inv": scale})


# --- decoding


@pytest.mark.parametrize("scale_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_blocks_that_divide_the_weight_are_decoded_as_transformers_does(dtype, scale_dtype):
    code, scale = any_codes((256, 384), 0), any_scales((2, 3), scale_dtype, 1)
    found = unpack(code, scale, BLOCK, dtype)
    assert found.dtype == dtype
    assert torch.equal(found, theirs(code, scale, dtype))
    assert torch.equal(found, decode_fp8(code, scale, BLOCK, dtype))


def test_every_code_with_every_power_of_two():
    """The smallest are below the smallest normal float32, and the products of the largest beyond float32."""
    byte = torch.arange(256, dtype=torch.uint8)
    code = byte[byte & 127 != 127].view(FP8).expand(255, 254).contiguous()
    for scale in (torch.arange(255, dtype=torch.uint8)[:, None], torch.exp2(torch.arange(-126.0, 128))[:, None]):
        some = code[: len(scale)]
        assert torch.equal(unpack(some, scale, (1, 254), torch.float32), theirs(some, scale, torch.float32))
        assert torch.equal(unpack(some, scale, (1, 254)), theirs(some, scale))


SIZES = st.integers(1, 40)


@tries(60)
@given(
    O=SIZES, I=SIZES, rows=st.integers(1, 48), columns=st.integers(1, 48), seed=st.integers(0, 2**31), data=st.data()
)
def test_blocks_of_any_size_on_weights_of_any_shape(O, I, rows, columns, seed, data):
    code = any_codes((O, I), seed)
    scale = any_scales((-(-O // rows), -(-I // columns)), data.draw(st.sampled_from(DTYPES)), seed + 1)
    found = unpack(code, scale, (rows, columns))
    assert torch.equal(found, decode_fp8(code, scale, (rows, columns)))
    if O % min(O, rows) == 0 and I % min(I, columns) == 0:
        assert torch.equal(found, theirs(code, scale))


def test_a_shape_that_blocks_do_not_divide_keeps_the_size_of_the_config():
    """transformers makes two blocks of 65 rows of this, where the kernels that run such models have 128 and 2."""
    W_OI = torch.randn(130, 70, generator=torch.Generator().manual_seed(0))
    W_OI[128:] *= 100
    code, scale = fp8_blocks(W_OI, BLOCK)
    found = unpack(code, scale, BLOCK, torch.float32)
    assert torch.equal(found, decode_fp8(code, scale, BLOCK, torch.float32))
    assert (found - W_OI).abs().max() < 0.07 * W_OI.abs().max()
    assert not torch.equal(found, theirs(code, scale, torch.float32))


def test_a_weight_larger_than_what_is_decoded_at_a_time():
    code, scale = any_codes((300, 5000), 0), any_scales((3, 40), torch.float32, 1)
    assert torch.equal(unpack(code, scale, BLOCK), decode_fp8(code, scale, BLOCK))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
def test_one_scale_for_a_tensor(shape):
    code, scale = any_codes((13, 7), 0), torch.full(shape, 0.0123)
    assert torch.equal(unpack(code, scale, None), theirs(code, scale))


@pytest.mark.parametrize("grid", [(12, 1), (3, 2), (1, 6)], ids=str)
def test_without_a_size_of_blocks_their_number_tells_it(grid):
    code, scale = any_codes((12, 6), 0), any_scales(grid, torch.float32, 1)
    assert torch.equal(unpack(code, scale, None), theirs(code, scale))


@pytest.mark.parametrize(("block", "grid"), [((16, 16), (3, 3, 2)), (None, (3, 1, 1)), (None, (3, 2, 1))], ids=str)
def test_experts_in_one_tensor(block, grid):
    code, scale = any_codes((3, 48, 32), 0), any_scales(grid, torch.bfloat16, 1)
    layout, tensors = subject.FP8(torch.bfloat16, block), {"weight": code, "weight_scale_inv": scale}
    found = layout.unpack(tensors)
    assert torch.equal(found, theirs(code, scale))
    for expert in range(3):
        assert torch.equal(layout.unpack_expert(tensors, expert), found[expert])
    told = layout.describe(tensors)
    assert (told.shape, told.count, told.bytes, told.finite) == ((3, 48, 32), 3 * 48 * 32, 4608 + scale.nbytes, True)
    for expert in (-1, 3):
        with pytest.raises(ValueError, match=rf"\[3, 48, 32\], which has no expert {expert}"):
            layout.unpack_expert(tensors, expert)


def test_an_expert_is_decoded_without_the_others():
    """Another one is damaged."""
    code, scale = any_codes((2, 16, 16), 0), torch.ones(2, 1, 1)
    code.view(torch.uint8)[1] = 0x7F
    name = "model.layers.0.mlp.experts.up_proj"
    stored = {name: code, f"{name}_scale_inv": scale, "plain": torch.arange(6.0).view(3, 2)}
    section = FP8Blocks.section({"quantization_config": {"quant_method": "fp8"}})
    weights = DecodedWeights(stored, FP8Blocks.packed_weights(stored, section))
    assert torch.equal(weights.expert(name, 0), code[0].to(torch.bfloat16))
    assert torch.equal(weights.expert("plain", 2), torch.tensor([4.0, 5.0]))
    for whole in (partial(weights.expert, name, 1), partial(weights.__getitem__, name)):
        with pytest.raises(CheckpointError, match=rf"^{name} cannot be decoded from layout 'fp8': .* NaN"):
            whole()


# --- a model

ODD = {"hidden_size": 70, "intermediate_size": 130, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}


@pytest.fixture(scope="module")
def fp8_of(build, tmp_path_factory):
    """`fp8_of("qwen3", (16, 16))`: the folder of a tiny model whose linears are FP8, of odd sizes. Not to be written to."""
    made = {}

    def make(family, block, **options):
        key = (family, block, tuple(options.items()))
        if key not in made:
            config = config_of(
                family, hidden_size=70, intermediate_size=130, head_dim=16, num_attention_heads=2, num_key_value_heads=1
            )
            folder = build(tmp_path_factory.mktemp(family) / "model", config, torch.bfloat16)
            made[key] = to_fp8(folder, block, **options)
        return made[key]

    return make


def dense_of(folder, block):
    """The tensors of the same model, decoded one by one."""
    stored = load_file(folder / "model.safetensors")
    found = {}
    for name, tensor in stored.items():
        scale = stored.get(f"{name}_scale_inv")
        if scale is not None:
            found[name] = decode_fp8(tensor, scale, block)
        elif not name.endswith("_scale_inv") and not name.endswith("activation_scale"):
            found[name] = tensor
    return found


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS_NS, use_cache=False).logits


CASES = [
    ("qwen3", BLOCK, {}),
    ("qwen3", (16, 16), {"scale_dtype": torch.float8_e8m0fnu, "scale_fmt": "ue8m0"}),
    ("llama", (48, 32), {"scale_dtype": torch.bfloat16}),
    ("llama", None, {"static": True}),
]
EACH = pytest.mark.parametrize(("family", "block", "options"), CASES, ids=str)


@EACH
def test_a_model_is_opened(family, block, options, fp8_of):
    folder = fp8_of(family, block, **options)
    source, expected = open_source(str(folder)), dense_of(folder, block)
    assert (source.dtype, source.stored, source.rounded) == (torch.bfloat16, torch.bfloat16, True)
    assert len(source.weights) == len(expected)
    assert set(source.weights) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(source.weights[name], tensor), name
    plain = AutoModelForCausalLM.from_config(source.config, dtype=torch.bfloat16).eval()
    plain.load_state_dict(expected, strict=False)
    plain.tie_weights()
    assert torch.equal(logits(secateur.load(folder)), logits(plain))


@EACH
def test_every_command_takes_it(family, block, options, fp8_of, says, text_file, tmp_path):
    folder = fp8_of(family, block, **options)
    expected = dense_of(folder, block)
    code, out, err = says("compress", folder, tmp_path / "rtn", "--quantize", "rtn", "--bits", 8, "--group-size", 10)
    assert code == 0, err
    assert "was quantized before" in out + err
    assert "no module" not in out + err
    assert all(layout["layout"] == "packed-int" for layout in section(tmp_path / "rtn")["modules"].values())
    names = load_file(tmp_path / "rtn" / "model.safetensors")
    assert not [name for name in names if name.endswith(("scale_inv", "activation_scale"))]
    for command in (
        ("eval", folder, "--data", text_file, "--seq-len", 16, "--windows", 2),
        ("eval", tmp_path / "rtn", "--reference", folder, "--data", text_file, "--seq-len", 16, "--windows", 2),
        ("generate", folder, "ba", "--max-new-tokens", 2),
        ("export", folder, tmp_path / "dense", "--to", "dense"),
        ("verify", tmp_path / "dense"),
    ):
        code, out, err = says(*command)
        assert code == 0, err
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    written = load_file(tmp_path / "dense" / "model.safetensors")
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in expected.items())
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype="auto")
    assert torch.equal(logits(stock), logits(secateur.load(folder)))


def section(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def test_it_is_loaded_as_transformers_loads_it(build, tmp_path):
    """Where blocks divide all weights. Early releases of transformers 5 leave weights in the dtype of their scales."""
    quantization = transformers.FineGrainedFP8Config
    folder = to_fp8(build(tmp_path / "model", config_of("llama"), torch.bfloat16), (16, 16))
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", quantization_config=quantization(dequantize=True)
    )
    ours = dict(secateur.load(folder).named_parameters())
    for name, parameter in theirs.named_parameters():
        assert torch.equal(parameter.to(torch.bfloat16), ours[name]), name


def test_experts_that_transformers_fuses_are_decoded_first(build, tmp_path):
    """It would take the 48 rows of a matrix for two blocks of 24."""
    options = {"num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size": 48, "vocab_size": 320}
    config = transformers.MixtralConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, **options
    )
    folder, stored = build(tmp_path / "model", config, torch.bfloat16), {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if ".experts." in name:
            stored[name], stored[f"{name}_scale_inv"] = fp8_blocks(tensor, (32, 32))
    assert len(stored) == 12
    change(folder, stored)
    set_config(folder, quantization_config={"quant_method": "fp8", "weight_block_size": [32, 32]})
    expected = dense_of(folder, (32, 32))
    export(str(folder), tmp_path / "dense", "dense")
    written = load_file(tmp_path / "dense" / "model.safetensors")
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in expected.items())
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype="auto")
    assert torch.equal(logits(stock), logits(secateur.load(folder)))
    change(folder, {next(iter(stored)): with_nan(next(iter(stored.values())))})
    with pytest.raises(CheckpointError, match=f"^{next(iter(stored))} cannot be decoded from layout 'fp8': .* NaN$"):
        secateur.load(folder)


def test_inspect_tells_what_is_stored(fp8_of):
    linear = {each.name: each for each in inspect(str(fp8_of("qwen3", BLOCK))).linears}[UP]
    assert (linear.layout, linear.shape, linear.bytes) == ("fp8", (130, 70), 130 * 70 + 2 * 4)
    assert linear.sparsity == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_weights_have_the_dtype_of_the_config(dtype, fp8_of, tmp_path):
    folder = shutil.copytree(fp8_of("qwen3", BLOCK), tmp_path / "own")
    set_config(folder, dtype=str(dtype).removeprefix("torch."))
    source, stored = open_source(str(folder)), load_file(folder / "model.safetensors")
    assert (source.dtype, source.stored) == (dtype, dtype)
    expected = decode_fp8(stored[f"{UP}.weight"], stored[SCALE], BLOCK, dtype)
    assert torch.equal(source.weights[f"{UP}.weight"], expected)


def test_a_config_without_a_dtype_means_bfloat16(fp8_of, tmp_path):
    """Whatever lies beside the codes: routers and norms of such models are often float32."""
    folder = shutil.copytree(fp8_of("qwen3", BLOCK), tmp_path / "own")
    content = json.loads((folder / "config.json").read_text())
    del content["dtype"]
    (folder / "config.json").write_text(json.dumps(content))
    change(
        folder,
        {"model.embed_tokens.weight": load_file(folder / "model.safetensors")["model.embed_tokens.weight"].float()},
    )
    source = open_source(str(folder))
    assert (source.dtype, source.stored) == (torch.bfloat16, torch.bfloat16)


def test_shapes_are_told_without_decoding(fp8_of, monkeypatch):
    weights = open_source(str(fp8_of("qwen3", BLOCK))).weights
    dense = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in weights.items()}
    monkeypatch.setattr(subject.FP8, "matrix", None)
    assert {name: weights.form(name) for name in weights} == dense


def test_experts_of_a_file_each_are_weights_like_others():
    name = "model.layers.3.mlp.experts.5.up_proj.weight"
    code, scale = fp8_blocks(torch.randn(130, 70), BLOCK)
    stored = {name: code, f"{name}_scale_inv": scale, "model.norm.weight": torch.ones(70)}
    section = FP8Blocks.section({"quantization_config": {"quant_method": "fp8"}, "torch_dtype": "float16"})
    weights = DecodedWeights(stored, FP8Blocks.packed_weights(stored, section))
    assert list(weights) == ["model.norm.weight", name]
    assert torch.equal(weights[name], decode_fp8(code, scale, BLOCK, torch.float16))


def test_a_section_that_packs_nothing_is_read(build, tmp_path):
    folder = build(tmp_path / "model", config_of("llama"), torch.bfloat16)
    set_config(folder, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    source = open_source(str(folder))
    assert not source.rounded
    assert logits(secateur.load(folder)).isfinite().all()


# --- what is refused


def replaced(part, make):
    return lambda tensors: {part: make(tensors[part])}


def with_nan(code):
    code = code.clone()
    code.view(torch.uint8)[3, 4] = 0xFF
    return code


def with_value(value):
    def make(scale):
        scale = scale.clone()
        scale[1, 0] = value
        return scale

    return make


WEIGHT = f"{UP}.weight"
DAMAGED = {
    "a code that is no number": (replaced(WEIGHT, with_nan), "codes that are NaN"),
    "codes of another kind": (replaced(WEIGHT, lambda t: t.float().to(torch.float8_e5m2)), "dtype torch.float8_e5m2"),
    "codes of int8": (replaced(WEIGHT, lambda t: t.view(torch.int8)), "'weight' has dtype torch.int8"),
    "a vector": (replaced(WEIGHT, lambda t: t.view(-1)), r"'weight' has dtype .* shape \[9100\]"),
    "nothing": (replaced(WEIGHT, lambda t: t[:0]), r"'weight' has dtype .* shape \[0, 70\]"),
    "too few scales": (replaced(SCALE, lambda t: t[:1]), r"\[1, 1\], but a weight .* block of 128 × 128"),
    "scales turned round": (replaced(SCALE, lambda t: t.T), r"shape \[1, 2\], but"),
    "scales in a row": (replaced(SCALE, lambda t: t.view(-1)), r"shape \[2\], but"),
    "scales of integers": (replaced(SCALE, lambda t: t.int()), "'weight_scale_inv' has dtype torch.int32"),
    "a scale that is NaN": (replaced(SCALE, with_value(float("nan"))), "a scale that is not finite"),
    "a scale that is infinite": (replaced(SCALE, with_value(float("inf"))), "a scale that is not finite"),
    "the NaN of e8m0": (replaced(SCALE, lambda t: torch.full_like(t, 255, dtype=torch.uint8)), "a scale that is not finite"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_what_is_damaged_is_named(case, fp8_of, says, tmp_path):
    make, message = DAMAGED[case]
    folder = shutil.copytree(fp8_of("qwen3", BLOCK), tmp_path / "own")
    change(folder, {k: v.contiguous() for k, v in make(load_file(folder / "model.safetensors")).items()})
    for use in (
        lambda: open_source(str(folder)).weights[WEIGHT],
        lambda: secateur.load(folder),
        lambda: inspect(str(folder)),
        lambda: export(str(folder), tmp_path / "out", "dense"),
    ):
        with pytest.raises(CheckpointError, match=message) as caught:
            use()
        assert str(caught.value).startswith(f"{WEIGHT} cannot be")
        assert "\n" not in str(caught.value)
    code, _, err = says("compress", folder, tmp_path / "out", "--quantize", "rtn")
    assert (code, WEIGHT in err) == (1, True)
    assert not (tmp_path / "out").exists()


def test_one_scale_is_not_many(fp8_of, tmp_path):
    folder = shutil.copytree(fp8_of("llama", None, static=True), tmp_path / "own")
    change(folder, {SCALE: torch.ones(3, 1)})
    with pytest.raises(CheckpointError, match=rf"^{WEIGHT} .* shape \[3, 1\], but a weight of \[130, 70\] has one$"):
        open_source(str(folder)).weights[WEIGHT]


def test_a_scale_without_its_weight(fp8_of, tmp_path):
    folder = shutil.copytree(fp8_of("qwen3", BLOCK), tmp_path / "own")
    change(folder, {WEIGHT: None})
    with pytest.raises(CheckpointError, match=rf"^{SCALE} stands alone: the files hold no {WEIGHT}$"):
        open_source(str(folder))


@pytest.mark.parametrize("section", [True, False])
def test_a_weight_without_its_scale(section, fp8_of, tmp_path):
    """Whether the config names a quantizer, or nobody does."""
    folder = shutil.copytree(fp8_of("qwen3", BLOCK), tmp_path / "own")
    change(folder, {SCALE: None})
    if not section:
        set_config(folder, quantization_config=None)
    with pytest.raises(
        CheckpointError, match=r"is torch.float8_e4m3fn, .* 'fp8' in config.json with .*_scale_inv beside"
    ):
        open_source(str(folder))


SECTIONS = [
    ("weight_block_size", 128),
    ("weight_block_size", [128]),
    ("weight_block_size", [0, 128]),
    ("weight_block_size", [128, 1.5]),
    ("weight_block_size", [True, 128]),
    ("weight_block_size", "128"),
    ("scale_fmt", "int8"),
    ("expert_dtype", "fp4"),
]


@pytest.mark.parametrize(("key", "value"), SECTIONS, ids=str)
def test_a_section_that_is_not_read(key, value, fp8_of, tmp_path):
    folder = shutil.copytree(fp8_of("qwen3", BLOCK), tmp_path / "own")
    set_config(folder, quantization_config={**section(folder), key: value})
    with pytest.raises(CheckpointError, match=f"quantization_config has {key} ") as caught:
        open_source(str(folder))
    assert repr(value) in str(caught.value)
    assert "secateur reads FP8 weights" in str(caught.value)


def test_blocks_of_any_number_of_rows_and_columns(fp8_of, tmp_path):
    """One that is larger than memory is as large as the weight."""
    folder = shutil.copytree(fp8_of("llama", None, static=True), tmp_path / "own")
    stored = load_file(folder / "model.safetensors")
    change(folder, {name: t.view(1, 1) for name, t in stored.items() if name.endswith("_scale_inv")})
    set_config(folder, quantization_config={"quant_method": "fp8", "weight_block_size": [10**30, 2**62]})
    assert torch.equal(open_source(str(folder)).weights[WEIGHT], decode_fp8(stored[WEIGHT], stored[SCALE], None))


@pytest.fixture(scope="module")
def worker(fp8_of):
    found = Worker(fp8_of("qwen3", BLOCK))
    yield found
    found.stop()


class Draw:
    def __init__(self, data):
        self.data = data

    def number(self, low, high):
        return self.data.draw(st.integers(low, high))


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
@given(data=st.data())
def test_whatever_is_changed_there_is_an_error_or_a_model(data, fp8_of, worker, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "changed-fp8"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(fp8_of("qwen3", BLOCK), folder)
    mutate(folder, Draw(data))
    assert worker.attempt(folder) == []
