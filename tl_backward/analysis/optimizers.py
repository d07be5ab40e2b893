"""Updates that optimizers compute from low-rank gradients (an open question of the paper)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from tl_backward.analysis.gradient_neurons import overlaps
from tl_backward.analysis.over_records import FactRun, Records, Row, over_records, place_of
from tl_backward.analysis.registry import figure_of
from tl_backward.capture import run_with_backward_cache
from tl_backward.editing.weight_edit import WeightEdit
from tl_backward.factors import GradientFactors
from tl_backward.lens import BackwardLogitLens
from tl_backward.sites import Model, weight_sites
from tl_backward.sites.kinds import writes_stream

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure

Matrix: TypeAlias = Float[Tensor, "d_in d_out"]

OPTIMIZERS: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = {
    "sgd": lambda weights: torch.optim.SGD(weights, lr=1),
    "momentum": lambda weights: torch.optim.SGD(weights, lr=1, momentum=0.9),
    "adam": lambda weights: torch.optim.Adam(weights, lr=1),
    "sign": lambda weights: torch.optim.SGD(weights, lr=1),
}
"""Optimizers with a learning rate of 1; ``"sign"`` gets the sign of the gradient."""


def optimizer_updates(
    model: Model,
    records: Records,
    *,
    optimizers: Iterable[str] = tuple(OPTIMIZERS),
    weights: str | Iterable[str] = ("W_out",),
    layers: int | Iterable[int] | None = None,
    n_steps: int = 3,
    step_norm: float = 0.001,
    n_neurons: int = 5,
    top_k: int = 100,
    **options: Any,
) -> pd.DataFrame:
    """Rank, spectrum and readout of the updates of several optimizers.

    The paper studies raw gradients; SGD's first step is a multiple of one. Adam divides every entry
    by its own size, which destroys the low rank. Each optimizer takes some steps towards one fact,
    on all weights at once. Every step is scaled to the same norm in every weight, so the optimizers
    differ in direction only. Each update is compared with the raw gradient of its step.

    Args:
        model: A TransformerLens model in eval mode, with a tokenizer. It is left unchanged.
        records: Facts in the schema of CounterFact.
        optimizers: Some of ``"sgd"``, ``"momentum"`` (0.9), ``"adam"`` (torch's defaults) and
            ``"sign"`` (of the gradient).
        weights: Kinds of weights.
        layers: Layers; negative ones count from the last. Default: only three (a third and five
            sixths of the way up, and the last), as every update is formed densely and decomposed.
        n_steps: Number of steps.
        step_norm: Norm of each step, relative to the weight's norm.
        n_neurons: Number of neurons to read, by largest raw gradient.
        top_k: Number of tokens to compare at each end.
        options: ``batch_size``, ``path``, ``prepend_bos`` and ``progress``, as in
            :func:`over_records`.

    Returns:
        One row per record, optimizer, step (1 is the first), weight and layer: ``loss`` before the
        step, in nats; ``n_tokens``; ``rank`` of the update (with the threshold of
        ``torch.linalg.matrix_rank``); ``stable_rank``: squared norm over squared largest singular
        value; ``rank_90``: number of singular values that hold 90 % of the squared norm;
        ``cosine``: of the update with a descent step on the raw gradient; ``top_overlap`` and
        ``bottom_overlap``: the fraction of the raw gradient's ``top_k`` most and least probable
        tokens that the negated update shares, averaged over the neurons.

    Raises:
        ValueError: For another optimizer, or a number of steps below 1.

    Example:
        >>> table = optimizer_updates(model, records, layers=(10, 20, -1))
        >>> table.groupby(["optimizer", "step"])[["rank", "stable_rank", "bottom_overlap"]].median()
    """
    chosen = list(optimizers)
    if not chosen or not set(chosen) <= set(OPTIMIZERS):
        raise ValueError(f"optimizers must be from {', '.join(OPTIMIZERS)}, got {chosen!r}")
    if n_steps < 1:
        raise ValueError(f"n_steps must be at least 1, got {n_steps}")
    weights = [weights] if isinstance(weights, str) else list(weights)
    n_layers = model.cfg.n_layers
    layers = {n_layers // 3, 5 * n_layers // 6, n_layers - 1} if layers is None else layers
    sites = {site.name: site for site in weight_sites(model, weights, layers)}
    lengths = {
        name: step_norm * float(site.parameter.detach().norm()) for name, site in sites.items()
    }
    lens = BackwardLogitLens(model)

    def rows(run: FactRun) -> list[Row]:
        tokens = torch.as_tensor(run.cache.tokens)
        found = []
        for optimizer in chosen:
            cache = run.cache
            total = {name: torch.zeros_like(g.dense()) for name, g in cache.items()}
            directions = _Directions(optimizer, total)
            for step in range(1, n_steps + 1):
                if step > 1:
                    factors = {name: _as_factors(update) for name, update in total.items()}
                    _, cache = run_with_backward_cache(
                        model,
                        tokens.tolist(),
                        run.target,
                        weights=weights,
                        layers=layers,
                        fwd_hooks=WeightEdit(model, factors).fwd_hooks(),
                    )
                raw = {name: g.dense() for name, g in cache.items()}
                updates = directions(raw)
                for name, update in updates.items():
                    total[name] = total[name] + update * (lengths[name] / update.norm())
                    place = {"optimizer": optimizer, "step": step, **place_of(name)}
                    size = {"loss": cache.loss, "n_tokens": len(run.segments)}
                    by_vjp = writes_stream(place["weight"])
                    read = _compare(lens, raw[name], update, by_vjp, n_neurons, top_k)
                    found.append({**place, **size, **_spectrum(update), **read})
        return found

    return over_records(model, records, rows, weights=weights, layers=layers, **options)


@figure_of(
    optimizer_updates,
    "Open: optimizers",
    "What do optimizers do to the rank and the reading of an update?",
)
def plot_optimizer_updates(frame: pd.DataFrame, value: str = "stable_rank") -> Figure:
    """Median over records by layer, a line for each optimizer and a panel for each step.

    Args:
        frame: From :func:`optimizer_updates`.
        value: The column to show.
    """
    import plotly.express as px

    place = ["weight", "step", "optimizer", "layer"]
    medians = frame.groupby(place, sort=False)[value].median().reset_index()
    return px.line(
        medians,
        x="layer",
        y=value,
        color="optimizer",
        facet_col="step",
        facet_row="weight",
        markers=True,
        title=f"Updates of optimizers: median {value.replace('_', ' ')}",
    )


class _Directions:
    """The updates that a torch optimizer computes from successive gradients."""

    def __init__(self, optimizer: str, like: dict[str, Matrix]) -> None:
        self._weights = {name: torch.zeros_like(tensor) for name, tensor in like.items()}
        self._takes_sign = optimizer == "sign"
        self._optimizer = OPTIMIZERS[optimizer](list(self._weights.values()))

    def __call__(self, gradients: dict[str, Matrix]) -> dict[str, Matrix]:
        for name, weight in self._weights.items():
            weight.zero_()
            weight.grad = gradients[name].sign() if self._takes_sign else gradients[name]
        self._optimizer.step()
        return {name: weight.clone() for name, weight in self._weights.items()}


def _as_factors(update: Matrix) -> GradientFactors:
    return GradientFactors(torch.eye(len(update), dtype=update.dtype), update)


def _spectrum(update: Matrix) -> Row:
    values = torch.linalg.svdvals(update)
    squares = values.square()
    threshold = max(update.shape) * torch.finfo(values.dtype).eps * values[0]
    held = squares.cumsum(0) / squares.sum()
    return {
        "rank": int((values > threshold).sum()),
        "stable_rank": squares.sum() / squares[0],
        "rank_90": int((held < 0.9).sum()) + 1,
    }


def _compare(
    lens: BackwardLogitLens,
    raw: Matrix,
    update: Matrix,
    by_vjp: bool,
    n_neurons: int,
    top_k: int,
) -> Row:
    """Compare the update with the raw gradient, as matrices and by their neurons' readouts."""
    raw_neurons, update_neurons = (raw, -update) if by_vjp else (raw.mT, -update.mT)
    largest = raw_neurons.norm(dim=-1).topk(n_neurons).indices
    read = lens.read(torch.cat([raw_neurons[largest], update_neurons[largest]]), top_k=top_k)
    columns = {
        "top_overlap": overlaps(*read.top_ids.split(n_neurons)).diagonal().mean(),
        "bottom_overlap": overlaps(*read.bottom_ids.split(n_neurons)).diagonal().mean(),
    }
    cosine = torch.cosine_similarity(raw.flatten(), -update.flatten(), dim=0)
    return {"cosine": cosine, **columns}
