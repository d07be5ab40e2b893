"""The VJP at the start of the backward pass (Lemma 5.1)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_backward.analysis.over_records import FactRun, Records, Row, over_records
from tl_backward.analysis.registry import figure_of
from tl_backward.sites import Model, unembedding

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure


def output_vjp(model: Model, records: Records, **options: Any) -> pd.DataFrame:
    """The share of the target's embedding in the VJP at the output (Lemma 5.1).

    The VJP at the final norm's output is ``v = sum_k delta[k] D^T[k]``, with ``delta`` the VJP at
    the logits (Eq 4). According to the paper, the target's term, ``-(1 - p[t]) D^T[t]``, dominates.
    The paper ignores the final norm, below which the VJP has another direction.

    Args:
        model: A TransformerLens model in eval mode, with a tokenizer.
        records: Facts in the schema of CounterFact.
        options: ``batch_size``, ``path``, ``prepend_bos`` and ``progress``, as in
            :func:`over_records`.

    Returns:
        One row per record, for its last token. ``target_probability``. ``target_coefficient`` and
        ``answer_coefficient``: ``delta`` of the target and of the model's prediction.
        ``target_share``, ``answer_share`` and ``other_share``: shares of these two and of all other
        tokens in ``v`` (``<term, v> / |v|^2``), which add up to 1; if target and prediction are the
        same token, it counts as the target. ``target_norm_share``: ``|delta[t] D^T[t]|`` over the
        sum of the norms of all terms. ``output_cosine`` and ``residual_cosine``: cosines of
        ``-D^T[t]`` with ``v`` and with the VJP at the end of the residual stream, below the norm.
        ``output_norm`` and ``residual_norm``: norms of these two VJPs. ``norm_cosine``: cosine
        between them. ``output_rank`` and ``residual_rank``: number of tokens whose embedding has a
        larger inner product with the VJP than the target's, ``d_vocab - 1`` if none has a smaller
        one; this is the logit lens without the final norm.

    Example:
        >>> output_vjp(model, records)[["output_cosine", "residual_cosine"]].describe()
    """
    W_U = unembedding(model).detach()
    embedding_norms = W_U.norm(dim=0)
    end = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"

    def rows(run: FactRun) -> list[Row]:
        delta = run.cache["unembed.W_U"].vjps[-1].to(W_U)
        residual = run.cache.residual.vjps[end][-1].to(W_U)
        v, target = W_U @ delta, W_U[:, run.target]
        shares = {
            name: float(delta[token] * (W_U[:, token] @ v) / v.square().sum())
            for name, token in (("target", run.target), ("answer", run.answer))
        }
        if run.answer == run.target:
            shares["answer"] = 0.0
        norms = delta.abs() * embedding_norms
        return [
            {
                "target_probability": (-run.cache.loss).exp(),
                "target_coefficient": delta[run.target],
                "answer_coefficient": delta[run.answer],
                "target_share": shares["target"],
                "answer_share": shares["answer"],
                "other_share": 1 - shares["target"] - shares["answer"],
                "target_norm_share": norms[run.target] / norms.sum(),
                "output_cosine": torch.cosine_similarity(v, -target, dim=0),
                "residual_cosine": torch.cosine_similarity(residual, -target, dim=0),
                "norm_cosine": torch.cosine_similarity(v, residual, dim=0),
                "output_norm": v.norm(),
                "residual_norm": residual.norm(),
                "output_rank": _rank(W_U, v, run.target),
                "residual_rank": _rank(W_U, residual, run.target),
            }
        ]

    return over_records(model, records, rows, weights=("W_O", "W_U"), **options)


@figure_of(
    output_vjp,
    "Lemma 5.1",
    "Does the target's embedding dominate the VJP that the backward pass starts from?",
)
def plot_output_vjp(frame: pd.DataFrame) -> Figure:
    """Cosine of the VJP with the target's negated embedding, above and below the final norm.

    Args:
        frame: From :func:`output_vjp`.
    """
    import plotly.express as px

    places = {
        "output_cosine": "output of the norm",
        "residual_cosine": "end of the residual stream",
    }
    cosines = frame.rename(columns=places).melt(
        id_vars=["record", "target_probability"],
        value_vars=list(places.values()),
        var_name="VJP at the",
        value_name="cosine",
    )
    return px.scatter(
        cosines,
        x="target_probability",
        y="cosine",
        color="VJP at the",
        log_x=True,
        title="Cosine of the VJP with the target's negated embedding (Lemma 5.1)",
    )


def _rank(W_U: Float[Tensor, "d_model d_vocab"], vector: Tensor, token: int) -> int:
    logits = vector @ W_U
    return int((logits > logits[token]).sum())
