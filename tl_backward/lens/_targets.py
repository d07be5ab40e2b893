"""The target tokens whose ranks a readout reports."""

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
    """Target token ids: several that all rows share, or one for all, per prompt or per row.

    Attributes:
        shown: The ids in the shape that the result reports.
        per_row: The ids aligned with the rows, several in the last axis.
        several: Whether all rows share several targets.
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
    """The requested targets, by default the loss's; ``rows`` is the shape ``[*batch, pos]``.

    Raises:
        TypeError, ValueError: If they are not tokens, or do not broadcast to the rows.
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
    """One target per row, broadcast from the right."""
    if targets.ndim == len(rows) + 1 and len(targets) == 1:
        targets = targets[0]
    try:
        return targets.expand(*rows)
    except RuntimeError as error:
        raise ValueError(
            f"targets of shape {list(targets.shape)} do not broadcast to the rows, {list(rows)}; "
            "axes are aligned from the right, so pass one per prompt as [batch, 1]"
        ) from error
