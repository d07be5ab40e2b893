"""The W_out sites of layers that have exactly one."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

from tl_backward.sites import Model, WeightSite, weight_sites


def w_out_sites(model: Model, layers: int | Iterable[int]) -> list[WeightSite]:
    """The W_out sites of some layers, lowest first.

    Raises:
        TypeError, ValueError, NotImplementedError: As :func:`weight_sites`, and if a layer has
            several W_out (mixtures of experts), because an edit cannot choose a token's expert.
    """
    sites = weight_sites(model, "W_out", layers)
    for before, after in pairwise(sites):
        if before.layer == after.layer:
            raise NotImplementedError(
                f"layer {after.layer} has several W_out ({before.name}, {after.name}, ...); this "
                "editor needs layers with a single one"
            )
    return sites
