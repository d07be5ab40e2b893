"""The share of the forward pass shift in a gradient (section 6)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from tl_backward.analysis.figures import over_layers
from tl_backward.analysis.over_records import FactRun, Records, Row, over_records, place_of
from tl_backward.analysis.registry import figure_of
from tl_backward.sites import Model, unembedding
from tl_backward.sites.kinds import READ_BY_VJP

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure


def shift_energy(
    model: Model,
    records: Records,
    *,
    weights: str | Iterable[str] = ("W_out",),
    layers: int | Iterable[int] | None = None,
    **options: Any,
) -> pd.DataFrame:
    """The share of W_out's gradient that lies along the forward pass shift.

    The gradient is ``G = sum_i x_i^T delta_i``; the shift of the paper's section 6 is
    ``x_n^T D^T[t]``, which replaces the last token's ``delta_n`` by the target's embedding. The
    share of energy along a matrix ``M`` is ``<G, M>^2 / (|G|^2 |M|^2)``: 1 if the two are parallel.

    Args:
        model: A TransformerLens model in eval mode, with a tokenizer.
        records: Facts in the schema of CounterFact.
        weights: ``"W_out"``, ``"W_O"`` or both, which write to the residual stream.
        layers: Layers; negative ones count from the last. Default: all.
        options: ``batch_size``, ``path``, ``prepend_bos`` and ``progress``, as in
            :func:`over_records`.

    Returns:
        One row per record, weight, layer and position: ``position, segment``;
        ``term_energy``: ``|x_i|^2 |delta_i|^2 / |G|^2`` of the token's own term (adds up to 1 over
        tokens if the terms are orthogonal); ``along_term``: share of the energy of ``G`` along this
        term; ``along_target``: share along ``x_i^T D^T[t]``, which is the shift at the last token;
        ``target_cosine``: cosine of ``delta_i`` with ``-D^T[t]``. Zero terms have no shares.

    Raises:
        ValueError: For other weights.

    Example:
        >>> last = shift_energy(model, records).query("segment == 'last'")
        >>> last.groupby("layer")["along_target"].mean()
    """
    weights = [weights] if isinstance(weights, str) else list(weights)
    if not set(weights) <= set(READ_BY_VJP):
        raise ValueError(
            f"weights={weights!r}: only {' and '.join(READ_BY_VJP)} write to the residual stream, "
            "where the target's embedding is"
        )
    W_U = unembedding(model).detach()

    def rows(run: FactRun) -> list[Row]:
        target = W_U[:, run.target]
        found = []
        for name, g in run.cache.items():
            x, vjps = g.inputs, g.vjps
            whole = g.norm().square()
            own = x.square().sum(-1) * vjps.square().sum(-1)
            along = (x @ (g @ target)).square() / (x.square().sum(-1) * target.square().sum())
            projected = ((x @ x.mT) * (vjps @ vjps.mT)).sum(-1).square() / own
            columns = {
                "term_energy": own / whole,
                "along_term": projected / whole,
                "along_target": along / whole,
                "target_cosine": torch.cosine_similarity(vjps, -target, dim=-1, eps=1e-30),
            }
            is_zero = own == 0
            for i, position in enumerate(run.positions()):
                values = {k: None if is_zero[i] else v[i] for k, v in columns.items()}
                found.append({**place_of(name), **position, **values})
        return found

    return over_records(model, records, rows, weights=weights, layers=layers, **options)


@figure_of(
    shift_energy,
    "Section 6 against the gradient",
    "How much of the gradient is the forward pass shift?",
)
def plot_shift_energy(frame: pd.DataFrame, value: str = "along_target") -> Figure:
    """Mean share of the gradient's energy by layer and segment.

    Args:
        frame: From :func:`shift_energy`.
        value: The column to show.
    """
    return over_layers(frame, value, f"Gradient of W_out: {value.replace('_', ' ')}")
