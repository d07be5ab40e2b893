"""Tiny models with adapters of peft."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from helpers.bridges import tiny_config

ATTENTION, MLP = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]
TARGETS = {"llama": [*ATTENTION, *MLP], "gpt2": ["attn.c_proj", "c_fc", "mlp.c_proj"]}
RANK, SCALING = 3, 5 / 3


def hf_model(tokenizer: Any, kind: str = "llama") -> Any:
    """A random transformers model, the same each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(tiny_config(kind, len(tokenizer)))
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.config.architectures = [type(model).__name__]
    return model.double().eval()


def boot(model: Any, tokenizer: Any) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_transformers(
        model.config.model_type, hf_model=model, tokenizer=tokenizer, dtype=torch.float64
    )


def config(kind: str = "llama", **settings: Any) -> LoraConfig:
    """Adapters on every linear layer; ``settings`` replace the defaults."""
    defaults = {"r": RANK, "lora_alpha": 5, "target_modules": TARGETS[kind]}
    return LoraConfig(**defaults | {"fan_in_fan_out": kind == "gpt2"} | settings)


def randomised(peft_model: Any) -> Any:
    """Untrained adapters do nothing: their B is zero."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in peft_model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            random = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data = (0.2 * random).to(parameter)
    return peft_model.double().eval()


def adapted(tokenizer: Any, kind: str = "llama", **settings: Any) -> tuple[Any, Any]:
    """A bridge with an adapter on every linear layer, and the model of peft around it."""
    peft_model = randomised(get_peft_model(hf_model(tokenizer, kind), config(kind, **settings)))
    return boot(peft_model.get_base_model(), tokenizer), peft_model
