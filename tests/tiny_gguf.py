"""A random GGUF file of a Llama with two blocks, and with a tokenizer of its own."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

HIDDEN, INNER, HEADS, KEY_HEADS, BLOCKS, THETA = 64, 96, 4, 2, 2, 500_000.0


def make_gguf(file: Path, kind: str) -> Path:
    """Write one whose matrices are of a type of GGUF's: "F32", "F16", "BF16", "Q8_0", …"""
    writer = gguf.GGUFWriter(file, "llama")
    tokens = _add_tokenizer(writer)
    writer.add_context_length(256)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(BLOCKS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_rope_freq_base(THETA)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(tokens)
    draw = np.random.default_rng(0)
    for name, shape in _shapes(tokens).items():
        values = (0.15 * draw.standard_normal(shape) + (len(shape) == 1)).astype(np.float32)
        quantized = gguf.GGMLQuantizationType["F32" if len(shape) == 1 else kind]
        writer.add_tensor(name, gguf.quants.quantize(values, quantized), raw_dtype=quantized)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _shapes(tokens: int) -> dict[str, tuple[int, ...]]:
    keys = HIDDEN // HEADS * KEY_HEADS
    block = {
        "attn_q": (HIDDEN, HIDDEN), "attn_k": (keys, HIDDEN), "attn_v": (keys, HIDDEN), "attn_output": (HIDDEN, HIDDEN),
        "ffn_gate": (INNER, HIDDEN), "ffn_up": (INNER, HIDDEN), "ffn_down": (HIDDEN, INNER),
        "attn_norm": (HIDDEN,), "ffn_norm": (HIDDEN,),
    }  # fmt: skip
    outside: dict[str, tuple[int, ...]] = {"token_embd": (tokens, HIDDEN), "output": (tokens, HIDDEN)}
    blocks = {f"blk.{i}.{name}": shape for i in range(BLOCKS) for name, shape in block.items()}
    return {f"{name}.weight": shape for name, shape in {**outside, "output_norm": (HIDDEN,), **blocks}.items()}


def _add_tokenizer(writer: Any) -> int:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(["the quick brown fox jumps over the lazy dog " * 3], trainer)
    model = json.loads(bpe.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, *[1] * (len(tokens) - 2)])
    writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    return len(tokens)
