"""Tiny random bridges of Llama and GPT-2, with three layers and no two widths alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PretrainedConfig

from helpers.versions import HAS_BRIDGE, NO_BRIDGE


def tiny_config(kind: str, vocab_size: int, **own: Any) -> PretrainedConfig:
    """A config with ``own`` values, and small ones otherwise."""
    if kind == "llama":
        small = {
            "hidden_size": 28,
            "intermediate_size": 44,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 6,
            "max_position_embeddings": 32,
            "initializer_range": 0.2,
        }
        return LlamaConfig(vocab_size=vocab_size, **small | own)
    small = {
        "n_embd": 28,
        "n_inner": 44,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 32,
        "initializer_range": 0.2,
    }
    return GPT2Config(vocab_size=vocab_size, **small | own)


def boot_tiny(
    kind: str, dtype: torch.dtype = torch.float64, *, tokenizer: Any, **config: Any
) -> Any:
    """A bridge of random weights, which are the same each time; without bridges, a skip."""
    if not HAS_BRIDGE:
        pytest.skip(NO_BRIDGE)
    from transformer_lens.model_bridge import TransformerBridge

    with torch.random.fork_rng():
        torch.manual_seed(0)
        hf = AutoModelForCausalLM.from_config(tiny_config(kind, len(tokenizer), **config))
        for parameter in hf.parameters():  # biases and norms must not be 0 and 1
            parameter.data += 0.1 * torch.randn_like(parameter)
    hf = hf.to(dtype).eval()
    return TransformerBridge.boot_transformers(
        kind, hf_model=hf, tokenizer=tokenizer, dtype=dtype, device="cpu"
    )
