"""Texts by their definition, and models whose KV cache is lost."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CACHE_ARGUMENTS = {"past_key_values", "past_kv_cache"}


@torch.no_grad()
def greedy(model: Any, tokens: Tensor, n_new: int) -> list[list[int]]:
    """The definition: each token is the most probable one after a pass over the whole text."""
    for _ in range(n_new):
        tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], 1)
    return tokens.tolist()


def lose_the_cache(model: Any) -> None:
    """As TransformerLens 4.3 does with transformers 5.24: the cache never reaches the attention."""
    forward = type(model).forward

    def without_cache(*args: Any, **kwargs: Any) -> Tensor:
        kept = {name: value for name, value in kwargs.items() if name not in CACHE_ARGUMENTS}
        return forward(model, *args, **kept)

    model.__dict__["forward"] = without_cache
