"""Mixtures of experts at their smallest: one family for each way in which transformers keeps experts and chooses among them."""

import torch
import transformers
from conftest import HIDDEN, POSITIONS, VOCABULARY

_SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": POSITIONS, "bos_token_id": 0, "eos_token_id": 1,
    "pad_token_id": None,
}  # fmt: skip
_LATENT = {
    "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "first_k_dense_replace": 1,
}  # fmt: skip
_ROUTED = {"intermediate_size": 48, "moe_intermediate_size": 16, "num_experts_per_tok": 2}
_SHARED = {"shared_expert_intermediate_size": 24, "num_experts": 4}
_LINEAR_ATTENTION = {
    "head_dim": 8, "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip

#: By name: the config class, its options besides the sizes, and what a projection of an expert is called on disk, where each
#: has a tensor of its own.
MIXTURES = {
    "mixtral": ("MixtralConfig", {"intermediate_size": 16, "num_local_experts": 4, "num_experts_per_tok": 2}, "w3"),
    "qwen2_moe": ("Qwen2MoeConfig", {**_ROUTED, **_SHARED}, "up_proj"),
    "qwen3_moe": ("Qwen3MoeConfig", {**_ROUTED, "num_experts": 6, "head_dim": 8}, "up_proj"),
    "qwen3_next": ("Qwen3NextConfig", {**_ROUTED, **_SHARED, **_LINEAR_ATTENTION}, "up_proj"),
    "olmoe": ("OlmoeConfig", {"intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}, "up_proj"),
    "deepseek_v2": (
        "DeepseekV2Config",
        {**_ROUTED, **_LATENT, "n_routed_experts": 4, "n_shared_experts": 1, "topk_group": 1, "n_group": 1},
        "up_proj",
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        {**_ROUTED, **_LATENT, "n_routed_experts": 8, "n_shared_experts": 1, "topk_group": 2, "n_group": 4},
        "up_proj",
    ),
    "glm4_moe": (
        "Glm4MoeConfig",
        {**_ROUTED, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "head_dim": 8},
        "up_proj",
    ),
    "gpt_oss": (
        "GptOssConfig",
        {
            "intermediate_size": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        None,
    ),
    "granitemoe": (
        "GraniteMoeConfig",
        {"intermediate_size": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
        None,
    ),
    "phimoe": ("PhimoeConfig", {"intermediate_size": 16, "num_local_experts": 4, "num_experts_per_tok": 2}, "w3"),
    "llama4_text": (
        "Llama4TextConfig",
        {
            "intermediate_size": 16, "intermediate_size_mlp": 48, "num_local_experts": 4, "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 1, "head_dim": 8, "moe_layers": [0, 1],
        },
        None,
    ),
    "ernie4_5_moe": (
        "Ernie4_5_MoeConfig",
        {
            "intermediate_size": 48, "moe_intermediate_size": 16, "moe_num_experts": 4, "moe_k": 2,
            "moe_num_shared_experts": 1, "moe_layer_start_index": 1,
        },
        "up_proj",
    ),
    "minimax_m2": (
        "MiniMaxM2Config",
        {"intermediate_size": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
        "w3",
    ),
    "lfm2_moe": (
        "Lfm2MoeConfig",
        {
            **_ROUTED, "num_experts": 4, "num_dense_layers": 1, "layer_types": ["conv", "full_attention"],
            "conv_L_cache": 3,
        },
        "w3",
    ),
    "nemotron_h": (
        "NemotronHConfig",
        {
            **_ROUTED, "moe_shared_expert_intermediate_size": 24, "n_routed_experts": 4, "n_group": 1, "topk_group": 1,
            "layers_block_type": ["mamba", "attention", "moe"], "num_hidden_layers": 3, "head_dim": 8,
            "mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 2, "chunk_size": 16,
        },
        "up_proj",
    ),
    "afmoe": (
        "AfmoeConfig",
        {
            **_ROUTED, "num_experts": 4, "num_shared_experts": 1, "num_dense_layers": 1, "head_dim": 8,
            "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8,
        },
        "up_proj",
    ),
}  # fmt: skip
#: One of each kind: names of their own and a shared expert's gate, a first block without experts, biases and interleaved rows,
#: copied inputs, no gate.
KINDS = ["mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss", "llama4_text", "nemotron_h"]


def known(names):
    """Those that the installed transformers has."""
    return [name for name in names if hasattr(transformers, MIXTURES[name][0])]


def config_of(name, **options):
    """The config of such a family."""
    kind, own, _ = MIXTURES[name]
    return getattr(transformers, kind)(**{**_SIZES, **own, **options})


def random_model(name, **options):
    """A model of such a family in memory, in which no bias is zero and tokens are routed everywhere."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config_of(name, **options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(parameter + 0.1 * noise if parameter.ndim == 1 else 0.15 * noise)
    return model
