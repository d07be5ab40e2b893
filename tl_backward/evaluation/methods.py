"""Ready-made editing methods for :func:`tl_backward.evaluation.evaluate`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, TypeAlias

from tl_backward import editing
from tl_backward.capture import run_with_backward_cache
from tl_backward.capture.bos import prepends_bos
from tl_backward.editing import (
    KeyStatistics,
    MendEditor,
    WeightEdit,
    adam_fine_tune,
    fine_tune,
    forward_pass_shift,
    gradient_step,
)
from tl_backward.evaluation.records import Record
from tl_backward.evaluation.scoring import tokenised
from tl_backward.sites import Model

Method: TypeAlias = Callable[..., WeightEdit | None]
"""Makes the edit for a model and a record (a list of records for several facts at once), or returns
None for no edit. If it has an argument ``prepend_bos``, it is told whether the evaluation's texts
begin with a BOS token; if it has ``earlier``, it gets the edits in place when facts are edited in
turn."""

Facts: TypeAlias = Record | Sequence[Record]


def unedited(model: Model, record: Facts) -> None:
    """The method that edits nothing."""


def shift(
    *, layer: int | Sequence[int] | Literal["auto"], lr: float | Literal["auto"], **options: Any
) -> Method:
    """The forward pass shift towards the new target's first token.

    Args:
        layer: As in :func:`forward_pass_shift`.
        lr: The same.
        options: Its other arguments, such as ``tokens="all"`` or ``skip_if_predicted=False``.

    Example:
        >>> evaluate(model, records, shift(layer=22, lr=0.3))
    """

    def method(model: Model, record: Facts, prepend_bos: bool | None = None) -> WeightEdit:
        bos = prepends_bos(model, prepend_bos)
        prompt, target = _fact(model, record, bos)
        arguments = {"layer": layer, "lr": lr, "prepend_bos": bos, **options}
        return forward_pass_shift(model, prompt, target, **arguments)

    return method


def fine_tuning(*, lr: float, layers: int | Iterable[int] | None = None, **options: Any) -> Method:
    """Gradient descent on W_out, or on other weights, until the new target is predicted.

    Args:
        lr: As in :func:`fine_tune`.
        layers: The same.
        options: Its other arguments, such as ``weights="W_in"`` or ``max_steps=10``.
    """

    def method(model: Model, record: Facts, prepend_bos: bool | None = None) -> WeightEdit:
        prompt, target = _fact(model, record, prepend_bos)
        return fine_tune(model, prompt, target, lr=lr, layers=layers, **options)

    return method


def gradient(
    *,
    lr: float,
    weights: str | Iterable[str] = "W_out",
    layers: int | Iterable[int] | None = None,
) -> Method:
    """One step of gradient descent on the new target's negative log-likelihood.

    Args:
        lr: As in :func:`gradient_step`.
        weights: Kinds of weights to change.
        layers: Layers to change. Default: all.
    """
    kinds = weights if isinstance(weights, str) else list(weights)

    def method(model: Model, record: Facts, prepend_bos: bool | None = None) -> WeightEdit:
        prompt, target = _fact(model, record, prepend_bos)
        _, cache = run_with_backward_cache(model, prompt, target, weights=kinds, layers=layers)
        return gradient_step(cache, lr=lr, model=model)

    return method


def adam(*, layer: int, **options: Any) -> Method:
    """Fine-tuning of one W_out with Adam, the usual baseline for editors.

    Args:
        layer: As in :func:`adam_fine_tune`.
        options: Its other arguments, such as ``bound=5e-4``.
    """

    def method(model: Model, record: Facts, prepend_bos: bool | None = None) -> WeightEdit:
        bos = prepends_bos(model, prepend_bos)
        prompt, target = _fact(model, record, bos)
        return adam_fine_tune(model, prompt, target, layer=layer, prepend_bos=bos, **options)

    return method


def mend(editor: MendEditor) -> Method:
    """The edits of a MEND editor that was trained on other records.

    Args:
        editor: From :func:`train_mend`.
    """

    def method(model: Model, record: Facts, prepend_bos: bool | None = None) -> WeightEdit:
        if model is not editor.model:
            raise ValueError("this editor was trained for another model; use evaluate with that")
        return editor(*_fact(model, record, prepend_bos))

    names = [site.name for site in editor.sites]
    vars(method)["made_by"] = {"sites": names, "networks": dict(editor.networks.state_dict())}
    return method


def rome(*, layer: int, statistics: KeyStatistics | None, **options: Any) -> Method:
    """ROME, for single facts.

    Args:
        layer: As in :func:`tl_backward.rome`.
        statistics: The same.
        options: Its other arguments. Without ``contexts`` (see :func:`rome_contexts`), each edit
            generates them again.

    Example:
        >>> from tl_backward import evaluation
        >>> method = evaluation.rome(layer=5, statistics=statistics, contexts=rome_contexts(model))
        >>> evaluate(model, records, method)
    """

    def method(model: Model, record: Facts, prepend_bos: bool | None = None) -> WeightEdit:
        if not isinstance(record, Record):
            raise ValueError(
                'rome edits one fact at a time; of several, take schedule="in turn", or memit'
            )
        (prompt,), (target,), (subject,), bos = _subject_facts(model, [record], prepend_bos)
        given = {"layer": layer, "statistics": statistics, "prepend_bos": bos, **options}
        return editing.rome(model, prompt, target, subject=subject, **given)

    return method


def memit(*, layers: Sequence[int], statistics: KeyStatistics, **options: Any) -> Method:
    """MEMIT.

    Args:
        layers: As in :func:`tl_backward.memit`.
        statistics: The same.
        options: Its other arguments. Without ``contexts`` (see :func:`memit_contexts`), each edit
            generates them again.
    """

    def method(model: Model, record: Facts, prepend_bos: bool | None = None) -> WeightEdit:
        prompts, targets, subjects, bos = _subject_facts(model, _listed(record), prepend_bos)
        given = {"layers": layers, "statistics": statistics, "prepend_bos": bos, **options}
        return editing.memit(model, prompts, targets, subjects=subjects, **given)

    return method


def alpha_edit(*, layers: Sequence[int], **options: Any) -> Method:
    """AlphaEdit. When facts are edited in turn, it preserves the outputs of earlier ones.

    Args:
        layers: As in :func:`tl_backward.alpha_edit`.
        options: Its other arguments: ``statistics`` or, to compute it only once, ``null_space``;
            and ``contexts``, as for :func:`memit`.
    """

    def method(
        model: Model,
        record: Facts,
        prepend_bos: bool | None = None,
        earlier: Sequence[WeightEdit] = (),
    ) -> WeightEdit:
        prompts, targets, subjects, bos = _subject_facts(model, _listed(record), prepend_bos)
        given = {"layers": layers, "prepend_bos": bos, "earlier": earlier, **options}
        return editing.alpha_edit(model, prompts, targets, subjects=subjects, **given)

    return method


def _listed(record: Facts) -> Sequence[Record]:
    return [record] if isinstance(record, Record) else record


def _fact(model: Model, record: Facts, prepend_bos: bool | None) -> tuple[Any, Any]:
    """The tokens of the prompt and of its new target, as the evaluation scores them.

    For several records, a list of prompts and a list of targets.
    """
    if not isinstance(record, Record):
        prompts, targets = zip(*(_fact(model, one, prepend_bos) for one in record), strict=True)
        return list(prompts), list(targets)
    case = tokenised(model, record.prompt, [record.target_new], prepend_bos=prepend_bos)
    return case.prefix, case.targets[0]


def _subject_facts(
    model: Model, records: Sequence[Record], prepend_bos: bool | None
) -> tuple[list[str], list[list[int]], list[str], bool]:
    """Prompts as texts, the targets' tokens, the subjects, and whether texts begin with BOS."""
    bos = prepends_bos(model, prepend_bos)
    _, targets = _fact(model, records, bos)
    return [one.prompt for one in records], targets, [one.subject for one in records], bos
