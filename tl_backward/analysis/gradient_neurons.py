"""Similarity of a gradient's neurons to the vectors that span them (Fig 7-9)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

from tl_backward.analysis.figures import over_layers
from tl_backward.analysis.over_records import FactRun, Records, Row, over_records, place_of
from tl_backward.analysis.registry import figure_of
from tl_backward.lens import BackwardLogitLens
from tl_backward.sites import Model, weight_sites
from tl_backward.sites.kinds import reads_stream

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure


def gradient_neurons(
    model: Model,
    records: Records,
    *,
    weights: str | Iterable[str] = ("W_in", "W_out"),
    layers: int | Iterable[int] | None = None,
    n_neurons: int = 5,
    top_k: int = 100,
    **options: Any,
) -> pd.DataFrame:
    """Compare a gradient's neurons with their spanning vectors, also in the vocabulary.

    Neuron ``j`` of ``dL/dW_in`` is ``sum_i delta_i[j] x_i``, and neuron ``j`` of ``dL/dW_out`` is
    ``sum_i x_i[j] delta_i`` (Eq 9, 10): a combination of one vector per token. The paper's Fig 7 to
    9 and Tables 2 to 5 compare neurons with these vectors, by cosine and by the overlap of their
    100 most probable tokens. This experiment takes the neurons with the largest norm.

    Args:
        model: A TransformerLens model in eval mode, with a tokenizer.
        records: Facts in the schema of CounterFact.
        weights: Kinds of weights.
        layers: Layers; negative ones count from the last. Default: all.
        n_neurons: Number of neurons per gradient.
        top_k: Number of tokens to compare at each end.
        options: ``batch_size``, ``path``, ``prepend_bos`` and ``progress``, as in
            :func:`over_records`.

    Returns:
        One row per record, weight, layer, neuron and position: ``neuron`` (its index),
        ``neuron_norm, position, segment``, ``coefficient`` (of the position's vector in the
        neuron), ``vector_norm``, ``cosine`` (of neuron and vector), and the overlaps as fractions
        of ``top_k``: ``top_overlap`` and ``bottom_overlap`` of their most and least probable
        tokens, and ``opposite_overlap`` of the neuron's most probable tokens with the vector's
        least probable ones, which is large if the coefficient is negative. A zero vector has no
        cosine and no overlaps.

    Raises:
        ValueError: If ``n_neurons`` or ``top_k`` is out of range.

    Example:
        >>> table = gradient_neurons(model, records)
        >>> table[table["coefficient"] > 0].groupby("segment")["top_overlap"].mean()
    """
    for site in weight_sites(model, weights, layers):
        n = site.d_out if reads_stream(site.kind) else site.d_in
        if not 1 <= n_neurons <= n:
            raise ValueError(f"n_neurons must be in [1, {n}] for {site.name}, got {n_neurons}")
    lens = BackwardLogitLens(model)

    def rows(run: FactRun) -> list[Row]:
        return [
            {**place_of(name), **position, **row}
            for name in run.cache
            for neuron in _neurons(lens, run, name, n_neurons, top_k)
            for position, row in zip(run.positions(), neuron, strict=True)
        ]

    return over_records(model, records, rows, weights=weights, layers=layers, **options)


@figure_of(
    gradient_neurons, "Fig 7-9", "Do a gradient's neurons read like the vectors that span it?"
)
def plot_gradient_neurons(frame: pd.DataFrame) -> Figure:
    """Fig 7 to 9: overlap of neurons and spanning vectors by layer.

    A vector with a negative coefficient is compared by its opposite end.

    Args:
        frame: From :func:`gradient_neurons`.
    """
    same_end = frame["top_overlap"].where(frame["coefficient"] > 0, frame["opposite_overlap"])
    title = "Overlap of the top tokens of gradient neurons and their spanning vectors (Fig 7-9)"
    return over_layers(frame.assign(overlap=same_end), "overlap", title)


def _neurons(
    lens: BackwardLogitLens, run: FactRun, name: str, n_neurons: int, top_k: int
) -> list[list[Row]]:
    """One row per position for each of the largest neurons."""
    g = run.cache[name]
    vectors, coefficients = g.inputs, g.vjps
    if not reads_stream(place_of(name)["weight"]):
        vectors, coefficients = coefficients, vectors
    norms, indices = _neuron_norms(vectors, coefficients).topk(n_neurons)
    chosen = coefficients[:, indices]
    neurons = chosen.mT @ vectors
    read = lens.read(torch.cat([neurons, vectors]), top_k=top_k)
    (top, vector_top), (bottom, vector_bottom) = (
        (ids[:n_neurons], ids[n_neurons:]) for ids in (read.top_ids, read.bottom_ids)
    )
    columns = {
        "coefficient": chosen.mT,
        "vector_norm": vectors.norm(dim=-1).expand(n_neurons, -1),
        "cosine": _unit(neurons) @ _unit(vectors).mT,
        "top_overlap": overlaps(top, vector_top),
        "bottom_overlap": overlaps(bottom, vector_bottom),
        "opposite_overlap": overlaps(top, vector_bottom),
    }
    values = {column: value.tolist() for column, value in columns.items()}
    is_zero = read.zero_mask[n_neurons:].tolist()
    return [
        [
            {"neuron": int(indices[j]), "neuron_norm": float(norms[j])}
            | {
                column: None if zero and column.endswith(("cosine", "overlap")) else value[j][i]
                for column, value in values.items()
            }
            for i, zero in enumerate(is_zero)
        ]
        for j in range(n_neurons)
    ]


def _neuron_norms(
    vectors: Float[Tensor, "n d"], coefficients: Float[Tensor, "n neurons"]
) -> Float[Tensor, "neurons"]:
    """The norm of every neuron, from inner products of the vectors."""
    gram = einsum(vectors, vectors, "row d, other d -> row other")
    pattern = "row neuron, row other, other neuron -> neuron"
    return einsum(coefficients, gram, coefficients, pattern).clamp(min=0).sqrt()


def overlaps(one: Int[Tensor, "a k"], other: Int[Tensor, "b k"]) -> Float[Tensor, "a b"]:
    """The fraction of shared tokens for every pair of lists."""
    shares = [[len(set(x) & set(y)) / len(x) for y in other.tolist()] for x in one.tolist()]
    return torch.tensor(shares, dtype=torch.float64)


def _unit(vectors: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    return torch.nn.functional.normalize(vectors, dim=-1)
