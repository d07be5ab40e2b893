"""Gradients to compare with, and how far two of them are apart."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def reference_loss(model: nn.Module, tokens: Tensor, target: int) -> Tensor:
    """-log p(target) after the last token, written out."""
    return -model(tokens)[0, -1].log_softmax(-1)[target]


def finite_difference(
    model: nn.Module, tokens: Tensor, target: int, parameter: Tensor, direction: Tensor, step: float
) -> Tensor:
    """Central difference of the loss along a direction of one parameter."""
    losses = []
    with torch.no_grad():
        start = parameter.clone()
        for sign in (1, -1):
            parameter.copy_(start + sign * step * direction)
            losses.append(reference_loss(model, tokens, target).double())
        parameter.copy_(start)
    return (losses[0] - losses[1]) / (2 * step)


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


def gradient_of_parameter(sites, cache, site):
    """From the factors: tied embeddings receive the sum of two gradients."""
    tied = [other for other in sites if other.name in (site.name, *site.tied_to)]
    return sum(other.to_parameter_layout(cache[other.name].dense()) for other in tied)


def gradients_of_sites(loss, sites):
    """Autograd's gradient of each site's weight: of stacked ones, the part of the parameter's."""
    stored = {id(site.stored_in[0]): site.stored_in[0] for site in sites}
    gradients = torch.autograd.grad(loss, list(stored.values()), materialize_grads=True)
    by_id = dict(zip(stored, gradients, strict=True))
    return [by_id[id(parameter)][index] for parameter, index in (s.stored_in for s in sites)]
