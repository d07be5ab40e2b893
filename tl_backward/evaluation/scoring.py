"""How probable targets are after prefixes, each under an edit of its own."""

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
    """A prefix and the targets that may follow it, as token ids."""

    prefix: list[int]
    targets: list[list[int]]


class TargetScores(NamedTuple):
    """How the model takes each target after each prefix, the prefix and its target given.

    Attributes:
        nll: Negative log-likelihood in nats, mean over the target's tokens.
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
    """The tokens of a prefix and, for each target, of what follows it in a text.

    The text is ``prefix + " " + target``. Where the tokenizer joins the end of the prefix with the
    target, so that the text does not begin with the prefix's own tokens, the target's are those of
    ``" " + target`` by itself.

    Args:
        model: A TransformerLens model with a tokenizer.
        prefix: The beginning of the texts.
        targets: What may follow it.
        prepend_bos: Whether the prefix begins with a BOS token. Default: as the tokenizer does.

    Raises:
        ValueError: When prefix or target is empty, or both together are longer than the model's
            context.
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
            f"{prefix!r} has {len(start)} tokens, and a target {longest}: more than the model's "
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
    """Score targets after prefixes by teacher forcing, each prefix under an edit of its own.

    ``NLL(s) = -(1/|T|) sum_j log softmax(logits[P + j - 1])[T_j]`` for the ``|T|`` tokens of a
    target after the ``P`` tokens of its prefix, computed in float32 at least. Targets of one token
    after the same prefix are read from the same run, as is one that begins like a longer one. The
    unembedding is computed at the positions that predict targets only: hooks on the model see no
    others there.

    Args:
        model: A TransformerLens model in eval mode.
        cases: Prefixes, all with the same number of targets; from :func:`tokenised`.
        edits: The edits that take part, by their hooks.
        rows: For each prefix the index of its edit, or -1 for none. Default: none for all.
        batch_size: The most texts in one forward pass. Texts of similar length share one.

    Raises:
        ValueError: When ``rows`` and ``cases`` differ in number, or name edits that there are not.

    Example:
        >>> cases = [tokenised(model, "The mother tongue of Danielle Darrieux is", ["English"])]
        >>> score_targets(model, cases, edits=[edit], rows=[0]).predicted
    """
    of_case = [-1] * len(cases) if rows is None else list(rows)
    if len(of_case) != len(cases):
        raise ValueError(f"rows has {len(of_case)} entries, but there are {len(cases)} prefixes")
    shape = len(cases), len(cases[0].targets) if cases else 0
    nll = torch.full(shape, torch.nan, dtype=torch.float64)
    predicted = torch.zeros(shape, dtype=torch.bool)
    texts = [row for i, case in enumerate(cases) for row in _rows(i, case)]
    for batch in _of_similar_length(texts, batch_size):
        logits = _logits_of_targets(model, batch, edits, [of_case[row.case] for row in batch])
        for row, of_row in zip(batch, logits, strict=True):
            log_probs = of_row[: len(row.tokens) - row.first].log_softmax(-1)
            for j in row.targets:
                ids = torch.tensor(cases[row.case].targets[j])
                of_target = log_probs[: len(ids)]
                nll[row.case, j] = -of_target.gather(-1, ids[:, None]).mean()
                predicted[row.case, j] = torch.equal(of_target.argmax(-1), ids)
    return TargetScores(nll, predicted)


def _rows(i: int, case: Case) -> list[_Row]:
    """The texts to run for a prefix: none that begins another."""
    rows: list[_Row] = []
    of_length = sorted(range(len(case.targets)), key=lambda j: len(case.targets[j]), reverse=True)
    for j in of_length:
        tokens = case.prefix + case.targets[j][:-1]
        longer = next((row for row in rows if row.tokens[: len(tokens)] == tokens), None)
        if longer is None:
            rows.append(_Row(tokens, len(case.prefix) - 1, i, [j]))
        else:
            longer.targets.append(j)
    return rows


def _of_similar_length(texts: Sequence[_Row], batch_size: int) -> Iterator[list[_Row]]:
    """Batches, the longest texts first, in which no text is padded by more than an eighth."""
    batch: list[_Row] = []
    for row in sorted(texts, key=lambda row: len(row.tokens), reverse=True):
        if batch and (len(batch) == batch_size or 8 * len(row.tokens) < 7 * len(batch[0].tokens)):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _logits_of_targets(
    model: Model, batch: Sequence[_Row], edits: Sequence[WeightEdit], rows: Sequence[int]
) -> Float[Tensor, "batch longest d_vocab"]:
    """The logits from the position on that predicts each row's first target token."""
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
