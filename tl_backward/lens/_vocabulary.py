"""The vocabulary kernel: the logit lens of vectors of width d_model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_backward._precision import full_precision, upcast

BLOCK = 64
UNDERFLOW = -80.0
"""Smaller exponents add nothing to a sum, and their exponentials are slow subnormal numbers."""
ReturnType: TypeAlias = Literal["logits", "log_probs", "probs"]


@dataclass(frozen=True, eq=False)
class VocabularyReadout:
    """The top and bottom tokens of each vector's logit lens, and the ranks of the targets.

    Values are logits, log-probabilities or probabilities, as requested.

    Attributes:
        top_ids: The ``top_k`` most probable tokens, most probable first.
        top_values: Their values.
        bottom_ids: The ``bottom_k`` least probable tokens, least probable first.
        bottom_values: Their values.
        target_ranks: Number of tokens more probable than each target: 0 is the most probable,
            ``d_vocab - 1`` the least; ties share the smaller rank.
        target_values: The values of the targets.
        vocab_values: The values of the tokens in ``vocab``.
        entropy: Entropy of the distribution over the whole vocabulary, in nats.
    """

    top_ids: Int[Tensor, "rows top_k"]
    top_values: Float[Tensor, "rows top_k"]
    bottom_ids: Int[Tensor, "rows bottom_k"]
    bottom_values: Float[Tensor, "rows bottom_k"]
    target_ranks: Int[Tensor, "rows t"]
    target_values: Float[Tensor, "rows t"]
    vocab_values: Float[Tensor, "rows v"]
    entropy: Float[Tensor, "rows"]

    def reversed(self, d_vocab: int) -> VocabularyReadout:
        """The same readout with top and bottom swapped and ranks counted from the bottom."""
        return replace(
            self,
            top_ids=self.bottom_ids,
            top_values=self.bottom_values,
            bottom_ids=self.top_ids,
            bottom_values=self.top_values,
            target_ranks=d_vocab - 1 - self.target_ranks,
        )


@torch.no_grad()
def read_vocabulary(
    vectors: Float[Tensor, "rows d_model"],
    unembed: Callable[[Float[Tensor, "chunk d_model"]], Float[Tensor, "chunk d_vocab"]],
    targets: Int[Tensor, "rows t"],
    *,
    top_k: int,
    bottom_k: int,
    vocab: Int[Tensor, "v"] | None = None,
    return_type: ReturnType = "log_probs",
    chunk_size: int = 64,
) -> VocabularyReadout:
    """Read vectors by the logit lens ``softmax(unembed(v))`` (Eq 7), ``chunk_size`` rows at a time.

    Autocast has no effect. Memory peaks at two ``chunk_size x d_vocab`` matrices. Shows a progress
    bar after two seconds.
    """
    rows = zip(vectors.split(chunk_size), targets.split(chunk_size), strict=True)
    n_chunks = -(-len(vectors) // chunk_size)
    chunks, scratch = [], vectors.new_empty(0)
    for part, wanted in tqdm(rows, desc="reading", total=n_chunks, delay=2, leave=False):
        with full_precision(part.device):
            logits = unembed(part)
        logits = upcast(logits)
        if not len(scratch):
            scratch = torch.empty_like(logits)
        used = scratch[: len(logits)]
        chunks.append(_read_logits(logits, used, wanted, top_k, bottom_k, vocab, return_type))
        del logits  # free this chunk before computing the next one
    return VocabularyReadout(*(torch.cat(parts) for parts in zip(*chunks, strict=True)))


def _read_logits(
    logits: Float[Tensor, "rows d_vocab"],
    scratch: Float[Tensor, "rows d_vocab"],
    targets: Int[Tensor, "rows t"],
    top_k: int,
    bottom_k: int,
    vocab: Int[Tensor, "v"] | None,
    return_type: ReturnType,
) -> tuple[Tensor, ...]:
    """The fields of a :class:`VocabularyReadout` for some rows, in field order."""
    log_total, entropy = _log_total_and_entropy(logits, scratch)

    def value(chosen: Tensor) -> Tensor:
        if return_type == "logits":
            return chosen
        return chosen - log_total if return_type == "log_probs" else (chosen - log_total).exp()

    top, top_ids = _outermost(logits, top_k, largest=True)
    bottom, bottom_ids = _outermost(logits, bottom_k, largest=False)
    targets = targets.to(logits.device)
    of_targets = logits.gather(-1, targets)
    ranks = [_n_above(one, logits, scratch) for one in of_targets.unbind(-1)]
    return (
        top_ids,
        value(top),
        bottom_ids,
        value(bottom),
        torch.stack(ranks, -1) if ranks else targets,
        value(of_targets),
        value(logits[:, [] if vocab is None else vocab.to(logits.device)]),
        entropy,
    )


def _n_above(
    values: Float[Tensor, "rows"],
    logits: Float[Tensor, "rows d_vocab"],
    scratch: Float[Tensor, "rows d_vocab"],
) -> Int[Tensor, "rows"]:
    """The number of logits in each row that exceed the row's value.

    The float sum of ones is exact up to 2^24 and avoids the integer copy of ``count_nonzero``.
    """
    return torch.gt(logits, values.unsqueeze(-1), out=scratch).sum(-1).long()


def _log_total_and_entropy(
    logits: Float[Tensor, "rows d_vocab"], scratch: Float[Tensor, "rows d_vocab"]
) -> tuple[Float[Tensor, "rows 1"], Float[Tensor, "rows"]]:
    """The logarithm of the softmax's denominator, and the entropy in nats."""
    largest = logits.amax(-1, keepdim=True)
    exponentials = torch.sub(logits, largest, out=scratch)
    exponentials.clamp_(min=UNDERFLOW).exp_()
    total = exponentials.sum(-1, keepdim=True)
    log_total = largest + total.log()
    mean = exponentials.mul_(logits).sum(-1, keepdim=True) / total
    return log_total, (log_total - mean).squeeze(-1)


def _outermost(
    logits: Float[Tensor, "rows d_vocab"], k: int, largest: bool
) -> tuple[Float[Tensor, "rows k"], Int[Tensor, "rows k"]]:
    """The k largest or smallest logits and their columns, outermost first.

    They lie in the k column blocks with the outermost block extrema, or in the columns after the
    last whole block. This is several times faster than ``topk`` over the vocabulary.
    """
    n_rows, n_blocks = len(logits), logits.shape[1] // BLOCK
    if k == 0 or k >= n_blocks:
        return logits.topk(k, largest=largest)
    in_blocks = n_blocks * BLOCK
    blocks = logits[:, :in_blocks].unflatten(1, (n_blocks, BLOCK))
    of_blocks = blocks.amax(-1) if largest else blocks.amin(-1)
    chosen = of_blocks.topk(k, largest=largest).indices
    columns = (chosen.unsqueeze(-1) * BLOCK + torch.arange(BLOCK, device=logits.device)).flatten(1)
    remaining = torch.arange(in_blocks, logits.shape[1], device=logits.device)
    columns = torch.cat([columns, remaining.expand(n_rows, -1)], dim=1)
    values, where = logits.gather(1, columns).topk(k, largest=largest)
    return values, columns.gather(1, where)
