"""What a new folder says of its weights: the source's own words, its dtype and its tensors' names, for tools of any release.

Sources are in the words of transformers 4, which most checkpoints are written by; `test_old_transformers.py` has it read ours.
"""

import json
import re

import pytest
import torch
import transformers
from conftest import config_of
from safetensors.torch import load_file, save_file
from tiny_gguf import make_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PhiConfig

import secateur
from secateur.checkpoint.export import export
from secateur.checkpoint.verify import verify
from secateur.errors import CheckpointError
from secateur.evaluation.quality import Runner
from secateur.folder.gguf_header import matrix_dtype
from secateur.model.dialects import in_all_dialects
from secateur.model.source import open_source
from secateur.pipeline.prepared import prepare
from secateur.recipes.plan import plan

RTN = secateur.Recipe(quantize="rtn", quantization={"bits": 8, "group_size": 16})
DENSE = secateur.Recipe(quantize="rtn", quantization={"bits": 8, "group_size": 16}, format="dense")
PRUNED = secateur.Recipe(prune="magnitude", sparsity=0.5)
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
#: Settings of a family as transformers 4 writes them.
OLD = {
    "llama": {"rope_theta": 500000.0, "rope_scaling": LLAMA3, "torch_dtype": "float32"},
    "qwen2": {"rope_theta": 1000000.0, "rope_scaling": None, "torch_dtype": "float32"},
    "gpt-neox": {"rotary_pct": 0.25, "rotary_emb_base": 25000, "torch_dtype": "float32"},
    "gemma3": {"rope_theta": 1e6, "rope_local_base_freq": 2e4, "sliding_window_pattern": 2, "torch_dtype": "float32"},
    "gpt2": {"torch_dtype": "float32"},
}
VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip


def config_in(folder):
    return json.loads((folder / "config.json").read_text())


def change_config(folder, **changes):
    """Set what the config of a folder says; what is None goes."""
    content = {**config_in(folder), **changes}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
    return folder


def in_old_words(folder, family):
    change_config(folder, rope_parameters=None, dtype=None, layer_types=None)
    (folder / "config.json").write_text(json.dumps({**config_in(folder), **OLD[family]}))
    return folder


def names_in(folder):
    return {name for file in folder.glob("*.safetensors") for name in load_file(file)}


def change_tensors(folder, change):
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return folder


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(2, 30)[None]).logits


def written(source, folder, transposed=False):
    """All kinds of folders that can be made of a source, packed ones and those with dense weights only."""
    folder.mkdir(exist_ok=True)
    secateur.compress(str(source), folder / "packed", RTN)
    secateur.compress(str(source), folder / "bitmap", PRUNED)
    secateur.compress(str(source), folder / "dense", DENSE)
    export(str(folder / "packed"), folder / "packed to dense", "dense")
    export(str(source), folder / "exported", "dense")
    export(str(folder / "bitmap"), folder / "repacked", "secateur")
    if not transposed:
        export(str(folder / "packed"), folder / "compressed-tensors", "compressed-tensors")
    return sorted(folder.iterdir())


# --- config.json


@pytest.mark.parametrize("family", OLD)
def test_the_config_is_the_sources_own(family, own_model, tmp_path):
    source = in_old_words(own_model(family), family)
    for folder in written(source, tmp_path / "made", transposed=family == "gpt2"):
        content = config_in(folder)
        is_dense = folder.name in ("dense", "packed to dense", "exported")
        assert (content.pop("quantization_config", None) is None) == is_dense
        assert content == config_in(source), folder.name


def test_the_model_is_the_same_by_either_spelling(own_model, tmp_path):
    source = in_old_words(own_model("llama"), "llama")
    export(str(source), tmp_path / "out", "dense")
    of_source, of_out = (AutoModelForCausalLM.from_pretrained(f, dtype="auto") for f in (source, tmp_path / "out"))
    assert of_out.config.rope_parameters["rope_theta"] == 500000.0
    assert torch.equal(logits(of_out), logits(of_source))
    assert torch.equal(logits(secateur.load(tmp_path / "out")), logits(of_source))


def test_other_quantizers_sections_go(own_model, tmp_path):
    source = own_model("llama")
    secateur.compress(str(source), tmp_path / "packed", RTN)
    export(str(tmp_path / "packed"), tmp_path / "others", "compressed-tensors")
    secateur.compress(str(tmp_path / "others"), tmp_path / "dense", DENSE)
    assert not {"quantization_config", "compression_config"} & set(config_in(tmp_path / "dense"))


@pytest.mark.parametrize("keys", [("dtype",), ("torch_dtype",), ("dtype", "torch_dtype")])
def test_another_dtype_stands_under_the_keys_that_the_source_used(keys, own_model, tmp_path):
    source = change_config(own_model("llama"), **{"dtype": None, **dict.fromkeys(keys, "float32")})
    recipe = secateur.Recipe(prune="magnitude", sparsity=0.5, dtype="float16")
    secateur.compress(str(source), tmp_path / "out", recipe)
    content = config_in(tmp_path / "out")
    assert {key: content[key] for key in ("dtype", "torch_dtype") if key in content} == dict.fromkeys(keys, "float16")
    assert {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values() if t.is_floating_point()} == {
        torch.float16
    }


def test_what_a_source_does_not_say_is_filled_in(own_model, tmp_path):
    source = change_config(own_model("llama", dtype=torch.bfloat16), architectures=None, dtype=None)
    export(str(source), tmp_path / "out", "dense")
    content = config_in(tmp_path / "out")
    assert content["architectures"] == ["LlamaForCausalLM"]
    assert content["dtype"] == content["torch_dtype"] == "bfloat16"


def test_a_config_in_all_dialects():
    llama = in_all_dialects(LlamaConfig(rope_parameters={"rope_theta": 5e5, **LLAMA3}))
    assert llama["rope_theta"] == llama["rope_parameters"]["rope_theta"] == 5e5
    assert llama["rope_scaling"] == LLAMA3
    plain = in_all_dialects(LlamaConfig(rope_parameters={"rope_theta": 5e5, "rope_type": "default"}))
    assert plain["rope_theta"] == 5e5
    assert "rope_scaling" not in plain
    phi = in_all_dialects(
        PhiConfig(rope_parameters={"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.25})
    )
    assert phi["partial_rotary_factor"] == 0.25
    gemma = in_all_dialects(config_of("gemma3", layer_types=["sliding_attention", "full_attention"]))
    assert gemma["rope_theta"] == gemma["rope_parameters"]["full_attention"]["rope_theta"]
    assert gemma["rope_local_base_freq"] == gemma["rope_parameters"]["sliding_attention"]["rope_theta"]
    assert gemma["sliding_window_pattern"] == 2
    experts = in_all_dialects(transformers.Qwen3MoeConfig(num_experts=4))
    assert experts["num_experts"] == experts.get("num_local_experts", 4) == 4
    half = in_all_dialects(LlamaConfig(dtype="float16"))
    assert half["dtype"] == half["torch_dtype"] == "float16"


# --- names of tensors


def gemma3_vlm(build, folder):
    """With names as transformers 4.51 gives them; release 5 writes most of them, too, of a model that it has not loaded."""
    text = config_of("gemma3").to_dict()
    config = transformers.Gemma3Config(
        text_config=text, vision_config=VISION, mm_tokens_per_image=4, image_token_id=300
    )
    build(folder, config, dtype=torch.bfloat16)
    assert "language_model.model.layers.0.mlp.up_proj.weight" in names_in(folder)
    tower = r"^vision_tower\.(?!vision_model\.)"
    return change_tensors(
        folder, lambda found: {re.sub(tower, "vision_tower.vision_model.", k): v for k, v in found.items()}
    )


def gemma3_vlm_of_release_5(build, folder):
    """With the names that modules have in release 5."""
    gemma3_vlm(build, folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    return change_tensors(
        folder, lambda _: {k: v.clone() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    )


def gpt2_without_prefix(build, folder):
    """As GPT-2 was published: without the name of the base model."""
    build(folder, config_of("gpt2"))
    return change_tensors(folder, lambda found: {k.removeprefix("transformer."): v for k, v in found.items()})


def llama_without_prefix(build, folder):
    build(folder, config_of("llama", tie_word_embeddings=True))
    return change_tensors(folder, lambda found: {k.removeprefix("model."): v for k, v in found.items()})


def neox(build, folder):
    build(folder, config_of("gpt-neox"))
    rename = {"lm_head.weight": "embed_out.weight"}
    return change_tensors(folder, lambda found: {rename.get(k, k): v for k, v in found.items()})


NAMED = [gemma3_vlm, gemma3_vlm_of_release_5, gpt2_without_prefix, llama_without_prefix, neox]


@pytest.mark.thin(2)
@pytest.mark.parametrize("make", NAMED, ids=lambda make: make.__name__)
def test_tensors_keep_the_names_that_they_had(make, build, tmp_path):
    source = make(build, tmp_path / "source")
    for folder in written(source, tmp_path / "made", transposed=make is gpt2_without_prefix):
        weights = open_source(str(folder)).weights
        assert set(weights) == names_in(source), folder.name
        if folder.name in ("dense", "packed to dense", "exported"):
            assert names_in(folder) == names_in(source), folder.name
        assert not list(map(str, verify(folder))), folder.name


@pytest.mark.thin(2)
@pytest.mark.parametrize("make", NAMED, ids=lambda make: make.__name__)
def test_packed_folders_load_under_names_of_any_release(make, build, tmp_path):
    source = make(build, tmp_path / "source")
    secateur.compress(str(source), tmp_path / "packed", RTN)
    secateur.compress(str(source), tmp_path / "dense", DENSE)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype="auto")
    with secateur.backend("dense"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype="auto")
    for name, parameter in expected.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter), name
    for i, model in enumerate(
        (
            AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype="auto"),
            secateur.load(tmp_path / "packed"),
            loaded,
        )
    ):
        packed = logits(model)
        torch.testing.assert_close(packed, logits(expected), rtol=0.1, atol=0.02)
        model.save_pretrained(tmp_path / f"again-{i}")
        again = secateur.load(tmp_path / f"again-{i}")
        torch.testing.assert_close(logits(again), packed, rtol=0.1, atol=0.02)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / f"again-{i}", dtype="auto")
        torch.testing.assert_close(logits(again), packed, rtol=0.1, atol=0.02)


def test_other_tools_are_told_both_names(build, tmp_path):
    source = gemma3_vlm(build, tmp_path / "source")
    secateur.compress(str(source), tmp_path / "packed", RTN)
    export(str(tmp_path / "packed"), tmp_path / "out", "compressed-tensors")
    assert "language_model.model.layers.0.mlp.up_proj.weight_packed" in names_in(tmp_path / "out")
    ignored = config_in(tmp_path / "out")["quantization_config"]["ignore"]
    modules = AutoModelForCausalLM.from_pretrained(source).named_modules()
    here = [name for name, _ in modules if name.endswith("encoder.layers.0.mlp.fc1")]
    assert {*here, "vision_tower.vision_model.encoder.layers.0.mlp.fc1"} <= set(ignored)


@pytest.mark.parametrize("family", ["MixtralConfig", "Qwen3MoeConfig"])
def test_experts_are_written_one_by_one_as_they_were(family, build, tmp_path):
    options = {
        "vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "num_experts_per_tok": 2, "max_position_embeddings": 64,
    }  # fmt: skip
    experts = {"num_local_experts": 4} if family == "MixtralConfig" else {"num_experts": 4, "moe_intermediate_size": 16}
    source = build(tmp_path / "source", getattr(transformers, family)(**options, **experts))
    assert any(re.search(r"experts\.3\.", name) for name in names_in(source))
    export(str(source), tmp_path / "out", "dense")
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


# --- dtype


def with_dtypes(folder, **dtypes):
    """Give tensors whose names have a word in them another dtype."""

    def change(found):
        return {
            name: tensor.to(next((d for word, d in dtypes.items() if word in name), tensor.dtype))
            for name, tensor in found.items()
        }

    return change_tensors(folder, change)


def test_a_float32_head_does_not_make_the_model_float32(own_model, tmp_path):
    source = with_dtypes(own_model("llama", dtype=torch.bfloat16), lm_head=torch.float32)
    assert open_source(str(source)).dtype == torch.bfloat16
    for name in ("config says it", "config says nothing"):
        if name == "config says nothing":
            change_config(source, dtype=None)
        assert open_source(str(source)).dtype == torch.bfloat16
        secateur.compress(str(source), tmp_path / name, DENSE)
        found = load_file(tmp_path / name / "model.safetensors")
        assert found["lm_head.weight"].dtype == torch.float32
        assert found["model.layers.0.mlp.up_proj.weight"].dtype == torch.bfloat16
        assert config_in(tmp_path / name)["dtype"] == "bfloat16"
        assert secateur.load(tmp_path / name).dtype == torch.bfloat16


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_config_says_the_dtype(key, own_model):
    """As with stock transformers and `dtype="auto"`; what lies in the files is known, too."""
    source = open_source(str(change_config(own_model("llama"), **{"dtype": None, key: "float16"})))
    assert (source.dtype, source.stored) == (torch.float16, torch.float32)
    assert secateur.load(source.name).dtype == torch.float16


def test_the_config_says_the_dtype_of_its_text_part(build, tmp_path):
    source = gemma3_vlm(build, tmp_path / "source")
    content = config_in(source)
    parts = {name: {**content[name], "dtype": "float16"} for name in ("text_config", "vision_config")}
    change_config(source, dtype=None, **parts)
    assert (open_source(str(source)).dtype, open_source(str(source)).stored) == (torch.float16, torch.bfloat16)
    export(str(source), tmp_path / "out", "dense")
    assert config_in(tmp_path / "out") == config_in(source)
    recipe = secateur.Recipe(prune="magnitude", sparsity=0.5, dtype="float32")
    secateur.compress(str(source), tmp_path / "float32", recipe)
    content = config_in(tmp_path / "float32")
    assert "dtype" not in content
    assert content["text_config"]["dtype"] == content["vision_config"]["dtype"] == "float32"


@pytest.mark.parametrize("nonsense", ["float8_e4m3fn", "int8", 7, {}])
def test_a_dtype_that_weights_do_not_have_is_not_believed(nonsense, own_model):
    folder = change_config(own_model("llama", dtype=torch.float16), dtype=None, torch_dtype=nonsense)
    source = open_source(str(folder))
    assert source.dtype == torch.float16


def test_tensors_keep_their_own_dtype_whatever_the_config_says(own_model, tmp_path):
    source = change_config(own_model("llama", dtype=torch.bfloat16), dtype="float32")
    secateur.compress(str(source), tmp_path / "out", DENSE)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert config_in(tmp_path / "out")["dtype"] == "float32"
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert secateur.load(tmp_path / "out").dtype == stock.dtype == torch.float32


def test_sizes_are_those_of_the_tensors_own_dtypes(own_model, tmp_path):
    """What a target size is a share of: a head of float32 counts as such, and so do weights whose config says float32."""
    source = with_dtypes(own_model("llama", dtype=torch.bfloat16), lm_head=torch.float32)
    change_config(source, dtype="float32")
    size = (source / "model.safetensors").stat().st_size
    prepared = prepare(open_source(str(source)), DENSE, plan(DENSE), torch.device("cpu"))
    total = prepared.dense_bytes()
    entries = 110 * len(names_in(source))
    assert size - entries < total < size + entries


# --- GGUF

TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "Q8_0": None}


@pytest.fixture(scope="module")
def gguf_of(tmp_path_factory):
    pytest.importorskip("gguf")
    folder = tmp_path_factory.mktemp("gguf")
    made = {}

    def make(kind):
        if kind not in made:
            made[kind] = make_gguf(folder / f"{kind}.gguf", kind)
        return made[kind]

    return make


def stock_of(file):
    """All that the file's values are."""
    return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).state_dict()


@pytest.mark.parametrize("kind", TYPES)
def test_a_gguf_keeps_its_dtype(kind, gguf_of, tmp_path):
    dtype = TYPES[kind] or torch.bfloat16
    assert matrix_dtype(gguf_of(kind)) is TYPES[kind]
    export(str(gguf_of(kind)), tmp_path / "out", "dense")
    found, expected = load_file(tmp_path / "out" / "model.safetensors"), stock_of(gguf_of(kind))
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name].to(dtype)), name
    assert config_in(tmp_path / "out")["dtype"] == config_in(tmp_path / "out")["torch_dtype"] == str(dtype)[6:]


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0"])
def test_a_gguf_is_not_rounded_on_the_way_to_another_dtype(kind, gguf_of, tmp_path):
    expected = stock_of(gguf_of(kind))
    name = "model.embed_tokens.weight"
    assert not torch.equal(expected[name], expected[name].bfloat16().float())
    loaded = secateur.load(gguf_of(kind), dtype=torch.float32)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in loaded.state_dict().items())
    runner = Runner(dtype="float32")
    assert torch.equal(runner.load(runner.open(str(gguf_of(kind)))).get_parameter(name), expected[name])
    for dtype in ("float32", "float16"):
        recipe = secateur.Recipe(prune="magnitude", sparsity=0.5, dtype=dtype)
        secateur.compress(str(gguf_of(kind)), tmp_path / dtype, recipe)
        found = load_file(tmp_path / dtype / "model.safetensors")[name]
        assert torch.equal(found, expected[name].to(getattr(torch, dtype)))


def test_a_gguf_makes_a_folder_that_all_tools_know(gguf_of, tmp_path):
    secateur.compress(str(gguf_of("Q8_0")), tmp_path / "out", RTN)
    content = config_in(tmp_path / "out")
    assert content["architectures"] == ["LlamaForCausalLM"]
    assert content["rope_theta"] == content["rope_parameters"]["rope_theta"] == 500000.0
    tokenizer = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not {"backend", "is_local", "local_files_only"} & tokenizer.keys()
    text = "the quick brown fox, jümps <s> over"
    own = open_source(str(gguf_of("Q8_0"))).tokenizer()
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(text).input_ids == own(text).input_ids


def test_a_gguf_that_is_cut_off_anywhere_is_refused(gguf_of, tmp_path):
    whole = gguf_of("F16").read_bytes()
    file = tmp_path / "cut.gguf"
    for size in (0, 3, 4, 10, 24, 30, 300, 5000):
        file.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"cut\.gguf cannot be read"):
            matrix_dtype(file)


def test_a_gguf_whose_counts_are_absurd_is_refused_at_once(gguf_of, tmp_path):
    whole = gguf_of("F16").read_bytes()
    file = tmp_path / "absurd.gguf"
    for place in (8, 16, 24):
        file.write_bytes(whole[:place] + b"\xff" * 8 + whole[place + 8 :])
        with pytest.raises(CheckpointError, match=r"absurd\.gguf cannot be read"):
            matrix_dtype(file)
