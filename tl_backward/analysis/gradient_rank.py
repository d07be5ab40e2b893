"""The rank of weight gradients compared with the length of the prompt (Lemma 4.1, Fig 3)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from tl_backward._precision import upcast_dtype
from tl_backward.analysis.over_records import FactRun, Records, Row, over_records, place_of
from tl_backward.analysis.registry import figure_of
from tl_backward.sites import Model

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure


def gradient_rank(
    model: Model,
    records: Records,
    *,
    weights: str | Iterable[str] = ("W_in", "W_out"),
    layers: int | Iterable[int] | None = None,
    **options: Any,
) -> pd.DataFrame:
    """The numerical rank of every gradient (Lemma 4.1).

    The paper's Fig 3: in every layer but the last, more than 98.5 % of the prompts have an FF1
    gradient whose rank is the length of the prompt. In the last layer the rank is 1 (App A).

    Args:
        model: A TransformerLens model in eval mode, with a tokenizer.
        records: Facts in the schema of CounterFact.
        weights: Kinds of weights.
        layers: Layers; negative ones count from the last. Default: all.
        options: ``batch_size``, ``path``, ``prepend_bos`` and ``progress``, as in
            :func:`over_records`.

    Returns:
        One row per record, weight and layer. ``n_tokens``: length of the prompt, including a BOS
        token. ``rank``: rank of the gradient, with the threshold of ``torch.linalg.matrix_rank``.
        ``input_rank``, ``vjp_rank``: ranks of the two factors, likewise. ``stable_rank``: squared
        Frobenius norm over squared largest singular value, which needs no threshold.

    Example:
        >>> table = gradient_rank(model, records, prepend_bos=False)
        >>> table["rank"].eq(table["n_tokens"]).groupby(table["layer"]).mean()
    """

    def rows(run: FactRun) -> list[Row]:
        found = []
        for name, g in run.cache.items():
            squares = g.singular_values().square()
            found.append(
                {
                    **place_of(name),
                    "n_tokens": len(run.segments),
                    "rank": g.rank(),
                    "input_rank": _rank(g.inputs),
                    "vjp_rank": _rank(g.vjps),
                    "stable_rank": squares.sum() / squares[0],
                }
            )
        return found

    return over_records(model, records, rows, weights=weights, layers=layers, **options)


@figure_of(
    gradient_rank,
    "Fig 3, Lemma 4.1",
    "Does a gradient have as many ranks as the prompt has tokens?",
)
def plot_gradient_rank(frame: pd.DataFrame) -> Figure:
    """Fig 3: share of prompts whose gradient's rank equals their length, by layer.

    Args:
        frame: From :func:`gradient_rank`.
    """
    import plotly.express as px

    full = frame["rank"].eq(frame["n_tokens"])
    shares = full.groupby([frame["weight"], frame["layer"]], sort=False).mean().mul(100)
    return px.line(
        shares.rename("percent").reset_index(),
        x="layer",
        y="percent",
        color="weight",
        markers=True,
        range_y=[-2, 102],
        title="Prompts whose gradient has rank = prompt length (Fig 3)",
        labels={"percent": "% of prompts"},
    )


def _rank(rows: torch.Tensor) -> int:
    dtype = upcast_dtype(rows.dtype)
    return int(torch.linalg.matrix_rank(rows.to(dtype)))
