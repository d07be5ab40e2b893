"""How far an edit goes down the gradient of each example."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from tl_backward._precision import full_precision, upcast_dtype
from tl_backward.cache import BackwardCache
from tl_backward.factors import GradientFactors


def alignment_of(
    updates: Mapping[str, GradientFactors], cache: BackwardCache
) -> Float[Tensor, "*batch"]:
    """``-<dW, G_i>`` over the sites of an edit, for each example of a cache.

    Raises:
        ValueError: When the cache lacks a site, or has it in another shape.
    """
    total: Tensor | None = None
    for name, update in updates.items():
        if name not in cache:
            raise ValueError(
                f"cache lacks {name}, which the edit changes; capture it, too (leave out weights= "
                "and layers=), or take an edit of fewer weights"
            )
        if cache[name].shape != update.shape:
            raise ValueError(
                f"cache is of another model: its {name} is {cache[name].shape}, and that of the "
                f"edit {update.shape}"
            )
        of_site = _inner_by_example(update, cache[name])
        total = of_site if total is None else total + of_site.to(total.device)
    if total is None:
        return torch.zeros_like(cache.loss)
    return -total


def _inner_by_example(update: GradientFactors, g: GradientFactors) -> Float[Tensor, "*batch"]:
    """The inner product with the gradient of each example; costs ``n r (d_in + d_out)``."""
    tensors = (update.inputs, update.vjps, g.inputs, g.vjps)
    dtype = upcast_dtype(*(tensor.dtype for tensor in tensors))
    U, V, X, D = (tensor.to(device=g.device, dtype=dtype) for tensor in tensors)
    with full_precision(g.device):
        left = einsum(X, U, "... n d_in, r d_in -> ... n r")
        right = einsum(D, V, "... n d_out, r d_out -> ... n r")
        of_rows = (left * right).sum(-1)
    if g.lengths is None:
        return of_rows.sum(-1)
    return torch.stack([of_example.sum() for of_example in of_rows.split(g.lengths)])
