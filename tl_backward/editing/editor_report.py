"""What the editors that search a value have to say about an edit."""

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
    """What :func:`rome`, :func:`memit` or :func:`alpha_edit` did.

    Attributes:
        layers: The layers that are edited.
        losses: For each fact, the loss of every step of the value search, in nats.
        value_norms: For each fact ``|v0|``, of what the layer writes at the subject's last token.
        change_norms: For each fact ``|d|``, of what the search adds to it.
        keys: By site name the key of each fact, mean over its contexts.
        positions: For each fact, the subject's last token in the prompt and in every context.
        counted_positions: The same by the count of tokens that the published implementations use;
            see :class:`SubjectToken`.
        notes: What the search ran into, in words.
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
        positions=tuple(tuple(text.position for text in of_fact) for of_fact in texts),
        counted_positions=tuple(tuple(text.counted for text in of_fact) for of_fact in texts),
        notes=values.notes,
    )
