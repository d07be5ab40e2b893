"""Prompts with targets, and the position that predicts each target token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_backward._precision import upcast
from tl_backward.capture.batch import batch_of_tokens
from tl_backward.capture.tokens import Prompt, Target, is_single, prompt_tokens, target_tokens
from tl_backward.editing.runs import Places
from tl_backward.sites import Model


class TargetTerms:
    """The terms of an edit, one per target token.

    With ``which="all"``, the texts of the batch are the prompts followed by all but the last token
    of their targets (teacher forcing).

    Attributes:
        batch: The texts, with the tokens of their targets.
        prompt: The prompts as token ids without padding; several in a list.
        example: Index of each term's text.
        ids: Token of each term.
        predicting: Position that predicts each term's token.
        input_at: Position of the weights' inputs for each term.

    Args:
        model: A TransformerLens model.
        prompt: One prompt or several.
        target: One target for all prompts, or one per prompt.
        position: Position of the inputs, for all prompts or one per prompt.
        which: Whether to use the first token of each target, or all.
        prepend_bos: As in ``model.to_tokens``.

    Raises:
        TypeError, ValueError: For malformed prompts, targets and positions.
    """

    def __init__(
        self,
        model: Model,
        prompt: Prompt,
        target: Target,
        position: int | Sequence[int],
        which: Literal["first", "all"],
        prepend_bos: bool | None,
    ) -> None:
        single = is_single(prompt)
        prompts = prompt_tokens(model, prompt, prepend_bos)
        targets = target_tokens(model, target, None if single else len(prompts), after=prompts)
        if which == "first":
            targets = [ids[:1] for ids in targets]
        self.batch = batch_of_tokens(model, prompts, targets, single=single)
        self.prompt = self.batch.whole([text.tolist() for text in prompts])
        self.ids = torch.tensor([i for ids in targets for i in ids])
        self.example = torch.tensor([b for b, ids in enumerate(targets) for _ in ids])
        self.predicting = torch.cat(self.batch.predicting)
        self.input_at = (
            _positions(position, [len(text) for text in prompts])
            if which == "first"
            else self.predicting
        )

    @property
    def places(self) -> Places:
        """The text and position that predict each term."""
        return self.example, self.predicting

    def gaps(self, logits: Float[Tensor, "copies term d_vocab"]) -> Float[Tensor, "copies batch"]:
        """The worst of the :meth:`term_gaps` of each prompt."""
        gaps = self.term_gaps(logits)
        worst = gaps.new_full((len(gaps), len(self.batch)), torch.inf)
        return worst.scatter_reduce(1, self.example.expand(len(gaps), -1), gaps, "amin")

    def term_gaps(
        self, logits: Float[Tensor, "copies term d_vocab"]
    ) -> Float[Tensor, "copies term"]:
        """The logit of each target token minus the largest other logit."""
        at = upcast(logits.cpu())
        ids = self.ids.expand(len(at), -1).unsqueeze(-1)
        largest_other = at.scatter(-1, ids, -torch.inf).amax(-1)
        return at.gather(-1, ids).squeeze(-1) - largest_other

    def elsewhere(self) -> Bool[Tensor, "batch pos"]:
        """True at positions that predict no target."""
        mask = self.batch.mask.clone()
        mask[self.example, self.predicting] = False
        return mask


def _positions(position: int | Sequence[int], lengths: list[int]) -> Int[Tensor, "batch"]:
    """One position per prompt, counted from its beginning."""
    each = [position] * len(lengths) if isinstance(position, int) else list(position)
    if len(each) != len(lengths):
        raise ValueError(
            f"position holds {len(each)} positions, but there are {len(lengths)} prompts"
        )
    for b, (at, n) in enumerate(zip(each, lengths, strict=True)):
        if not -n <= at < n:
            raise ValueError(f"position={at}: prompt {b} has positions 0 to {n - 1}")
    return torch.tensor([at % n for at, n in zip(each, lengths, strict=True)])
