"""MXFP4 experts: as transformers makes them dense, all of them or one alone."""

import json
import shutil
from functools import partial

import pytest
import torch
import transformers
from block_codes import LEVELS, change, mxfp4, set_config
from hypothesis import given
from hypothesis import strategies as st
from random_examples import tries
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import secateur
from secateur.checkpoint.export import export
from secateur.errors import CheckpointError
from secateur.foreign.mxfp4 import MXFP4, MXFP4Experts
from secateur.formats.layouts.packed_weight import DecodedWeights
from secateur.model.source import open_source

EXPERTS = "model.layers.1.mlp.experts"
BLOCKS, SCALES = f"{EXPERTS}.down_proj_blocks", f"{EXPERTS}.down_proj_scales"
SECTION = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head", "model.layers.*.mlp.router"]}


def theirs(blocks, scales, dtype=torch.bfloat16):
    integration = pytest.importorskip("transformers.integrations.mxfp4")
    return integration.convert_moe_packed_tensors(blocks, scales, dtype=dtype)


def at_random(E, O, G, seed, low=100, high=140):
    draw = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (E, O, G, 16), generator=draw, dtype=torch.uint8)
    return blocks, torch.randint(low, high, (E, O, G), generator=draw, dtype=torch.uint8)


def unpack(blocks, scales, dtype=torch.bfloat16):
    return MXFP4(dtype).unpack({"blocks": blocks, "scales": scales})


# --- decoding


def test_a_group_by_hand():
    """Codes 0 to 15, twice, times 2^3."""
    byte = torch.tensor([low + 16 * (low + 1) for low in range(0, 16, 2)], dtype=torch.uint8)
    blocks, scales = byte.repeat(2).view(1, 1, 1, 16), torch.tensor([[[130]]], dtype=torch.uint8)
    found = unpack(blocks, scales)
    assert (found.shape, found.dtype) == ((1, 32, 1), torch.bfloat16)
    assert found.flatten().tolist() == [8 * level for level in LEVELS] * 2


@tries(40)
@given(E=st.integers(1, 3), O=st.integers(1, 20), G=st.integers(1, 4), seed=st.integers(0, 2**31))
def test_experts_are_decoded_as_transformers_does(E, O, G, seed):
    blocks, scales = at_random(E, O, G, seed)
    found = unpack(blocks, scales)
    assert found.shape == (E, 32 * G, O)
    assert found.is_contiguous()
    assert torch.equal(found, theirs(blocks, scales))
    layout, tensors = MXFP4(), {"blocks": blocks, "scales": scales}
    for expert in range(E):
        assert torch.equal(layout.unpack_expert(tensors, expert), found[expert])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_every_byte_with_every_scale(dtype):
    """The largest overflow, as they do there; zeros of both signs stay."""
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 255, 16, 16).contiguous()
    scales = torch.arange(255, dtype=torch.uint8).view(1, 255, 1).expand(1, 255, 16).contiguous()
    found, expected = unpack(blocks, scales, dtype), theirs(blocks, scales, dtype)
    assert found.dtype == expected.dtype == dtype
    assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


def test_a_matrix_larger_than_what_is_decoded_at_a_time():
    blocks, scales = at_random(1, 40, 1100, 0)
    assert torch.equal(unpack(blocks, scales), theirs(blocks, scales))


def test_what_is_told_without_decoding_all_at_once():
    blocks, scales = at_random(3, 4, 2, 0)
    told = MXFP4().describe({"blocks": blocks, "scales": scales})
    assert (told.layout, told.shape, told.count, told.finite) == ("mxfp4", (3, 64, 4), 768, True)
    assert told.bytes == blocks.nbytes + scales.nbytes
    blocks[2], scales[2] = 7, 254  # 6 · 2^127
    assert not MXFP4().describe({"blocks": blocks, "scales": scales}).finite


def test_an_expert_is_decoded_without_the_others():
    """Another one is damaged."""
    blocks, scales = at_random(3, 4, 2, 0)
    whole = unpack(blocks, scales)
    scales[2, 0, 0] = 255
    stored = {f"{EXPERTS}.down_proj_blocks": blocks, f"{EXPERTS}.down_proj_scales": scales}
    section = MXFP4Experts.section({"quantization_config": SECTION})
    weights = DecodedWeights(stored, MXFP4Experts.packed_weights(stored, section))
    name = f"{EXPERTS}.down_proj"
    assert list(weights) == [name]
    assert torch.equal(weights.expert(name, 1), whole[1])
    for damaged in (partial(weights.expert, name, 2), partial(weights.__getitem__, name)):
        with pytest.raises(CheckpointError, match=rf"^{name} cannot be decoded from layout 'mxfp4': its scales .* NaN"):
            damaged()
    for missing in (-1, 3):
        with pytest.raises(CheckpointError, match=rf"^{name} .* \[3, 64, 4\], which has no expert {missing}"):
            weights.expert(name, missing)


# --- a model


@pytest.fixture(scope="module")
def gpt_oss(build, tmp_path_factory):
    """A tiny gpt-oss in MXFP4. Not to be written to."""
    config = transformers.GptOssConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    folder = build(tmp_path_factory.mktemp("gpt-oss") / "model", config, torch.bfloat16)
    changes = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            changes[f"{name}_blocks"], changes[f"{name}_scales"] = mxfp4(tensor)
            changes[name] = None
    assert len(changes) == 12
    change(folder, changes)
    set_config(folder, quantization_config=SECTION)
    return folder


def test_a_model_is_opened(gpt_oss):
    source, stored = open_source(str(gpt_oss)), load_file(gpt_oss / "model.safetensors")
    assert (source.dtype, source.stored, source.rounded) == (torch.bfloat16, torch.bfloat16, True)
    assert not [name for name in source.weights if name.endswith(("_blocks", "_scales"))]
    packed = source.weights[f"{EXPERTS}.gate_up_proj"]
    assert (packed.shape, packed.dtype) == ((4, 64, 64), torch.bfloat16)
    assert torch.equal(
        packed, theirs(stored[f"{EXPERTS}.gate_up_proj_blocks"], stored[f"{EXPERTS}.gate_up_proj_scales"])
    )
    assert torch.equal(source.weights[f"{EXPERTS}.gate_up_proj_bias"], stored[f"{EXPERTS}.gate_up_proj_bias"])
    assert not hasattr(source.config, "quantization_config")


def test_its_weights_are_those_of_the_model_that_transformers_loads(gpt_oss):
    quantization = transformers.Mxfp4Config(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(gpt_oss, dtype="auto", quantization_config=quantization)
    weights = open_source(str(gpt_oss)).weights
    expected = dict(model.state_dict())
    assert set(weights) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(weights[name], tensor), name


def test_it_runs_and_is_exported(gpt_oss, tmp_path):
    weights, ids_NS = open_source(str(gpt_oss)).weights, torch.arange(2, 26).view(2, 12)
    export(str(gpt_oss), tmp_path / "dense", "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    written = load_file(tmp_path / "dense" / "model.safetensors")
    assert set(written) == set(weights)
    assert all(torch.equal(written[name], weights[name]) for name in weights)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype="auto")
    with torch.no_grad():
        assert torch.equal(stock(ids_NS).logits, secateur.load(gpt_oss)(ids_NS).logits)


# --- what is refused

DAMAGED = {
    "a scale that is NaN": (SCALES, lambda t: t.index_fill(2, torch.tensor(0), 255), "its scales have one that is NaN"),
    "scales of another count": (SCALES, lambda t: t[:, :-1], r"scales have shape \[4, 63, 1\], and blocks of \[4, 64, 1, 16\]"),
    "scales of floats": (SCALES, lambda t: t.float(), "'scales' has dtype torch.float32"),
    "blocks of floats": (BLOCKS, lambda t: t.float(), "'blocks' has dtype torch.float32"),
    "blocks of 8 bytes": (BLOCKS, lambda t: t[..., :8], r"'blocks' has dtype torch.uint8 and shape \[4, 64, 1, 8\]"),
    "blocks in rows": (BLOCKS, lambda t: t.flatten(2), r"'blocks' has dtype torch.uint8 and shape \[4, 64, 16\]"),
    "no experts": (BLOCKS, lambda t: t[:0], r"'blocks' has dtype torch.uint8 and shape \[0, 64, 1, 16\]"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_what_is_damaged_is_named(case, gpt_oss, tmp_path):
    part, make, message = DAMAGED[case]
    folder = shutil.copytree(gpt_oss, tmp_path / "own")
    change(folder, {part: make(load_file(folder / "model.safetensors")[part]).contiguous()})
    weights = open_source(str(folder)).weights
    name = f"{EXPERTS}.down_proj"
    for use in (
        partial(weights.__getitem__, name),
        partial(weights.expert, name, 0),
        partial(weights.packed[name].describe, name, weights.stored),
    ):
        with pytest.raises(CheckpointError, match=message) as caught:
            use()
        assert str(caught.value).startswith(f"{name} cannot be")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("part", [BLOCKS, SCALES])
def test_a_part_alone(part, gpt_oss, tmp_path):
    folder = shutil.copytree(gpt_oss, tmp_path / "own")
    change(folder, {part: None})
    with pytest.raises(CheckpointError, match=rf"^{EXPERTS}\.down_proj cannot .*: {part} is missing$"):
        open_source(str(folder))
