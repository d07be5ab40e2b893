"""Vectors of width d_model, read in the vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm


@dataclass(frozen=True, eq=False)
class VocabularyReadout:
    """The two ends of each vector's logit lens, and where the targets stand between them.

    Attributes:
        top_ids: The ``k`` most probable tokens, most probable first.
        top_values: Their log-probabilities, in nats.
        bottom_ids: The ``k`` least probable tokens, least probable first.
        bottom_values: Their log-probabilities, in nats.
        target_ranks: How many tokens are more probable than the target: 0 is the most probable,
            ``d_vocab - 1`` the least; ties share the smaller rank.
    """

    top_ids: Int[Tensor, "rows k"]
    top_values: Float[Tensor, "rows k"]
    bottom_ids: Int[Tensor, "rows k"]
    bottom_values: Float[Tensor, "rows k"]
    target_ranks: Int[Tensor, "rows"]


@torch.no_grad()
def read_vocabulary(
    vectors: Float[Tensor, "rows d_model"],
    unembed: Callable[[Float[Tensor, "chunk d_model"]], Float[Tensor, "chunk d_vocab"]],
    target: int,
    *,
    top_k: int,
    chunk_size: int = 64,
) -> VocabularyReadout:
    """Read vectors by the logit lens ``softmax(unembed(v))`` (Eq 7), ``chunk_size`` rows at a time.

    At most ``chunk_size x d_vocab`` logits exist at once. Shows a progress bar when it takes
    longer than two seconds.
    """
    chunks = []
    for rows in tqdm(vectors.split(chunk_size), desc="reading", delay=2, leave=False):
        logits = unembed(rows)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        log_total = logits.logsumexp(-1, keepdim=True)
        top, bottom = logits.topk(top_k), logits.topk(top_k, largest=False)
        chunks.append(
            (
                top.indices,
                top.values - log_total,
                bottom.indices,
                bottom.values - log_total,
                (logits > logits[:, target, None]).sum(-1),
            )
        )
    return VocabularyReadout(*(torch.cat(parts) for parts in zip(*chunks, strict=True)))
