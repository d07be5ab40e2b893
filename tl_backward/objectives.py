"""What is differentiated: targets, and the loss that they define."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor


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


def next_token_nll(
    logits: Float[Tensor, "pos d_vocab"], target: Int[Tensor, ""]
) -> Float[Tensor, ""]:
    """Negative log-likelihood, in nats, of the target as the token after the last position.

    Its VJP at the last position's logits is ``p_hat[k] - 1[k = t]`` (Eq 4). Computed in float32
    at least.
    """
    last = logits[-1]
    last = last.to(torch.promote_types(last.dtype, torch.float32))
    return torch.nn.functional.cross_entropy(last, target)


def _encode(model: Any, string: str) -> list[int]:
    if not string:
        return []
    return model.to_tokens(string, prepend_bos=False)[0].tolist()


def _not_one_token(model: Any, target: str, ids: list[int]) -> str:
    tokens = [model.tokenizer.decode([i]) for i in ids]
    message = f"target={target!r} must be exactly one token, but it is {len(ids)}: {tokens}."
    spaced = " " + target.lstrip()
    if target.strip() and spaced != target and len(_encode(model, spaced)) == 1:
        return f"{message} With the leading space, {spaced!r} is one token."
    return f"{message} Pass a word that the model knows as one token, mostly with a leading space."
