"""Which examples of a data set wrote an edit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tl_backward.capture import run_with_backward_cache
from tl_backward.capture.objectives import lm_cross_entropy_loss
from tl_backward.editing import WeightEdit
from tl_backward.sites import Model
from tl_backward.sites.names import parse_site_name
from tl_backward.sweep import sweep

if TYPE_CHECKING:
    import pandas as pd


def attribute(
    edit: WeightEdit,
    model: Model,
    dataset: Iterable[Any],
    *,
    text: str = "text",
    prepend_bos: bool | None = None,
    batch_size: int = 8,
    path: str | Path | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Score every example by how far the edit goes down its gradient.

    The score is ``-<dW, G>``, to first order what the edit takes off the loss of the example: the
    examples that a fine-tune learned from are those along whose gradients it went. The loss is the
    model's own over the text, mean over its tokens, as in training.

    Args:
        edit: What was written, such as :meth:`WeightEdit.from_difference` or
            :meth:`WeightEdit.from_peft`.
        model: Where the gradients are taken: the model before the fine-tune, as a rule.
        dataset: Texts, or mappings that have one each; as :func:`tl_backward.sweep` takes records.
        text: The field with the text.
        prepend_bos: Whether a BOS token comes before the texts; as in training, best. Default: the
            model's own setting.
        batch_size: The most texts in a batch.
        path: A folder for the table, from which an interrupted run goes on; see
            :func:`tl_backward.sweep`.
        progress: Whether to show a progress bar.

    Returns:
        One row per example in order of score, the largest first, with the columns ``record`` (its
        place in the data set), ``score`` and ``loss``.

    Raises:
        TypeError: When an example has no text, and as :func:`tl_backward.sweep`.
        ValueError: When the model lacks a site of the edit, and as
            :func:`tl_backward.run_with_backward_cache` (texts of fewer than two tokens, or too
            long ones).

    Example:
        >>> attribute(edit, model, ["Lionel Messi plays for Paris", "Rome is in Italy"]).record[0]
    """
    import pandas as pd

    rows = sweep(
        model,
        dataset,
        _Score(edit.bind(model), text, prepend_bos),
        batch_size=batch_size,
        path=path,
        length=lambda record: len(_text_of(record, text)),
        progress=progress,
    )
    table = pd.DataFrame(rows, columns=["record", "score", "loss"])
    return table.sort_values("score", ascending=False, kind="stable").reset_index(drop=True)


class _Score:
    """The scores of a batch. What it was made of, for results on disk, are the edit's vectors."""

    def __init__(self, edit: WeightEdit, text: str, prepend_bos: bool | None) -> None:
        self.edit, self.text, self.prepend_bos = edit, text, prepend_bos
        sites = [parse_site_name(name) for name in edit.at_sites()]
        self.weights = list(dict.fromkeys(site.kind for site in sites))
        layers = sorted({site.layer for site in sites if site.layer is not None})
        self.layers = layers if all(site.layer is not None for site in sites) else None

    def __getstate__(self) -> dict[str, Any]:
        factors = {name: [g.inputs, g.vjps] for name, g in self.edit.factors.items()}
        return {"factors": factors, "text": self.text, "prepend_bos": self.prepend_bos}

    def __call__(self, model: Model, batch: Sequence[Any]) -> list[dict[str, Any]]:
        texts = [_text_of(record, self.text) for record in batch]
        losses, cache = run_with_backward_cache(
            model,
            texts,
            loss_fn=lm_cross_entropy_loss,
            weights=self.weights,
            layers=self.layers,
            prepend_bos=self.prepend_bos,
        )
        scores = self.edit.alignment(cache)
        return [
            {"score": score, "loss": loss}
            for score, loss in zip(scores.tolist(), losses.tolist(), strict=True)
        ]


def _text_of(record: Any, field: str) -> str:
    found = record.get(field) if isinstance(record, Mapping) else record
    if not isinstance(found, str):
        raise TypeError(
            f"dataset: an example must be a text, or have one under {field!r} (text=), got "
            f"{record!r}"
        )
    return found
