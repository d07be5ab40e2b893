"""Mixtures of experts in a ``HookedTransformer``: each expert is a module with linear layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tl_backward.sites.mixture import Mixture, Routes
from tl_backward.sites.site import WeightSite
from tl_backward.sites.tap import Tap


def hooked_expert_sites(mlp: Any, layer: int) -> Iterator[WeightSite]:
    """The sites of the router and of every expert's matrices, each read at its own linear layer."""
    path = f"blocks.{layer}.mlp"
    mixture = Mixture(
        f"{path}.experts",
        len(mlp.experts),
        {
            "input": partial(Tap, mlp, "input"),
            "experts": partial(Tap, mlp.hook_expert_indices, "output"),
            "weights": partial(Tap, mlp.hook_expert_weights, "output"),
        },
        partial(Tap, mlp, "output"),
        partial(_routes, mlp),
        rows=_rows,
    )
    yield _site(f"{path}.W_router", "W_router", layer, mlp.W_gate)
    for number, expert in enumerate(mlp.experts):
        for kind in ("W_gate", "W_in", "W_out"):
            linear = getattr(expert, kind)
            yield _site(f"{mixture.name}.{number}.{kind}", kind, layer, linear, number, mixture)


def _site(
    name: str,
    kind: str,
    layer: int,
    linear: nn.Linear,
    expert: int | None = None,
    mixture: Mixture | None = None,
) -> WeightSite:
    return WeightSite(
        name=name,
        kind=kind,
        layer=layer,
        hook_in=None,
        hook_out=None,
        d_in=linear.weight.shape[1],
        d_out=linear.weight.shape[0],
        x_tap=lambda: Tap(linear, "input"),
        y_tap=lambda: Tap(linear, "output"),
        holder=(linear, "weight"),
        layout=lambda matrix: matrix.mT,
        expert=expert,
        mixture=mixture,
    )


def _routes(mlp: Any, seen: Mapping[str, Tensor]) -> Routes:
    """The routes; the recorded weights cover all experts, before the highest are chosen."""
    experts, all_weights = seen["experts"], seen["weights"]
    if type(mlp).__name__ == "GptOssMoE":
        return Routes(experts, all_weights.gather(1, experts))
    weights = all_weights.topk(experts.shape[1], dim=-1).values
    if getattr(mlp.cfg, "norm_topk_prob", True):  # TransformerLens 2 always does
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return Routes(experts, weights)


def _rows(seen: Mapping[str, Tensor], expert: int) -> tuple[Tensor, Tensor]:
    """An expert sees only its own tokens, ordered by its place among their chosen experts."""
    _, tokens = torch.where(seen["experts"].mT == expert)
    return torch.arange(len(tokens), device=tokens.device), tokens
