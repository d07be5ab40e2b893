"""Evaluating one edit per CounterFact record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tl_backward._undo import Undo
from tl_backward.capture.bos import prepends_bos
from tl_backward.editing import StepNotFoundError, WeightEdit
from tl_backward.evaluation.generation import generate_texts
from tl_backward.evaluation.methods import Method
from tl_backward.evaluation.metrics import n_gram_entropy, prompt_metrics
from tl_backward.evaluation.perplexity import perplexity
from tl_backward.evaluation.records import Record
from tl_backward.evaluation.scoring import Case, TargetScores, score_targets, tokenised
from tl_backward.sites import Model, occupy, require_eval_mode
from tl_backward.sweep import sweep

if TYPE_CHECKING:
    import pandas as pd

TOGETHER = 10**9
"""Sorts records whose texts are measured before all others, so that they share batches."""


def evaluate(
    model: Model,
    records: Sequence[Record],
    method: Method,
    *,
    batch_size: int = 16,
    generation: bool = False,
    perplexity_texts: Sequence[str] | None = None,
    text_every: int = 1,
    prepend_bos: bool | None = None,
    path: str | Path | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Edit the model for each record separately, and measure the effects of the edit.

    The edits of a batch of records are evaluated together, by hooks: each text has its own record's
    edit. The model and its weights are not changed.

    Args:
        model: A TransformerLens model in eval mode.
        records: From :func:`load_records`.
        method: Called with the model and a record; returns the edit, bound to the model, or None
            for no edit. Ready-made: :func:`shift`, :func:`fine_tuning`, :func:`gradient` and
            :func:`unedited`. If it has an argument ``prepend_bos``, as these have, it is passed.
        batch_size: Number of records whose texts are evaluated together.
        generation: Whether to generate from each record's generation prompts and measure the mean
            n-gram entropy of the texts.
        perplexity_texts: Texts whose perplexity to measure under each edit, such as
            :func:`wikitext_lines`. Costs far more than the rest: a pass over all texts for each
            edit, though only through the edited and higher layers.
        text_every: Measure these two for every ``k``-th record only, starting with the first.
        prepend_bos: Whether all texts begin with a BOS token: prompts, generation prompts and
            ``perplexity_texts``. Default: as the tokenizer does.
        path: A folder to write the table to and to resume from, as in :func:`sweep`. Results of
            other records, methods, options, models or versions are refused.
        progress: Whether to show a progress bar.

    Returns:
        One row per record, in order: ``record`` (its index), ``case_id``, ``error`` (None, or why
        there is no edit), ``edit_norm`` (Frobenius norm of the update; 0 without one),
        ``prepend_bos`` (whether texts began with a BOS token), and the metrics as fractions, not
        per cent: ``efficacy_``, ``paraphrase_`` and ``neighborhood_`` with ``success``,
        ``magnitude`` and ``accuracy``, averaged over the record's prompts of that kind;
        ``ngram_entropy`` (bits) and ``perplexity`` where measured. If the method raises, the record
        has an error and no metrics; if a search fails, its best edit is measured nevertheless. With
        several processes, each returns its share.

    Raises:
        ValueError: For training mode that changes the result, no records, an argument that is not
            positive, or a folder of other results.
        TypeError: If the method does not return an edit or None; and as :func:`sweep`, which also
            raises BlockingIOError.

    Example:
        >>> results = {
        ...     "unedited": evaluate(model, records, unedited),
        ...     "shift": evaluate(model, records, shift(layer=22, lr=0.3), path="shift22"),
        ... }
        >>> table(results)
    """
    import pandas as pd

    require_eval_mode(model)
    if text_every < 1:
        raise ValueError(f"text_every must be at least 1, got {text_every}")
    records = list(records)
    if not records:
        raise ValueError("records is empty; pass at least one record")
    bos = prepends_bos(model, prepend_bos)
    every = text_every if generation or perplexity_texts is not None else 1

    def has_texts(task: _Task) -> bool:
        return task.place % every == 0

    def run(model: Model, batch: list[_Task]) -> list[dict[str, Any]]:
        attempts = [_attempt(model, task, method, bos) for task in batch]
        done = [attempt for attempt in attempts if attempt.cases]
        _score(model, done)
        chosen = [attempt for attempt in done if has_texts(attempt.task)]
        if chosen and generation:
            _generate(model, chosen, bos)
        if chosen and perplexity_texts is not None:
            edits = [attempt.edit for attempt in chosen]
            values = perplexity(model, perplexity_texts, edits, prepend_bos=bos)
            for attempt, value in zip(chosen, values.tolist(), strict=True):
                attempt.row["perplexity"] = value
        return [attempt.row for attempt in attempts]

    with Undo() as undo, undo, undo:
        occupy(model, undo)
        rows = list(
            sweep(
                model,
                list(map(_Task, range(len(records)), records)),
                run,
                batch_size=batch_size,
                path=path,
                length=lambda task: len(task.record.prompt) + has_texts(task) * TOGETHER,
                progress=progress,
            )
        )
    frame = pd.DataFrame(rows)
    return frame.sort_values("record", ignore_index=True) if rows else frame


class _Task(NamedTuple):
    """A record and its index."""

    place: int
    record: Record


@dataclass
class _Attempt:
    """A task, its edit, its tokenized prompts (none after an error), and its row of the table."""

    task: _Task
    edit: WeightEdit
    cases: dict[str, list[Case]]
    row: dict[str, Any]


def _attempt(model: Model, task: _Task, method: Method, bos: bool) -> _Attempt:
    """Call the method; its error, if any, goes into the row."""
    record = task.record
    row: dict[str, Any] = {"case_id": record.case_id, "error": None, "edit_norm": None}
    row["prepend_bos"] = bos
    options = {"prepend_bos": bos} if "prepend_bos" in signature(method).parameters else {}
    try:
        cases = _cases(model, record, bos)
        try:
            edit = method(model, record, **options)
        except StepNotFoundError as error:
            edit, row["error"] = error.best, _described(error)
    except Exception as error:
        return _Attempt(task, WeightEdit(model, {}), {}, row | {"error": _described(error)})
    edit = WeightEdit(model, {}) if edit is None else edit
    if not isinstance(edit, WeightEdit):
        raise TypeError(
            f"method returned {edit!r} for case {record.case_id}; it must return a WeightEdit, or "
            "None for no edit"
        )
    return _Attempt(task, edit, cases, row | {"edit_norm": float(edit.norm())})


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _cases(model: Model, record: Record, bos: bool) -> dict[str, list[Case]]:
    """The tokenized prompts of each kind, with both targets."""
    prompts = {
        "efficacy": [record.prompt],
        "paraphrase": record.paraphrase_prompts,
        "neighborhood": record.neighborhood_prompts,
    }
    targets = [record.target_new, record.target_true]
    return {
        kind: [tokenised(model, prompt, targets, prepend_bos=bos) for prompt in each]
        for kind, each in prompts.items()
    }


def _score(model: Model, attempts: Sequence[_Attempt]) -> None:
    """Add the metrics of all prompts to the rows."""
    edits, cases, rows = [attempt.edit for attempt in attempts], [], []
    for row, attempt in enumerate(attempts):
        for kind_cases in attempt.cases.values():
            cases += kind_cases
            rows += [row] * len(kind_cases)
    nll, predicted = score_targets(model, cases, edits=edits, rows=rows)
    start = 0
    for attempt in attempts:
        for kind, kind_cases in attempt.cases.items():
            part = slice(start, start + len(kind_cases))
            attempt.row |= prompt_metrics(kind, TargetScores(nll[part], predicted[part]))
            start = part.stop


def _generate(model: Model, attempts: Sequence[_Attempt], bos: bool) -> None:
    """Add the n-gram entropy of the edited models' texts to the rows."""
    prompts = [(row, p) for row, a in enumerate(attempts) for p in a.task.record.generation_prompts]
    texts = generate_texts(
        model,
        [prompt for _, prompt in prompts],
        edits=[attempt.edit for attempt in attempts],
        rows=[row for row, _ in prompts],
        prepend_bos=bos,
    )
    entropies = iter(map(n_gram_entropy, texts))
    for attempt in attempts:
        own = [next(entropies) for _ in attempt.task.record.generation_prompts]
        attempt.row["ngram_entropy"] = sum(own) / len(own)
