"""The report of the editors that search a value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from tl_backward.editing._subject_facts import SubjectFact
from tl_backward.editing._value_search import Values
from tl_backward.sites import WeightSite


@dataclass(frozen=True, eq=False)
class EditorReport:
    """Report of :func:`rome`, :func:`memit` or :func:`alpha_edit`.

    Attributes:
        layers: Edited layers.
        losses: Loss of every step of the value search, in nats, for each fact.
        value_norms: ``|v0|`` of the layer's output at the subject's last token, for each fact.
        change_norms: ``|d|`` of the change that the search adds, for each fact.
        keys: Key of each fact, averaged over its contexts, by site name.
        positions: Position of the subject's last token in the prompt and in every context, for each
            fact.
        counted_positions: The same by the token count of the published implementations; see
            :class:`SubjectToken`.
        notes: Problems during the search, as text.
    """

    layers: tuple[int, ...]
    losses: tuple[tuple[float, ...], ...]
    value_norms: tuple[float, ...]
    change_norms: tuple[float, ...]
    keys: dict[str, Float[Tensor, "fact d_in"]]
    positions: tuple[tuple[int, ...], ...]
    counted_positions: tuple[tuple[int, ...], ...]
    notes: tuple[str, ...]


def report_of(
    sites: Sequence[WeightSite],
    facts: Sequence[SubjectFact],
    values: Values,
    keys: dict[str, Float[Tensor, "fact d_in"]],
) -> EditorReport:
    """The report of an edit of some sites."""
    texts = [[fact.plain, *fact.in_contexts] for fact in facts]
    return EditorReport(
        layers=tuple(site.layer for site in sites if site.layer is not None),
        losses=values.losses,
        value_norms=tuple(values.initial.norm(dim=-1).tolist()),
        change_norms=tuple(values.change.norm(dim=-1).tolist()),
        keys=keys,
        positions=tuple(tuple(text.position for text in each) for each in texts),
        counted_positions=tuple(tuple(text.counted for text in each) for each in texts),
        notes=values.notes,
    )
