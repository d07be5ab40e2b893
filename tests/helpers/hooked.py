"""Models of the class HookedTransformer: tiny random ones, and those with a bridge's weights."""

from __future__ import annotations

from typing import Any

import torch
import transformer_lens

D_VOCAB = 31

GATED = {"gated_mlp": True, "act_fn": "silu"}
GQA = {"n_key_value_heads": 2}
PARALLEL = {"parallel_attn_mlp": True}
ROTARY = {"positional_embedding_type": "rotary", "rotary_dim": 4}
SHORTFORMER = {"positional_embedding_type": "shortformer"}
ALIBI = {"positional_embedding_type": "alibi"}
LIKE = {"llama": {**GATED, **GQA, **ROTARY, "normalization_type": "RMS"}, "gpt2": {}}


def build(**settings: Any) -> Any:
    """A random model in which no two widths are alike and no bias or gain is trivial."""
    config = {
        "n_layers": 2,
        "d_model": 14,
        "n_ctx": 9,
        "n_heads": 4,
        "d_head": 6,
        "d_mlp": 22,
        "d_vocab": D_VOCAB,
        "act_fn": "gelu",
        "normalization_type": "LN",
        "dtype": torch.float64,
        "device": "cpu",
        "init_weights": False,
    }
    model = transformer_lens.HookedTransformer(
        transformer_lens.HookedTransformerConfig(**config | settings)
    ).eval()
    generator = torch.Generator().manual_seed(0)
    scale = 0.4 if model.cfg.normalization_type else 0.2  # larger ones saturate the attention
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        is_gain = name.endswith(".w")
        parameter.data = 1 + 0.3 * noise if is_gain else scale * noise
    model.tokenizer = None
    return model


def hooked(hf: Any, tokenizer: Any) -> Any:
    """A HookedTransformer with the weights of a transformers model, as they are."""
    from transformer_lens.pretrained import weight_conversions

    config = hf.config
    if config.model_type == "gpt2":
        own = {
            "d_mlp": config.n_inner,
            "d_head": config.n_embd // config.n_head,
            "act_fn": "gelu_new",
            "normalization_type": "LN",
            "eps": config.layer_norm_epsilon,
        }
        convert = weight_conversions.convert_gpt2_weights
    else:
        own = {
            "d_mlp": config.intermediate_size,
            "d_head": config.head_dim,
            "n_key_value_heads": config.num_key_value_heads,
            "act_fn": "silu",
            "gated_mlp": True,
            "normalization_type": "RMS",
            "final_rms": True,
            "eps": config.rms_norm_eps,
            "positional_embedding_type": "rotary",
            "rotary_dim": config.head_dim,
            "rotary_base": int(config.rope_parameters["rope_theta"]),
        }
        convert = weight_conversions.convert_llama_weights
    cfg = transformer_lens.HookedTransformerConfig(
        d_model=config.hidden_size,
        n_layers=config.num_hidden_layers,
        n_heads=config.num_attention_heads,
        n_ctx=min(config.max_position_embeddings, 128),
        d_vocab=config.vocab_size,
        original_architecture=type(hf).__name__,
        dtype=hf.dtype,
        device="cpu",
        **own,
    )
    model = transformer_lens.HookedTransformer(cfg, tokenizer)
    model.load_and_process_state_dict(
        convert(hf, cfg),
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
    )
    return model.eval()
