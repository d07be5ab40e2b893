"""A tiny random model on disk, as checkpoints are stored."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM

from helpers.bridges import tiny_config
from helpers.texts import TEXTS, tokenizer_from


def save_tiny_checkpoint(folder: Path, *texts: str) -> Path:
    """Write a Llama whose tokenizer has every byte, and a token for most words of the texts."""
    every_byte = ByteLevel.alphabet()
    tokenizer = tokenizer_from(folder, texts=[*TEXTS, *texts * 9], initial_alphabet=every_byte)
    config = tiny_config("llama", len(tokenizer))
    config.max_position_embeddings = 128
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder
