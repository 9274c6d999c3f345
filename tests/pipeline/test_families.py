"""Families of models: their linears are found, grouped, pruned, written and read back, each in the way it is built."""

import json

import pytest
import torch
import transformers
from conftest import EVERY_KIND, FAMILIES, HIDDEN, INNER, VOCABULARY
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import secateur
from secateur.checkpoint.export import export
from secateur.checkpoint.inspect import inspect
from secateur.model.source import open_source
from secateur.model.structure import build_skeleton, find_blocks
from secateur.walking import walker
from secateur.walking.capture import BlockCalls

pytestmark = pytest.mark.usefixtures("dense_backend")

TIED = {
    "llama-tied", "qwen3", "gemma", "gemma2", "gemma3", "starcoder2", "cohere", "opt", "gpt2", "falcon", "falcon-new",
    "bloom", "mpt",
}  # fmt: skip
IDS_NS = torch.randint(2, VOCABULARY, (3, 20), generator=torch.Generator().manual_seed(3))


def recipe(text_file, **options):
    calibration = secateur.Calibration(source=str(text_file), samples=12, seq_len=24)
    return secateur.Recipe(**{"prune": "wanda", "sparsity": 0.5, "calibration": calibration, **options})


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS_NS, use_cache=False).logits


def tensors(folder):
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


@pytest.fixture
def groups_seen(monkeypatch):
    """The groups in which each block is solved, filled while `compress` runs."""
    seen = []
    walk = walker.walk

    def spy(passage, target, *how):
        seen.append([group for stage in target.stages for group in stage.groups])
        walk(passage, target, *how)

    monkeypatch.setattr(walker, "walk", spy)
    return seen


@pytest.mark.parametrize("name", FAMILIES)
def test_linears_are_those_of_the_blocks(name, model_of, family):
    skeleton = build_skeleton(open_source(str(model_of(name))), torch.float32)
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    blocks, prefix = find_blocks(skeleton), family[name].prefix
    assert list(blocks.modules) == [f"{prefix}.0", f"{prefix}.1"]
    assert set(blocks.linears) == {f"{prefix}.{i}.{part}" for i in range(2) for part in family[name].linears}
    assert (blocks.idle, blocks.unreached) == ((), frozenset())


# SparseGPT is tried with some ways to order linears, and with all kinds of families by the tests of the walk.
_SELDOM = FAMILIES.keys() - {"cohere", "gpt2", "falcon"}


@pytest.mark.parametrize(
    ("name", "prune", "share"),
    [
        pytest.param(*each.values, "wanda", {"sparsity": 0.5}, id=f"{each.values[0]}-wanda", marks=each.marks)
        for each in EVERY_KIND
    ]
    + [
        pytest.param(
            name, "sparsegpt", {"pattern": "2:4"}, id=f"{name}-sparsegpt", marks=[pytest.mark.slow] * (name in _SELDOM)
        )
        for name in FAMILIES
    ],
)
def test_a_family_is_compressed_and_loads(name, prune, share, model_of, family, text_file, tmp_path, groups_seen):
    source = model_of(name, dtype=torch.bfloat16)
    out, dense = tmp_path / "out", tmp_path / "dense"
    report = secateur.compress(str(source), out, recipe(text_file, **{"sparsity": None, "prune": prune, **share}))
    export(str(out), dense, "dense")

    prefix = family[name].prefix
    assert groups_seen == [[[f"{prefix}.{i}.{part}" for part in g] for g in family[name].groups] for i in range(2)]
    linears = {f"{prefix}.{i}.{part}" for i in range(2) for part in family[name].linears}
    assert {linear.name for linear in report.linears} == linears

    before, after = tensors(source), tensors(dense)
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype == torch.bfloat16
        if key.removesuffix(".weight") not in linears:
            assert torch.equal(tensor, after[key]), key
    for linear in report.linears:
        old, new = before[f"{linear.name}.weight"], after[f"{linear.name}.weight"]
        assert torch.count_nonzero(new) * 2 == new.numel() == torch.count_nonzero(old), linear.name
        assert linear.sparsity == 0.5
        kept = new[new != 0] == old[new != 0]
        # Wanda removes only; SparseGPT makes up for it in what stays.
        assert kept.all() if prune == "wanda" else kept.float().mean() < 0.8, linear.name
        assert 0 < linear.error < 1

    loaded = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    plain = AutoModelForCausalLM.from_pretrained(dense, dtype="auto")
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(logits(loaded), logits(plain))
    assert torch.equal(logits(secateur.load(out)), logits(plain))
    assert not torch.equal(logits(plain), logits(AutoModelForCausalLM.from_pretrained(source, dtype="auto")))


@pytest.mark.thin(2)
@pytest.mark.parametrize("name", FAMILIES)
def test_parameters_are_counted_once(name, model_of, text_file, tmp_path):
    """Tied embeddings are one tensor, in the report as in the file."""
    source = model_of(name)
    model = AutoModelForCausalLM.from_pretrained(source)
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied == (name in TIED)
    report = secateur.compress(str(source), tmp_path / "out", recipe(text_file))
    assert report.parameters == model.num_parameters()
    assert inspect(open_source(str(source))).parameters == model.num_parameters()


def test_the_head_of_an_untied_model_is_not_touched(model_of, text_file, tmp_path):
    secateur.compress(str(model_of("llama")), tmp_path / "out", recipe(text_file))
    before, after = tensors(model_of("llama")), tensors(tmp_path / "out")
    for key in ("lm_head.weight", "model.embed_tokens.weight"):
        assert torch.equal(before[key], after[key])


def test_tensors_that_transformers_renames_keep_the_name_they_are_stored_under(model_of, text_file, tmp_path):
    """GPT-NeoX's head is `embed_out` on disk and `lm_head` in the model; other tools look for the former."""
    source = model_of("gpt-neox")
    ours, theirs = secateur.load(source), AutoModelForCausalLM.from_pretrained(source)
    assert torch.equal(logits(ours), logits(theirs))
    secateur.compress(str(source), tmp_path / "out", recipe(text_file))
    before, after = tensors(source), tensors(tmp_path / "out")
    assert torch.equal(after["embed_out.weight"], before["embed_out.weight"])
    assert "lm_head.weight" not in after
    head = AutoModelForCausalLM.from_pretrained(tmp_path / "out").get_output_embeddings().weight
    assert torch.equal(head, before["embed_out.weight"])
    assert torch.equal(secateur.load(tmp_path / "out").get_output_embeddings().weight, head)


@pytest.mark.parametrize("form", ["dense", "bitmap", "nm"])
def test_a_transposed_weight_keeps_its_shape_on_disk(form, model_of, text_file, tmp_path):
    """GPT-2's Conv1D keeps `[I, O]`: packed, rows are outputs all the same, and N:M runs along the inputs."""
    source, out = model_of("gpt2"), tmp_path / "out"
    report = secateur.compress(str(source), out, recipe(text_file, sparsity=None, pattern="1:4", format=form))
    stored = tensors(out)
    key = "transformer.h.0.mlp.c_fc.weight"
    if form == "dense":
        assert stored[key].shape == (HIDDEN, INNER)
    else:
        assert stored[f"{key}.shape"].tolist() == [INNER, HIDDEN]
        modules = json.loads((out / "config.json").read_text())["quantization_config"]["modules"]
        assert modules["transformer.h.*.mlp.c_fc"]["transposed"] is True
    W_IO = AutoModelForCausalLM.from_pretrained(out).get_parameter(key)
    assert ((W_IO.T.reshape(-1, 4) != 0).sum(1) == 1).all()
    shapes = {linear.name: linear.shape for linear in report.linears}
    assert shapes[key.removesuffix(".weight")] == (INNER, HIDDEN)
    assert {linear.name: linear.shape for linear in inspect(open_source(str(out))).linears} == shapes


@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
def test_sliding_and_full_attention_blocks_get_masks_of_their_own(name, model_of):
    """Windows are longer here than the attention of the first block reaches, so its mask is not that of the second."""
    model = AutoModelForCausalLM.from_pretrained(model_of(name), attn_implementation="eager").eval()
    blocks = list(find_blocks(model).modules.values())
    with torch.no_grad():
        calls = BlockCalls(model, blocks, IDS_NS[:1, :8]).catch(IDS_NS)
    near, far = ((call.kwargs["attention_mask"] == 0).sum(-1).max().item() for call in calls)
    assert (near, far) == (8, IDS_NS.shape[1])


def test_blocks_may_return_a_list(build, tmp_path, text_file):
    """The first GPT's blocks return a list of hidden states and more."""
    config = transformers.OpenAIGPTConfig(vocab_size=VOCABULARY, n_embd=HIDDEN, n_layer=2, n_head=4, n_positions=64)
    source = build(tmp_path / "gpt", config)
    report = secateur.compress(str(source), tmp_path / "out", recipe(text_file))
    assert len(report.linears) == 8


def test_a_convolution_in_a_block_is_not_a_mixture_of_experts(build, tmp_path, text_file):
    options = {"layer_types": ["conv", "full_attention"], "num_key_value_heads": 2, "block_multiple_of": 8}
    config = transformers.Lfm2Config(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, **options,
    )  # fmt: skip
    source = build(tmp_path / "lfm2", config)
    report = secateur.compress(str(source), tmp_path / "out", recipe(text_file))
    names = {linear.name for linear in report.linears}
    assert "model.layers.0.conv.in_proj" in names
    assert "model.layers.1.self_attn.q_proj" in names
