"""The terms of a forward pass shift."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_backward._precision import upcast_dtype
from tl_backward.editing._kernel import kernel
from tl_backward.editing.key_statistics import KeyStatistics
from tl_backward.editing.target_terms import TargetTerms
from tl_backward.editing.weight_edit import WeightEdit
from tl_backward.factors import GradientFactors
from tl_backward.sites import Model, WeightSite, unembedding


class ShiftRule(NamedTuple):
    """What a term of a shift is made of.

    Attributes:
        value: What is written: ``"target"``, the target's embedding ``D^T[t]``, or ``"centred"``,
            that less the mean of all embeddings.
        statistics: For whitened keys; None for the inputs themselves.
        joint: Whether the output for each prompt is to change by its own term alone.
        ridge: With ``joint``, what is added to the diagonal of the keys' products, in units of
            its mean.
    """

    value: Literal["target", "centred"] = "target"
    statistics: KeyStatistics | None = None
    joint: bool = False
    ridge: int | float = 0.0


def unit_shift(
    model: Model,
    sites: Sequence[WeightSite],
    terms: TargetTerms,
    inputs: Mapping[str, Float[Tensor, "batch pos d_in"]],
    wanted: Bool[Tensor, "batch"],
    rule: ShiftRule,
) -> WeightEdit:
    """The shift with a step of 1: ``key^T value`` for every term.

    The output for a term's own input changes by ``|x|^2 value`` and, unless the rule is joint, by
    what the other terms add.

    Args:
        model: The model.
        sites: Where to edit.
        terms: The prompts and targets.
        inputs: The inputs of the sites' weights.
        wanted: For each prompt, whether it gets its terms.
        rule: What terms are made of.

    Raises:
        ValueError: When there are no statistics of one of the sites, or joint keys are equal.
        NotImplementedError: When the unembedding does not read what the weights write.
    """
    chosen = wanted[terms.example].nonzero().squeeze(1)
    W_U = unembedding(model).detach()
    values = W_U[:, terms.ids[chosen].to(W_U.device)].mT
    if rule.value == "centred":
        dtype = upcast_dtype(W_U.dtype)
        values = values.to(dtype) - W_U.mean(1, dtype=dtype)
    factors = {}
    for site in sites:
        if values.shape[1] != site.d_out:
            raise NotImplementedError(
                f"{site.name} writes vectors of width {site.d_out}, but W_U reads such of width "
                f"{values.shape[1]}: there is a projection between them"
            )
        x = inputs[site.name][terms.example, terms.input_at]
        keys = (
            _joint_keys(x, site.name, rule)[chosen] if rule.joint else _keys(x[chosen], site, rule)
        )
        factors[site.name] = GradientFactors(keys, values.to(x.device))
    known = None if any(site.in_storage_with for site in sites) else sites
    return WeightEdit(model, factors, sites=known)


def _keys(
    x: Float[Tensor, "term d_in"], site: WeightSite, rule: ShiftRule
) -> Float[Tensor, "term d_in"]:
    return x if rule.statistics is None else rule.statistics.whitened(site.name, x)


def _joint_keys(
    x: Float[Tensor, "term d_in"], name: str, rule: ShiftRule
) -> Float[Tensor, "term d_in"]:
    """Keys of all terms, also of those that are not wanted, whose outputs are to stay.

    Without a ridge the product of each key with its own input is ``|x|^2``, and 0 with the others.
    """
    metric = None if rule.statistics is None else partial(rule.statistics.solve, name)
    exact = x.to(device="cpu", dtype=torch.float64)
    weighted = exact if metric is None else metric(exact)
    mean = float((exact * weighted).sum(-1).mean())
    rows = kernel(exact, metric, ridge=rule.ridge * mean)
    return (exact.square().sum(-1, keepdim=True) * rows).to(x)
