"""One run of llm-compressor by the protocol, from loading the model to the saved folder. Run by benchmarks/speed.py.

python -P benchmarks/peer_llmcompressor.py METHOD SPARSITY|N:M|BITS MODEL CALIBRATION.txt OUT THREADS [GROUP]

GPTQ is asymmetric in groups of 64, or of GROUP, otherwise with the peer's defaults.
"""

import json
import resource
import sys
import time

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from transformers import AutoModelForCausalLM, AutoTokenizer

SAMPLES, SEQ_LEN = 32, 512


def main() -> None:
    method, pattern, folder, calibration, out, threads = sys.argv[1:7]
    group = int(sys.argv[7]) if len(sys.argv) > 7 else 64
    torch.set_num_threads(int(threads))
    started = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with open(calibration, encoding="utf-8") as file:
        ids = tokenizer(file.read())["input_ids"]
    rows = [ids[i * SEQ_LEN : (i + 1) * SEQ_LEN] for i in range(SAMPLES)]
    data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * SEQ_LEN] * SAMPLES})
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    recipe = _gptq(int(pattern), group) if method == "gptq" else _pruning(method, pattern)
    oneshot(model=model, dataset=data, recipe=recipe, max_seq_length=SEQ_LEN, num_calibration_samples=SAMPLES)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "peak_bytes": peak}))


def _pruning(method: str, pattern: str):
    modifier = {"wanda": WandaPruningModifier, "sparsegpt": SparseGPTModifier}[method]
    mask = {"sparsity": 0.5, "mask_structure": pattern} if ":" in pattern else {"sparsity": float(pattern)}
    return modifier(targets=["Linear"], ignore=["lm_head"], **mask)


def _gptq(bits: int, group: int):
    weights = QuantizationArgs(num_bits=bits, type="int", strategy="group", group_size=group, symmetric=False)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    return GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"])


if __name__ == "__main__":
    main()
