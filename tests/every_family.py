"""Every causal language model that the installed transformers can make tiny, by its model type."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

_SIZES = {
    32: "hidden_size n_embd d_model dim embedding_size n_embed embed_dim word_embed_proj_dim lru_width hidden_dim emb_dim",
    64: "intermediate_size n_inner ffn_dim ffn_hidden_size decoder_ffn_dim encoder_ffn_dim moe_intermediate_size "
    "shared_expert_intermediate_size max_position_embeddings n_positions n_ctx max_seq_len context_length",
    2: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_key_value_heads num_kv_heads "
    "num_experts_per_tok",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads mamba_n_heads "
    "rotary_dim num_experts num_local_experts n_routed_experts",
    8: "head_dim",
    320: "vocab_size",
}
_SMALL = {name: size for size, names in _SIZES.items() for name in names.split()}
_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
_MOST_PARAMETERS = 5_000_000


def tiny_config(model_type: str) -> Any:
    """The config of a family with small numbers for the sizes that it has. Raises whatever it has against them."""
    kind = CONFIG_MAPPING[model_type]
    defaults = {key: value for key, value in vars(kind()).items() if isinstance(value, int)}
    options = {key: _SMALL[key] for key in defaults if key in _SMALL}
    options |= {key: min(defaults[key], 3) for key in _SPECIAL if key in defaults}
    for name, own in kind.attribute_map.items():
        if name in _SMALL:
            options.pop(name, None)
            options.setdefault(own, _SMALL[name])
    return kind(**options)


def tiny_families() -> list[str]:
    """The model types that can be made so."""
    found = []
    for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(tiny_config(model_type))
        except Exception:
            continue  # what it has against these sizes is no concern of ours
        if sum(parameter.numel() for parameter in model.parameters()) <= _MOST_PARAMETERS:
            found.append(model_type)
    return found
