"""Translators that may make the target readable in early layers (an open question)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_backward._precision import upcast_dtype
from tl_backward.analysis.over_records import Records, place_of, run_facts
from tl_backward.analysis.registry import figure_of
from tl_backward.analysis.target_rank import target_rank
from tl_backward.sites import Model
from tl_backward.translators import (
    Translator,
    identity,
    through_jacobian_lens,
    unit_normalised,
)

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure
    from transformer_lens.tools.analysis.jacobian_lens import JacobianLens


def translator_ranks(
    model: Model,
    records: Records,
    translators: Mapping[str, Translator] | None = None,
    *,
    jacobian_lens: JacobianLens | None = None,
    path: str | Path | None = None,
    **options: Any,
) -> pd.DataFrame:
    """Ranks of the target by layer, for each of several translators.

    The paper leaves open whether early layers need a learned map to be readable, as they do in
    forward lenses.

    Args:
        model: A TransformerLens model in eval mode, with a tokenizer.
        records: Facts in the schema of CounterFact.
        translators: Translators by name, as :class:`BackwardLogitLens` takes them: from
            ``tl_backward.translators`` or :func:`fit_linear_translator`. Default: the plain lens,
            the normalised lens, and a linear translator fitted on every second record; the table
            then has the other records only.
        jacobian_lens: A lens of the same model, to add :func:`through_jacobian_lens`.
        path: A folder with one folder of :func:`sweep` per translator.
        options: As in :func:`target_rank`.

    Returns:
        The table of :func:`target_rank` for each translator, with a column ``translator``.

    Example:
        >>> table = translator_ranks(model, records)
        >>> table.query("segment == 'last'").groupby(["translator", "layer"]).target_rank.median()
    """
    import pandas as pd

    if translators is None:
        records = list(records)
        fitted_on, records = records[::2], records[1::2]
        prepend_bos = options.get("prepend_bos")
        linear = fit_linear_translator(model, fitted_on, prepend_bos=prepend_bos)
        made_by = {"fitted_on": fitted_on, "prepend_bos": prepend_bos}
        vars(linear)["made_by"] = made_by  # every fit rounds its maps differently
        translators = {
            "identity": identity,
            "unit-normalised": unit_normalised,
            "linear": linear,
        }
    if jacobian_lens is not None:
        translators = {**translators, "jacobian": through_jacobian_lens(jacobian_lens)}
    frames = []
    for name, translator in translators.items():
        where = None if path is None else Path(path, name)
        frame = target_rank(model, records, lens=translator, path=where, **options)
        frame.insert(0, "translator", name)
        frames.append(frame)
    return pd.concat(frames, ignore_index=True)


def fit_linear_translator(
    model: Model,
    records: Records,
    *,
    ridge: float = 0.1,
    batch_size: int = 8,
    prepend_bos: bool | None = None,
) -> Translator:
    """Fit a linear map for each layer, from its VJPs at W_out to those of the last layer.

    This is a ridge regression of the direction of the last token's ``delta`` in the last layer on
    its direction in each layer: a backward cousin of the tuned lens. Evaluate it on other records
    than it was fitted on.

    Args:
        model: A TransformerLens model in eval mode, with a tokenizer.
        records: Facts in the schema of CounterFact.
        ridge: Weight of the squared norm of the map, in units of the mean square of the singular
            values of the directions in each layer.
        batch_size: Number of prompts to run at once.
        prepend_bos: Whether prompts begin with a BOS token. Default: as the tokenizer does.

    Returns:
        The translator. It scales vectors to unit length first.

    Raises:
        ValueError: If there is no record, or one is malformed.
    """
    records = list(records)
    if not records:
        raise ValueError("records is empty; pass at least one record to fit on")
    vjps: dict[int, list[Tensor]] = {}
    for start in range(0, len(records), batch_size):
        batch = records[start : start + batch_size]
        for run in run_facts(model, batch, weights="W_out", prepend_bos=prepend_bos):
            for name in run.cache:
                layer = place_of(name)["layer"]
                vjps.setdefault(layer, []).append(run.cache.residual_vjps(name)[-1])
    directions = {layer: _unit(torch.stack(each)) for layer, each in vjps.items()}
    wanted = directions[max(directions)]
    maps = {layer: _ridge(given, wanted, ridge) for layer, given in directions.items()}

    def translator(vectors: Tensor, layer: int | None) -> Tensor:
        return vectors if layer is None else _unit(vectors) @ maps[layer].to(vectors)

    return translator


@figure_of(
    translator_ranks,
    "Open: early layers",
    "Does a learned map make early layers readable?",
    options=("jacobian_lens",),
)
def plot_translator_ranks(
    frame: pd.DataFrame, segment: str = "last", rank: str = "target_rank"
) -> Figure:
    """Median rank by layer at one segment, a line for each translator.

    Args:
        frame: From :func:`translator_ranks`.
        segment: The segment to show.
        rank: ``"target_rank"``, ``"original_rank"`` or ``"answer_rank"``.
    """
    import plotly.express as px

    here = frame[frame["segment"] == segment]
    medians = here.groupby(["weight", "translator", "layer"], sort=False)[rank].median()
    return px.line(
        medians.reset_index(),
        x="layer",
        y=rank,
        color="translator",
        facet_col="weight",
        markers=True,
        title=f"Median {rank.replace('_', ' ')} by translator: {segment}",
    )


def _unit(vectors: Tensor) -> Tensor:
    return torch.nn.functional.normalize(vectors, dim=-1)


def _ridge(
    given: Float[Tensor, "n d"], wanted: Float[Tensor, "n d"], ridge: float
) -> Float[Tensor, "d d"]:
    """The map ``M`` that minimises ``|given M - wanted|^2 + weight |M|^2``."""
    dtype = upcast_dtype(given.dtype)
    given, wanted = given.to(dtype), wanted.to(dtype)
    gram = given.mT @ given
    gram.diagonal().add_(ridge * gram.diagonal().mean())
    return torch.linalg.solve(gram, given.mT @ wanted)
