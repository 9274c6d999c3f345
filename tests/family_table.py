"""Every family of causal language models that transformers has, tried at its smallest: `docs/families.md` is what came of it.

`make families` writes the page anew; with names of families, `python tests/family_table.py` only tells what comes of them.
What a family is tried with is a random model of its own default config, with small sizes in place of those that make it large.
"""

import random
import re
import shutil
import sys
import tempfile
import textwrap
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as FAMILIES

import secateur
from secateur.checkpoint.export import export
from secateur.errors import SecateurError, one_line

PAGE = Path(__file__).parents[1] / "docs" / "families.md"
VOCABULARY, POSITIONS, HIDDEN, INNER = 320, 64, 32, 64
WORKS = "yes"
# Sizes by the names that configs have for them; none is made larger than it is.
_SIZES = {
    VOCABULARY: r"(.*_)?vocab_size(_base|_per_layer_input)?",
    POSITIONS: r"(.*_)?max_position_embeddings|n_positions|n_ctx|max_seq_len|max_target_positions|context_length"
    r"|model_max_length",
    HIDDEN: r"(.*_)?(hidden|embedding)_size|d_model|n_embd|emb_dim|word_embed_proj_dim|embedding_dim|lru_width|ple_embed_dim",
    INNER: r"(.*_)?intermediate_size(_mlp)?|(.*_)?ffn_dim|d_inner|n_inner|dff|dim_ff|(.*_)?ffn_hidden_size|feed_forward_size",
    2: r"num_hidden_layers|n_layers?|num_layers|(de|en)coder_layers|num_(de|en)coder_layers|num_blocks|depth"
    r"|num_key_value_heads|num_kv_heads|num_query_groups|num_experts_per_tok(en)?|moe_topk|moe_k|topk_group|n_group",
    4: r"num_attention_heads|n_heads?|((de|en)coder_)?attention_heads|num_heads|num_(de|en)coder_attention_heads"
    r"|linear_num_(key|value)_heads|index_n_heads|n_mamba_heads|mamba_n_heads|(.*_)?(num|n)_(routed_|local_)?experts",
    8: r"(.*_)?head_dim|dim_head|d_head|attention_head_size|kv_channels|rotary_dim|(mamba_d_|ssm_)?state(_size)?",
    16: r"mamba_d_head|mamba_headdim|(kv|q|o)_lora_rank|adapter_rank|mamba_dt_rank",
}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_HYBRID = {
    "num_hidden_layers": 6,
    "layers_block_type": ["linear_attention", "hybrid"] * 3,
    "attention_hidden_size": INNER,
    "attention_head_dim": 16,
}
_HEAD = {"head_dim": 8}
# What a family needs besides, where its sizes hang together.
_SPECIAL = {
    "bailing_hybrid": {"n_group": 2},
    "cohere_compass_text": {"rope_parameters": {"sliding_attention": _ROPE, "full_attention": _ROPE}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"moe_intermediate_size": INNER, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "falcon_h1": {"mamba_d_ssm": INNER, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1},
    "flint": {"mlp_only_layers": [0]},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 0,
        "intermediate_size": [INNER] * 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.0] * 4,
        "laurel_rank": 8,
        "hidden_size_per_layer_input": 8,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "hunyuan_v1_dense": _HEAD,
    "hunyuan_v1_moe": _HEAD,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1},
    "ministral": _HEAD,
    "nemotron": {**_HEAD, "num_key_value_heads": 4},
    "olmo_hybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "is_decoder": True,
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [16, 16],
        "attn_layers": ["local", "lsh"],
        "num_buckets": 2,
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": {**_HYBRID, "attn_layer_period": 2, "attn_layer_offset": 1, "n_mamba_heads": 2},
    "zamba2": {**_HYBRID, "n_mamba_heads": 4, "mamba_headdim": 16, "kv_channels": 8, "chunk_size": 8},
}
#: Left out of the table, with the reason.
NOT_TRIED = {
    "blt": "its patches are found by a second model of a fixed size",
    "dbrx": "its default config makes no model",
    "emu3": "its text model, saved by itself, is of a type that transformers does not load as a causal language model",
    "mllama": "its text model, saved by itself, is of a type that transformers does not load as a causal language model",
    "dots3_note": "its default config fixes the number of layers",
    "gemma3n": "its image encoder needs the package timm",
    "gemma4_assistant": "runs only beside another model",
    "gemma4_unified_assistant": "runs only beside another model",
    "musicgen": "its config is of a model of text and sound together, of which this class is a part",
    "musicgen_melody": "its config is of a model of text and sound together, of which this class is a part",
}


@dataclass(frozen=True)
class Row:
    """What came of one family.

    Attributes:
        family: its model type.
        compress, load, logits, export: `yes`, or why not; empty where it was not come to.
        notes: what the run said besides.
    """

    family: str
    compress: str
    load: str = ""
    logits: str = ""
    export: str = ""
    notes: str = ""


def tiny_config(config_class, **options):
    """A config of few and small layers: the class's own defaults, with other sizes."""
    default = config_class()
    known = default.to_dict()
    found = {}
    for key, value in known.items():
        size = next((size for size, names in _SIZES.items() if re.fullmatch(names, key)), None)
        if size is not None and isinstance(value, int) and not isinstance(value, bool):
            found[key] = min(size, value)
    if "num_key_value_heads" in found and known["num_key_value_heads"] == known.get("num_attention_heads"):
        found["num_key_value_heads"] = found["num_attention_heads"]
    # Families that begin with layers without experts are to have some with them, too.
    if isinstance(known.get("first_k_dense_replace"), int):
        found["first_k_dense_replace"] = 1
    if "sparse" in (known.get("mlp_layer_types") or ()):
        found["mlp_layer_types"] = ["dense", "sparse"]
    for name in getattr(config_class, "sub_configs", {}):
        if getattr(default, name, None) is not None:
            found[name] = tiny_config(type(getattr(default, name))).to_dict()
    tokens = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    found.update({name: token for name, token in tokens.items() if known.get(name) is not None})
    return config_class(**{**found, **_SPECIAL.get(config_class.model_type, {}), **options})


def save_tokenizer(folder):
    """Put a tokenizer of bytes into a folder, and a text beside it; the text's path."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = {"<s>": 0, "</s>": 1, **{byte: i for i, byte in enumerate(alphabet, 2)}}
    tokenizer = Tokenizer(models.BPE(tokens, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    draw = random.Random(0)
    text = folder.parent / "text.txt"
    text.write_text("".join(draw.choice("abcdefghijklmnop ") for _ in range(1000)))
    return text


def tiny_model(family, **options):
    """A random model of a family in which no bias is zero and no norm is one."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(CONFIG_MAPPING[family], **options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(parameter + 0.1 * noise if parameter.ndim == 1 else 0.15 * noise)
    return model


@torch.no_grad()
def try_family(family, folder, **options):
    """Compress a tiny model of a family, load it packed, export it, and compare the logits of the two."""
    source, out, dense = folder / "source", folder / "out", folder / "dense"
    tiny_model(family, **options).save_pretrained(source)
    calibration = secateur.Calibration(source=str(save_tokenizer(source)), samples=4, seq_len=16)
    try:
        recipe = secateur.Recipe(prune="wanda", sparsity=0.5, calibration=calibration)
        try:
            report = secateur.compress(str(source), out, recipe)
        except SecateurError as error:
            ignored = tuple(re.findall(r"'([^']+)'", str(error).partition("`ignore=[")[2].partition("]`")[0]))
            if not ignored:
                return Row(family, _plain(error, source))
            recipe = secateur.Recipe(prune="wanda", sparsity=0.5, calibration=calibration, ignore=ignored)
            report = secateur.compress(str(source), out, recipe)
            report.notes.insert(0, " ".join(["needs", *(f"`--ignore '{name}'`" for name in ignored)]))
    except SecateurError as error:
        return Row(family, _plain(error, source))
    done = {"compress": WORKS, "notes": "; ".join(report.notes)}
    try:
        packed = AutoModelForCausalLM.from_pretrained(out, dtype="auto").eval()
        done["load"] = WORKS
        export(str(out), dense, "dense")
        plain = AutoModelForCausalLM.from_pretrained(dense, dtype="auto").eval()
        done["export"] = WORKS
        ids_NS = torch.randint(2, 100, (2, 16), generator=torch.Generator().manual_seed(1))
        ours, theirs = (model(input_ids=ids_NS, use_cache=False).logits for model in (packed, plain))
        done["logits"] = WORKS if torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3 * theirs.abs().max()) else "no"
    except Exception as error:
        last = next(name for name in ("load", "export", "logits") if name not in done)
        done[last] = f"no: {_plain(error, folder)}"
    return Row(family, **done)


def _plain(error, folder):
    return one_line(error).replace(f"{folder}: ", "").replace(str(folder), "the model").replace("|", "\\|")


def try_all(families=FAMILIES):
    """A row for each family that is tried."""
    for family in families:
        if family in NOT_TRIED:
            continue
        folder = Path(tempfile.mkdtemp(prefix="family-"))
        try:
            row = try_family(family, folder)
        finally:
            shutil.rmtree(folder)
        yield row


def page(rows):
    """The text of the page."""
    works = [row for row in rows if row.logits == WORKS]
    experts = [row for row in rows if "mixture of experts" in row.compress]
    other = [row for row in rows if row not in works and row not in experts]
    lines = [
        "# Families of models",
        "",
        *_wrapped(
            f"The {len(FAMILIES)} model types that transformers {transformers.__version__} offers as causal language models, "
            "each tried with a tiny random model: compressed by Wanda to half its weights (which needs the inputs of every "
            "linear), loaded with its weights packed, exported dense, and the logits of these two compared. `make families` "
            "makes this page, and a test compares it with what happens."
        ),
        "",
        *_wrapped(
            "What a text does not run, an image encoder say, stays as it is, and so do weights that several blocks share. The "
            "run says so, as the remarks do here. Of a mixture, every expert is compressed, and the router stays as it is."
        ),
        "",
        f"## All of it works: {len(works)}",
        "",
        "| model type | remarks |",
        "|---|---|",
        *(f"| `{row.family}` | {row.notes} |" for row in works),
        "",
        f"## Refused: {len(experts)}",
        "",
        "Mixtures of experts in a form of their own. A model of such a family whose config has no experts is compressed.",
        "",
        "| model type | because |",
        "|---|---|",
        *(f"| `{row.family}` | {row.compress} |" for row in experts),
        "",
    ]
    if other:
        lines += [
            f"## Not all of it works: {len(other)}",
            "",
            "| model type | compress | load packed | export dense | equal logits |",
            "|---|---|---|---|---|",
            *(f"| `{r.family}` | {r.compress} | {r.load} | {r.export} | {r.logits} |" for r in other),
            "",
        ]
    lines += [
        f"## Not tried: {len(NOT_TRIED)}",
        "",
        "| model type | because |",
        "|---|---|",
        *(f"| `{family}` | {why} |" for family, why in NOT_TRIED.items()),
        "",
    ]
    return "\n".join(lines)


def _wrapped(text):
    return textwrap.wrap(text, 125, break_long_words=False, break_on_hyphens=False)


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    chosen = sys.argv[1:]
    found = []
    for row in try_all(chosen or FAMILIES):
        print(row, flush=True)
        found.append(row)
    if not chosen:
        PAGE.write_text(page(found), encoding="utf-8")
