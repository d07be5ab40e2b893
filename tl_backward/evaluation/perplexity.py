"""The perplexity of texts under edits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_backward._precision import upcast
from tl_backward.capture.batch import Batch, batch_of_tokens
from tl_backward.capture.bos import prepends_bos
from tl_backward.capture.tokens import prompt_tokens
from tl_backward.editing.runs import WholeRun
from tl_backward.editing.weight_edit import WeightEdit
from tl_backward.sites import Model

MAX_TOKENS = 256
TOKENS_PER_PASS = 1024
"""Tokens per forward pass, which holds all logits of each token."""


def perplexity(
    model: Model,
    texts: Sequence[str],
    edits: Sequence[WeightEdit] | None = None,
    *,
    prepend_bos: bool | None = None,
) -> Float[Tensor, "edit"]:
    """The perplexity of texts under each of several edits, averaged over the texts.

    Each text is truncated to 256 tokens, including a BOS token. Its perplexity is ``exp`` of the
    mean negative log-likelihood per token, from the second token on. (This averages the texts'
    perplexities, which gives the paper's order of magnitude; it is not one perplexity of all
    tokens.)

    Several edits share a batch, and run only through the layers from the lowest edited one upwards;
    the layers below run once.

    Args:
        model: A TransformerLens model in eval mode.
        texts: Texts of at least two tokens.
        edits: The edits. Default: a single edit without effect.
        prepend_bos: Whether texts begin with a BOS token. Default: as the tokenizer does.

    Raises:
        ValueError: If there is no text, or one has fewer than two tokens.

    Example:
        >>> before = perplexity(model, wikitext_lines("wiki.test.raw.txt"))
    """
    edits = [WeightEdit(model, {})] if edits is None else edits
    if not texts:
        raise ValueError("texts is empty; pass at least one text")
    n_ctx = model.cfg.n_ctx or MAX_TOKENS
    bos = prepends_bos(model, prepend_bos)
    tokens = [ids[: min(MAX_TOKENS, n_ctx)] for ids in prompt_tokens(model, texts, bos)]
    for text, ids in zip(texts, tokens, strict=True):
        if len(ids) < 2:
            raise ValueError(f"texts: {text!r} is one token; the first token has no likelihood")
    total = torch.zeros(len(edits), dtype=torch.float64)
    with_effect = [i for i, edit in enumerate(edits) if edit.factors]
    without = [i for i, edit in enumerate(edits) if not edit.factors]
    for texts_of_pass in _passes(sorted(tokens, key=len, reverse=True)):
        batch = batch_of_tokens(model, texts_of_pass)
        run = WholeRun(model, batch)
        if without:
            total[without] += _perplexities(run.logits, batch).sum()
        at_once = max(1, TOKENS_PER_PASS // batch.tokens.numel())
        for start in range(0, len(with_effect), at_once):
            some = with_effect[start : start + at_once]
            logits = run.edited_logits([edits[i] for i in some])
            for i, edited in zip(some, logits, strict=True):
                total[i] += _perplexities(edited, batch).sum()
    return total / len(texts)


def _passes(tokens: Sequence[Int[Tensor, "_"]]) -> Iterator[list[Int[Tensor, "_"]]]:
    """Groups of texts, longest first, that fill a forward pass including padding."""
    start = 0
    while start < len(tokens):
        n = max(1, TOKENS_PER_PASS // len(tokens[start]))
        yield list(tokens[start : start + n])
        start += n


def _perplexities(
    logits: Float[Tensor, "batch pos d_vocab"], batch: Batch
) -> Float[Tensor, "batch"]:
    """The perplexity of each text, without padding."""
    logits = upcast(logits[:, :-1])
    next_tokens = batch.tokens[:, 1:, None].to(logits.device)
    nll = (logits.logsumexp(-1) - logits.gather(-1, next_tokens).squeeze(-1)).cpu().double()
    counted = batch.mask[:, 1:]
    return (nll.masked_fill(~counted, 0).sum(-1) / counted.sum(-1)).exp()
