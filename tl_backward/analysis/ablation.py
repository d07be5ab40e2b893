"""Ablating MLPs or attention: does the pattern need them (an open question)?"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tl_backward.analysis.figures import over_layers
from tl_backward.analysis.over_records import Records
from tl_backward.analysis.registry import figure_of
from tl_backward.analysis.target_rank import target_rank
from tl_backward.sites import Model, weight_sites
from tl_backward.sites.kinds import READ_BY_VJP

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure

CONDITIONS = ("none", "mlp", "mlp vjp", "attention", "attention vjp")
READERS = {"mlp": ("W_in", "W_gate"), "attention": ("W_Q", "W_K", "W_V")}
WRITERS = {"mlp": "hook_mlp_out", "attention": "hook_attn_out"}


def ablation(
    model: Model,
    records: Records,
    *,
    conditions: Iterable[str] = CONDITIONS,
    ablated: int | Iterable[int] | None = None,
    weights: str | Iterable[str] = READ_BY_VJP,
    path: str | Path | None = None,
    **options: Any,
) -> pd.DataFrame:
    """Ranks of the target with MLPs or attention ablated in the forward or backward pass.

    The paper's evidence is correlational. If MLPs cause the pattern, ablating them removes it,
    unless attention takes over.

    Args:
        model: A TransformerLens model in eval mode, with a tokenizer.
        records: Facts in the schema of CounterFact.
        conditions: ``"none"``: no ablation. ``"mlp"``, ``"attention"``: their outputs are zero.
            ``"mlp vjp"``, ``"attention vjp"``: the forward pass is unchanged, and no VJP flows
            through them.
        ablated: Layers to ablate; negative ones count from the last. Default: all.
        weights: Kinds of weights to read, as in :func:`target_rank`.
        path: A folder with one folder of :func:`sweep` per condition.
        options: As in :func:`target_rank`.

    Returns:
        The table of :func:`target_rank` for each condition, with a column ``condition``.

    Raises:
        ValueError: For another condition.

    Example:
        >>> table = ablation(model, records).query("segment == 'last'")
        >>> table.groupby(["condition", "weight", "layer"])["target_rank"].median()
    """
    import pandas as pd

    conditions = list(conditions)
    if not conditions or not set(conditions) <= set(CONDITIONS):
        raise ValueError(f"conditions must be from {', '.join(CONDITIONS)}, got {conditions!r}")
    frames = []
    for condition in conditions:
        part, _, vjp = condition.partition(" ")
        hooks = [] if part == "none" else _hooks(model, part, bool(vjp), ablated)
        ablating: dict[str, Any] = {"bwd_hooks" if vjp else "fwd_hooks": hooks}
        frame = target_rank(
            model,
            records,
            weights=weights,
            path=None if path is None else Path(path, condition.replace(" ", "_")),
            **ablating,
            **options,
        )
        frame.insert(0, "condition", condition)
        frames.append(frame)
    return pd.concat(frames, ignore_index=True)


@figure_of(ablation, "Open: are MLPs the cause", "Does the pattern survive without the MLPs?")
def plot_ablation(frame: pd.DataFrame, rank: str = "target_rank", segment: str = "last") -> Figure:
    """Mean rank by layer at one segment, a panel for each weight and condition.

    Args:
        frame: From :func:`ablation`.
        rank: ``"target_rank"``, ``"original_rank"`` or ``"answer_rank"``.
        segment: The segment to show.
    """
    here = frame[frame["segment"] == segment]
    panels = here.assign(weight=here["weight"] + ": " + here["condition"])
    return over_layers(
        panels, rank, f"Mean {rank.replace('_', ' ')} without a part of the blocks: {segment}"
    )


def _hooks(
    model: Model, part: str, backward: bool, ablated: int | Iterable[int] | None
) -> list[tuple[str, Any]]:
    """Hooks that zero the output of MLPs or attention, or the VJP of their input."""
    kinds = {site.kind for site in weight_sites(model)}
    readers = [kind for kind in READERS[part] if kind in kinds]
    sites = weight_sites(model, readers, ablated)
    if backward:
        return [(name, _zero) for name in dict.fromkeys(site.hook_in for site in sites) if name]
    layers = dict.fromkeys(site.layer for site in sites)
    return [(f"blocks.{layer}.{WRITERS[part]}", _zero) for layer in layers]


def _zero(tensor: Tensor, hook: Any) -> Tensor:
    return torch.zeros_like(tensor)
