"""Tiny random models of every decoder-only family that TransformerLens 4.3's bridge boots offline.

The widths differ wherever a family allows it: 28 (residual stream), 32 (queries),
16 (keys and values), 44 (MLP), 20 (one expert), so that a transposed weight cannot go unnoticed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig

from helpers.versions import HAS_BRIDGE, NO_BRIDGE, TL_VERSION

BIASES = (
    *("attention_bias", "mlp_bias", "use_bias", "bias", "use_qkv_bias", "add_bias_linear"),
    *("mamba_proj_bias", "conv_bias", "projectors_bias"),
)
COMMON = {  # every config takes those of these that it declares
    **dict.fromkeys(("hidden_size", "n_embd", "d_model"), 28),
    **dict.fromkeys(("intermediate_size", "ffn_hidden_size", "ffn_dim", "n_inner"), 44),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), 4
    ),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 64),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 20),
    **dict.fromkeys(BIASES, True),
    **dict.fromkeys(("initializer_range", "init_std"), 0.2),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 12),
    **dict.fromkeys(("sliding_window", "chunk_size", "mamba_chunk_size"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim"), 4),
    **dict.fromkeys(("qk_nope_head_dim", "v_head_dim"), 6),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size"), 10),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 2),
    "head_dim": 8,
    "num_experts_per_tok": 2,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 10,
}


def tiny(model_type: str, **own: Any) -> Callable[[int], PretrainedConfig]:
    """A function from vocabulary size to config: ``COMMON``, then the family's own values."""

    def config(vocab_size: int) -> PretrainedConfig:
        kind = CONFIG_MAPPING[model_type]
        declared = inspect.signature(kind).parameters
        common = {key: value for key, value in COMMON.items() if key in declared}
        ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
        return kind(vocab_size=vocab_size, **{**common, **ids, **own})

    return config


SQUARE = {"hidden_size": 32}  # for families whose heads must fill the hidden width
PER_LAYER = {"hidden_size_per_layer_input": 10, "vocab_size_per_layer_input": 1024}

FAMILIES: dict[str, Callable[[int], PretrainedConfig]] = {
    # Llama's plan and its relatives
    "llama": tiny("llama"),
    "llama_tied": tiny("llama", tie_word_embeddings=True),
    "llama_heads": tiny("llama", num_key_value_heads=4),
    "mistral": tiny("mistral"),
    "ministral3": tiny("ministral3"),
    "internlm3": tiny("internlm3"),
    "iquestcoder": tiny("iquestcoder"),
    "qwen2": tiny("qwen2", head_dim=8),
    "qwen3": tiny("qwen3"),
    "gemma": tiny("gemma"),
    "gemma2": tiny("gemma2", query_pre_attn_scalar=8),
    "gemma3_text": tiny("gemma3_text", query_pre_attn_scalar=8),
    "gemma4_text": tiny("gemma4_text", **PER_LAYER),
    "vaultgemma": tiny("vaultgemma", query_pre_attn_scalar=8),
    "olmo": tiny("olmo", head_dim=8),
    "olmo2": tiny("olmo2", head_dim=8),
    "olmo3": tiny("olmo3", head_dim=8),
    "glm": tiny("glm"),
    "glm4": tiny("glm4"),
    "cohere": tiny("cohere", head_dim=8, logit_scale=0.5, use_qk_norm=True),
    "cohere2": tiny("cohere2", head_dim=8, logit_scale=0.5),
    "granite": tiny(
        "granite",
        head_dim=8,
        embedding_multiplier=1.5,
        logits_scaling=2.0,
        residual_multiplier=0.7,
        attention_multiplier=0.3,
    ),
    "smollm3": tiny("smollm3", head_dim=8, no_rope_layers=[1, 0]),
    "seed_oss": tiny("seed_oss", attention_out_bias=True),
    "nemotron": tiny("nemotron"),
    "arcee": tiny("arcee"),
    "apertus": tiny("apertus", head_dim=8),
    "jais2": tiny("jais2"),
    "ernie4_5": tiny("ernie4_5"),
    "exaone4": tiny("exaone4", head_dim=8),
    "hunyuan_v1_dense": tiny("hunyuan_v1_dense"),
    "bitnet": tiny("bitnet", **SQUARE),
    "nanochat": tiny("nanochat", head_dim=8),
    "youtu": tiny("youtu", num_key_value_heads=4),
    "phi": tiny("phi", head_dim=8),
    "phi3": tiny("phi3", head_dim=8),
    "stablelm": tiny("stablelm", **SQUARE),
    "stablelm_parallel": tiny("stablelm", **SQUARE, use_parallel_residual=True, qk_layernorm=True),
    "starcoder2": tiny("starcoder2", head_dim=8),
    "modernbert-decoder": tiny("modernbert-decoder", **SQUARE, pad_token_id=0, norm_bias=True),
    "hrm_text": tiny("hrm_text"),
    # GPT-2's plan and its relatives
    "gpt2": tiny("gpt2"),
    "gpt2_untied": tiny("gpt2", tie_word_embeddings=False),
    "gpt_bigcode": tiny("gpt_bigcode"),
    "openai-gpt": tiny("openai-gpt"),
    "gpt_neo": tiny("gpt_neo", attention_types=[[["global", "local"], 1]], window_size=16),
    "gpt_neox": tiny("gpt_neox", **SQUARE),
    "gpt_neox_sequential": tiny("gpt_neox", **SQUARE, use_parallel_residual=False),
    "gptj": tiny("gptj"),
    "codegen": tiny("codegen", n_embd=32),
    "bloom": tiny("bloom"),
    "falcon": tiny("falcon", **SQUARE),
    "falcon_multi_head": tiny("falcon", **SQUARE, multi_query=False, num_kv_heads=4),
    "falcon_sequential": tiny("falcon", **SQUARE, parallel_attn=False),
    "falcon_new": tiny("falcon", **SQUARE, new_decoder_architecture=True, multi_query=False),
    "falcon_alibi": tiny("falcon", **SQUARE, alibi=True, multi_query=False, num_kv_heads=4),
    "mpt": tiny("mpt"),
    "opt": tiny("opt"),
    "opt_post_norm": tiny("opt", do_layer_norm_before=False, word_embed_proj_dim=18),
    "xglm": tiny("xglm"),
    "bert": tiny("bert", is_decoder=True),
    # experts
    "mixtral": tiny("mixtral"),
    "qwen2_moe": tiny("qwen2_moe", head_dim=8),
    "qwen3_moe": tiny("qwen3_moe", head_dim=8),
    "olmoe": tiny("olmoe", **SQUARE),
    "flex_olmo": tiny("flex_olmo", **SQUARE),
    "gpt_oss": tiny("gpt_oss"),
    "granitemoe": tiny("granitemoe", head_dim=8),
    "phimoe": tiny("phimoe", head_dim=8, router_jitter_noise=0.4),
    "deepseek_v2": tiny("deepseek_v2", num_key_value_heads=4),
    "deepseek_v3": tiny(
        "deepseek_v3", num_key_value_heads=4, n_group=2, topk_group=1, first_k_dense_replace=1
    ),
    "deepseek_v4": tiny(
        "deepseek_v4",
        layer_types=["heavily_compressed_attention", "compressed_sparse_attention"],
        compress_rates={"heavily_compressed_attention": 4, "compressed_sparse_attention": 2},
        mlp_layer_types=["hash_moe", "moe"],
        o_groups=2,
        o_lora_rank=6,
        index_n_heads=3,
        index_head_dim=8,
        index_topk=2,
    ),
    "ernie4_5_moe": tiny("ernie4_5_moe", head_dim=8, moe_num_experts=4, moe_k=2),
    "glm4_moe": tiny("glm4_moe", head_dim=8, use_qk_norm=True),
    "glm4_moe_lite": tiny("glm4_moe_lite", num_key_value_heads=4),
    "glm_moe_dsa": tiny("glm_moe_dsa", num_key_value_heads=4, first_k_dense_replace=1),
    "gemma4_text_moe": tiny(
        "gemma4_text",
        **PER_LAYER,
        enable_moe_block=True,
        num_experts=4,
        top_k_experts=2,
    ),
    "minimax_m2": tiny("minimax_m2"),
    "afmoe": tiny("afmoe"),
    "laguna": tiny("laguna"),
    "llama4_text": tiny("llama4_text", intermediate_size_mlp=36),
    "jetmoe": tiny("jetmoe", kv_channels=8),
    # recurrence, convolution and mixtures of these with attention
    "mamba": tiny("mamba", residual_in_fp32=False),
    "mamba2": tiny("mamba2", residual_in_fp32=False, num_heads=7, n_groups=1),
    "falcon_mamba": tiny("falcon_mamba", residual_in_fp32=False),
    "rwkv": tiny("rwkv", attention_hidden_size=32, context_length=64),
    "recurrent_gemma": tiny("recurrent_gemma", num_hidden_layers=3, **SQUARE, lru_width=36),
    "jamba": tiny(
        "jamba", head_dim=8, num_hidden_layers=4, attn_layer_period=2, attn_layer_offset=1
    ),
    "bamba": tiny("bamba", head_dim=8, mamba_n_heads=7, attn_layer_indices=[1]),
    "falcon_h1": tiny("falcon_h1", head_dim=8, mamba_n_heads=6, mamba_d_ssm=36),
    "granitemoehybrid": tiny(
        "granitemoehybrid",
        head_dim=8,
        mamba_n_heads=7,
        position_embedding_type="rope",
        layer_types=["linear_attention", "full_attention"],
    ),
    "nemotron_h": tiny(
        "nemotron_h",
        mamba_num_heads=7,
        mamba_head_dim=6,
        n_groups=1,
        moe_shared_expert_intermediate_size=18,
    ),
    "zamba2": tiny(
        "zamba2",
        use_shared_attention_adapter=True,
        num_key_value_heads=4,
        adapter_rank=5,
        num_hidden_layers=3,
        layers_block_type=["linear_attention", "hybrid", "hybrid"],
    ),
    "lfm2": tiny("lfm2", head_dim=8, layer_types=["conv", "full_attention"]),
    "lfm2_moe": tiny(
        "lfm2_moe", head_dim=8, layer_types=["conv", "full_attention"], num_dense_layers=1
    ),
    "qwen3_next": tiny("qwen3_next", layer_types=["linear_attention", "full_attention"]),
    "qwen3_5_text": tiny("qwen3_5_text", layer_types=["linear_attention", "full_attention"]),
    "qwen3_5_moe_text": tiny(
        "qwen3_5_moe_text", layer_types=["linear_attention", "full_attention"]
    ),
    "olmo_hybrid": tiny(
        "olmo_hybrid", head_dim=8, layer_types=["linear_attention", "full_attention"]
    ),
}

# Names that Hub checkpoints and TransformerLens use for a class of another name in transformers.
ARCHITECTURES = {"PhimoeForCausalLM": "PhiMoEForCausalLM"}

# Families that do not run in float64.
FLOAT32_ONLY = {"xglm": "makes the lowest float64 number as a float32: torch.full((), finfo.min)"}

# Families that cast to float32, whatever the dtype, where these kinds of weights are.
FLOAT32_INSIDE = {
    **dict.fromkeys(
        ("deepseek_v2", "deepseek_v3", "ernie4_5_moe", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa"),
        ("W_router",),
    ),
    "nemotron_h": ("W_router", "W_in", "W_out"),
}

TL_4_ONLY = {"cohere": "its adapter of cohere refuses to boot with a norm on queries and keys"}

PADDING_CHANGES_TL_3 = dict.fromkeys(
    ("youtu", "deepseek_v2", "deepseek_v3", "glm4_moe_lite"),
    "its bridge of latent attention gives a padded text another loss than the text alone",
)

# Families that give other logits to a text that is padded on the left, whatever the mask says.
SEE_PADDING_ON_THE_LEFT = (
    *("openai-gpt", "hrm_text", "deepseek_v4", "mamba", "mamba2", "falcon_mamba", "rwkv"),
    *("recurrent_gemma", "jamba", "bamba", "falcon_h1", "granitemoehybrid", "nemotron_h"),
    *("zamba2", "lfm2", "lfm2_moe", "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"),
    "olmo_hybrid",
)

# Families whose own backward pass is not the derivative of their forward pass.
TRUNCATED_BACKWARD = {"hrm_text": "runs all cycles but the last under torch.no_grad()"}

# Families whose bridge computes another function than transformers' own model does.
DIFFERS_FROM_TRANSFORMERS = {
    "falcon_new": "the bridge splits the rows of query_key_value as if all of Q came first",
    "falcon_alibi": "the bridge adds ALiBi to the scores, and again as a part of the mask",
}

NO_CLASS = "transformers 5.23 has no such class; the code comes with the checkpoint, from the Hub"
LEFT_OUT: dict[str, str] = {
    **dict.fromkeys(
        [
            *("BaiChuanForCausalLM", "BaichuanForCausalLM", "ExaoneForCausalLM"),
            *("GPT2LMHeadCustomModel", "HyenaDNAForCausalLM", "InternLM2ForCausalLM"),
            *("OpenELMForCausalLM", "OuroForCausalLM", "QwenForCausalLM", "RavenForCausalLM"),
            *("RWKV7ForCausalLM", "NanoGPTForCausalLM", "MinGPTForCausalLM"),
            "NeelSoluOldForCausalLM",
        ],
        NO_CLASS,
    ),
    **dict.fromkeys(
        ["BD3LM", "DreamModel", "GiddForDiffusionLM", "LLaDA2MoeModelLM", "LLaDAModelLM"],
        "a diffusion model, not a causal one; " + NO_CLASS,
    ),
    **{
        "Gemma1ForCausalLM": "another name for the adapter of gemma; no such class",
        "JetMoEForCausalLM": "another name for the adapter of jetmoe; no such class",
        "MPTForCausalLM": "another name for the adapter of mpt; no such class",
        "NeoForCausalLM": "another name for the adapter of gpt_neo; no such class",
        "NeoXForCausalLM": "another name for the adapter of gpt_neox; no such class",
        "BloomModel": "the adapter of bloom on a model without an output head",
        "TransformerLensNative": "TransformerLens's own model, not one of transformers",
        "TransformerLensPretrain": "TransformerLens's own model, not one of transformers",
        "gpt_bigcode with multi_query=False": "the adapter asserts multi_query",
        "falcon with new_decoder_architecture and multi_query": "the adapter takes 1 key-value "
        "head: split_with_sizes ... got split_sizes=[32, 8, 8] (input 64)",
        "gemma3n_text": "Could not determine supported architecture: only the whole "
        "Gemma3nForConditionalGeneration, with pictures and sound, is listed",
    },
}


def make(family: str, tokenizer: Any, dtype: torch.dtype = torch.float64) -> Any:
    """The family's tiny random bridge, every parameter in ``dtype``.

    The test is skipped where this TransformerLens does not boot the family.
    """
    if not HAS_BRIDGE:
        pytest.skip(NO_BRIDGE)
    if TL_VERSION < 4 and family in TL_4_ONLY:
        pytest.skip(f"TransformerLens 3: {TL_4_ONLY[family]}")
    return bridge_of(random_model(FAMILIES[family](len(tokenizer)), dtype), tokenizer)


def random_model(
    config: PretrainedConfig,
    dtype: torch.dtype,
    build: Callable[[PretrainedConfig], Any] = AutoModelForCausalLM.from_config,
) -> Any:
    """The model of transformers that ``build`` makes of a config, the same weights each time."""
    config._experts_implementation = "eager"  # the grouped kernels know no float64
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hf = build(config)
        for parameter in hf.parameters():  # biases and norms must not be 0 and 1
            parameter.data += 0.1 * torch.randn_like(parameter)
    return name_architecture(hf).to(dtype).eval()


def name_architecture(hf: Any) -> Any:
    """The model, with the name of its class in its config, as a checkpoint has it."""
    name = type(hf).__name__
    hf.config.architectures = [ARCHITECTURES.get(name, name)]
    return hf


def bridge_of(hf: Any, tokenizer: Any, device: str = "cpu") -> Any:
    """The bridge around a model of transformers."""
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_transformers(
        hf.config.model_type, hf_model=hf, tokenizer=tokenizer, dtype=hf.dtype, device=device
    )
