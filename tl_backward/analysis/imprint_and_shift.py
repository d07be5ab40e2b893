"""What a gradient's energy lies along, and what a step on it does (Eq 17, 18)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_backward.analysis.figures import over_layers
from tl_backward.analysis.over_records import FactRun, Records, Row, over_records, place_of
from tl_backward.lens_result import READ_BY_VJP
from tl_backward.sites import Model

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
    """How much of the gradient of W_out the forward pass shift has in common with it.

    The gradient is ``G = sum_i x_i^T delta_i``; the shift of the paper's section 6 is
    ``x_n^T D^T[t]``, with the target's embedding in the place of the last token's ``delta_n``. A
    share of energy along a matrix ``M`` is ``<G, M>^2 / (|G|^2 |M|^2)``: 1 where the two are
    parallel.

    Args:
        model: A TransformerLens model in eval mode, with a tokenizer.
        records: Facts in the schema of CounterFact.
        weights: ``"W_out"``, ``"W_O"`` or both: what writes to the residual stream.
        layers: Layers; negative ones count from the last. Default: all.
        options: ``batch_size``, ``path``, ``prepend_bos`` and ``progress``, as in
            :func:`over_records`.

    Returns:
        One row per record, weight, layer and position: ``position, segment``;
        ``term_energy``: ``|x_i|^2 |delta_i|^2 / |G|^2``, of the token's own term (the terms of all
        tokens add up to 1 where they are orthogonal); ``along_term``: the share of the energy of
        ``G`` along it; ``along_target``: along ``x_i^T D^T[t]``, which is the shift at the last
        token; ``target_cosine``: of ``delta_i`` with ``-D^T[t]``. Zero terms have no shares.

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
    W_U = model.W_U.detach()

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


def step_effect(
    model: Model,
    records: Records,
    *,
    weights: str | Iterable[str] = ("W_in", "W_out"),
    layers: int | Iterable[int] | None = None,
    **options: Any,
) -> pd.DataFrame:
    """What a step on the gradient of one weight does to its output for the same inputs.

    After a step of size ``eta`` (negative for descent) the output for ``x_i`` changes by
    ``eta |x_i|^2 delta_i`` (Eq 17 for all neurons of W_in, and Eq 18 summed over those of W_out) on
    account of the token's own term. The terms of the other tokens add ``eta <x_i, x_j> delta_j``
    each, which the paper leaves aside.

    Args:
        model: A TransformerLens model in eval mode, with a tokenizer.
        records: Facts in the schema of CounterFact.
        weights: Kinds of weights.
        layers: Layers; negative ones count from the last. Default: all.
        options: ``batch_size``, ``path``, ``prepend_bos`` and ``progress``, as in
            :func:`over_records`.

    Returns:
        One row per record, weight, layer and position: ``position, segment``; ``own_change`` and
        ``change``: the norms of the change of the output by the token's own term, and by all, for
        ``eta = 1``; ``cosine``: between these two; ``neurons``: among how many neurons the own
        change is spread, ``(sum_j c_j)^2 / sum_j c_j^2`` with ``c_j`` the neuron's share of it:
        ``delta_i[j]^2`` for W_in, W_gate and the like (Eq 17), ``x_i[j]^2`` for W_out and W_O
        (Eq 18). Where a change is zero, there is no cosine, and where its shares are, no
        ``neurons``.

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


def plot_shift_energy(frame: pd.DataFrame, value: str = "along_target") -> Figure:
    """Mean share of the gradient's energy over the layers, by segment.

    Args:
        frame: From :func:`shift_energy`.
        value: Which of its columns.
    """
    return over_layers(frame, value, f"Gradient of W_out: {value.replace('_', ' ')}")


def plot_step_effect(frame: pd.DataFrame, value: str = "cosine") -> Figure:
    """The effect of a step over the layers, by segment; a panel for each weight.

    Args:
        frame: From :func:`step_effect`.
        value: Which of its columns.
    """
    return over_layers(frame, value, f"Effect of a step on the same input: {value}")


def _participation(shares: Float[Tensor, "n neurons"]) -> Float[Tensor, "n"]:
    """The number of equal shares that are as concentrated as these; nan where all are zero."""
    shares = shares / shares.sum(-1, keepdim=True)
    return 1 / shares.square().sum(-1)
