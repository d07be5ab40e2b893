"""The one W_out of each of some layers."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

from tl_backward.sites import Model, WeightSite, weight_sites


def w_out_sites(model: Model, layers: int | Iterable[int]) -> list[WeightSite]:
    """The sites of W_out in some layers, from the lowest up.

    Raises:
        TypeError, ValueError, NotImplementedError: As :func:`weight_sites`, and when a layer has
            several (mixtures of experts): which of them a token uses is not for an edit to choose.
    """
    sites = weight_sites(model, "W_out", layers)
    for before, after in pairwise(sites):
        if before.layer == after.layer:
            raise NotImplementedError(
                f"layer {after.layer} has several W_out ({before.name}, {after.name}, ...); this "
                "editor writes to layers with a single one"
            )
    return sites
