"""A model so small that all its files together have some ten kilobytes, compressed into each layout."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedTokenizerFast

import secateur
from secateur.folder.manifest import MANIFEST_NAME
from secateur.folder.reader import read_json
from secateur.folder.writer import write_manifest

_WORDS = {"<s>": 0, "</s>": 1, "a": 2, "b": 3}
_SPQR = {"bits": 3, "group_size": 4, "scale_bits": 3, "tile_rows": 4, "outlier_share": 0.1}
RECIPES = {
    "bitmap": secateur.Recipe(prune="magnitude", sparsity=0.5),
    "nm": secateur.Recipe(prune="magnitude", pattern="2:4"),
    "packed-int": secateur.Recipe(quantize="rtn", quantization={"bits": 4, "group_size": 4}),
    "spqr": secateur.Recipe(quantize="spqr", quantization=_SPQR),
    "codebook": secateur.Recipe(
        quantize="squeezellm", quantization={"bits": 2, "sensitivity": "hessian", "outlier_share": 0.1}
    ),
    "sparse-int": secateur.Recipe(
        prune="magnitude", sparsity=0.5, quantize="rtn", quantization={"bits": 3, "group_size": 4}
    ),
    "low-rank": secateur.Recipe(quantize="rtn", quantization={"bits": 3, "group_size": 4}, rank=1),
    "sq": secateur.Recipe(quantize="sq", quantization={"bank": 4, "high_share": 0.25}),
    "dictionary": secateur.Recipe(factorize="cospadi", factorization={"coefficient_bits": 4}),
    "dense": secateur.Recipe(prune="magnitude", sparsity=0.5, format="dense"),
}


def make_source(folder: Path, kind: str = "llama") -> Path:
    """A random model of one block with 8 features, in float16."""
    special = {"vocab_size": len(_WORDS), "bos_token_id": 0, "eos_token_id": 1}
    if kind == "gpt2":
        config = GPT2Config(n_embd=8, n_inner=8, n_layer=1, n_head=2, n_positions=16, **special)
    else:
        config = LlamaConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
            max_position_embeddings=16, **special,
        )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).half().save_pretrained(folder)
    words = Tokenizer(models.WordLevel(_WORDS, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return folder


def make_tiny(folder: Path, layout: str, source: Path) -> Path:
    """That model in one layout."""
    text = folder.parent / "text.txt"
    text.write_text("a b <s> b " * 200)
    calibration = secateur.Calibration(source=str(text), samples=4, seq_len=8)
    recipe = RECIPES[layout]
    secateur.compress(str(source), folder, secateur.Recipe(**{**vars(recipe), "calibration": calibration}))
    return folder


def reseal(folder: Path, **changes: object) -> None:
    """Write the manifest anew, so that it tells the files as they are now; what the test is about is then found without it."""
    manifest = {**read_json(folder / MANIFEST_NAME), **changes}
    (folder / MANIFEST_NAME).unlink()
    write_manifest(folder, {key: value for key, value in manifest.items() if key != "files"})


def set_json(path: Path, change: object) -> None:
    """Change the object in a JSON file."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
