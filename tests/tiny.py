"""Tiny random models of many decoder families: what the tests call "every architecture".

`tiny_model(name)` is deterministic (the same weights each time, the global random state untouched), float32, in eval mode, and has
neither an end nor a pad token, so that `generate` runs for as many tokens as it is asked for. Weights are larger than a training
initialisation and biases, norms and sinks are random too: greedy output wanders, and an op that forgets a term shows.
"""

from __future__ import annotations

import zlib
from typing import Any

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB = 128
"""Entries of every tiny vocabulary."""
WINDOW = 8
"""Sliding window and attention chunk of the families that have one, in tokens."""
CONTEXT = 512
"""Positions that every tiny model can hold."""

_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.4,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_SHORT = {key: _SIZES[key] for key in ("vocab_size", "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id")}
_OLD = _SHORT | {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "tie_word_embeddings": False}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_ALTERNATING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}

# name -> (model type, configuration)
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _SIZES),
    "qwen2": ("qwen2", _SIZES),
    "qwen3": ("qwen3", _SIZES),
    "smollm3": ("smollm3", _SIZES | {"no_rope_layers": [1, 0]}),
    "granite": ("granite", _SIZES | {"attention_multiplier": 0.3, "residual_multiplier": 0.7, "logits_scaling": 2.0}),
    "mistral": ("mistral", _SIZES | {"sliding_window": WINDOW}),
    "phi3": ("phi3", _SIZES),
    "gemma2": (
        "gemma2",
        _SIZES | _ALTERNATING | {"query_pre_attn_scalar": 8, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 20.0},
    ),
    "gemma3": ("gemma3_text", _SIZES | _ALTERNATING | {"query_pre_attn_scalar": 8}),
    "olmo3": ("olmo3", _SIZES | _ALTERNATING),
    "cohere2": ("cohere2", _SIZES | _ALTERNATING | {"logit_scale": 1.0}),
    "gpt_oss": (
        "gpt_oss",
        _SIZES
        | _ALTERNATING
        | {"num_local_experts": 4, "num_experts_per_tok": 2}
        | {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}},
    ),
    "qwen3_moe": ("qwen3_moe", _SIZES | _MOE),
    "mixtral": ("mixtral", _SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "deepseek_v3": (
        "deepseek_v3",
        {key: value for key, value in _SIZES.items() if key not in ("head_dim", "num_key_value_heads")}
        | {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
        | {"v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1}
        | {"moe_intermediate_size": 32, "first_k_dense_replace": 1},
    ),
    "llama4": (
        "llama4_text",
        _SIZES
        | {"intermediate_size_mlp": 64, "num_local_experts": 2, "attention_chunk_size": WINDOW, "no_rope_layers": [1, 0]}
        | {"layer_types": ["chunked_attention", "full_attention"], "interleave_moe_layer_step": 2},
    ),
    "gpt2": ("gpt2", _SHORT | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT, "tie_word_embeddings": False}),
    "gpt_neox": ("gpt_neox", _OLD | {"intermediate_size": 64, "max_position_embeddings": CONTEXT, "rotary_pct": 0.5}),
    "gptj": ("gptj", _SHORT | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT, "rotary_dim": 4}),
    "opt": (
        "opt",
        _OLD | {"ffn_dim": 64, "max_position_embeddings": CONTEXT, "word_embed_proj_dim": 32, "init_std": 0.4},
    ),
    "falcon": ("falcon", _OLD | {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False, "bias": True}),
    "bloom": ("bloom", _SHORT | {"hidden_size": 32, "n_layer": 2, "n_head": 4, "tie_word_embeddings": False}),
    "mpt": ("mpt", _SHORT | {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": CONTEXT}),
    "mamba": ("mamba", _SHORT | {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "tie_word_embeddings": False}),
    "jamba": (
        "jamba",
        _SIZES
        | {"num_experts": 2, "num_experts_per_tok": 1, "attn_layer_period": 2, "attn_layer_offset": 1}
        | {"mamba_d_state": 8, "mamba_dt_rank": 4},
    ),
    "qwen3_next": (
        "qwen3_next",
        _SIZES
        | _MOE
        | {"layer_types": ["linear_attention", "full_attention"], "shared_expert_intermediate_size": 32, "linear_num_value_heads": 4}
        | {"linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
    ),
    "qwen3_5": (
        "qwen3_5_text",
        _SIZES
        | {"layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 4, "linear_num_key_heads": 2}
        | {"linear_key_head_dim": 8, "linear_value_head_dim": 8},
    ),
    "mamba2": (
        "mamba2",
        _SHORT
        | {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "expand": 2, "num_heads": 8, "head_dim": 8, "n_groups": 2}
        | {"chunk_size": 8, "tie_word_embeddings": False},
    ),
    "nemotron_h": (
        "nemotron_h",
        {key: value for key, value in _SIZES.items() if key != "num_hidden_layers"}
        | {"layers_block_type": ["mamba", "moe", "attention", "mlp"], "mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8}
        | {"n_groups": 2, "chunk_size": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
        | {"moe_shared_expert_intermediate_size": 32, "n_group": 1, "topk_group": 1}
        | {"time_step_min": 1e-9},  # above it transformers clamps the steps of several rows, and not that of one
    ),
    "bailing_hybrid": (
        "bailing_hybrid",
        _SIZES
        | {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
        | {"v_head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "layer_group_size": 2}
        | {"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "num_shared_experts": 1},
    ),
    "inkling": (
        "inkling_text",
        _SIZES
        | {"layer_types": ["hybrid_sliding", "hybrid"], "mlp_layer_types": ["dense", "sparse"], "sliding_window": WINDOW}
        | {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8, "d_rel": 4, "rel_extent": 32}
        | {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 1},
    ),
    "lfm2": (
        "lfm2",
        _SIZES | {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3, "block_ff_dim": 64, "block_auto_adjust_ff_dim": False},
    ),
}

TINY_NAMES: tuple[str, ...] = tuple(_CONFIGS)
"""Every name that `tiny_model` knows."""
FORGETFUL_NAMES: tuple[str, ...] = ("mamba", "jamba")
"""Those whose layers forget their state where several rows come behind it."""
RECURRENT_NAMES: tuple[str, ...] = ("qwen3_next", "qwen3_5", "mamba2", "nemotron_h", "bailing_hybrid", "inkling", "lfm2")
"""Those that carry a recurrent or convolutional state from row to row, several rows at once too."""


def tiny_model(name: str, **config_overrides: Any) -> PreTrainedModel:
    """A new model of family `name` (one of `TINY_NAMES`); `config_overrides` replace or add configuration entries."""
    model_type, settings = _CONFIGS[name]
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    config = AutoConfig.for_model(model_type, **(settings | config_overrides))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(name.encode()))
        plain = "eager" if getattr(config, "attn_logit_softcapping", None) else None  # transformers 5.17 leaves it to SDPA, which has none
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=plain)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.2 * torch.randn_like(parameter))
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = None
    return model.eval()
