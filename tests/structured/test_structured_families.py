"""Structural pruning in many families: the folder is a smaller model, which computes what the zeroed one does."""

import json

import pytest
import torch
from accelerate import init_empty_weights
from family_table import tiny_config
from mixtures import config_of
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import secateur
from secateur.mixture.unfuse import fused_in, unfuse
from secateur.model.load import load_source
from secateur.model.source import open_source
from secateur.model.structure import build_skeleton, find_blocks
from secateur.structured.sites import Width, find_sites
from secateur.structured.structure_of import legal_heads

TOKENS = torch.arange(2, 34)[None]


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def recipe_of(text_file, method="wanda", sparsity=0.25, **more):
    text = secateur.Calibration(str(text_file), 8, 32)
    return secateur.Recipe(prune=method, pattern="structured", sparsity=sparsity, calibration=text, **more)


def zeroed(model, out, sites, load=load):
    """The dense model with the columns of the result where they stayed, and zeros where they went; by the rows of producers."""
    dense, small = load(model), load(out)
    for site in sites:
        consumer = dense.get_submodule(site.name)
        new = small.get_submodule(site.name)
        dim = 0 if site.coupling.consumer in site.transposed else 1
        W, left = consumer.weight.data, new.weight.data
        kept = columns_that_stayed(dense, small, site)
        assert len(kept) == left.shape[dim] < W.shape[dim]
        W.zero_().index_copy_(dim, kept, left)
        if new.bias is not None:
            consumer.bias.data.copy_(new.bias.data)
    return dense, small


def columns_that_stayed(dense, small, site):
    """Told by the rows of producers alone: those of the dense model that the small one has, in order."""
    name, feeds = next(iter(site.coupling.producers.items()))
    turn = name in site.transposed
    try:
        before, after = (m.get_submodule(f"{site.prefix}.{name}").weight.data for m in (dense, small))
    except AttributeError:  # its module is gone
        return torch.zeros(0, dtype=torch.long)
    before, after = (before.T, after.T) if turn else (before, after)
    units, at = [], 0
    for row in range(len(before)):
        if at < len(after) and torch.equal(before[row], after[at]):
            at += 1
            if feeds.stop_R[row] == feeds.first_R[row] + 1:
                units.append(int(feeds.first_R[row]))
    assert at == len(after)
    size = site.coupling.size
    return torch.tensor([unit * size + i for unit in sorted(set(units)) for i in range(size)])


def sites_of(model, kind):
    source = open_source(str(model))
    skeleton = build_skeleton(source, torch.float32)
    probed = find_sites(skeleton, find_blocks(skeleton), source.config.get_text_config().num_attention_heads)
    return source, skeleton, probed, [site for site in probed.sites if site.coupling.kind == kind]


def same(one, other):
    with torch.no_grad():
        a, b = one(TOKENS).logits, other(TOKENS).logits
    assert (a - b).abs().max() <= 1e-6 * a.abs().max()


@pytest.mark.parametrize(
    "family",
    [
        *["llama-tied", "qwen3", "gpt-neox", "opt", "gemma3", "falcon", "cohere"],
        *[
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("llama", "qwen2", "phi3", "gpt2", "gemma2", "falcon-new")
        ],
    ],
)
def test_sliced_is_zeroed(family, model_of, text_file, tmp_path):
    secateur.compress(str(model_of(family)), tmp_path / "out", recipe_of(text_file, multiple=8))
    *_, sites = sites_of(model_of(family), "neurons")
    dense, small = zeroed(model_of(family), tmp_path / "out", sites)
    same(dense, small)
    assert secateur.verify(tmp_path / "out") == []


HEADS = {
    "llama": [(2, 2), (2, 1)],
    "qwen2": [(2, 2), (2, 1)],
    "qwen3": [(2, 2), (2, 1)],
    "phi3": [(2, 2), (2, 1)],
    "gemma2": [(2, 2), (2, 1)],
    "gpt2": [],
    "opt": [],
    "gpt-neox": [],
    "bloom": [],
}


@pytest.mark.thin(2)
@pytest.mark.parametrize("family", HEADS)
def test_the_numbers_of_heads_that_a_config_gives(family, model_of):
    source, skeleton, probed, sites = sites_of(model_of(family), "heads")
    assert legal_heads(source, skeleton, probed, sites) == [Width(*each) for each in HEADS[family]]


@pytest.mark.thin(2)
@pytest.mark.parametrize("family", [name for name, found in HEADS.items() if found])
@pytest.mark.parametrize("width", [0, 1])
def test_heads_sliced_are_heads_zeroed(family, width, model_of, text_file, tmp_path):
    *_, sites = sites_of(model_of(family), "heads")
    units, groups = HEADS[family][width]
    chosen = {site.name: secateur.Choice(units=units, groups=groups) for site in sites}
    recipe = recipe_of(text_file, "sparsegpt", units="heads", linears=chosen)
    secateur.compress(str(model_of(family)), tmp_path / "out", recipe)
    dense, small = zeroed(model_of(family), tmp_path / "out", sites)
    same(dense, small)
    assert secateur.verify(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("family", "kinds"),
    [
        ("olmo2", {"neurons"}),  # a norm goes over all heads
        ("olmoe", {"neurons"}),  # the same, and neurons are inside experts
        ("mamba", set()),  # what mixes tokens is no row of neurons
        ("mixtral", {"heads", "neurons"}),
        ("qwen2_moe", {"heads", "neurons"}),  # of experts, and of the shared one
        ("gpt_oss", {"heads"}),  # biases of experts stay fused
        ("gptj", {"heads", "neurons"}),
    ],
)
def test_what_is_told_apart(family, kinds):
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(tiny_config(CONFIG_MAPPING[family]))
    with torch.no_grad():
        model.initialize_weights()
    unfuse(model, fused_in(model))
    probed = find_sites(model.eval(), find_blocks(model), 4)
    assert {site.coupling.kind for site in probed.sites} == kinds


def test_heads_of_a_mixture(build, text_file, tmp_path):
    folder = build(tmp_path / "model", tiny_config(CONFIG_MAPPING["qwen3_moe"], vocab_size=320, head_dim=8))
    *_, sites = sites_of(folder, "heads")
    chosen = {site.name: secateur.Choice(units=2, groups=2) for site in sites}
    secateur.compress(str(folder), tmp_path / "out", recipe_of(text_file, units="heads", linears=chosen))
    dense, small = zeroed(folder, tmp_path / "out", sites)
    same(dense, small)


def apart(folder):
    """A model with its experts as linears."""
    return load_source(open_source(str(folder)), torch.float32, torch.device("cpu"), apart=True).eval()


@pytest.mark.thin(2)
@pytest.mark.parametrize(
    "family", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "glm4_moe", "granitemoe", "llama4_text"]
)
def test_experts_sliced_are_experts_zeroed(family, build, text_file, tmp_path):
    """All experts get as narrow, and a stock model is what comes of it, fused on disk as others of its family are."""
    folder = build(tmp_path / "model", config_of(family))
    secateur.compress(str(folder), tmp_path / "out", recipe_of(text_file, "sparsegpt", 0.2, multiple=2))
    *_, sites = sites_of(folder, "neurons")
    assert any(site.of_expert for site in sites)
    dense, small = zeroed(folder, tmp_path / "out", sites, apart)
    same(dense, small)
    stock = load(tmp_path / "out")
    assert torch.allclose(stock(TOKENS).logits, small(TOKENS).logits, atol=1e-5)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert secateur.verify(tmp_path / "out") == []


def test_a_key_of_all_heads_stays(model_of):
    """Falcon's queries share one key and value: only rows of queries go."""
    *_, sites = sites_of(model_of("falcon"), "heads")
    fused = sites[0].coupling.producers["self_attention.query_key_value"]
    assert int(fused.some_R.sum()) == 32
    assert int((~fused.some_R).sum()) == 16
