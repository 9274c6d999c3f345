"""transformers 4.51, in an environment of its own, makes models and reads what is made of them: the same logits.

The environment is made once (`pip install` of torch and transformers) and kept in pytest's cache; `old_transformers.py` runs in
it.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import secateur
from secateur.checkpoint.export import export
from secateur.model.source import open_source

pytestmark = pytest.mark.slow

OLD = "4.51.3"
SCRIPT = Path(__file__).parents[1] / "old_transformers.py"
SIZES = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
GPT2 = {"vocab_size": 320, "n_embd": 32, "n_inner": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
GEMMA = {**SIZES, "head_dim": 8, "sliding_window": 8, "rope_theta": 3e5, "rope_local_base_freq": 2e4}
VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
GEMMA_VLM = {
    "text_config": {**GEMMA, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}, "vision_config": VISION,
    "mm_tokens_per_image": 4, "image_token_index": 310, "boi_token_index": 311, "eoi_token_index": 312,
}  # fmt: skip


def spec(name, dtype, *, model=None, base=False, **options):
    return {
        "config": f"{name}Config",
        "model": model or f"{name}ForCausalLM",
        "dtype": dtype,
        "base": base,
        "options": options,
    }


SPECS = {
    "llama": spec("Llama", "float32", **SIZES, rope_theta=500000.0),
    "llama3": spec("Llama", "bfloat16", **SIZES, rope_theta=500000.0, rope_scaling=LLAMA3),
    "qwen2": spec("Qwen2", "float16", **SIZES, rope_theta=1000000.0),
    "gpt-neox": spec("GPTNeoX", "float16", **SIZES, rotary_pct=0.5, rotary_emb_base=25000),
    "phi": spec("Phi", "float32", **{**SIZES, "num_key_value_heads": 4}, partial_rotary_factor=0.25, rope_theta=5e4),
    "gemma3": spec("Gemma3Text", "bfloat16", model="Gemma3ForCausalLM", **GEMMA, sliding_window_pattern=2),
    "gemma3-vlm": spec("Gemma3", "bfloat16", model="Gemma3ForConditionalGeneration", **GEMMA_VLM),
    "gpt2": spec("GPT2", "float32", model="GPT2LMHeadModel", base=True, **GPT2),
    "falcon": spec("Falcon", "float32", **SIZES, rope_theta=20000.0),
}
EXPERTS = {
    "qwen3-moe": spec(
        "Qwen3Moe", "bfloat16", **SIZES, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
        norm_topk_prob=True, rope_theta=1e6,
    ),
    "mixtral": spec("Mixtral", "float32", **SIZES, num_local_experts=4),
}  # fmt: skip
QUANTIZED = {"quantize": "rtn", "quantization": {"bits": 8, "group_size": 8}}


@pytest.fixture(scope="module")
def old(request, tmp_path_factory):
    """Run the script with the old release: `old("make", …)`."""
    folder = request.config.cache.mkdir(f"transformers-{OLD}") / f"torch-{torch.__version__}"
    python, ready = folder / "bin" / "python", folder / "ready"
    if not ready.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        # torch alone first: the build that the index has for this machine.
        for packages in ([f"torch=={torch.__version__.partition('+')[0]}"], [f"transformers=={OLD}", "numpy"]):
            subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
        ready.touch()

    def run(*arguments):
        done = subprocess.run(
            [python, SCRIPT, *arguments], capture_output=True, text=True, env={"PATH": "", "HF_HUB_OFFLINE": "1"}
        )
        assert done.returncode == 0, done.stderr[-2000:]

    return run


@pytest.fixture(scope="module")
def sources(old, tmp_path_factory):
    folder = tmp_path_factory.mktemp("old")
    (folder / "specs.json").write_text(json.dumps({**SPECS, **EXPERTS}))
    old("make", folder / "specs.json", folder)
    return folder


@pytest.fixture(scope="module")
def logits(old, sources, tmp_path_factory):
    """Of every source and of all that is made of it, as the old release computes them."""
    out = tmp_path_factory.mktemp("made")
    for name in (*SPECS, *EXPERTS):
        export(str(sources / name), out / name / "exported", "dense")
    for name in SPECS:
        secateur.compress(str(sources / name), out / name / "packed", secateur.Recipe(**QUANTIZED))
        export(str(out / name / "packed"), out / name / "unpacked", "dense")
        secateur.compress(str(sources / name), out / name / "dense", secateur.Recipe(**QUANTIZED, format="dense"))
    folders = [sources / name for name in (*SPECS, *EXPERTS)]
    folders += [folder for folder in sorted(out.glob("*/*")) if folder.name != "packed"]
    old("logits", out / "logits", *folders)
    found = load_file(out / "logits")
    return {
        (folder.parent.name if out in folder.parents else folder.name, folder.name): found[str(folder)]
        for folder in folders
    }


@pytest.mark.parametrize("name", [*SPECS, *EXPERTS])
def test_a_dense_export_is_the_same_model(name, logits):
    assert torch.equal(logits[name, "exported"], logits[name, name])


@pytest.mark.parametrize("name", SPECS)
def test_what_was_packed_is_the_same_model_once_it_is_dense(name, logits):
    """With codes of 8 bits it is near the source; a wrong rotation or a tensor at random is not."""
    assert torch.equal(logits[name, "unpacked"], logits[name, "dense"])
    source = logits[name, name].float()
    assert (logits[name, "dense"].float() - source).norm() < 0.05 * source.norm()


def test_a_gguf_is_the_same_model_in_both(old, tmp_path):
    pytest.importorskip("gguf")
    from tiny_gguf import make_gguf
    from transformers import AutoModelForCausalLM

    file = make_gguf(tmp_path / "tiny.gguf", "Q8_0")
    secateur.compress(str(file), tmp_path / "out", secateur.Recipe(**QUANTIZED, format="dense"))
    old("logits", tmp_path / "logits", tmp_path / "out")
    old("tokens", tmp_path / "tokens", tmp_path / "out")
    (found,) = load_file(tmp_path / "logits").values()
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").eval()
        torch.testing.assert_close(model(torch.arange(2, 50)[None] * 7 % 250).logits, found)
    (tokens,) = load_file(tmp_path / "tokens").values()
    own = open_source(str(file)).tokenizer()
    assert tokens.tolist() == own((tmp_path / "out" / "config.json").read_text()).input_ids
