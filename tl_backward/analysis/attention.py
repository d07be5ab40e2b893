"""Gradients of attention matrices, head by head (an open question of the paper)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tl_backward.analysis.over_records import FactRun, Records, Row, over_records, place_of
from tl_backward.analysis.registry import figure_of
from tl_backward.factors import GradientFactors
from tl_backward.lens import BackwardLogitLens
from tl_backward.sites import Model
from tl_backward.sites.kinds import READ_BY_INPUT

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure

ATTENTION = ("W_Q", "W_K", "W_V", "W_O")


def attention_heads(
    model: Model,
    records: Records,
    *,
    weights: str | Iterable[str] = ATTENTION,
    layers: int | Iterable[int] | None = None,
    **options: Any,
) -> pd.DataFrame:
    """Rank, energy and readout of the gradient of every attention head.

    The paper leaves open whether attention matrices share the low rank and the readout of MLPs. A
    head's gradient is ``sum_i x_i^T delta_i`` with the head's part of the VJPs (W_Q, W_K, W_V,
    which are read by their inputs) or of the inputs (W_O, which is read by its VJPs, shared by all
    heads). Its direction in the vocabulary is its leading singular vector in the residual stream,
    with the sign of its component in the ``x_i`` or ``delta_i`` of the token with the largest term.

    Args:
        model: A TransformerLens model in eval mode, with a tokenizer.
        records: Facts in the schema of CounterFact.
        weights: Some of the four attention matrices.
        layers: Layers; negative ones count from the last. Default: all.
        options: ``batch_size``, ``path``, ``prepend_bos`` and ``progress``, as in
            :func:`over_records`.

    Returns:
        One row per record, weight, layer and head (key-value head if heads share keys and values):
        ``n_tokens``; ``rank`` (with the threshold of ``torch.linalg.matrix_rank``); ``energy``: the
        head's share of the weight's squared norm; ``leading_energy``: the share of the largest
        singular value in the head's squared norm; ``position, segment``: the token with the largest
        term; ``d_vocab``; ``target_rank``, ``original_rank``, ``answer_rank``: ranks in the readout
        of the leading singular vector, 0 is the most probable token. A zero gradient has ``rank`` 0
        and no other values.

    Raises:
        ValueError: For other weights.

    Example:
        >>> heads = attention_heads(model, records, weights="W_O")
        >>> heads.groupby(["layer", "head"])["energy"].mean().nlargest(5)
    """
    weights = [weights] if isinstance(weights, str) else list(weights)
    if not weights or not set(weights) <= set(ATTENTION):
        raise ValueError(f"weights must be from {', '.join(ATTENTION)}, got {weights!r}")
    lens = BackwardLogitLens(model)
    d_head = int(model.cfg.d_head)

    def rows(run: FactRun) -> list[Row]:
        found, vectors = [], []
        for name, g in run.cache.items():
            place = place_of(name)
            by_input = place["weight"] in READ_BY_INPUT
            whole = g.norm().square()
            for head, g_head in enumerate(_heads(g if by_input else g.T, d_head)):
                U, S, _ = g_head.svd()
                row: Row = {**place, "head": head, "n_tokens": len(run.segments), "rank": 0}
                vectors.append(torch.zeros_like(U[:, 0]))
                if S[0] > 0:
                    largest = int(_term_norms(g_head).argmax())
                    vectors[-1] = U[:, 0] * (U[:, 0] @ g_head.inputs[largest].to(U)).sign()
                    row |= {
                        "rank": g_head.rank(),
                        "energy": S.square().sum() / whole,
                        "leading_energy": S[0].square() / S.square().sum(),
                        **run.positions()[largest],
                    }
                found.append(row)
        tokens = [run.target, run.original, run.answer]
        read = lens.read(torch.stack(vectors), targets=tokens, top_k=1)
        for row, is_zero, ranks in zip(
            found, read.zero_mask.tolist(), read.target_ranks.tolist(), strict=True
        ):
            names = ("target_rank", "original_rank", "answer_rank")
            row |= {"d_vocab": int(model.cfg.d_vocab)}
            row |= dict(zip(names, [None] * 3 if is_zero else ranks, strict=True))
        return found

    return over_records(model, records, rows, weights=weights, layers=layers, **options)


@figure_of(
    attention_heads, "Open: attention", "Do attention matrices share the low rank and the reading?"
)
def plot_attention_heads(frame: pd.DataFrame, value: str = "energy", weight: str = "W_O") -> Figure:
    """Mean over records by layer and head.

    Args:
        frame: From :func:`attention_heads`.
        value: The column to show.
        weight: The weight to show.
    """
    import plotly.express as px

    here = frame[frame["weight"] == weight]
    means = here.pivot_table(index="layer", columns="head", values=value)
    return px.imshow(
        means,
        origin="lower",
        aspect="auto",
        title=f"Gradient of {weight} by head: mean {value.replace('_', ' ')}",
        labels={"color": value},
    )


def _heads(g: GradientFactors, d_head: int) -> list[GradientFactors]:
    """The gradient of each head, with the residual stream on the input side."""
    return [GradientFactors(g.inputs, part) for part in g.vjps.split(d_head, dim=-1)]


def _term_norms(g: GradientFactors) -> Tensor:
    return g.inputs.norm(dim=-1) * g.vjps.norm(dim=-1)
