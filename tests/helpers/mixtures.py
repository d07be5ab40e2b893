"""Mixtures of experts for tests, and what autograd says of their experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from helpers.gradients import gradients_of_sites, reference_loss

TOKENS, TARGET = torch.tensor([[3, 9, 1, 17, 5, 11, 2, 8, 30]]), 5
TEXTS, TARGETS = [[3, 9, 1, 17, 5, 11, 2], [4, 7, 2], [12]], [[5], [7, 9], [11]]


def autograd(model: Any, sites: list[Any], tokens: Tensor = TOKENS) -> dict[str, Tensor]:
    """The gradients of the sites' weights, in the layouts of their parameters."""
    gradients = gradients_of_sites(reference_loss(model, tokens, TARGET), sites)
    return {site.name: one for site, one in zip(sites, gradients, strict=True)}


def assert_autograds(model: Any, sites: list[Any], cache: Any, tokens: Tensor = TOKENS) -> None:
    """Every site's factors give autograd's gradient."""
    got = {s.name: s.to_parameter_layout(cache[s.name].dense()) for s in sites}
    for name, expected in autograd(model, sites, tokens).items():
        assert (got[name] - expected).norm() <= 1e-10 * expected.norm(), name


def mixtral_routes(block: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Experts and weights of each token, by Mixtral's formula."""
    logits = x @ block.mlp.original_component.gate.original_component.weight.mT
    weights, experts = logits.softmax(-1).topk(2, dim=-1)
    return experts, weights / weights.sum(-1, keepdim=True)
