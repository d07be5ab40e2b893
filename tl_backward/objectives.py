"""What is differentiated."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


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
