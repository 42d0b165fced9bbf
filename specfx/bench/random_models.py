"""Llamas with random weights, made on the device: what there is where no checkpoint is at hand."""

from __future__ import annotations

from typing import Any

import torch

TINY_VOCABULARY = 512
_TINY = {
    "vocab_size": TINY_VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
}
_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}
"""The sizes of Llama 3.1 8B."""


def tiny_llama(device: torch.device, dtype: torch.dtype) -> Any:
    """Two layers; weights so large that greedy output wanders. Always the same on one kind of device."""
    return _llama(_TINY, device, dtype)


def llama_8b(device: torch.device, dtype: torch.dtype, layers: int = 32) -> Any:
    """Llama 3.1 8B without what it has learned."""
    return _llama(_8B | {"num_hidden_layers": layers}, device, dtype)


def _llama(sizes: dict[str, Any], device: torch.device, dtype: torch.dtype) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    nothing = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    config = AutoConfig.for_model("llama", **sizes, **nothing)
    with torch.random.fork_rng(devices=[] if device.type == "cpu" else None), device:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = None
    return model.eval().requires_grad_(False)
