"""`export --to mlx`: what the definition of MLX's affine codes reads, and what mlx and mlx-lm do where they are installed."""

import json

import mixtures
import pytest
import torch
from foreign_codes import words
from hypothesis import given
from hypothesis import strategies as st
from random_examples import tries
from safetensors.torch import load_file

import secateur
from secateur.checkpoint.export import export
from secateur.core.quantized import Outliers, Quantized
from secateur.errors import UsageError
from secateur.foreign.mlx_codes import MLXCodes, pack, section_of
from secateur.formats.layouts.packed_int import Uniform
from secateur.model.source import open_source

RECIPES = {
    "4 bits": {"quantization": {"bits": 4, "group_size": 32}},
    "symmetric, of whole rows": {"quantization": {"bits": 5, "group_size": "row", "symmetric": True}},
    "with tables": {"quantization": {"bits": 3, "group_size": 32}, "embeddings": 6, "head": 8},
    "7 bits": {"quantization": {"bits": 7, "group_size": 32}, "embeddings": 7},
}


def uniform(bits=4, group=32, shape=(8, 192), dtype=torch.bfloat16, symmetric=False, seed=0):
    draw = torch.Generator().manual_seed(seed)
    (O, I), G = shape, -(-shape[1] // min(group, shape[1]))
    code_OI = torch.randint(0, 2**bits, (O, I), generator=draw, dtype=torch.uint8)
    scale_OG = (torch.rand(O, G, generator=draw) / 16 + 1 / 64).to(dtype if dtype.itemsize == 2 else torch.float16)
    zero_OG = None if symmetric else torch.randint(0, 2**bits, (O, G), generator=draw, dtype=torch.uint8)
    return Quantized(Uniform(bits, group, code_OI, scale_OG, zero_OG), shape, dtype)


@tries(60)
@given(
    bits=st.integers(2, 8),
    group=st.sampled_from([32, 64, 96, 128, 192, 1024]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    symmetric=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_codes_and_scales_are_the_same_numbers(bits, group, dtype, symmetric, seed):
    weight = uniform(bits, group, dtype=dtype, symmetric=symmetric, seed=seed)
    form, parts, moved = pack(weight)
    assert form.bits == (8 if bits == 7 else bits)
    assert form.group_size == {32: 32, 64: 64, 96: 32, 128: 64, 192: 64, 1024: 64}[group]
    assert torch.equal(parts["weight"], words(weight.codes.code_OK, form.bits))
    assert {tensor.dtype for part, tensor in parts.items() if part != "weight"} == {dtype}
    scale_OI, bias_OI = (parts[part].double().repeat_interleave(form.group_size, 1) for part in ("scales", "biases"))
    exact_OI = weight.codes.values().double()
    found_OI = weight.codes.code_OK.double() * scale_OI + bias_OI
    assert ((found_OI - exact_OI).abs() <= moved * scale_OI * (1 + 1e-6)).all()
    assert moved <= 2**bits * torch.finfo(dtype).eps / 2
    if symmetric or dtype == torch.float32:
        assert moved == 0
        assert torch.equal(found_OI, exact_OI)
    # As mlx rounds: the product, and the sum.
    code_OI = weight.codes.code_OK.to(dtype)
    assert torch.equal(form.unpack(parts), (code_OI * scale_OI.to(dtype)) + bias_OI.to(dtype))


CANNOT = {
    "groups of 16": (uniform(group=16), "192 input features in groups of 16 do not divide into groups of 32"),
    "a row of 40": (uniform(group=64, shape=(2, 40)), "40 input features in groups of 40 do not divide"),
    "an order": (Quantized(uniform().codes, (8, 192), torch.bfloat16, order_I=torch.arange(192)), "in another order"),
    "a mask": (
        Quantized(uniform().codes, (8, 192), torch.bfloat16, torch.ones(8, 192).bool()),
        "a mask of kept weights",
    ),
    "outliers": (
        Quantized(uniform().codes, (8, 192), torch.bfloat16, outliers=Outliers(*torch.zeros(3, 0))),
        "it has outliers, which MLX does not store",
    ),
    "scales of another dtype": (
        Quantized(uniform(dtype=torch.bfloat16).codes, (8, 192), torch.float16),
        None,  # these are: float16 has them
    ),
    "scales too small": (
        Quantized(
            Uniform(4, 32, uniform().codes.code_OK, torch.full((8, 6), 1e-30).bfloat16(), None), (8, 192), torch.float16
        ),
        "bfloat16 numbers that float16, the model's dtype, does not have",
    ),
    "offsets too large": (
        Quantized(
            Uniform(8, 32, uniform().codes.code_OK, torch.full((8, 6), 32768.0).half(), None), (8, 192), torch.float16
        ),
        "times zero points overflow float16",
    ),
}


@pytest.mark.parametrize("what", CANNOT)
def test_what_mlx_cannot_hold_is_refused(what):
    weight, message = CANNOT[what]
    if message is None:
        assert pack(weight)[1]["scales"].dtype == torch.float16
        return
    with pytest.raises(ValueError, match=message):
        pack(weight)


def test_most_say_what_is_so_and_others_are_named():
    forms = {"a": MLXCodes(4, 64), "b": MLXCodes(8, 64), "c": MLXCodes(4, 64)}
    assert section_of(forms) == {"group_size": 64, "bits": 4, "mode": "affine", "b": {"bits": 8, "group_size": 64}}


def exported(model, what, folder):
    secateur.compress(str(model), folder / "ours", {"quantize": "rtn", **RECIPES[what]})
    return export(str(folder / "ours"), folder / "mlx", "mlx")


@pytest.mark.thin(2)
@pytest.mark.parametrize("name", ["llama", "llama-tied"])
@pytest.mark.parametrize("what", RECIPES)
def test_a_folder_is_read_again(what, name, model_of, tmp_path):
    notes = exported(model_of(name, torch.bfloat16), what, tmp_path)
    section = json.loads((tmp_path / "mlx" / "config.json").read_text())
    assert "quantization_config" not in section
    section = section["quantization"]
    assert {"group_size", "bits", "mode"} <= section.keys()
    stored = load_file(tmp_path / "mlx" / "model.safetensors")
    packed = {key.removesuffix(".scales") for key in stored if key.endswith(".scales")}
    tables = {"model.embed_tokens", "lm_head"} & packed
    wanted = {"with tables": {"model.embed_tokens", "lm_head"}, "7 bits": {"model.embed_tokens"}}.get(what, set())
    assert tables == (wanted - {"lm_head"} if name == "llama-tied" else wanted)
    assert len(packed - tables) == 14
    assert {name for name in section if "." in name or name == "lm_head"} <= packed
    assert not secateur.verify(tmp_path / "mlx")
    ours, again = (open_source(str(tmp_path / folder)).weights for folder in ("ours", "mlx"))
    assert set(ours) == set(again)
    exact = "symmetric" in what
    assert [note.partition(",")[0] for note in notes] == (
        [] if exact else ["zero points times scales are rounded to the model's dtype"]
    )
    for key in ours:
        module = key.removesuffix(".weight")
        if module in packed:
            own = {**section, **section.get(module, {})}
            step_OG = stored[f"{module}.scales"].float()
            step_OI = step_OG.repeat_interleave(own["group_size"], 1)
            # The zero point has moved by a little; product and sum are rounded, where ours is once.
            most_OI = step_OI * 2 ** own["bits"] * 2**-7
            assert ((again[key].float() - ours[key].float()).abs() <= most_OI).all(), key
        else:
            assert torch.equal(again[key], ours[key])
    card = (tmp_path / "mlx" / "README.md").read_text()
    assert "from mlx_lm import generate, load" in card
    assert "AutoModelForCausalLM" not in card
    assert "library_name: mlx\n" in card


def test_a_table_on_a_grid_of_ggufs_is_made_dense(model_of, tmp_path):
    recipe = {"quantize": "rtn", "quantization": {"group_size": 32}, "embeddings": "q8_0", "head": 8}
    secateur.compress(str(model_of("llama", torch.bfloat16)), tmp_path / "ours", recipe)
    notes = export(str(tmp_path / "ours"), tmp_path / "mlx", "mlx")
    assert notes[0] == "model.embed_tokens: made dense, for its codes are not on a uniform grid"
    stored = load_file(tmp_path / "mlx" / "model.safetensors")
    assert stored["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert "lm_head.scales" in stored


def test_models_that_cannot_go_are_refused(packed_of, model_of, tmp_path):
    with pytest.raises(UsageError, match="a mask of kept weights, which MLX does not store; `to='dense'`"):
        export(str(packed_of("llama", "sparse-int")), tmp_path / "out", "mlx")
    with pytest.raises(UsageError, match="not on a uniform grid, and MLX's affine codes are; `to='dense'`"):
        export(str(packed_of("llama", "spqr")), tmp_path / "out", "mlx")
    with pytest.raises(UsageError, match="no quantized linears to write as mlx"):
        export(str(model_of("llama")), tmp_path / "out", "mlx")
    secateur.compress(str(model_of("gpt2")), tmp_path / "gpt2", {"quantize": "rtn", "quantization": {"group_size": 32}})
    with pytest.raises(UsageError, match=r"keeps weights as \[in, out\]"):
        export(str(tmp_path / "gpt2"), tmp_path / "out", "mlx")
    assert not (tmp_path / "out").exists()


def test_experts_are_refused(build, tmp_path):
    source = build(tmp_path / "source", mixtures.config_of("mixtral", intermediate_size=64))
    secateur.compress(str(source), tmp_path / "moe", {"quantize": "rtn", "quantization": {"group_size": 32}})
    with pytest.raises(
        UsageError, match=r"MLX keeps the experts of a layer in one tensor, .* which mlx_lm\.convert takes"
    ):
        export(str(tmp_path / "moe"), tmp_path / "out", "mlx")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("what", RECIPES)
def test_mlx_itself_reads_the_same_weights(what, dtype, model_of, tmp_path):
    mx = pytest.importorskip("mlx.core")
    exported(model_of("llama", dtype), what, tmp_path)
    section = json.loads((tmp_path / "mlx" / "config.json").read_text())["quantization"]
    stored, found = mx.load(str(tmp_path / "mlx" / "model.safetensors")), open_source(str(tmp_path / "mlx")).weights
    packed = [key.removesuffix(".scales") for key in stored if key.endswith(".scales")]
    assert packed
    for module in packed:
        own = {**section, **section.get(module, {})}
        parts = [stored[f"{module}.{part}"] for part in ("weight", "scales", "biases")]
        W_OI = mx.dequantize(*parts, group_size=own["group_size"], bits=own["bits"]).astype(mx.float32)
        assert torch.equal(torch.tensor(W_OI.tolist()), found[f"{module}.weight"].float()), module


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_mlx_lm_runs_it(name, model_of, tmp_path):
    mx = pytest.importorskip("mlx.core")
    utils = pytest.importorskip("mlx_lm.utils")
    exported(model_of(name, torch.float16), "with tables", tmp_path)
    model, _ = utils.load_model(tmp_path / "mlx")
    assert type(model.model.embed_tokens).__name__ == "QuantizedEmbedding"
    ids = list(range(3, 19))
    theirs_SV = torch.tensor(model(mx.array([ids])).astype(mx.float32).tolist())[0]
    with torch.no_grad():
        ours_SV = secateur.load(tmp_path / "ours", dtype=torch.float32)(torch.tensor([ids])).logits[0]
    assert (theirs_SV - ours_SV).square().mean().sqrt() < 0.02 * ours_SV.std()
