"""The effect of a gradient step on the output for the same input (Eq 17, 18)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_backward.analysis.figures import over_layers
from tl_backward.analysis.over_records import FactRun, Records, Row, over_records, place_of
from tl_backward.analysis.registry import figure_of
from tl_backward.sites import Model
from tl_backward.sites.kinds import READ_BY_VJP

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure


def step_effect(
    model: Model,
    records: Records,
    *,
    weights: str | Iterable[str] = ("W_in", "W_out"),
    layers: int | Iterable[int] | None = None,
    **options: Any,
) -> pd.DataFrame:
    """The effect of a step on one weight's gradient on its output for the same inputs.

    After a step of size ``eta`` (negative for descent), the token's own term changes the output for
    ``x_i`` by ``eta |x_i|^2 delta_i`` (Eq 17 for all neurons of W_in, and Eq 18 summed over the
    neurons of W_out). Each other token's term adds ``eta <x_i, x_j> delta_j``, which the paper
    ignores.

    Args:
        model: A TransformerLens model in eval mode, with a tokenizer.
        records: Facts in the schema of CounterFact.
        weights: Kinds of weights.
        layers: Layers; negative ones count from the last. Default: all.
        options: ``batch_size``, ``path``, ``prepend_bos`` and ``progress``, as in
            :func:`over_records`.

    Returns:
        One row per record, weight, layer and position: ``position, segment``; ``own_change`` and
        ``change``: norm of the output's change from the token's own term, and from all terms, for
        ``eta = 1``; ``cosine``: cosine between the two changes; ``neurons``: effective number of
        neurons in the own change, ``(sum_j c_j)^2 / sum_j c_j^2``, where neuron ``j`` has the share
        ``c_j = delta_i[j]^2`` for W_in, W_gate etc. (Eq 17) and ``c_j = x_i[j]^2`` for W_out and
        W_O (Eq 18). ``cosine`` is missing if a change is zero, ``neurons`` if all shares are.

    Example:
        >>> step_effect(model, records).query("segment == 'last'").groupby("layer").cosine.mean()
    """

    def rows(run: FactRun) -> list[Row]:
        found = []
        for name, g in run.cache.items():
            place = place_of(name)
            x, vjps = g.inputs, g.vjps
            own = x.square().sum(-1, keepdim=True) * vjps
            whole = (x @ x.mT) @ vjps
            cosine = torch.cosine_similarity(own, whole, dim=-1, eps=1e-30)
            shares = x if place["weight"] in READ_BY_VJP else vjps
            neurons = _participation(shares.square())
            norms = own.norm(dim=-1), whole.norm(dim=-1)
            for i, position in enumerate(run.positions()):
                changed = min(float(norm[i]) for norm in norms) > 0
                found.append(
                    {
                        **place,
                        **position,
                        "own_change": norms[0][i],
                        "change": norms[1][i],
                        "cosine": cosine[i] if changed else None,
                        "neurons": None if neurons[i].isnan() else neurons[i],
                    }
                )
        return found

    return over_records(model, records, rows, weights=weights, layers=layers, **options)


@figure_of(
    step_effect, "Eq 17, 18", "Does a token's own term explain what a step does to its output?"
)
def plot_step_effect(frame: pd.DataFrame, value: str = "cosine") -> Figure:
    """The effect of a step by layer and segment, a panel for each weight.

    Args:
        frame: From :func:`step_effect`.
        value: The column to show.
    """
    return over_layers(frame, value, f"Effect of a step on the same input: {value}")


def _participation(shares: Float[Tensor, "n neurons"]) -> Float[Tensor, "n"]:
    """The participation ratio: effective number of shares; nan if all are zero."""
    shares = shares / shares.sum(-1, keepdim=True)
    return 1 / shares.square().sum(-1)
