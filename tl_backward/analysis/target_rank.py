"""Ranks of the target and the original answer in the lens's readout (Fig 6, 18-21, 24, 25)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from tl_backward.analysis.figures import over_layers
from tl_backward.analysis.over_records import FactRun, Records, Row, over_records
from tl_backward.analysis.registry import figure_of
from tl_backward.lens import BackwardLogitLens
from tl_backward.sites import Model

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure


def target_rank(
    model: Model,
    records: Records,
    *,
    weights: str | Iterable[str] = ("W_out",),
    layers: int | Iterable[int] | None = None,
    normalize: bool = False,
    lens: Callable[[Tensor, int | None], Tensor] | None = None,
    apply_ln: bool = True,
    **options: Any,
) -> pd.DataFrame:
    """Ranks of the edit's target and of the competing answers, at every token.

    The paper's Fig 6 and 18 to 21: in ``LL(delta_i)`` of FF2, the target is at the bottom at the
    last token in all but the first layers. Fig 24 and 25: the same under the normalised lens.
    ``W_out`` and ``W_O`` are read by ``delta_i``, the others by ``x_i``.

    Args:
        model: A TransformerLens model in eval mode, with a tokenizer.
        records: Facts in the schema of CounterFact.
        weights: Kinds of weights.
        layers: Layers; negative ones count from the last. Default: all.
        normalize: Read vectors of unit length (App H).
        lens: A translator, as in :class:`BackwardLogitLens`.
        apply_ln: Whether to apply the model's final norm.
        options: ``batch_size``, ``path``, ``prepend_bos`` and ``progress``, as in
            :func:`over_records`.

    Returns:
        One row per record, weight, layer and position: ``position, segment, norm`` (of the vector
        that was read), ``d_vocab``, and the ranks of three tokens, where 0 is the most probable
        token and ``d_vocab - 1`` the least: ``target_rank`` of the target, ``original_rank`` of the
        true answer, ``answer_rank`` of the model's prediction. Zero vectors have no ranks.

    Example:
        >>> table = target_rank(model, records).query("segment == 'last'")
        >>> table["target_rank"].eq(table["d_vocab"] - 1).groupby(table["layer"]).mean()
    """
    weights = [weights] if isinstance(weights, str) else list(weights)
    read = BackwardLogitLens(model)

    def rows(run: FactRun) -> list[Row]:
        result = read(
            cache=run.cache,
            weights=weights,
            normalize=normalize,
            lens=lens,
            apply_ln=apply_ln,
            targets=[run.target, run.original, run.answer],
            top_k=1,
        )
        found = []
        for kind, readout in result.items():
            for i, layer in enumerate(readout.layers):
                for j, position in enumerate(run.positions()):
                    is_zero = bool(readout.zero_mask[i, j])
                    ranks = readout.target_ranks[i, j].tolist()
                    target, original, answer = [None] * 3 if is_zero else ranks
                    found.append(
                        {
                            "weight": kind,
                            "layer": layer,
                            **position,
                            "norm": readout.norms[i, j],
                            "d_vocab": result.d_vocab,
                            "target_rank": target,
                            "original_rank": original,
                            "answer_rank": answer,
                        }
                    )
        return found

    return over_records(model, records, rows, weights=weights, layers=layers, **options)


@figure_of(
    target_rank,
    "Fig 6, 18-21, 24, 25",
    "Where does the target stand among the tokens that a gradient reads as?",
)
def plot_target_rank(frame: pd.DataFrame, rank: str = "target_rank") -> Figure:
    """Fig 6 and 18 to 21: mean rank by layer and segment, a panel for each weight.

    Args:
        frame: From :func:`target_rank`.
        rank: ``"target_rank"``, ``"original_rank"`` or ``"answer_rank"``.
    """
    return over_layers(frame, rank, f"Mean {rank.replace('_', ' ')} by layer and segment (Fig 6)")
