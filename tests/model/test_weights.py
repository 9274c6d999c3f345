"""Weights as they lie in the files and as they come into the model: dtypes, ties, what is no weight, what nobody uses."""

import json
from functools import partial

import pytest
import torch
import transformers
from conftest import VOCABULARY
from every_family import tiny_config, tiny_families
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.llama.modeling_llama import LlamaPreTrainedModel

import secateur
from secateur.checkpoint.export import export
from secateur.errors import CheckpointError, SecateurError
from secateur.evaluation.quality import size_of
from secateur.folder.manifest import MANIFEST_NAME
from secateur.model.source import open_source
from secateur.pipeline import team
from secateur.recipes.recipe import Recipe

IDS_NS = torch.randint(2, VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(3))
HALF = [torch.bfloat16, torch.float16]


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS_NS, use_cache=False).logits


def stock(folder, dtype="auto"):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def change(folder, changes):
    """Change the tensors of a folder's only file; None takes one out."""
    file = folder / "model.safetensors"
    tensors = {**load_file(file), **changes}
    save_file({k: v.contiguous() for k, v in tensors.items() if v is not None}, file, metadata={"format": "pt"})
    return folder


def tensors(folder):
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def recipe(text_file=None, **options):
    if text_file is not None:
        options = {
            "prune": "wanda",
            "calibration": secateur.Calibration(str(text_file), samples=8, seq_len=16),
            **options,
        }
    return secateur.Recipe(**{"prune": "magnitude", "sparsity": 0.5, **options})


# --- dtypes

KNOWN = ["llama", "gpt_neox", "gptj", "codegen", "rwkv", "olmo_hybrid", "flint", "xlnet"]


def check_family(model_type, folder):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_config(model_type)).to(torch.bfloat16).save_pretrained(folder)
    for dtype in HALF:
        ours, theirs = secateur.load(folder, dtype=dtype), stock(folder, dtype)
        found, wanted = ({**m.state_dict(), **dict(m.named_buffers())} for m in (ours, theirs))
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert found[name].dtype == tensor.dtype, (model_type, dtype, name)
            assert torch.equal(found[name], tensor), (model_type, dtype, name)


@pytest.mark.parametrize("model_type", KNOWN)
def test_tensors_and_buffers_are_those_of_transformers(model_type, tmp_path):
    """Position tables computed in float32, what transformers keeps in float32, what a model makes in a dtype of its own."""
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    check_family(model_type, tmp_path / "model")


@pytest.mark.parametrize("filled", ["all", "some", "none"])
def test_a_model_is_made_once_where_its_buffers_can_be_computed_afterwards(filled, tmp_path, monkeypatch):
    """Here they cannot be where what transformers does for those that files lack leaves any number of one unset."""
    AutoModelForCausalLM.from_config(tiny_config("llama")).save_pretrained(tmp_path)
    wanted = dict(stock(tmp_path, torch.float32).named_buffers())
    made = []
    rotary = type(AutoModelForCausalLM.from_config(tiny_config("llama")).model.rotary_emb)
    build, init = rotary.__init__, LlamaPreTrainedModel._init_weights

    def count(self, *args, **kwargs):
        made.append(1)
        build(self, *args, **kwargs)

    def partly(self, module):
        if filled == "all":
            init(self, module)
        elif filled == "some" and isinstance(module, rotary):
            module.inv_freq[:-1] = wanted["model.rotary_emb.inv_freq"][:-1]

    monkeypatch.setattr(rotary, "__init__", count)
    monkeypatch.setattr(LlamaPreTrainedModel, "_init_weights", partly)
    found = dict(secateur.load(tmp_path).named_buffers())
    assert len(made) == (1 if filled == "all" else 2)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


@pytest.mark.slow
def test_so_are_those_of_every_family(tmp_path):
    families = tiny_families()
    assert len(families) >= 70
    for model_type in families:
        check_family(model_type, tmp_path / model_type)


def test_positions_of_half_precision_are_not_rounded(tmp_path):
    """Far positions of GPT-J: their angles, computed in half precision, are off by whole turns."""
    config = tiny_config("gptj")
    config.n_positions = 2048
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(tmp_path)
    table = secateur.load(tmp_path).transformer.h[0].attn.embed_positions
    angles = torch.arange(2048).double()[:, None] * 10000 ** (-torch.arange(0, 4, 2).double() / 4)
    assert table.dtype == torch.float32
    torch.testing.assert_close(table.double(), torch.cat([angles.sin(), angles.cos()], 1), atol=2e-4, rtol=0)


def test_what_stays_in_float32_is_written_in_float32(build, tmp_path):
    """RWKV's decay is kept in float32 beside weights of float16, in memory and so in the files."""
    source, out = build(tmp_path / "model", tiny_config("rwkv")), tmp_path / "out"
    secateur.compress(str(source), out, recipe(dtype="float16"))
    before, after = tensors(source), tensors(out)
    kept = {name for name in before if name.endswith(("time_decay", "time_first"))}
    assert len(kept) == 4
    for name, tensor in before.items():
        assert name not in kept or torch.equal(after[name], tensor)
        assert name in kept or name not in after or after[name].dtype == torch.float16
    # The head and the norms are not compressed, and are float16.
    assert after["head.weight"].dtype == torch.float16


# --- ties

TIED = {
    "llama-tied": ("lm_head.weight", "model.embed_tokens.weight"),
    "gpt2": ("lm_head.weight", "transformer.wte.weight"),
    "opt": ("lm_head.weight", "model.decoder.embed_tokens.weight"),
}


@pytest.fixture(params=TIED)
def conflicting(request, own_model):
    """A folder whose config ties the head to the embeddings, while its file holds another head; and the head's name."""
    head, table = TIED[request.param]
    folder = own_model(request.param)
    stored = next(tensor for name, tensor in load_file(folder / "model.safetensors").items() if table.endswith(name))
    assert json.loads((folder / "config.json").read_text()).get("tie_word_embeddings", True)
    return change(folder, {head: 0.1 * torch.randn(stored.shape, generator=torch.Generator().manual_seed(1))}), head


def test_a_stored_head_is_the_one_that_counts(conflicting, text_file, tmp_path):
    folder, head = conflicting
    wanted = logits(stock(folder))
    assert not torch.allclose(wanted, logits(stock(change_copy(folder, tmp_path / "tied", {head: None}))), atol=0.1)
    assert torch.equal(logits(secateur.load(folder)), wanted)
    assert size_of(open_source(str(folder))).parameters == stock(folder).num_parameters()

    out, dense = tmp_path / "out", tmp_path / "dense"
    report = secateur.compress(str(folder), out, recipe(text_file))
    assert report.parameters == stock(folder).num_parameters()
    export(str(out), dense, "dense")
    for written in (out, dense):
        assert torch.equal(tensors(written)[head], tensors(folder)[head])
        assert json.loads((written / "config.json").read_text())["tie_word_embeddings"] is False
        assert secateur.verify(written) == []
    wanted = logits(stock(dense))
    with secateur.backend("dense"):
        assert torch.equal(logits(secateur.load(out)), wanted)
        assert torch.equal(logits(stock(out)), wanted)


def change_copy(folder, copy, changes):
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return change(copy, changes)


def test_verify_tells_a_conflict(conflicting):
    folder, head = conflicting
    said = [problem.what for problem in secateur.verify(folder) if problem.where == head]
    assert len(said) == 1
    assert "the files hold two different tensors" in said[0]
    assert "set tie_word_embeddings to false" in said[0]


@pytest.mark.parametrize("stored_as", [torch.float32, torch.bfloat16])
def test_the_same_head_stored_twice_is_no_conflict(stored_as, own_model):
    folder = own_model("llama-tied", dtype=torch.bfloat16)
    table = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    change(folder, {"lm_head.weight": table.to(stored_as)})
    assert not any("two different tensors" in problem.what for problem in secateur.verify(folder))
    model = secateur.load(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_what_else_is_tied_keeps_its_values(build, tmp_path):
    """BERT ties a bias, too: where the head's weight is another one, its bias still is the one that is stored."""
    config = tiny_config("bert")
    config.is_decoder, config.pad_token_id = True, None
    folder = build(tmp_path / "model", config)
    head = "cls.predictions.decoder.weight"
    change(folder, {head: 0.1 * torch.randn(VOCABULARY, 32), "cls.predictions.decoder.bias": None})
    wanted = logits(stock(folder))
    assert torch.equal(logits(secateur.load(folder)), wanted)
    export(str(folder), tmp_path / "dense", "dense")
    assert torch.equal(tensors(tmp_path / "dense")[head], tensors(folder)[head])
    assert torch.equal(logits(stock(tmp_path / "dense")), wanted)


def test_a_head_without_embeddings(own_model):
    """Tied to each other, either may be the one that is stored."""
    folder = own_model("llama-tied")
    wanted = logits(stock(folder))
    table = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    change(folder, {"lm_head.weight": table, "model.embed_tokens.weight": None})
    assert torch.equal(logits(stock(folder)), wanted)
    assert torch.equal(logits(secateur.load(folder)), wanted)


# --- codes that look like weights

LINEAR = "model.layers.1.mlp.up_proj.weight"
SCALE = torch.ones(1)


def scaled(name, tensor=SCALE):
    return lambda W: {name: tensor}


CODES = {
    "e4m3fn": (lambda W: {LINEAR: W.to(torch.float8_e4m3fn)}, rf"{LINEAR} is torch.float8_e4m3fn"),
    "e5m2": (lambda W: {LINEAR: W.to(torch.float8_e5m2)}, rf"{LINEAR} is torch.float8_e5m2"),
    "e4m3fnuz": (lambda W: {LINEAR: W.to(torch.float8_e4m3fnuz)}, LINEAR),
    "e5m2fnuz": (lambda W: {LINEAR: W.to(torch.float8_e5m2fnuz)}, LINEAR),
    "e4m3fn with its scale": (
        lambda W: {LINEAR: W.to(torch.float8_e4m3fn), f"{LINEAR}_scale_inv": SCALE},
        rf"{LINEAR} is torch.float8_e4m3fn",
    ),
    "int8": (lambda W: {LINEAR: (10 * W).to(torch.int8)}, rf"{LINEAR} is torch.int8 in the checkpoint"),
    "uint8": (lambda W: {LINEAR: (10 * W).abs().to(torch.uint8)}, rf"{LINEAR} is torch.uint8 in the checkpoint"),
    "packed by bitsandbytes": (
        lambda W: {LINEAR: torch.zeros(W.numel() // 2, 1, dtype=torch.uint8), f"{LINEAR}.absmax": SCALE},
        LINEAR,
    ),
    "weight_scale": (scaled(f"{LINEAR}_scale"), rf"{LINEAR}_scale stands beside {LINEAR}"),
    "weight_scale_inv": (scaled(f"{LINEAR}_scale_inv", torch.ones(1, 1)), rf"{LINEAR}_scale_inv stands beside"),
    "scales": (scaled("model.layers.1.mlp.up_proj.scales"), r"up_proj\.scales stands beside"),
    "input_scale": (scaled("model.layers.1.mlp.up_proj.input_scale"), r"up_proj\.input_scale stands beside"),
    "SCB": (scaled("model.layers.1.mlp.up_proj.SCB"), r"up_proj\.SCB stands beside"),
    "absmax": (scaled(f"{LINEAR}.absmax"), rf"{LINEAR}\.absmax stands beside"),
    "of the head": (scaled("lm_head.weight_scale"), r"lm_head\.weight_scale stands beside"),
}


@pytest.mark.parametrize("case", CODES)
def test_codes_are_not_taken_for_weights(case, own_model, says, text_file, tmp_path):
    make, message = CODES[case]
    folder = own_model("llama")
    change(folder, make(load_file(folder / "model.safetensors")[LINEAR]))
    out = tmp_path / "out"
    for refused in (
        partial(secateur.load, folder),
        partial(secateur.compress, str(folder), out, recipe()),
        partial(secateur.compress, str(folder), out, recipe(text_file)),
        partial(export, str(folder), out, "dense"),
    ):
        with pytest.raises(CheckpointError, match=message) as caught:
            refused()
        assert "\n" not in str(caught.value)
        assert "--resume" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["own-llama"]
    code, _, stderr = says("inspect", folder)
    assert (code, stderr.count("\n")) == (1, 1)
    assert says("verify", folder)[0] == 1


def test_a_scale_that_a_module_uses_is_a_weight_like_others(own_model):
    """So is one beside a vector, or of something that is not there."""
    folder = own_model("llama")
    change(folder, {"model.norm.scale": SCALE, "model.layers.7.mlp.up_proj.weight_scale": torch.ones(2)})
    assert torch.equal(logits(secateur.load(folder)), logits(stock(folder)))


# --- what no module uses


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("target", ["auto", "float16"])
def test_what_no_module_uses_is_copied_as_it_is(dtype, target, own_model, text_file, tmp_path):
    """Old GPT-NeoX checkpoints hold masks and their fill value, which is no number of half precision."""
    name = "gpt_neox.layers.{}.attention.masked_bias"
    unused = {
        name.format(0): torch.tensor(-1e9).to(dtype),  # minus infinity in float16
        name.format(1): torch.tensor(-1e9),
        "gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool).tril(),
        "something.else": torch.tensor([float("nan"), float("inf")]),
    }
    source, out = change(own_model("gpt-neox", dtype=dtype), unused), tmp_path / "out"
    secateur.compress(str(source), out, recipe(text_file, dtype=target))
    export(str(out), tmp_path / "dense", "dense")
    for folder in (out, tmp_path / "dense"):
        assert secateur.verify(folder) == []
        written = tensors(folder)
        for key, tensor in unused.items():
            assert written[key].dtype == tensor.dtype
            assert torch.equal(written[key].nan_to_num(7), tensor.nan_to_num(7))


# --- before the first block

LAST = "model.layers.1.mlp.down_proj.weight"
WRONG = {
    "NaN": ({LAST: lambda t: t.index_fill(0, torch.tensor(0), torch.nan)}, {}, "holds NaN or infinity"),
    "infinity in a norm": ({"model.norm.weight": lambda t: t / 0}, {}, "holds NaN or infinity"),
    "shape": ({LAST: lambda t: t[:-1]}, {}, r"is \[31, 64\] in the checkpoint, but \[32, 64\]"),
    "shape of the head": ({"lm_head.weight": lambda t: t[:-1]}, {}, r"is \[319, 32\] in the checkpoint"),
    "integers": ({LAST: lambda t: t.to(torch.int64)}, {}, "is torch.int64 in the checkpoint"),
    "too large": (
        {"model.layers.1.input_layernorm.weight": lambda t: t * 1e6},
        {"dtype": "float16"},
        "overflow torch.float16: give another `dtype`",
    ),
}


@pytest.mark.parametrize("text", [False, True], ids=["magnitude", "wanda"])
@pytest.mark.parametrize("case", WRONG)
def test_what_can_be_known_is_known_before_the_first_block(case, text, own_model, text_file, tmp_path, monkeypatch):
    spoil, options, message = WRONG[case]
    folder = own_model("llama")
    ((name, how),) = spoil.items()
    change(folder, {name: how(load_file(folder / "model.safetensors")[name])})
    monkeypatch.setattr(team, "solve", lambda *_: pytest.fail("a linear was solved"))
    with pytest.raises(SecateurError, match=rf"{name}.*{message}.*; nothing is left behind"):
        secateur.compress(str(folder), tmp_path / "out", recipe(text_file if text else None, **options))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["own-llama"]


def test_a_search_does_not_begin_with_a_damaged_block(own_model, text_file, tmp_path):
    folder = own_model("llama")
    change(folder, {LAST: torch.full((32, 64), torch.nan)})
    seen = []
    searching = recipe(text_file, sparsity=None, target_size="0.6x")
    with pytest.raises(CheckpointError, match=rf"{LAST} holds NaN"):
        secateur.compress(str(folder), tmp_path / "out", searching, progress=lambda step: seen.append(step.stage))
    assert "checking the weights" in seen[-1]


def test_weights_are_checked_once_for_all_runs(model_of, text_file, tmp_path):
    """A search by perplexity makes several models of the same weights."""
    seen = []
    wanted = recipe(text_file, sparsity=None, max_perplexity_rise="50%")
    secateur.compress(str(model_of("llama")), tmp_path / "out", wanted, progress=lambda step: seen.append(step.stage))
    assert seen.count("checking the weights") == 1


def test_an_error_that_would_come_again_does_not_advise_to_resume(own_model, text_file, tmp_path):
    """The second block computes what float32 cannot hold from weights that are numbers all of them."""
    folder = own_model("llama")
    name = "model.layers.1.mlp.{}_proj.weight"
    change(folder, {name.format(part): torch.full((64, 32), 3e36) for part in ("gate", "up")})
    with pytest.raises(SecateurError, match=r"1 block is kept in .*, but `resume` would come to the same: `overwrite`"):
        secateur.compress(str(folder), tmp_path / "out", recipe(text_file))
    with pytest.raises(SecateurError, match="but `resume` would come to the same"):
        secateur.compress(str(folder), tmp_path / "out", recipe(text_file), resume=True)


# --- weights that were quantized before


@pytest.mark.parametrize(("layout", "told"), [("packed-int", True), ("spqr", True), ("bitmap", False)])
def test_a_source_that_was_quantized_before_is_told(layout, told, packed_of, tmp_path):
    report = secateur.compress(
        str(packed_of("llama", layout)), tmp_path / "out", Recipe(prune="magnitude", sparsity=0.5)
    )
    assert any("was quantized before" in note for note in report.notes) == told
    assert json.loads((tmp_path / "out" / MANIFEST_NAME).read_text())["notes"] == report.notes
