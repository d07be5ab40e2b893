"""Runs of facts, and the table of an experiment's rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from tl_backward._precision import upcast
from tl_backward.analysis.segments import Fact, fact_of, prompt_segments
from tl_backward.cache import BackwardCache
from tl_backward.capture import Hooks, run_with_backward_cache
from tl_backward.capture.bos import prepends_bos
from tl_backward.capture.objectives import Objective
from tl_backward.capture.tokens import target_tokens
from tl_backward.sites import Model
from tl_backward.sites.names import parse_site_name
from tl_backward.sweep import sweep

if TYPE_CHECKING:
    import pandas as pd

Row: TypeAlias = dict[str, Any]
Records: TypeAlias = Iterable[Any]


@dataclass(frozen=True, eq=False)
class FactRun:
    """One forward and one backward pass of one fact.

    Attributes:
        fact: The fact.
        cache: The cache of its prompt; the loss is ``-log p(target)`` at the last token.
        segments: Segment of each position.
        target: First token of the edit's target.
        original: First token of the true answer.
        answer: The model's own prediction.
    """

    fact: Fact
    cache: BackwardCache
    segments: list[str]
    target: int
    original: int
    answer: int

    def positions(self) -> list[Row]:
        """The columns ``position`` and ``segment`` of every position."""
        return [{"position": i, "segment": name} for i, name in enumerate(self.segments)]


def over_records(
    model: Model,
    records: Records,
    rows_of: Callable[[FactRun], Sequence[Row]],
    *,
    weights: str | Iterable[str],
    layers: int | Iterable[int] | None = None,
    fwd_hooks: Hooks = (),
    bwd_hooks: Hooks = (),
    batch_size: int = 8,
    path: str | Path | None = None,
    prepend_bos: bool | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Run every fact towards the first token of its target and collect all rows.

    Args:
        model: A TransformerLens model in eval mode, with a tokenizer.
        records: Facts in the schema of CounterFact, as for :func:`fact_of`.
        rows_of: Takes one fact's run and returns its rows.
        weights: Kinds of weights to capture.
        layers: Layers to capture; negative ones count from the last. Default: all.
        fwd_hooks: As in :func:`run_with_backward_cache`.
        bwd_hooks: The same.
        batch_size: Number of prompts to run at once.
        path: A folder for the rows, to resume an interrupted run from (:func:`sweep`).
        prepend_bos: Whether prompts begin with a BOS token; the paper's do not. Default: as the
            tokenizer does.
        progress: Whether to show a progress bar.

    Returns:
        One table in record order; ``record`` is the index of each record, and ``prepend_bos`` says
        whether its prompt began with a BOS token.

    Raises:
        ValueError: If a record is malformed, or there is none; and as
            :func:`run_with_backward_cache`.
    """
    import pandas as pd

    bos = prepends_bos(model, prepend_bos)
    capture = {
        "weights": weights,
        "layers": layers,
        "fwd_hooks": fwd_hooks,
        "bwd_hooks": bwd_hooks,
    }

    def rows_of_batch(model: Model, batch: list[Any]) -> list[Sequence[Row]]:
        runs = run_facts(model, batch, prepend_bos=bos, **capture)
        return [[{**row, "prepend_bos": bos} for row in rows_of(run)] for run in runs]

    rows = sweep(
        model,
        records,
        rows_of_batch,
        batch_size=batch_size,
        path=path,
        length=lambda record: len(fact_of(record).prompt),
        progress=progress,
    )
    table = pd.DataFrame(rows)
    if table.empty:
        raise ValueError("records is empty, or no record gives a row")
    return table.sort_values("record", kind="stable", ignore_index=True)


def run_facts(
    model: Model, records: Sequence[Any], *, prepend_bos: bool | None = None, **capture: Any
) -> list[FactRun]:
    """Run several facts in one batch.

    Args:
        model: A TransformerLens model in eval mode, with a tokenizer.
        records: As for :func:`fact_of`.
        prepend_bos: Whether prompts begin with a BOS token. Default: as the tokenizer does.
        capture: As in :func:`run_with_backward_cache`.

    Raises:
        NotImplementedError: For the matrices of experts, which have no rows for most tokens.
    """
    facts = [fact_of(record) for record in records]
    targets = first_tokens(model, [fact.target for fact in facts])
    originals = first_tokens(model, [fact.original for fact in facts])
    answers: list[int] = []
    _, batch = run_with_backward_cache(
        model,
        [fact.prompt for fact in facts],
        loss_fn=_nll_noting_answers(targets, answers),
        prepend_bos=prepends_bos(model, prepend_bos),
        **capture,
    )
    expert = next((name for name in batch if parse_site_name(name).expert is not None), None)
    if expert is not None:
        raise NotImplementedError(
            f"{expert} has rows only for the tokens routed to this expert, but experiments "
            "compare weights token by token; pass weights or layers without experts"
        )
    caches = [batch.example(b) for b in range(len(facts))]
    segments = [
        prompt_segments(model, torch.as_tensor(cache.tokens).tolist(), fact)
        for fact, cache in zip(facts, caches, strict=True)
    ]
    each = zip(facts, caches, segments, targets, originals, answers, strict=True)
    return [FactRun(*parts) for parts in each]


def place_of(name: str) -> Row:
    """The columns ``weight`` and ``layer`` of a site's name; layer None outside the blocks."""
    site = parse_site_name(name)
    return {"weight": site.kind, "layer": site.layer}


def first_tokens(model: Model, texts: Sequence[str]) -> list[int]:
    """The first token of each text."""
    return [ids[0] for ids in target_tokens(model, list(texts), len(texts))]


def _nll_noting_answers(targets: list[int], answers: list[int]) -> Objective:
    """``-log p(target)`` after the last token; appends the most probable token to ``answers``."""

    def compute(logits: Tensor, tokens: Tensor, targets: Tensor) -> Tensor:
        last = upcast(logits[:, -1])
        answers.extend(last.argmax(-1).tolist())
        return torch.nn.functional.cross_entropy(last, targets.to(last.device), reduction="none")

    return Objective(compute, {"targets": torch.tensor(targets)}, n_last=1)
