"""Prompts and targets as one padded batch, and the model's call on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_backward.capture.tokens import (
    Prompt,
    Target,
    is_single,
    padding_side_of,
    prompt_tokens,
    target_tokens,
)
from tl_backward.sites import Model, left_padding_obstacle

NO_TARGET = -1
"""Pads the target ids of prompts with shorter targets."""


@dataclass(frozen=True, eq=False)
class Batch:
    """A padded batch of texts and their targets.

    A text is a prompt followed by all but the last token of its target (teacher forcing), so its
    last ``k`` positions predict the target's ``k`` tokens.

    Attributes:
        texts: Tokens of each text, without padding, on the CPU.
        targets: Tokens of each target; empty without a target.
        single: Whether the prompt was passed alone, not in a list.
        padding_side: Side on which shorter texts are padded.
        pad_id: Token id at padding; results do not depend on it.
    """

    texts: list[Int[Tensor, "_"]]
    targets: list[list[int]]
    single: bool
    padding_side: Literal["left", "right"]
    pad_id: int

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def width(self) -> int:
        """Number of positions of the longest text."""
        return max(map(len, self.texts))

    @property
    def starts(self) -> list[int]:
        """Start of each text in its row."""
        at_left = self.padding_side == "left"
        return [self.width - len(text) if at_left else 0 for text in self.texts]

    @property
    def spans(self) -> list[slice]:
        """The slice of each text in its row."""
        each = zip(self.starts, self.texts, strict=True)
        return [slice(start, start + len(text)) for start, text in each]

    @property
    def is_padded(self) -> bool:
        """Whether the texts differ in length."""
        return any(len(text) < self.width for text in self.texts)

    @cached_property
    def tokens(self) -> Int[Tensor, "batch pos"]:
        """The texts in one tensor, padded with ``pad_id``."""
        tokens = torch.full((len(self), self.width), self.pad_id)
        for row, span, text in zip(tokens, self.spans, self.texts, strict=True):
            row[span] = text
        return tokens

    @cached_property
    def mask(self) -> Bool[Tensor, "batch pos"]:
        """True at text tokens, False at padding."""
        mask = torch.zeros(len(self), self.width, dtype=torch.bool)
        for row, span in zip(mask, self.spans, strict=True):
            row[span] = True
        return mask

    @property
    def predicting(self) -> list[Int[Tensor, "_"]]:
        """The positions of each text that predict its target's tokens."""
        each = zip(self.texts, self.targets, strict=True)
        return [torch.arange(len(text) - len(ids), len(text)) for text, ids in each]

    @property
    def target_ids(self) -> Int[Tensor, "..."]:
        """The targets in one tensor, padded with -1; no token axis if each is one token."""
        longest = max(map(len, self.targets))
        filled = [[*ids, *[NO_TARGET] * (longest - len(ids))] for ids in self.targets]
        ids = torch.tensor(filled, dtype=torch.long)
        return self.whole(ids.squeeze(1) if longest == 1 else ids)

    def whole(self, each: Any) -> Any:
        """The values of all prompts, or the value itself for a single prompt."""
        return each[0] if self.single else each

    def logits(self, model: Model) -> Float[Tensor, "batch pos d_vocab"]:
        """The model's logits; meaningless at padding.

        Causal attention ignores padding on the right; the attention mask hides padding on the left.
        """
        arguments: dict[str, Any] = {}
        if self.is_padded and model.tokenizer is not None:
            arguments["padding_side"] = self.padding_side
        if self.is_padded and self.padding_side == "left":
            arguments["attention_mask"] = self.mask.long().to(model.cfg.device)
        return model(self.tokens.to(model.cfg.device), return_type="logits", **arguments)

    def repeated(self, copies: int) -> Batch:
        """The batch repeated ``copies`` times."""
        return Batch(
            self.texts * copies, self.targets * copies, False, self.padding_side, self.pad_id
        )


def batch_of(
    model: Model,
    prompt: Prompt,
    target: Target | None = None,
    *,
    prepend_bos: bool | None = None,
    padding_side: Literal["left", "right"] | None = None,
) -> Batch:
    """Build the batch of one or several prompts and their targets.

    Args:
        model: A TransformerLens model.
        prompt: As in :func:`tl_backward.run_with_backward_cache`.
        target: The same.
        prepend_bos: The same.
        padding_side: The same.

    Raises:
        TypeError: If a prompt or a target is malformed.
        ValueError: If a prompt or target is empty, outside the vocabulary or longer than the
            context, or their numbers differ.
        NotImplementedError: If texts need padding on a side that the model does not ignore.
    """
    single = is_single(prompt)
    side = padding_side_of(model, padding_side)
    prompts = prompt_tokens(model, prompt, prepend_bos, side)
    targets: list[list[int]] = [[] for _ in prompts]
    if target is not None:
        n_prompts = None if single else len(prompts)
        targets = target_tokens(model, target, n_prompts, after=prompts)
    return batch_of_tokens(model, prompts, targets, single=single, padding_side=side)


def batch_of_tokens(
    model: Model,
    prompts: Sequence[Int[Tensor, "_"]],
    targets: Sequence[Sequence[int]] | None = None,
    *,
    single: bool = False,
    padding_side: Literal["left", "right"] = "right",
) -> Batch:
    """Build the batch of tokenized prompts and targets.

    Raises:
        ValueError, NotImplementedError: As :func:`batch_of`.
    """
    ids = [[] for _ in prompts] if targets is None else [list(target) for target in targets]
    texts = [
        torch.cat([prompt, prompt.new_tensor(target[:-1])])
        for prompt, target in zip(prompts, ids, strict=True)
    ]
    _require_room(model, prompts, texts, single)
    pad_id = getattr(model.tokenizer, "pad_token_id", None) or 0
    batch = Batch(texts, ids, single, padding_side, pad_id)
    if padding_side == "left" and batch.is_padded:
        _require_left_padding(model)
    return batch


def _require_room(
    model: Model, prompts: Sequence[Tensor], texts: Sequence[Tensor], single: bool
) -> None:
    n_ctx = model.cfg.n_ctx
    for b, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        if n_ctx is not None and len(text) > n_ctx:
            which = "" if single else f" (example {b})"
            appended = len(text) - len(prompt)
            and_target = f" and {appended} of its target" if appended else ""
            raise ValueError(
                f"prompt{which} has {len(prompt)} tokens{and_target}, more than the model's "
                f"context of {n_ctx}; shorten it"
            )


def _require_left_padding(model: Model) -> None:
    reason = left_padding_obstacle(model)
    if reason is not None:
        raise NotImplementedError(
            f"prompts of different lengths with padding_side='left': {reason}; pass "
            "padding_side='right', which gives every text the same result as alone"
        )
