"""Tiny random models of the multimodal wrappers that TransformerLens 4.3's bridge boots offline."""

from __future__ import annotations

import inspect
from typing import Any
from unittest.mock import patch

import torch
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, PretrainedConfig

from helpers.families import bridge_of, random_model, tiny

VISION = {  # every vision config takes those of these that it declares
    **dict.fromkeys(("hidden_size", "embed_dim"), 16),
    "intermediate_size": 24,
    **dict.fromkeys(("vision_output_dim", "projector_input_dim", "projector_output_dim"), 18),
    **dict.fromkeys(("num_hidden_layers", "depth"), 1),
    **dict.fromkeys(("num_attention_heads", "num_heads"), 2),
    **{"image_size": 28, "patch_size": 14, "spatial_merge_size": 2, "num_channels": 3},
    **{
        "deepstack_visual_indexes": [0],
        "num_position_embeddings": 16,
        "fullatt_block_indexes": [0],
    },
}
HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
SECTIONS = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}}

TEXT_MODELS = {
    "gemma3": tiny("gemma3_text", query_pre_attn_scalar=8),
    "llama4": tiny("llama4_text", intermediate_size_mlp=36),
    "mistral3": tiny("mistral"),
    "llava": tiny("llama"),
    "llava_next": tiny("mistral"),
    "idefics3": tiny("llama"),
    "qwen2_5_vl": tiny("qwen2_5_vl_text", head_dim=8, hidden_size=32, **SECTIONS),
    "qwen3_vl": tiny("qwen3_vl_text", **SECTIONS),
    "qwen3_vl_moe": tiny("qwen3_vl_moe_text", **SECTIONS),
    "qwen3_5": tiny("qwen3_5_text", **HYBRID),
    "qwen3_5_moe": tiny("qwen3_5_moe_text", **HYBRID),
}
"""The config of the text model inside each."""


def make_multimodal(family: str, tokenizer: Any, dtype: torch.dtype = torch.float64) -> Any:
    """The family's tiny random bridge, every parameter in ``dtype``."""
    text = TEXT_MODELS[family](len(tokenizer))
    kind = CONFIG_MAPPING[family]
    config = kind(text_config=text.to_dict(), vision_config=_vision(kind, text.hidden_size))
    build = AutoModelForImageTextToText.from_config
    from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter
    from transformer_lens.model_bridge.sources.transformers import helpers as loading

    model = random_model(config, dtype, build)
    with (  # the text model needs no torchvision, which TransformerLens asks for and installs
        patch.object(loading, "_ensure_torchvision", return_value=False),
        patch.object(ArchitectureAdapter, "_check_required_libraries"),
    ):
        return bridge_of(model, tokenizer)


def _vision(kind: type[PretrainedConfig], hidden_size: int) -> dict[str, Any]:
    """A tiny vision tower that gives vectors as wide as the text model's stream."""
    default = kind().vision_config
    declared = inspect.signature(type(default)).parameters
    sizes = {key: value for key, value in VISION.items() if key in declared}
    width = {"out_hidden_size": hidden_size} if "out_hidden_size" in declared else {}
    return {"model_type": default.model_type, **sizes, **width}
