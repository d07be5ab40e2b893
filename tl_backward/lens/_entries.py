"""The vectors that the lens reads at weights: one per layer and token.

All experts of a token share their input, and their VJPs at ``W_out`` are one vector times the
routing weights. So the lens reads the experts of a layer together, including the shared experts,
like a dense layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from tl_backward._precision import stable_norm
from tl_backward.cache import BackwardCache
from tl_backward.cache.routing import Routing
from tl_backward.sites.kinds import reads_stream
from tl_backward.sites.names import parse_site_name

Vjps = Literal["residual", "output"]


class Entry(NamedTuple):
    """The vectors of one weight, or of one kind of weight of all experts of a layer.

    Attributes:
        vectors: Vectors to read in the vocabulary.
        vjp_norms: Norm of the VJP at the weight's own output; for several experts, of all their
            VJPs together.
    """

    vectors: Float[Tensor, "*batch n d_model"]
    vjp_norms: Float[Tensor, "*batch n"]


def entries_of(
    cache: BackwardCache, names: Sequence[str], kind: str, vjps: Vjps, d_model: int
) -> dict[str, Entry]:
    """The entries of one kind of weight, by label.

    Args:
        cache: The cache.
        names: Names of sites, in model order.
        kind: Their kind.
        vjps: Whether to read VJPs after post-norms.
        d_model: Width of the residual stream.

    Raises:
        NotImplementedError: If experts work on vectors of another width.
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_mixture(cache, name) or name, []).append(name)
    found = {}
    for name, members in groups.items():
        if name in cache.routings:
            found[f"{name}.{kind}"] = _of_mixture(cache, name, members, kind, vjps, d_model)
        else:
            norms = stable_norm(cache[name].vjps, dim=-1)
            found[name] = Entry(_at_weight(cache, name, kind, vjps), norms)
    return found


def entry_of_expert(cache: BackwardCache, name: str, vjps: Vjps, d_model: int) -> Entry:
    """The entry of one expert's matrix; zero at tokens not routed to it.

    Raises:
        NotImplementedError: As :func:`entries_of`.
    """
    _, kind, expert = parse_site_name(name)
    mixture = _mixture(cache, name)
    assert mixture is not None and expert is not None
    routing = cache.routings[mixture]
    whole = _of_mixture(cache, mixture, [name], kind, vjps, d_model)
    weights = rearrange(routing.weights_of(expert), "... -> ... 1")
    multiplies = routing.scales_input == reads_stream(kind)
    is_routed = rearrange(routing.is_at(expert).any(-1), "... -> ... 1")
    return whole._replace(vectors=whole.vectors * (weights if multiplies else is_routed))


def _mixture(cache: BackwardCache, name: str) -> str | None:
    """The mixture that a site's weight belongs to, if any."""
    path = name.rpartition(".")[0]
    if ".experts." in name:
        return path.rpartition(".")[0]
    mixture = path.removesuffix(".shared_experts") + ".experts"
    return mixture if path.endswith(".shared_experts") and mixture in cache.routings else None


def _at_weight(cache: BackwardCache, name: str, kind: str, vjps: Vjps) -> Tensor:
    if reads_stream(kind):
        return cache[name].inputs
    return cache.residual_vjps(name) if vjps == "residual" else cache[name].vjps


def _of_mixture(
    cache: BackwardCache,
    mixture: str,
    names: Iterable[str],
    kind: str,
    vjps: Vjps,
    d_model: int,
) -> Entry:
    routing = cache.routings[mixture]
    if reads_stream(kind):
        vectors = routing.inputs
    elif vjps == "residual":
        vectors = cache.post_norm_vjps.get(mixture, routing.vjps)
    else:
        vectors = routing.vjps
    if vectors.shape[-1] != d_model:
        raise NotImplementedError(
            f"the experts of {mixture} work on vectors of width {vectors.shape[-1]}, not on the "
            f"residual stream (width {d_model})"
        )
    norms = stable_norm(routing.vjps, dim=-1) * 0
    for name in names:
        norms = torch.hypot(norms, _norms(cache, name, routing).to(norms))
    return Entry(vectors, norms)


def _norms(cache: BackwardCache, name: str, routing: Routing) -> Float[Tensor, "*batch n"]:
    """The norms of the VJPs at the output of one matrix; 0 for tokens not routed to it."""
    _, kind, expert = parse_site_name(name)
    if expert is None:
        return stable_norm(cache[name].vjps, dim=-1)
    if kind == "W_out":  # known without the expert's weights
        is_routed = routing.is_at(expert).any(-1).to(routing.weights.dtype)
        weights = is_routed if routing.scales_input else routing.weights_of(expert)
        return stable_norm(routing.vjps, dim=-1) * weights.abs()
    norms = stable_norm(cache[name].vjps, dim=-1)
    whole = norms.new_zeros(routing.experts.shape[:-1])
    whole[routing.is_at(expert).any(-1)] = norms
    return whole
