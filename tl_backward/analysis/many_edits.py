"""Forward pass shifts of many facts, and repeated shifts (an open question)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tl_backward.analysis.over_records import Records, Row, first_tokens
from tl_backward.analysis.registry import figure_of
from tl_backward.analysis.segments import Fact, fact_of
from tl_backward.capture.batch import batch_of_tokens
from tl_backward.capture.bos import prepends_bos
from tl_backward.capture.tokens import prompt_tokens
from tl_backward.editing.forward_shift import StepNotFoundError, forward_pass_shift
from tl_backward.editing.weight_edit import WeightEdit
from tl_backward.evaluation.perplexity import perplexity
from tl_backward.sites import Model
from tl_backward.sweep import sweep

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure

SCHEDULES = ("together", "in turn")
N_SINGLE = 20
"""Number of facts whose steps determine the default step."""
PROMPTS = {"paraphrase": "paraphrase_prompts", "neighborhood": "neighborhood_prompts"}


class Plan(NamedTuple):
    """Number of facts, schedule and number of iterations of an edit."""

    size: int
    schedule: str
    iterations: int


def many_edits(
    model: Model,
    records: Records,
    *,
    layer: int | None = None,
    lr: float | Literal["auto"] = "auto",
    sizes: Iterable[int] = (0, 1, 10, 100),
    schedules: Iterable[str] = SCHEDULES,
    iterations: Iterable[int] = (1, 3, 10),
    texts: Sequence[str] | None = None,
    prepend_bos: bool | None = None,
    batch_size: int = 16,
    path: str | Path | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Accuracy of each of several facts after all of them were edited.

    The paper edits one fact with one step. This experiment edits the records in groups, by the
    forward pass shift of W_out in one layer. ``"together"``: one update with one term per fact, all
    computed from the unedited model. ``"in turn"``: each fact with the earlier edits in place. A
    target that is already predicted gets no (further) shift.

    Args:
        model: A TransformerLens model in eval mode, with a tokenizer. It is left unchanged.
        records: Facts in the schema of CounterFact, with ``paraphrase_prompts`` and
            ``neighborhood_prompts``.
        layer: The layer of W_out. Default: four fifths of the way up.
        lr: The step of the shift. ``"auto"``: the median of the smallest steps that the first 20
            facts need on their own.
        sizes: Numbers of facts to edit at once; 0 leaves the model unedited. The last group may be
            smaller.
        schedules: One or both of the schedules. Both edit a single fact in the same way, so only
            the first one runs for it.
        iterations: Maximum numbers of updates per fact (of all facts, if edited together).
        texts: Texts whose perplexity to measure with each group's edit. Default: none.
        prepend_bos: Whether prompts, and ``texts``, begin with a BOS token. Default: as the
            tokenizer does.
        batch_size: Number of prompts to run at once.
        path: A folder for the rows, to resume an interrupted run from (:func:`sweep`).
        progress: Whether to show a progress bar.

    Returns:
        One row per plan and record, in record order: ``size, schedule, iterations, group``,
        ``record``; ``lr`` and, with texts, ``perplexity`` of the group's edit; ``prepend_bos``:
        whether texts began with a BOS token. The other columns compare the first tokens of the
        targets after the last token of the prompts: ``accuracy``: whether the target is predicted;
        ``success``: whether the target is more probable than the true answer;
        ``paraphrase_accuracy`` and ``paraphrase_success``: the same, averaged over paraphrases;
        ``neighborhood_accuracy`` and ``neighborhood_success``: averaged over neighbours, where the
        true answer should win. All are between 0 and 1.

    Raises:
        ValueError: For another schedule, sizes below 0, no iteration, and as
            :func:`forward_pass_shift`.

    Example:
        >>> table = many_edits(model, records, layer=24, lr=0.1, iterations=[1])
        >>> table.groupby(["size", "schedule", "iterations"]).mean(numeric_only=True)
    """
    import pandas as pd

    records = list(records)
    plans = _plans(sizes, schedules, iterations)
    if not records:
        raise ValueError("records is empty; pass at least one record")
    groups: list[dict[str, Any]] = [
        {"plan": list(plan), "group": g, "first": first, "records": records[first : first + width]}
        for plan in plans
        for width in (plan.size or len(records),)
        for g, first in enumerate(range(0, len(records), width))
    ]
    bos = prepends_bos(model, prepend_bos)
    at = round(0.8 * model.cfg.n_layers) if layer is None else layer
    step = _usual_step(model, records[:N_SINGLE], at, bos) if lr == "auto" else lr
    given: dict[str, Any] = {"layer": at, "texts": texts, "prepend_bos": bos}
    rows_of_groups = partial(_rows_of_groups, lr=step, batch=batch_size, **given)
    vars(rows_of_groups)["made_by"] = given | {"lr": lr}  # a new search may round differently
    rows = sweep(
        model,
        groups,
        rows_of_groups,
        batch_size=1,
        path=path,
        length=lambda group: len(group["records"]),
        progress=progress,
    )
    table = pd.DataFrame(rows).drop(columns="record").rename(columns={"index": "record"})
    order = ["size", "schedule", "iterations", "record"]
    return table.sort_values(order, kind="stable", ignore_index=True)


@figure_of(
    many_edits,
    "Open: many edits",
    "Does the shift survive many facts and repetition?",
    options=("texts",),
)
def plot_many_edits(frame: pd.DataFrame) -> Figure:
    """Mean accuracies by number of facts, a panel for each schedule and number of iterations.

    Args:
        frame: From :func:`many_edits`.
    """
    import plotly.express as px

    kinds = ["accuracy", "paraphrase_accuracy", "neighborhood_accuracy"]
    means = frame.groupby(["size", "schedule", "iterations"])[kinds].mean().mul(100)
    tidy = means.reset_index().melt(
        id_vars=["size", "schedule", "iterations"], var_name="prompts", value_name="percent"
    )
    return px.line(
        tidy.sort_values("size"),
        x="size",
        y="percent",
        color="prompts",
        facet_col="iterations",
        facet_row="schedule",
        markers=True,
        range_y=[-2, 102],
        title="Accuracy after editing several facts",
    )


def _plans(sizes: Iterable[int], schedules: Iterable[str], iterations: Iterable[int]) -> list[Plan]:
    sizes, schedules, iterations = list(sizes), list(schedules), list(iterations)
    if not schedules or not set(schedules) <= set(SCHEDULES):
        raise ValueError(f"schedules must be from {', '.join(SCHEDULES)}, got {schedules!r}")
    if not sizes or min(sizes) < 0:
        raise ValueError(f"sizes must hold numbers of at least 0, got {sizes!r}")
    if not iterations or min(iterations) < 1:
        raise ValueError(f"iterations must hold numbers of at least 1, got {iterations!r}")
    return [
        Plan(size, schedule, n)
        for size, schedule, n in product(sizes, schedules, iterations)
        if size > 1 or (schedule == schedules[0] and (size == 1 or n == iterations[0]))
    ]


def _rows_of_groups(
    model: Model,
    groups: Sequence[Mapping[str, Any]],
    layer: int,
    lr: float,
    texts: Sequence[str] | None,
    prepend_bos: bool,
    batch: int,
) -> list[list[Row]]:
    """The rows of one group's facts."""
    (group,) = groups
    plan, records = Plan(*group["plan"]), group["records"]
    facts = [fact_of(record) for record in records]
    targets = first_tokens(model, [fact.target for fact in facts])
    originals = first_tokens(model, [fact.original for fact in facts])
    edit = _edit(model, facts, targets, plan, layer=layer, lr=lr, prepend_bos=prepend_bos)
    kinds = {"": [[fact.prompt] for fact in facts]}
    kinds |= {f"{kind}_": [_prompts(r, field) for r in records] for kind, field in PROMPTS.items()}
    shared: Row = {
        **plan._asdict(),
        "group": group["group"],
        "lr": lr,
        "prepend_bos": prepend_bos,
    }
    if texts is not None:
        shared["perplexity"] = float(perplexity(model, texts, [edit], prepend_bos=prepend_bos))
    rows: list[Row] = [{**shared, "index": group["first"] + i} for i in range(len(facts))]
    with edit.applied():
        for kind, prompts in kinds.items():
            flat = [text for fact_prompts in prompts for text in fact_prompts]
            logits = _last_logits(model, flat, prepend_bos, batch)
            parts = logits.split([len(fact_prompts) for fact_prompts in prompts])
            for row, part, target, original in zip(rows, parts, targets, originals, strict=True):
                wanted, other = (
                    (original, target) if kind == "neighborhood_" else (target, original)
                )
                predicted = part.argmax(-1) == wanted
                row[f"{kind}accuracy"] = predicted.double().mean()
                row[f"{kind}success"] = (part[:, wanted] > part[:, other]).double().mean()
    return [rows]


def _usual_step(model: Model, records: Sequence[Any], layer: int, prepend_bos: bool) -> float:
    """The median of the smallest steps that single facts need.

    Raises:
        ValueError: If no step makes any of their targets the prediction.
    """
    facts = [fact_of(record) for record in records]
    steps = []
    for fact, target in zip(facts, first_tokens(model, [f.target for f in facts]), strict=True):
        with suppress(StepNotFoundError):
            edit = forward_pass_shift(
                model, fact.prompt, target, layer=layer, lr="auto", prepend_bos=prepend_bos
            )
            steps += [edit.report.lr] if edit.factors else []
    if not steps:
        raise ValueError(
            f'lr="auto": no step in layer {layer} makes any of the first {len(facts)} targets the '
            "prediction; pass lr as a number, or another layer"
        )
    return median(steps)


def _edit(
    model: Model, facts: Sequence[Fact], targets: Sequence[int], plan: Plan, **options: Any
) -> WeightEdit:
    edit = WeightEdit(model, {})
    if plan.size == 0:
        return edit
    options["iterations"] = plan.iterations
    if plan.schedule == "together":
        prompts = [fact.prompt for fact in facts]
        return forward_pass_shift(model, prompts, list(targets), **options)
    for fact, target in zip(facts, targets, strict=True):
        with edit.applied():
            term = forward_pass_shift(model, fact.prompt, target, **options)
        edit = edit + term
    return edit


@torch.no_grad()
def _last_logits(
    model: Model, prompts: Sequence[str], prepend_bos: bool, batch: int
) -> Float[Tensor, "prompt d_vocab"]:
    """The logits after the last token of every prompt."""
    last = []
    texts = prompt_tokens(model, list(prompts), prepend_bos)
    for start in range(0, len(texts), batch):
        part = batch_of_tokens(model, texts[start : start + batch])
        logits = part.logits(model)
        ends = torch.tensor([span.stop - 1 for span in part.spans], device=logits.device)
        last.append(logits[torch.arange(len(part), device=logits.device), ends])
    return torch.cat(last)


def _prompts(record: Any, field: str) -> list[str]:
    prompts = record[field] if isinstance(record, Mapping) else getattr(record, field)
    return list(prompts)
