"""Figures shared by several experiments."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tl_backward.analysis.segments import SEGMENTS

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure


def over_layers(frame: pd.DataFrame, value: str, title: str, **options: Any) -> Figure:
    """A value by layer, with a line for each segment and a panel for each weight.

    Args:
        frame: A table with the columns ``record, weight, layer, segment`` and ``value``.
        value: The column to show, averaged over a segment's tokens, then over records.
        title: The figure's title.
        options: As in ``plotly.express.line``.
    """
    import plotly.express as px

    means = segment_means(frame, value)
    return px.line(
        means,
        x="layer",
        y="mean",
        color="segment",
        facet_col="weight",
        facet_col_wrap=2,
        markers=True,
        title=title,
        labels={"mean": value},
        category_orders={"segment": list(SEGMENTS), "weight": list(dict.fromkeys(frame["weight"]))},
        **options,
    )


def segment_means(frame: pd.DataFrame, value: str) -> pd.DataFrame:
    """Mean and spread of a value over records, by weight, layer and segment.

    Tokens of one segment are averaged first, so that every record counts once.

    Returns:
        A table with the columns ``weight, layer, segment, mean, median, std`` (over records) and
        ``records`` (their number).
    """
    place = ["weight", "layer", "segment"]
    each = frame.groupby(["record", *place], sort=False)[value].mean()
    of_records = each.dropna().groupby(place)
    return of_records.agg(mean="mean", median="median", std="std", records="size").reset_index()
