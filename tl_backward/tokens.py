"""Prompts and targets, between text and token ids."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from jaxtyping import Int
from torch import Tensor


def prompt_tokens(
    model: Any, prompt: str | Int[Tensor, "... pos"], prepend_bos: bool | None
) -> Int[Tensor, "pos"]:
    """The tokens of one prompt, on the model's device.

    Args:
        model: Any TransformerLens model; its tokenizer, context and vocabulary are used.
        prompt: Text, or the tokens of one prompt (then nothing is prepended).
        prepend_bos: As in ``model.to_tokens``.

    Raises:
        TypeError: When the prompt is neither a string nor a tensor of token ids.
        ValueError: When it is empty, longer than the context, or outside the vocabulary.
        NotImplementedError: For several prompts.
    """
    if isinstance(prompt, str):
        if not prompt:
            raise ValueError("prompt is empty; pass at least one token of text")
        _require_tokenizer(model, "prompt")
        tokens = model.to_tokens(prompt, prepend_bos=prepend_bos, truncate=False)
    elif isinstance(prompt, Tensor) and not prompt.is_floating_point() and prompt.ndim in (1, 2):
        tokens = prompt if prompt.ndim == 2 else prompt.unsqueeze(0)
        tokens = tokens.to(model.cfg.device)
    elif isinstance(prompt, list):
        raise NotImplementedError("several prompts at once are not supported yet; pass one prompt")
    else:
        raise TypeError(f"prompt must be a string or a tensor of token ids, got {prompt!r}")
    if len(tokens) != 1:
        raise NotImplementedError(
            f"prompt must be a single one for now, got a batch of {len(tokens)}"
        )
    n, n_ctx, d_vocab = tokens.shape[1], model.cfg.n_ctx, model.cfg.d_vocab
    if n == 0:
        raise ValueError("prompt is empty; pass at least one token")
    if n_ctx is not None and n > n_ctx:
        raise ValueError(
            f"prompt has {n} tokens, more than the model's context of {n_ctx}; shorten it"
        )
    if int(tokens.min()) < 0 or int(tokens.max()) >= d_vocab:
        raise ValueError(f"prompt holds token ids outside the vocabulary, 0 to {d_vocab - 1}")
    return tokens[0]


def target_id(model: Any, target: str | int | Tensor) -> int:
    """The one token that a target stands for.

    Args:
        model: Any TransformerLens model; its tokenizer and vocabulary size are used.
        target: A string of exactly one token (mind the leading space), or a token id.

    Raises:
        ValueError: When the string is not one token, or the id not in the vocabulary.
        TypeError: When the target is neither a string nor an integer.
    """
    if isinstance(target, str):
        _require_tokenizer(model, "target")
        ids = _encode(model, target)
        if len(ids) != 1:
            raise ValueError(_not_one_token(model, target, ids))
        return ids[0]
    if isinstance(target, Tensor) and target.numel() == 1 and not target.is_floating_point():
        target = int(target)
    if isinstance(target, bool) or not isinstance(target, int):
        raise TypeError(f"target must be a string of one token or a token id, got {target!r}")
    if not 0 <= target < model.cfg.d_vocab:
        raise ValueError(
            f"target={target}: token ids of this model are 0 to {model.cfg.d_vocab - 1}"
        )
    return target


def decode_each(model: Any, ids: Iterable[int]) -> list[str]:
    """Every token by itself as a string; a model without tokenizer gives its number."""
    if model.tokenizer is None:
        return [str(i) for i in ids]
    return model.tokenizer.batch_decode([[i] for i in ids], clean_up_tokenization_spaces=False)


def _require_tokenizer(model: Any, argument: str) -> None:
    if model.tokenizer is None:
        raise ValueError(f"this model has no tokenizer; pass {argument} as token ids")


def _encode(model: Any, string: str) -> list[int]:
    return model.to_tokens(string, prepend_bos=False)[0].tolist() if string else []


def _not_one_token(model: Any, target: str, ids: list[int]) -> str:
    tokens = decode_each(model, ids)
    message = f"target={target!r} must be exactly one token, but it is {len(ids)}: {tokens}."
    spaced = " " + target.lstrip()
    if target.strip() and spaced != target and len(_encode(model, spaced)) == 1:
        return f"{message} With the leading space, {spaced!r} is one token."
    return f"{message} Pass a word that the model knows as one token, mostly with a leading space."
