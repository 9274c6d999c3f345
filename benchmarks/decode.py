"""Whole models decoding one token at a time: dense against packed, and against llama.cpp.

    python -m benchmarks.decode [--models smollm2,1.1b] [--llama PYTHON] [--rounds 3]

For each model and form, a process of its own loads the folder, writes 48 tokens by `generate`, and tells the time from `load`
to the first token (and the processor's, which changes less on a busy machine), the median time of the tokens after it, and the
memory that it holds (its own, less what the interpreter with torch and transformers held before). The forms take turns,
`--rounds` times; medians of the rounds are printed. The 1.1 B Llama has random weights; trellis codes are random, too, since to
search for them takes minutes and changes no time. PYTHON is an interpreter with llama-cpp-python and gguf: the same weights as
Q4_0, all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import secateur
from benchmarks.protocol import arguments, machine, plain_model, prepare, random_llama, sharded_mixture, table
from benchmarks.random_packed import trellis
from secateur.folder.reader import weight_files
from secateur.formats.layouts.trellis_rings import Trellis

TOKENS = 48
SIZES = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
}
# 1 B of 4 B parameters for a token.
MIXTURE = {"hidden": 2048, "inner": 768, "blocks": 12, "experts": 64, "chosen": 16}
FORMS = {
    "dense": None,
    "bitmap 50 %": secateur.Recipe(prune="magnitude", sparsity=0.5),
    "packed-int 4 bits": secateur.Recipe(quantize="rtn", quantization={"search_range": False}),
}
TRELLIS_BITS = 3

CODE = """
import json, sys, time
import psutil, torch, transformers
import secateur
transformers.utils.logging.disable_progress_bar()
torch.set_num_threads({threads})
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer
import transformers.models.llama.modeling_llama

class Clock(BaseStreamer):
    def __init__(self): self.at, self.busy = [], []
    def put(self, value): self.at.append(time.perf_counter()); self.busy.append(time.process_time())
    def end(self): pass

how, folder = sys.argv[1:3]
process = psutil.Process()
before = process.memory_full_info().uss
started, working = time.perf_counter(), time.process_time()
if how == "transformers":
    model = AutoModelForCausalLM.from_pretrained(folder)
else:
    model = secateur.load(folder, how.removesuffix(", plain layers"))
if how.endswith("plain layers"):
    from secateur.plugin.decode_steps import DecodingHead, DecodingModel
    for part in model.modules():
        if isinstance(part, (DecodingHead, DecodingModel)):
            part.__class__ = part.original
ids = torch.arange(3, 11)[None]
clock = Clock()
with torch.inference_mode():
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens={tokens}, min_new_tokens={tokens}, do_sample=False,
                   pad_token_id=0, streamer=clock)
gaps = sorted(b - a for a, b in zip(clock.at[2:], clock.at[3:]))
memory = process.memory_full_info().uss - before
first = {{"first": clock.at[1] - started, "busy": clock.busy[1] - working}}
print(json.dumps({{**first, "token": gaps[len(gaps) // 2], "memory": memory}}))
"""

GGUF = """
import sys
import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
out, sizes = sys.argv[1], eval(sys.argv[2])
H, F, L, V = (sizes[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size"))
K = H // sizes["num_attention_heads"] * sizes["num_key_value_heads"]
draw = np.random.default_rng(0)
writer = GGUFWriter(out, "llama")
writer.add_block_count(L)
writer.add_context_length(2048)
writer.add_embedding_length(H)
writer.add_feed_forward_length(F)
writer.add_head_count(sizes["num_attention_heads"])
writer.add_head_count_kv(sizes["num_key_value_heads"])
writer.add_layer_norm_rms_eps(1e-6)
writer.add_rope_dimension_count(H // sizes["num_attention_heads"])
writer.add_vocab_size(V)
writer.add_tokenizer_model("no_vocab")
def add(name, *shape):
    W = draw.standard_normal(shape, dtype=np.float32) * 0.02
    writer.add_tensor(name, quantize(W, GGMLQuantizationType.Q4_0), raw_dtype=GGMLQuantizationType.Q4_0)
add("token_embd.weight", V, H)
add("output.weight", V, H)
writer.add_tensor("output_norm.weight", np.ones(H, np.float32))
for i in range(L):
    for name, shape in (("attn_q", (H, H)), ("attn_k", (K, H)), ("attn_v", (K, H)), ("attn_output", (H, H)),
                        ("ffn_gate", (F, H)), ("ffn_up", (F, H)), ("ffn_down", (H, F))):
        add(f"blk.{i}.{name}.weight", *shape)
    writer.add_tensor(f"blk.{i}.attn_norm.weight", np.ones(H, np.float32))
    writer.add_tensor(f"blk.{i}.ffn_norm.weight", np.ones(H, np.float32))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
"""

LLAMA = """
import json, sys, time
import llama_cpp as ll
started = time.perf_counter()
ll.llama_backend_init()
model = ll.llama_model_load_from_file(sys.argv[1].encode(), ll.llama_model_default_params())
params = ll.llama_context_default_params()
params.n_ctx, params.n_threads, params.n_threads_batch = 256, {threads}, {threads}
context = ll.llama_init_from_model(model, params)

def step(tokens):
    array = (ll.llama_token * len(tokens))(*tokens)
    assert ll.llama_decode(context, ll.llama_batch_get_one(array, len(tokens))) == 0
    ll.llama_synchronize(context)

step(range(3, 11))
first = time.perf_counter() - started
gaps = []
for i in range({tokens}):
    t = time.perf_counter()
    step([100 + i])
    gaps.append(time.perf_counter() - t)
print(json.dumps({{"first": first, "token": sorted(gaps)[len(gaps) // 2]}}))
"""


def run(python: str, code: str, *args: str) -> dict[str, float]:
    # Modules are compiled once, as those of installed packages are, and not by every process.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run([python, "-c", code, *args], capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(f"{args}: {done.returncode}\n{done.stderr}")
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def random_trellis(source: Path, folder: Path) -> Path:
    """A folder with random trellis codes in place of the linears of a model's blocks, of weights as large as its; made once."""
    if folder.exists():
        return folder
    part = folder.with_name(folder.name + ".part")
    part.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor for file in weight_files(source) for name, tensor in load_file(file).items()}
    modules = {}
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        W_OI = tensors.pop(name)
        weight = trellis(*W_OI.shape, TRELLIS_BITS)
        weight.scale_out_O.mul_(W_OI.float().std())
        layout = Trellis(TRELLIS_BITS, weight.state_bits, weight.ring, 128, weight.dtype)
        codes = layout.store(weight)
        codes["codes"] = codes["codes"].view(W_OI.shape[0] // weight.ring, W_OI.shape[1], -1)
        tensors |= {f"{name}.{key}": tensor for key, tensor in codes.items()}
        modules[name.removesuffix(".weight")] = layout.to_config()
    save_file(tensors, part / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "secateur", "layout_version": 1, "modules": modules}
    (part / "config.json").write_text(json.dumps(config))
    for file in source.glob("tokenizer*"):
        shutil.copy(file, part)
    return part.rename(folder)


def main() -> None:
    parser: argparse.ArgumentParser = arguments(__doc__)
    parser.add_argument("--models", default="smollm2,1.1b", help="smollm2, 1.1b, mixture: which, with commas between")
    parser.add_argument("--llama", help="Python with llama-cpp-python and gguf")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    prepare(args)
    print(f"{machine()}\n")
    code = CODE.format(threads=args.threads, tokens=TOKENS)
    for name in args.models.split(","):
        if name == "1.1b":
            source = args.work / "llama-1.1b"
            if not (source / "config.json").exists():
                random_llama(source, torch.bfloat16, max_position_embeddings=2048, **SIZES)
        elif name == "mixture":
            source = args.work / "mixture-4b"
            if not (source / "model.safetensors.index.json").exists():
                sharded_mixture(source, plain_model(args.work, torch.bfloat16), **MIXTURE)
        else:
            source = plain_model(args.work, torch.bfloat16)
        runs: dict[str, list[dict[str, float]]] = {}
        jobs: dict[str, tuple[str, str, tuple[str, ...]]] = {}
        for form, recipe in FORMS.items():
            folder = source if recipe is None else args.work / f"{name}-{form.split()[0]}"
            if recipe is not None and not folder.exists():
                secateur.compress(str(source), folder, recipe)
            if recipe is None:
                jobs["dense, transformers"] = (sys.executable, code, ("transformers", str(folder)))
            else:
                jobs[f"{form}, packed"] = (sys.executable, code, ("auto", str(folder)))
                jobs[f"{form}, packed, plain layers"] = (sys.executable, code, ("auto, plain layers", str(folder)))
                jobs[f"{form}, unpacked"] = (sys.executable, code, ("dense", str(folder)))
        if name != "mixture":
            folder = random_trellis(source, args.work / f"{name}-trellis")
            jobs[f"trellis {TRELLIS_BITS} bits, packed"] = (sys.executable, code, ("auto", str(folder)))
        if args.llama and name == "1.1b":
            gguf = args.work / "llama-1.1b-q4_0.gguf"
            if not gguf.exists():
                subprocess.run([args.llama, "-c", GGUF, str(gguf), repr(SIZES)], check=True, capture_output=True)
            jobs["llama.cpp, Q4_0"] = (args.llama, LLAMA.format(threads=args.threads, tokens=TOKENS), (str(gguf),))
        for _ in range(args.rounds):
            for job, (python, source_code, given) in jobs.items():
                runs.setdefault(job, []).append(run(python, source_code, *given))
        rows = []
        for job, found in runs.items():
            middle = {key: statistics.median(r[key] for r in found) for key in found[0]}
            path = Path(jobs[job][2][-1])
            files = [path] if path.is_file() else list(path.glob("*.safetensors"))
            size = sum(file.stat().st_size for file in files)
            busy = f"{middle['busy']:.2f}" if "busy" in middle else ""
            memory = f"{middle['memory'] / 2**20:.0f}" if "memory" in middle else ""
            rows.append(
                [
                    job,
                    f"{size / 2**20:.0f}",
                    f"{1e3 * middle['token']:.1f}",
                    f"{1 / middle['token']:.1f}",
                    f"{middle['first']:.2f}",
                    busy,
                    memory,
                ]
            )
        print(f"\n{name}\n")
        table(
            [
                "",
                "files, MiB",
                "ms a token",
                "tokens a second",
                "load to first token, s",
                "of processors, s",
                "memory, MiB",
            ],
            rows,
        )


if __name__ == "__main__":
    main()
