"""The smallest learning rate at which an edit succeeds, and its cost (Fig 26)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_backward.analysis.over_records import FactRun, Records, Row, over_records, place_of
from tl_backward.analysis.registry import figure_of
from tl_backward.capture.bos import prepends_bos
from tl_backward.editing._step_search import Step, smallest_step
from tl_backward.editing.runs import WholeRun
from tl_backward.editing.target_terms import TargetTerms
from tl_backward.editing.weight_edit import WeightEdit
from tl_backward.evaluation.perplexity import perplexity
from tl_backward.factors import GradientFactors
from tl_backward.sites import Model, unembedding, weight_sites

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure

ADAM_EPS = 1e-8
FIRST_GUESS = 0.05
"""Norm of the first update to try, relative to the weight's norm."""

METHODS = ("shift", "sgd", "adam")


def smallest_edit(
    model: Model,
    records: Records,
    *,
    methods: Iterable[str] = METHODS,
    layers: int | Iterable[int] | None = None,
    margin: float = 0.1,
    texts: Sequence[str] | None = None,
    prepend_bos: bool | None = None,
    **options: Any,
) -> pd.DataFrame:
    """The smallest step on W_out that makes the target the prediction, by layer and method.

    The paper's Fig 26 shows this learning rate and the perplexity after the edit. ``"shift"`` is
    the forward pass shift ``x_n^T D^T[t]``, ``"sgd"`` the step ``-G``, and ``"adam"`` Adam's first
    step, ``-G / (|G| + 1e-8)`` elementwise, each times the learning rate. The three rates have
    different units; compare the norms of the updates.

    Args:
        model: A TransformerLens model in eval mode, with a tokenizer.
        records: Facts in the schema of CounterFact.
        methods: Some of these three.
        layers: Layers; negative ones count from the last. Default: every fifth, and the last.
        margin: Required distance of the target's logit above all others, in nats.
        texts: Texts whose perplexity to measure before and after each edit. Default: none, which is
            much faster.
        prepend_bos: Whether prompts, and ``texts``, begin with a BOS token. Default: as the
            tokenizer does.
        options: ``batch_size``, ``path`` and ``progress``, as in :func:`over_records`.

    Returns:
        One row per record, layer and method: ``lr``: the smallest learning rate found, to about 1 %
        (none if no rate succeeds, 0 if the model already predicts the target); ``update_norm`` and
        ``relative_norm``: Frobenius norm of the update at that rate, absolute and relative to the
        weight's norm; ``gap``: distance of the target's logit above all others, in nats; with
        texts, ``perplexity_before`` and ``perplexity``.

    Raises:
        ValueError: For another method.

    Example:
        >>> smallest_edit(model, records, layers=(10, 20, -1)).groupby("layer").lr.median()
    """
    methods = list(methods)
    if not methods or not set(methods) <= set(METHODS):
        raise ValueError(f"methods must be from {', '.join(METHODS)}, got {methods!r}")
    n_layers = model.cfg.n_layers
    layers = {*range(0, n_layers, 5), n_layers - 1} if layers is None else layers
    sites = weight_sites(model, "W_out", layers)
    norms = {site.name: float(site.parameter.detach().norm()) for site in sites}
    W_U = unembedding(model).detach()
    bos = prepends_bos(model, prepend_bos)
    before = None if texts is None else float(perplexity(model, texts, prepend_bos=bos))

    def rows(run: FactRun) -> list[Row]:
        tokens = torch.as_tensor(run.cache.tokens)
        terms = TargetTerms(model, tokens.tolist(), run.target, -1, "first", None)
        whole = WholeRun(model, terms.batch)

        def row_and_edit(name: str, g: GradientFactors, method: str) -> tuple[Row, WeightEdit]:
            update = _update(method, g, W_U[:, run.target])
            unit = WeightEdit(model, {name: _restricted_to(update, g.inputs)})

            def gaps(sizes: Sequence[float]) -> list[float]:
                edits = [size * unit for size in sizes]
                return terms.gaps(whole.edited_logits(edits, terms.places)).squeeze(1).tolist()

            norm = float(update.norm())
            step = Step(0.0, *gaps([0.0]))
            if step.gap <= 0:
                step = smallest_step(gaps, FIRST_GUESS * norms[name] / norm, margin)
            succeeds = step.gap >= margin or step.size == 0
            row: Row = {
                **place_of(name),
                "method": method,
                "lr": step.size if succeeds else None,
                "update_norm": step.size * norm if succeeds else None,
                "relative_norm": step.size * norm / norms[name] if succeeds else None,
                "gap": step.gap,
            }
            return row, step.size * WeightEdit(model, {name: _factors(update)})

        each = [
            row_and_edit(name, g, method) for name, g in run.cache.items() for method in methods
        ]
        if texts is not None:
            edits = [edit for _, edit in each]
            values = perplexity(model, texts, edits, prepend_bos=bos).tolist()
            for (row, _), after in zip(each, values, strict=True):
                row |= {
                    "perplexity_before": before,
                    "perplexity": None if row["lr"] is None else after,
                }
        return [row for row, _ in each]

    return over_records(
        model, records, rows, weights="W_out", layers=layers, prepend_bos=bos, **options
    )


@figure_of(
    smallest_edit,
    "Fig 26",
    "How large must an edit be to succeed, layer by layer?",
    options=("texts",),
)
def plot_smallest_edit(frame: pd.DataFrame, value: str = "relative_norm") -> Figure:
    """Fig 26: median over records by layer, a line for each method.

    Args:
        frame: From :func:`smallest_edit`.
        value: The column to show: a step's size, or ``"perplexity"``.
    """
    import plotly.express as px

    medians = frame.groupby(["method", "layer"], sort=False)[value].median().reset_index()
    title = f"Smallest edit of W_out that succeeds: median {value.replace('_', ' ')} (Fig 26)"
    return px.line(
        medians, x="layer", y=value, color="method", log_y=True, markers=True, title=title
    )


def _update(
    method: str, g: GradientFactors, target: Float[Tensor, "d_out"]
) -> GradientFactors | Float[Tensor, "d_in d_out"]:
    """The update of W_out at a learning rate of 1."""
    if method == "shift":
        return GradientFactors(g.inputs[-1:], target.unsqueeze(0))
    if method == "sgd":
        return -1 * g
    dense = g.dense()
    return -dense / (dense.abs() + ADAM_EPS)


def _factors(update: GradientFactors | Float[Tensor, "d_in d_out"]) -> GradientFactors:
    if isinstance(update, GradientFactors):
        return update
    return GradientFactors(torch.eye(len(update), dtype=update.dtype), update.cpu())


def _restricted_to(
    update: GradientFactors | Float[Tensor, "d_in d_out"], inputs: Float[Tensor, "n d_in"]
) -> GradientFactors:
    """An update of rank ``n`` with the same effect on these inputs."""
    if isinstance(update, GradientFactors):
        return update
    return GradientFactors(torch.linalg.pinv(inputs).mT, inputs @ update)
