"""A prompt, its target, and a tokenizer that has most of their words as one token each."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

PROMPT = "Lionel Messi plays for the city of"
TARGET = " Paris"
TEXTS = [PROMPT + TARGET, "The Eiffel Tower is located in Rome and in Berlin, not in London"] * 9


def byte_level_bpe(texts: Iterable[str] = TEXTS, **trainer: object) -> Tokenizer:
    """Byte-level BPE, trained on the texts."""
    bpe = Tokenizer(BPE())
    bpe.pre_tokenizer, bpe.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    bpe.train_from_iterator(
        texts, BpeTrainer(special_tokens=["<bos>"], show_progress=False, **trainer)
    )
    return bpe


def tokenizer_from(
    folder: Path, *, adds_bos: bool = False, **trainer: Any
) -> PreTrainedTokenizerFast:
    """The tokenizer, after it has been saved into a folder, as those of real models are."""
    bpe = byte_level_bpe(**trainer)
    if adds_bos:
        ids = [("<bos>", bpe.token_to_id("<bos>"))]
        bpe.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=ids)
    special = {f"{role}_token": "<bos>" for role in ("bos", "eos", "pad")}
    PreTrainedTokenizerFast(tokenizer_object=bpe, **special).save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)
