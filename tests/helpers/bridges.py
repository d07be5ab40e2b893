"""Tiny random bridges of Llama and GPT-2, with three layers and no two widths alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PretrainedConfig

from helpers.versions import HAS_BRIDGE, NO_BRIDGE


def tiny_config(kind: str, vocab_size: int) -> PretrainedConfig:
    if kind == "llama":
        return LlamaConfig(
            hidden_size=28,
            intermediate_size=44,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=6,
            vocab_size=vocab_size,
            max_position_embeddings=32,
            initializer_range=0.2,
        )
    return GPT2Config(
        n_embd=28,
        n_inner=44,
        n_layer=3,
        n_head=4,
        vocab_size=vocab_size,
        n_positions=32,
        initializer_range=0.2,
    )


def boot_tiny(kind: str, dtype: torch.dtype = torch.float64, *, tokenizer: Any) -> Any:
    """A bridge of random weights, which are the same each time; without bridges, a skip."""
    if not HAS_BRIDGE:
        pytest.skip(NO_BRIDGE)
    from transformer_lens.model_bridge import TransformerBridge

    with torch.random.fork_rng():
        torch.manual_seed(0)
        hf = AutoModelForCausalLM.from_config(tiny_config(kind, len(tokenizer)))
        for parameter in hf.parameters():  # biases and norms must not be 0 and 1
            parameter.data += 0.1 * torch.randn_like(parameter)
    hf = hf.to(dtype).eval()
    return TransformerBridge.boot_transformers(
        kind, hf_model=hf, tokenizer=tokenizer, dtype=dtype, device="cpu"
    )
