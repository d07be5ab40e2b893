"""The terms of a forward pass shift."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jaxtyping import Bool, Float
from torch import Tensor

from tl_backward.editing._facts import Facts
from tl_backward.editing.key_statistics import KeyStatistics
from tl_backward.editing.weight_edit import WeightEdit
from tl_backward.factors import GradientFactors
from tl_backward.sites import Model, WeightSite


def unit_shift(
    model: Model,
    sites: Sequence[WeightSite],
    facts: Facts,
    inputs: Mapping[str, Float[Tensor, "batch pos d_in"]],
    wanted: Bool[Tensor, "batch"],
    statistics: KeyStatistics | None,
) -> WeightEdit:
    """The shift with a step of 1: ``key^T D^T[t]`` for every term.

    Args:
        model: The model.
        sites: Where to edit.
        facts: The prompts and targets.
        inputs: The inputs of the sites' weights.
        wanted: For each prompt, whether it gets its terms.
        statistics: For whitened keys; None for the inputs themselves.

    Raises:
        ValueError: When there are no statistics of one of the sites.
        NotImplementedError: When the unembedding does not read what the weights write.
    """
    terms = wanted[facts.example].nonzero().squeeze(1)
    W_U = model.W_U.detach()
    values = W_U[:, facts.ids[terms].to(W_U.device)].mT
    factors = {}
    for site in sites:
        if values.shape[1] != site.d_out:
            raise NotImplementedError(
                f"{site.name} writes vectors of width {site.d_out}, but W_U reads such of width "
                f"{values.shape[1]}: there is a projection between them"
            )
        x = inputs[site.name][facts.example[terms], facts.input_at[terms]]
        key = x if statistics is None else statistics.whitened(site.name, x)
        factors[site.name] = GradientFactors(key, values.to(x.device))
    known = None if any(site.in_storage_with for site in sites) else sites
    return WeightEdit(model, factors, sites=known)
