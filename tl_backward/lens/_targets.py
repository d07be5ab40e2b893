"""Whose ranks a readout has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from jaxtyping import Int
from torch import Tensor

from tl_backward.capture.tokens import each_token_id
from tl_backward.sites import Model

TargetTokens: TypeAlias = str | int | Sequence[Any] | Int[Tensor, "..."]


@dataclass(frozen=True)
class Targets:
    """Whose ranks are wanted.

    Several are for all rows; otherwise there is one for all, for each prompt or for each row.

    Attributes:
        shown: As the result shows them.
        per_row: For every row.
        several: Whether there are several for all rows.
    """

    shown: Int[Tensor, "..."]
    per_row: Int[Tensor, "... t"]
    several: bool


def targets_for(
    model: Model,
    targets: TargetTokens | None,
    rows: Sequence[int],
    of_loss: Int[Tensor, "..."] | None = None,
) -> Targets:
    """Those that are asked for, or else the loss's, of prompts or of rows ``[*batch, pos]``.

    Raises:
        TypeError, ValueError: When they are no tokens, or do not fit to the rows.
    """
    if targets is None and of_loss is not None:
        of_rows = of_loss if of_loss.ndim == len(rows) else of_loss.unsqueeze(-1)
        return Targets(of_loss, of_rows.unsqueeze(-1), several=False)
    ids = each_token_id(model, "targets", [] if targets is None else targets)
    if isinstance(targets, Tensor) and targets.ndim:
        of_rows = _for_rows(ids, rows)
        return Targets(of_rows, of_rows.unsqueeze(-1), several=False)
    return Targets(ids, ids.reshape(-1), several=ids.ndim == 1)


def _for_rows(targets: Int[Tensor, "..."], rows: Sequence[int]) -> Int[Tensor, "..."]:
    """Targets that are aligned with rows from the right, one for every row."""
    if targets.ndim == len(rows) + 1 and len(targets) == 1:
        targets = targets[0]
    try:
        return targets.expand(*rows)
    except RuntimeError as error:
        raise ValueError(
            f"targets of shape {list(targets.shape)} do not fit to the rows, {list(rows)}; they "
            "are aligned from the right, and one for each prompt is [batch, 1]"
        ) from error
