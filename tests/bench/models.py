"""The models that are measured: two random ones of well-known shapes, and SmolLM2."""

from __future__ import annotations

from typing import Any

import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen3MoeConfig

from tl_backward.demo_model import load_demo_model

D_VOCAB = 49152


def gpt2_small() -> TransformerBridge:
    """12 layers of 768, the tokenizer and vocabulary of SmolLM2."""
    return _random("gpt2", GPT2Config(vocab_size=D_VOCAB))


def llama_1b() -> TransformerBridge:
    """The layers of a Llama-type model of 1.1 B parameters (TinyLlama's), four of them."""
    return _random(
        "llama",
        LlamaConfig(
            hidden_size=2048,
            intermediate_size=5632,
            num_hidden_layers=4,
            num_attention_heads=32,
            num_key_value_heads=4,
            vocab_size=D_VOCAB,
        ),
    )


def smollm2_of(n_layers: int) -> TransformerBridge:
    """Some layers of SmolLM2's shape, random."""
    return _random(
        "llama",
        LlamaConfig(
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=n_layers,
            num_attention_heads=9,
            num_key_value_heads=3,
            vocab_size=D_VOCAB,
            tie_word_embeddings=True,
        ),
    )


def mixture() -> TransformerBridge:
    """Four layers of 16 experts, of which each token has four; a small vocabulary.

    Attention has a third of the parameters that a token passes, as in Qwen3-30B-A3B.
    """
    return _random(
        "qwen3_moe",
        Qwen3MoeConfig(
            vocab_size=2048,
            hidden_size=512,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=2,
            head_dim=128,
            num_experts=16,
            num_experts_per_tok=4,
            moe_intermediate_size=384,
            experts_implementation="grouped_mm",
        ),
    )


def smollm2() -> TransformerBridge:
    """SmolLM2-135M."""
    return load_demo_model()


MODELS = {"GPT-2 small": gpt2_small, "Llama 1.1 B, 4 layers": llama_1b, "SmolLM2-135M": smollm2}


def random_tokens(n: int, seed: int = 0) -> torch.Tensor:
    """A prompt of ``n`` tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(100, D_VOCAB, (n,), generator=generator)


def counterfact_like(n_prompts: int) -> list[torch.Tensor]:
    """Prompts as long as CounterFact's."""
    lengths = torch.randint(7, 16, (n_prompts,), generator=torch.Generator().manual_seed(0))
    return [random_tokens(n, seed) for seed, n in enumerate(lengths.tolist())]


def _random(model_type: str, config: Any) -> TransformerBridge:
    torch.manual_seed(0)
    hf = AutoModelForCausalLM.from_config(config).eval()
    hf.config.architectures = [type(hf).__name__]
    return TransformerBridge.boot_transformers(
        model_type, hf_model=hf, tokenizer=load_demo_model().tokenizer, device="cpu"
    )
