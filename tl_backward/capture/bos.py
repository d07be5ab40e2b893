"""Whether texts begin with a BOS token."""

from __future__ import annotations

from functools import lru_cache
from typing import Any


def prepends_bos(model: Any, prepend_bos: bool | None = None) -> bool:
    """Whether to prepend BOS to texts: the given value, or the tokenizer's own default.

    The tokenizer's own default matches the model's training: BOS for Llama, Gemma and Mistral, none
    for GPT-2 or Qwen. TransformerLens's default, ``cfg.default_prepend_bos``, is True for nearly
    all models, and TransformerLens rebuilds tokenizers with ``add_bos_token=True``. If a tokenizer
    may have been rebuilt, its files decide.

    Args:
        model: A TransformerLens model; without a tokenizer there are no texts, and no BOS.
        prepend_bos: The requested value; None for the tokenizer's own default.

    Raises:
        ValueError: If the tokenizer's files cannot be read.
    """
    if prepend_bos is not None:
        return bool(prepend_bos)
    tokenizer = model.tokenizer
    if tokenizer is None or not _begins_with_bos(tokenizer):
        return False
    name = tokenizer.name_or_path
    may_be_rebuilt = name and tokenizer.init_kwargs.get("add_bos_token") is True
    return _does_by_itself(name) if may_be_rebuilt else True


@lru_cache
def _does_by_itself(name: str) -> bool:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(
            f"cannot tell whether the tokenizer {name} prepends BOS: its files cannot be read; "
            "pass prepend_bos=True or False (--bos or --no-bos)"
        ) from error
    return _begins_with_bos(tokenizer)


def _begins_with_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer prepends a BOS or CLS token to texts."""
    first, *rest = tokenizer("a")["input_ids"]
    return bool(rest) and first in (tokenizer.bos_token_id, tokenizer.cls_token_id)
