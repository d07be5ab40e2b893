"""Norms of VJPs and of inputs, by layer, sub-module and prompt segment (Fig 5, 16, 17)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from tl_backward.analysis.figures import over_layers
from tl_backward.analysis.over_records import FactRun, Records, Row, over_records, place_of
from tl_backward.analysis.registry import figure_of
from tl_backward.sites import Model

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure

SUB_MODULES = ("W_Q", "W_K", "W_V", "W_O", "W_in", "W_out")


def vjp_norms(
    model: Model,
    records: Records,
    *,
    weights: str | Iterable[str] = SUB_MODULES,
    layers: int | Iterable[int] | None = None,
    **options: Any,
) -> pd.DataFrame:
    """The norm of ``delta_i`` and of ``x_i`` at every weight and token.

    The paper's Fig 5, 16 and 17: the mean norm of the VJPs peaks at the subject's tokens in early
    layers, and at the last token around the second quarter of the layers; most VJPs are near zero.
    The product of the two norms is the norm of the token's term ``x_i^T delta_i`` in the gradient.

    Args:
        model: A TransformerLens model in eval mode, with a tokenizer.
        records: Facts in the schema of CounterFact.
        weights: Kinds of weights; pass ``"W_gate"`` too for a gated MLP.
        layers: Layers; negative ones count from the last. Default: all.
        options: ``batch_size``, ``path``, ``prepend_bos`` and ``progress``, as in
            :func:`over_records`.

    Returns:
        One row per record, weight, layer and position: ``position, segment``, ``vjp_norm`` (nats
        per unit of the weight's output) and ``input_norm``.

    Example:
        >>> segment_means(vjp_norms(model, records), "vjp_norm")
    """

    def rows(run: FactRun) -> list[Row]:
        found = []
        for name, g in run.cache.items():
            norms = zip(g.vjps.norm(dim=-1).tolist(), g.inputs.norm(dim=-1).tolist(), strict=True)
            for position, (vjp, x) in zip(run.positions(), norms, strict=True):
                found.append({**place_of(name), **position, "vjp_norm": vjp, "input_norm": x})
        return found

    return over_records(model, records, rows, weights=weights, layers=layers, **options)


@figure_of(vjp_norms, "Fig 5, 16, 17", "At which layers and tokens are the VJPs large?")
def plot_vjp_norms(frame: pd.DataFrame, norm: str = "vjp_norm") -> Figure:
    """Fig 5, 16 and 17: mean norm by layer and segment, a panel for each weight.

    Args:
        frame: From :func:`vjp_norms`.
        norm: ``"vjp_norm"`` or ``"input_norm"``.
    """
    return over_layers(frame, norm, "Mean norm by layer and segment (Fig 5)")
