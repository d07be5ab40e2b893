"""Evaluating one edit per CounterFact record."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

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
    size: int = 1,
    schedule: Literal["together", "in turn"] = "together",
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

    With a ``size`` above 1, records are edited in groups: all edits of a group are applied, each of
    its records is measured, and the weights are restored to the bit.

    Args:
        model: A TransformerLens model in eval mode.
        records: From :func:`load_records`.
        method: Called with the model and a record; returns the edit, bound to the model, or None
            for no edit. Ready-made: :func:`shift`, :func:`fine_tuning`, :func:`gradient`,
            :func:`adam`, :func:`mend`, :func:`rome`, :func:`memit`, :func:`alpha_edit` and
            :func:`unedited`. If it has an argument ``prepend_bos``, as these have, it is passed.
        batch_size: Number of records whose texts are evaluated together. Groups are evaluated one
            at a time.
        size: Number of facts that are edited before they are measured. The last group may be
            smaller.
        schedule: How to edit a group: ``"together"`` calls the method once, with the list of
            records; ``"in turn"`` calls it for each record, with the previous edits applied (and
            passed, if it has an argument ``earlier``).
        generation: Whether to generate from each record's generation prompts and measure the mean
            n-gram entropy of the texts.
        perplexity_texts: Texts whose perplexity to measure under each edit, such as
            :func:`wikitext_lines`. Costs far more than the rest: a pass over all texts for each
            edit, though only through the edited and higher layers.
        text_every: Measure these two for every ``k``-th record only, starting with the first. The
            records of a group share one perplexity.
        prepend_bos: Whether all texts begin with a BOS token: prompts, generation prompts and
            ``perplexity_texts``. Default: as the tokenizer does.
        path: A folder to write the table to and to resume from, as in :func:`sweep`. Results of
            other records, methods, options, models or versions are refused.
        progress: Whether to show a progress bar.

    Returns:
        One row per record, in order: ``record`` (its index), ``case_id``, ``error`` (None, or why
        there is no edit), ``edit_norm`` (Frobenius norm of the update; 0 without one), ``seconds``
        (duration of the method's call, divided by the number of facts edited together),
        ``prepend_bos`` (whether texts began with a BOS token), and the metrics as fractions, not
        per cent: ``efficacy_``, ``paraphrase_`` and ``neighborhood_`` with ``success``,
        ``magnitude`` and ``accuracy``, averaged over the record's prompts of that kind;
        ``ngram_entropy`` (bits) and ``perplexity`` where measured; ``group``, if there are groups.
        If the method raises or its edit is not finite, the record has an error and no metrics; if a
        search fails, its best edit is measured nevertheless. With several processes, each returns
        its share.

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
    for argument, value in (("text_every", text_every), ("size", size)):
        if value < 1:
            raise ValueError(f"{argument} must be at least 1, got {value}")
    if schedule not in ("together", "in turn"):
        raise ValueError(f"schedule must be 'together' or 'in turn', got {schedule!r}")
    records = list(records)
    if not records:
        raise ValueError("records is empty; pass at least one record")
    bos = prepends_bos(model, prepend_bos)
    every = text_every if generation or perplexity_texts is not None else 1

    def has_texts(task: _Task) -> bool:
        return task.place % every == 0

    def measure(model: Model, attempts: Sequence[_Attempt]) -> None:
        """Put the metrics into the rows, each under its attempt's edit."""
        done = [attempt for attempt in attempts if attempt.cases]
        _score(model, done)
        chosen = [attempt for attempt in done if has_texts(attempt.task)]
        if chosen and generation:
            _generate(model, chosen, bos)
        if chosen and perplexity_texts is not None:
            edits = list({id(attempt.edit): attempt.edit for attempt in chosen}.values())
            values = perplexity(model, perplexity_texts, edits, prepend_bos=bos).tolist()
            of_edit = dict(zip(map(id, edits), values, strict=True))
            for attempt in chosen:
                attempt.row["perplexity"] = of_edit[id(attempt.edit)]

    def run(model: Model, batch: list[_Task]) -> list[dict[str, Any]]:
        attempts = [_attempt(model, task, method, bos) for task in batch]
        measure(model, attempts)
        return [attempt.row for attempt in attempts]

    def run_group(model: Model, groups: list[list[_Task]]) -> list[list[dict[str, Any]]]:
        (group,) = groups
        with ExitStack() as stack:
            edited = _together if schedule == "together" else _in_turn
            attempts = edited(model, group, method, bos, stack)
            measure(model, attempts)
        return [[attempt.row | {"index": attempt.task.place} for attempt in attempts]]

    def length(task: _Task) -> int:
        return len(task.record.prompt) + has_texts(task) * TOGETHER

    tasks: list[Any] = list(map(_Task, range(len(records)), records))
    how: dict[str, Any] = {"fn": run, "batch_size": batch_size, "length": length}
    if size > 1:
        tasks = [tasks[first : first + size] for first in range(0, len(tasks), size)]
        how = {"fn": run_group, "batch_size": 1, "length": len}
    with Undo() as undo, undo, undo:
        occupy(model, undo)
        rows = list(sweep(model, tasks, path=path, progress=progress, **how))
    frame = pd.DataFrame(rows)
    if size > 1 and rows:
        frame = frame.rename(columns={"record": "group", "index": "record"})
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

    def edited(self, edit: WeightEdit | None, outcome: dict[str, Any]) -> None:
        """Note what the method did; without an edit there is nothing to measure."""
        self.row |= outcome
        if edit is None:
            self.cases = {}
        else:
            self.edit = edit


def _attempt(
    model: Model, task: _Task, method: Method, bos: bool, earlier: Sequence[WeightEdit] = ()
) -> _Attempt:
    """Call the method for a record."""
    attempt = _unedited(model, task, bos)
    if attempt.cases:
        attempt.edited(*_edit(model, task.record, method, bos, earlier))
    return attempt


def _unedited(model: Model, task: _Task, bos: bool) -> _Attempt:
    """A record before its edit; where its texts cannot be made, with the error."""
    row: dict[str, Any] = {"case_id": task.record.case_id, "error": None, "edit_norm": None}
    attempt = _Attempt(task, WeightEdit(model, {}), {}, row | {"seconds": None, "prepend_bos": bos})
    try:
        attempt.cases = _cases(model, task.record, bos)
    except Exception as error:
        attempt.row["error"] = _described(error)
    return attempt


def _together(
    model: Model, group: Sequence[_Task], method: Method, bos: bool, stack: ExitStack
) -> list[_Attempt]:
    """Edit all records by one call; the edit is in place until the stack is closed."""
    attempts = [_unedited(model, task, bos) for task in group]
    ready = [attempt for attempt in attempts if attempt.cases]
    if ready:
        records = [attempt.task.record for attempt in ready]
        edit, outcome = _edit(model, records, method, bos)
        if edit is not None:
            stack.enter_context(edit.applied())
            outcome["seconds"] /= len(ready)
        in_place = None if edit is None else WeightEdit(model, {})
        for attempt in ready:
            attempt.edited(in_place, outcome)
    return attempts


def _in_turn(
    model: Model, group: Sequence[_Task], method: Method, bos: bool, stack: ExitStack
) -> list[_Attempt]:
    """Edit each record with the edits before it in place, all until the stack is closed."""
    attempts: list[_Attempt] = []
    edits: list[WeightEdit] = []
    in_place = WeightEdit(model, {})
    for task in group:
        attempt = _attempt(model, task, method, bos, edits)
        if attempt.edit.factors:
            stack.enter_context(attempt.edit.applied())
            edits.append(attempt.edit)
        attempt.edit = in_place
        attempts.append(attempt)
    return attempts


def _edit(
    model: Model,
    facts: Record | list[Record],
    method: Method,
    bos: bool,
    earlier: Sequence[WeightEdit] = (),
) -> tuple[WeightEdit | None, dict[str, Any]]:
    """Call the method; what it raises goes into the row, and then there is no edit."""
    offered = {"prepend_bos": bos, "earlier": earlier}
    told = {key: offered[key] for key in offered.keys() & signature(method).parameters.keys()}
    row: dict[str, Any] = {}
    start = perf_counter()
    try:
        edit = method(model, facts, **told)
    except StepNotFoundError as error:
        edit, row["error"] = error.best, _described(error)
    except Exception as error:
        return None, {"error": _described(error)}
    row["seconds"] = perf_counter() - start
    edit = WeightEdit(model, {}) if edit is None else edit
    if not isinstance(edit, WeightEdit):
        cases = [one.case_id for one in ([facts] if isinstance(facts, Record) else facts)]
        raise TypeError(
            f"method returned {edit!r} for case {', '.join(map(str, cases))}; it must return a "
            "WeightEdit, or None for no edit"
        )
    norm = float(edit.norm())
    if not math.isfinite(norm):
        return None, {"error": f"the norm of the edit is {norm}"}
    return edit, row | {"edit_norm": norm}


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
