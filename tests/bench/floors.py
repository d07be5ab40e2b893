"""What the same work costs without this package."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

TARGET = 1000


def full_backward(model: Any, tokens: Tensor) -> None:
    """Forward and ``loss.backward()``, with all weight gradients."""
    nll(model, tokens).backward()
    model.zero_grad(set_to_none=True)


def input_only_backward(model: Any, tokens: Tensor, start: str = "embed.hook_out") -> None:
    """Forward, and backward down to one HookPoint without any weight gradient."""
    leaves: list[Tensor] = []

    def begin(x: Tensor, hook: Any) -> Tensor:
        leaves.append(x.detach().requires_grad_())
        return leaves[0].clone()

    with frozen(model), model.hooks(fwd_hooks=[(start, begin)]):
        torch.autograd.grad(nll(model, tokens), leaves)


def incl_bwd(model: Any, tokens: Tensor, hooks: set[str]) -> None:
    """TransformerLens's own: of the mean loss over the text, which is what it differentiates."""
    model.run_with_cache(
        tokens.reshape(1, -1), return_type="loss", incl_bwd=True, names_filter=hooks.__contains__
    )
    model.zero_grad(set_to_none=True)


def nll(model: Any, tokens: Tensor) -> Tensor:
    """Of one prompt, or the sum over several of the same length."""
    logits = model(tokens.reshape(-1, tokens.shape[-1]))
    return -logits[:, -1].log_softmax(-1)[:, TARGET].sum()


@contextmanager
def frozen(model: Any) -> Iterator[None]:
    thawed = [p for p in model.parameters() if p.requires_grad]
    for p in thawed:
        p.requires_grad_(False)
    yield
    for p in thawed:
        p.requires_grad_(True)
