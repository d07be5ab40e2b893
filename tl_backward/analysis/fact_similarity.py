"""Similarity of the gradients of different facts (an open question of the paper)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import trange

from tl_backward.analysis.over_records import Records, place_of, run_facts
from tl_backward.analysis.registry import figure_of
from tl_backward.capture.bos import prepends_bos
from tl_backward.factors import GradientFactors
from tl_backward.sites import Model

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure


def fact_similarity(
    model: Model,
    records: Records,
    *,
    weights: str | Iterable[str] = ("W_in", "W_out"),
    layers: int | Iterable[int] | None = None,
    batch_size: int = 8,
    prepend_bos: bool | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Cosine between the gradients of every pair of facts, from inner products of their factors.

    ``<G, H> = sum_ij <x_i, y_j> <delta_i, epsilon_j>``, so no gradient is formed. The factors of
    all records stay in memory: about ``tokens x (d_in + d_out)`` numbers per record, weight and
    layer.

    Args:
        model: A TransformerLens model in eval mode, with a tokenizer.
        records: Facts in the schema of CounterFact. Records with the same ``relation_id`` share a
            relation; records without one share none.
        weights: Kinds of weights.
        layers: Layers; negative ones count from the last. Default: all.
        batch_size: Number of prompts to run at once.
        prepend_bos: Whether prompts begin with a BOS token. Default: as the tokenizer does.
        progress: Whether to show a progress bar.

    Returns:
        One row per weight, layer and pair of records, ``record < other_record``:
        ``same_relation``; ``same_target``: whether the edits' targets have the same first token;
        ``cosine``: of the two gradients; ``input_cosine`` and ``vjp_cosine``: of the last tokens'
        ``x_n`` and ``delta_n``, whose product is the cosine of the last tokens' terms;
        ``prepend_bos``: whether prompts began with a BOS token.

    Raises:
        ValueError: If there are fewer than two records, or one is malformed.

    Example:
        >>> table = fact_similarity(model, records)
        >>> table.groupby(["weight", "layer", "same_relation"])["cosine"].mean()
    """
    import pandas as pd

    records = list(records)
    if len(records) < 2:
        raise ValueError("records must hold at least two records to compare")
    bos = prepends_bos(model, prepend_bos)
    gradients: dict[str, list[GradientFactors]] = {}
    targets: list[int] = []
    relations: list[str | None] = []
    for start in trange(0, len(records), batch_size, desc="facts", disable=not progress):
        batch = records[start : start + batch_size]
        runs = run_facts(model, batch, weights=weights, layers=layers, prepend_bos=bos)
        for run in runs:
            targets.append(run.target)
            relations.append(run.fact.relation)
            for name, g in run.cache.items():
                gradients.setdefault(name, []).append(GradientFactors(g.inputs, g.vjps))
    one, other = torch.triu_indices(len(records), len(records), offset=1)
    pairs = {
        "record": one,
        "other_record": other,
        "same_relation": [
            relations[a] is not None and relations[a] == relations[b]
            for a, b in zip(one.tolist(), other.tolist(), strict=True)
        ],
        "same_target": [
            targets[a] == targets[b] for a, b in zip(one.tolist(), other.tolist(), strict=True)
        ],
    }
    frames = [
        pd.DataFrame(
            {
                **place_of(name),
                **pairs,
                "cosine": _gradient_cosines(each)[one, other],
                "input_cosine": _cosines([g.inputs[-1] for g in each])[one, other],
                "vjp_cosine": _cosines([g.vjps[-1] for g in each])[one, other],
                "prepend_bos": bos,
            }
        )
        for name, each in gradients.items()
    ]
    return pd.concat(frames, ignore_index=True)


@figure_of(
    fact_similarity,
    "Open: other facts",
    "Do the gradients of related facts resemble each other?",
    resumes=False,
)
def plot_fact_similarity(frame: pd.DataFrame, value: str = "cosine") -> Figure:
    """Mean over pairs with the same relation, and over the other pairs, by layer.

    Args:
        frame: From :func:`fact_similarity`.
        value: The column to show.
    """
    import plotly.express as px

    means = frame.groupby(["weight", "layer", "same_relation"], sort=False)[value].mean()
    return px.line(
        means.reset_index(),
        x="layer",
        y=value,
        color="same_relation",
        facet_col="weight",
        markers=True,
        title=f"Mean {value.replace('_', ' ')} between the gradients of two facts",
    )


def _gradient_cosines(gradients: list[GradientFactors]) -> Float[Tensor, "fact fact"]:
    """Cosines from the inner products of all tokens of all facts, summed per fact."""
    x, vjps = (
        torch.cat(rows).double()
        for rows in ([g.inputs for g in gradients], [g.vjps for g in gradients])
    )
    fact = torch.arange(len(gradients)).repeat_interleave(
        torch.tensor([len(g.vjps) for g in gradients])
    )
    products = (x @ x.mT) * (vjps @ vjps.mT)
    rows = products.new_zeros(len(gradients), len(x)).index_add_(0, fact.to(x.device), products)
    inner = rows.new_zeros(len(gradients), len(gradients)).index_add_(1, fact.to(x.device), rows)
    norms = inner.diagonal().sqrt()
    return (inner / norms / norms.unsqueeze(1)).cpu()


def _cosines(vectors: list[Tensor]) -> Float[Tensor, "fact fact"]:
    units = torch.nn.functional.normalize(torch.stack(vectors).double(), dim=-1)
    return (units @ units.mT).cpu()
