"""Similarity of the VJPs of different layers (Fig 22, 23)."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations
from typing import TYPE_CHECKING, Any

import torch
from einops import einsum

from tl_backward.analysis.over_records import FactRun, Records, Row, over_records, place_of
from tl_backward.analysis.registry import figure_of
from tl_backward.sites import Model
from tl_backward.sites.kinds import READ_BY_VJP
from tl_backward.sites.names import parse_site_name

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure


def layer_similarity(
    model: Model,
    records: Records,
    *,
    weights: str | Iterable[str] = ("W_out",),
    layers: int | Iterable[int] | None = None,
    **options: Any,
) -> pd.DataFrame:
    """Cosine of ``delta_i`` at the residual stream between every pair of layers.

    The paper's Fig 22 and 23: at the last token the cosine stays above 0.7 across 10 blocks.

    Args:
        model: A TransformerLens model in eval mode, with a tokenizer.
        records: Facts in the schema of CounterFact.
        weights: ``"W_out"``, ``"W_O"`` or both, which write to the residual stream.
        layers: Layers; negative ones count from the last. Default: all.
        options: ``batch_size``, ``path``, ``prepend_bos`` and ``progress``, as in
            :func:`over_records`.

    Returns:
        One row per record, weight, segment and pair of layers, ``layer < other_layer``:
        ``cosine``, averaged over the segment's tokens; none where a VJP is zero.

    Raises:
        ValueError: For other weights, whose VJPs in two layers do not share a space.

    Example:
        >>> table = layer_similarity(model, records).query("segment == 'last'")
        >>> table.groupby(table["other_layer"] - table["layer"])["cosine"].mean()
    """
    weights = [weights] if isinstance(weights, str) else list(weights)
    if not set(weights) <= set(READ_BY_VJP):
        raise ValueError(
            f"weights={weights!r}: only VJPs at the residual stream can be compared between "
            f"layers; pass {' and '.join(READ_BY_VJP)}"
        )

    def rows(run: FactRun) -> list[Row]:
        found = []
        segments = list(dict.fromkeys(run.segments))
        for kind in weights:
            names = [name for name in run.cache if parse_site_name(name).kind == kind]
            vjps = torch.stack([run.cache.residual_vjps(name) for name in names])
            cosines = _cosines(vjps)
            for segment in segments:
                here = [i for i, name in enumerate(run.segments) if name == segment]
                mean = cosines[..., here].nanmean(-1)
                for a, b in combinations(range(len(names)), 2):
                    cosine = None if mean[a, b].isnan() else mean[a, b]
                    place = {**place_of(names[a]), "other_layer": place_of(names[b])["layer"]}
                    found.append({**place, "segment": segment, "cosine": cosine})
        return found

    return over_records(model, records, rows, weights=weights, layers=layers, **options)


@figure_of(layer_similarity, "Fig 22, 23", "Do the VJPs of different layers point the same way?")
def plot_layer_similarity(
    frame: pd.DataFrame, segment: str = "last", weight: str = "W_out"
) -> Figure:
    """Fig 22 and 23: mean cosine of every pair of layers at one segment.

    Args:
        frame: From :func:`layer_similarity`.
        segment: The segment to show.
        weight: The weight to show.
    """
    import pandas as pd
    import plotly.express as px

    here = frame[(frame["segment"] == segment) & (frame["weight"] == weight)]
    upper = here.pivot_table(index="layer", columns="other_layer", values="cosine", dropna=False)
    layers = upper.index.union(upper.columns)
    upper = upper.reindex(index=layers, columns=layers)
    both = upper.combine_first(upper.T).combine_first(
        pd.DataFrame(torch.eye(len(layers)).numpy(), index=layers, columns=layers)
    )
    return px.imshow(
        both,
        zmin=-1,
        zmax=1,
        color_continuous_scale="RdBu",
        title=f"Mean cosine of the VJPs at {weight} between layers, {segment} (Fig 22)",
        labels={"x": "layer", "y": "layer", "color": "cosine"},
    )


def _cosines(vjps: torch.Tensor) -> torch.Tensor:
    """Cosines ``[layer, layer, position]``; nan where one of the two VJPs is zero."""
    units = vjps / vjps.norm(dim=-1, keepdim=True)
    return einsum(units, units, "layer pos d, other pos d -> layer other pos")
