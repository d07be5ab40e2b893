"""A low-rank weight change as forward hooks, without changing the weight."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

from tl_backward._precision import full_precision, upcast_dtype
from tl_backward.sites import Model, WeightSite, add_hook_points

ForwardHooks: TypeAlias = list[tuple[str, Callable[..., Any]]]


def with_hook_points(model: Model, sites: Iterable[WeightSite]) -> None:
    """Add any missing HookPoints of these sites to a ``HookedTransformer``.

    Raises:
        NotImplementedError: If a site cannot have HookPoints.
    """
    points = [site.hook_points for site in sites]
    if any(hook_in not in model.hook_dict for hook_in, _ in points):
        add_hook_points(model)


def low_rank_hooks(
    site: WeightSite, u: Float[Tensor, "batch n d_in"], v: Float[Tensor, "batch n d_out"]
) -> ForwardHooks:
    """Thread-safe hooks that record ``x`` and add ``(x u^T) v`` to ``y``.

    Gradients flow to ``u`` and ``v``.

    Args:
        site: The site of ``x`` and ``y``.
        u: Left vectors per row of a batch or, with a batch of 1, for all rows.
        v: Right vectors, likewise.

    Raises:
        NotImplementedError: If the site lacks a HookPoint on one side.
        ValueError: In the forward pass, if the batch has another number of rows.
    """
    seen = threading.local()
    placed: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def note(x: Tensor, hook: Any) -> None:
        seen.x = x

    def add(y: Tensor, hook: Any) -> Tensor:
        if not hasattr(seen, "x"):
            raise RuntimeError(f"the input of {site.name} did not pass {site.hook_in}")
        x = site.encode(seen.x)
        del seen.x
        dtype = upcast_dtype(u.dtype, x.dtype)
        place = (x.device, dtype)
        if place not in placed:
            placed[place] = u.to(*place), v.to(*place)
        left, right = placed[place]
        if len(u) > 1:
            x = x.expand(len(u), *x.shape[1:]) if len(x) == 1 else x
            if len(x) % len(u) or (x.ndim > 2 and len(x) != len(u)):
                raise ValueError(
                    f"rows has {len(u)} entries, but {site.hook_in} has a batch of {len(x)}"
                )
        with full_precision(x.device):
            rows = _by_edit(x.to(dtype), len(u))
            inner = einsum(rows, left, "edit row d_in, edit n d_in -> edit row n")
            added = einsum(inner, right, "edit row n, edit n d_out -> edit row d_out")
        return (y + site.hook_out_scale * added.reshape(-1, *y.shape[1:])).to(y.dtype)

    hook_in, hook_out = site.hook_points
    return [(hook_in, note), (hook_out, add)]


def _by_edit(x: Float[Tensor, "batch *pos_and_heads d"], n_edits: int) -> Float[Tensor, "_ row _"]:
    """Group the inputs by edit."""
    if x.ndim == 2:
        return rearrange(x, "(edit row) d_in -> edit row d_in", edit=n_edits)
    return rearrange(x, "(edit b) pos ... -> edit (b pos) (...)", edit=n_edits)


def require_finite(site: WeightSite, u: Float[Tensor, "*batch n d_in"], v: Tensor) -> None:
    """Raise unless all vectors of an update are finite.

    Raises:
        ValueError: If one is not.
    """
    if not (u.isfinite().all() and v.isfinite().all()):
        raise ValueError(f"edits: the update of {site.name} is not finite; check its factors")
