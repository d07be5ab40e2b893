"""The terms of a forward pass shift."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_backward._precision import upcast_dtype
from tl_backward.editing._expert_outputs import ExpertOutputs
from tl_backward.editing._kernel import kernel
from tl_backward.editing.key_statistics import KeyStatistics
from tl_backward.editing.runs import Inputs, Matrix
from tl_backward.editing.target_terms import TargetTerms
from tl_backward.editing.weight_edit import WeightEdit
from tl_backward.factors import GradientFactors
from tl_backward.sites import Model, WeightSite, unembedding


class ShiftRule(NamedTuple):
    """How a term of a shift is built.

    Attributes:
        value: The value to write: ``"target"``, the target's embedding ``D^T[t]``, or
            ``"centred"``, the embedding minus the mean of all embeddings.
        statistics: Statistics for whitened keys; None to use the inputs themselves.
        joint: Whether the output for each prompt should change by its own term only.
        ridge: With ``joint``, added to the diagonal of the Gram matrix of the keys, in units of its
            mean.
    """

    value: Literal["target", "centred"] = "target"
    statistics: KeyStatistics | None = None
    joint: bool = False
    ridge: int | float = 0.0


def unit_shift(
    model: Model,
    sites: Sequence[Matrix],
    terms: TargetTerms,
    inputs: Mapping[str, Inputs],
    wanted: Bool[Tensor, "batch"],
    rule: ShiftRule,
) -> WeightEdit:
    """The shift with a step of 1: ``key^T value`` for every term.

    The output for a term's own input changes by ``|x|^2 value`` plus, unless the rule is joint, the
    contributions of the other terms. Experts count as one matrix: the key of
    each is its own input times its routing weight.

    Args:
        model: The model.
        sites: The sites to edit.
        terms: The prompts and targets.
        inputs: The inputs of the sites' weights.
        wanted: Whether each prompt gets its terms.
        rule: How terms are built.

    Raises:
        ValueError: If the statistics lack one of the sites, or joint keys are equal.
        NotImplementedError: If the unembedding does not read the weights' output space.
    """
    chosen = wanted[terms.example].nonzero().squeeze(1)
    W_U = unembedding(model).detach()
    values = W_U[:, terms.ids[chosen].to(W_U.device)].mT
    if rule.value == "centred":
        dtype = upcast_dtype(W_U.dtype)
        values = values.to(dtype) - W_U.mean(1, dtype=dtype)
    factors: dict[str, GradientFactors] = {}
    edited: list[WeightSite] = []
    for site in sites:
        if values.shape[1] != site.d_out:
            raise NotImplementedError(
                f"{site.name} writes vectors of width {site.d_out}, but W_U reads width "
                f"{values.shape[1]}: there is a projection between them"
            )
        x = inputs[site.name][terms.example, terms.input_at]
        keys = (
            _joint_keys(x, site.name, rule)[chosen] if rule.joint else _keys(x[chosen], site, rule)
        )
        each = site.split(keys) if isinstance(site, ExpertOutputs) else [(site, keys)]
        for one, of_one in each:
            factors[one.name] = GradientFactors(of_one, values.to(x.device))
            edited.append(one)
    known = None if any(site.in_storage_with for site in edited) else edited
    return WeightEdit(model, factors, sites=known)


def _keys(
    x: Float[Tensor, "term d_in"], site: Matrix, rule: ShiftRule
) -> Float[Tensor, "term d_in"]:
    return x if rule.statistics is None else rule.statistics.whitened(site.name, x)


def _joint_keys(
    x: Float[Tensor, "term d_in"], name: str, rule: ShiftRule
) -> Float[Tensor, "term d_in"]:
    """Keys of all terms, including unwanted ones, whose outputs should not change.

    Without a ridge, the product of each key with its own input is ``|x|^2``, and 0 with the others.
    """
    metric = None if rule.statistics is None else partial(rule.statistics.solve, name)
    exact = x.to(device="cpu", dtype=torch.float64)
    weighted = exact if metric is None else metric(exact)
    mean = float((exact * weighted).sum(-1).mean())
    rows = kernel(exact, metric, ridge=rule.ridge * mean)
    return (exact.square().sum(-1, keepdim=True) * rows).to(x)
