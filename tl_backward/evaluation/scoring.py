"""Scores of targets after prefixes, each prefix under its own edit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_backward._precision import upcast
from tl_backward._undo import Undo
from tl_backward.capture.batch import batch_of_tokens
from tl_backward.capture.bos import prepends_bos
from tl_backward.capture.run_hooks import Run, set_grad_enabled
from tl_backward.capture.tokens import prompt_tokens
from tl_backward.editing import WeightEdit, edit_hooks
from tl_backward.sites import Model, occupy


class Case(NamedTuple):
    """A prefix and its possible targets, as token ids."""

    prefix: list[int]
    targets: list[list[int]]


class TargetScores(NamedTuple):
    """Teacher-forced scores of each target after each prefix.

    Attributes:
        nll: Negative log-likelihood in nats, averaged over the target's tokens.
        predicted: Whether every token of the target is the most probable one.
    """

    nll: Float[Tensor, "prefix target"]
    predicted: Bool[Tensor, "prefix target"]


class _Row(NamedTuple):
    """A text to run, and the targets to read from it."""

    tokens: list[int]
    first: int
    """The position that predicts the targets' first tokens."""
    case: int
    targets: list[int]


def tokenised(
    model: Model, prefix: str, targets: Sequence[str], *, prepend_bos: bool | None = None
) -> Case:
    """Tokenize a prefix, and each target as it follows the prefix in a text.

    The text is ``prefix + " " + target``. If the tokenizer merges the end of the prefix with the
    target, so that the text does not begin with the prefix's own tokens, the target's tokens are
    those of ``" " + target`` on its own.

    Args:
        model: A TransformerLens model with a tokenizer.
        prefix: The beginning of the texts.
        targets: Its possible targets.
        prepend_bos: Whether the prefix begins with a BOS token. Default: as the tokenizer does.

    Raises:
        ValueError: If a prefix or target is empty, or both together exceed the model's context.
    """
    whole_texts = [prefix, *(f"{prefix} {target}" for target in targets)]
    bos = prepends_bos(model, prepend_bos)
    start, *wholes = (ids.tolist() for ids in prompt_tokens(model, whole_texts, bos))
    case = Case(start, [])
    for target, whole in zip(targets, wholes, strict=True):
        ids = whole[len(start) :]
        if not ids or whole[: len(start)] != start:
            ids = prompt_tokens(model, f" {target}", False)[0].tolist()
        case.targets.append(ids)
    n_ctx, longest = model.cfg.n_ctx, max(map(len, case.targets))
    if n_ctx is not None and len(start) + longest - 1 > n_ctx:
        raise ValueError(
            f"{prefix!r} has {len(start)} tokens and a target has {longest}, more than the model's "
            f"context of {n_ctx}; leave this record out"
        )
    return case


def score_targets(
    model: Model,
    cases: Sequence[Case],
    *,
    edits: Sequence[WeightEdit] = (),
    rows: Sequence[int] | None = None,
    batch_size: int = 64,
) -> TargetScores:
    """Score targets after prefixes by teacher forcing, each prefix under its own edit.

    ``NLL(s) = -(1/|T|) sum_j log softmax(logits[P + j - 1])[T_j]`` for the ``|T|`` tokens of a
    target after the ``P`` tokens of its prefix, computed in float32 or higher. Targets of the same
    prefix share a run if they have one token, or if one begins like a longer one. The unembedding
    is computed only at the positions that predict targets, so hooks there see no others.

    Args:
        model: A TransformerLens model in eval mode.
        cases: Prefixes, all with the same number of targets; from :func:`tokenised`.
        edits: The edits, applied by hooks.
        rows: Index of each prefix's edit, or -1 for none. Default: no edits.
        batch_size: Maximum number of texts in one forward pass. Texts of similar length share one.

    Raises:
        ValueError: If ``rows`` and ``cases`` differ in number, or an edit does not exist.

    Example:
        >>> cases = [tokenised(model, "The mother tongue of Danielle Darrieux is", ["English"])]
        >>> score_targets(model, cases, edits=[edit], rows=[0]).predicted
    """
    edit_rows = [-1] * len(cases) if rows is None else list(rows)
    if len(edit_rows) != len(cases):
        raise ValueError(f"rows has {len(edit_rows)} entries, but there are {len(cases)} prefixes")
    shape = len(cases), len(cases[0].targets) if cases else 0
    nll = torch.full(shape, torch.nan, dtype=torch.float64)
    predicted = torch.zeros(shape, dtype=torch.bool)
    texts = [row for i, case in enumerate(cases) for row in _rows(i, case)]
    for batch in _batches(texts, batch_size):
        logits = _target_logits(model, batch, edits, [edit_rows[row.case] for row in batch])
        for row, row_logits in zip(batch, logits, strict=True):
            log_probs = row_logits[: len(row.tokens) - row.first].log_softmax(-1)
            for j in row.targets:
                ids = torch.tensor(cases[row.case].targets[j])
                target_log_probs = log_probs[: len(ids)]
                nll[row.case, j] = -target_log_probs.gather(-1, ids[:, None]).mean()
                predicted[row.case, j] = torch.equal(target_log_probs.argmax(-1), ids)
    return TargetScores(nll, predicted)


def _rows(i: int, case: Case) -> list[_Row]:
    """The texts to run for a prefix, without texts that are the beginning of another."""
    rows: list[_Row] = []
    by_length = sorted(range(len(case.targets)), key=lambda j: len(case.targets[j]), reverse=True)
    for j in by_length:
        tokens = case.prefix + case.targets[j][:-1]
        longer = next((row for row in rows if row.tokens[: len(tokens)] == tokens), None)
        if longer is None:
            rows.append(_Row(tokens, len(case.prefix) - 1, i, [j]))
        else:
            longer.targets.append(j)
    return rows


def _batches(texts: Sequence[_Row], batch_size: int) -> Iterator[list[_Row]]:
    """Batches, longest texts first, in which padding is at most an eighth of each row."""
    batch: list[_Row] = []
    for row in sorted(texts, key=lambda row: len(row.tokens), reverse=True):
        if batch and (len(batch) == batch_size or 8 * len(row.tokens) < 7 * len(batch[0].tokens)):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _target_logits(
    model: Model, batch: Sequence[_Row], edits: Sequence[WeightEdit], rows: Sequence[int]
) -> Float[Tensor, "batch longest d_vocab"]:
    """The logits of each row from the position that predicts its first target token."""
    texts = batch_of_tokens(model, [torch.tensor(row.tokens) for row in batch])
    longest = max(len(row.tokens) - row.first for row in batch)
    first = torch.tensor([row.first for row in batch])
    positions = (first[:, None] + torch.arange(longest)).clamp(max=texts.width - 1)

    def at_positions(x: Tensor, hook: Any) -> Tensor:
        index = positions.to(x.device)[..., None].expand(-1, -1, x.shape[-1])
        return x.gather(1, index)

    with Undo() as undo, undo, undo:
        occupy(model, undo)
        set_grad_enabled(False, undo)
        hooks = [("unembed.hook_in", at_positions), *edit_hooks(model, edits, rows)]
        Run(undo).put_hooks(model, undo, hooks)
        logits = texts.logits(model)
    return upcast(logits.cpu())
