"""Facts about subjects, each in several contexts, as token ids."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_backward.capture.batch import Batch, batch_of_tokens
from tl_backward.capture.tokens import Target, prompt_tokens, target_tokens
from tl_backward.editing._subjects import SLOT, Span, subject_in, subject_token
from tl_backward.editing.runs import read_at
from tl_backward.editing.weight_edit import WeightEdit
from tl_backward.sites import Model

ESSENCE = "{} is a"
TOKENS_AT_ONCE = 4096
"""Tokens that go through the model in one batch."""

Thing = TypeVar("Thing")


@dataclass(frozen=True)
class SubjectText:
    """A text about a subject.

    Attributes:
        ids: Its tokens.
        position: The subject's last token.
        counted: Where the published implementations look for it, see :class:`SubjectToken`.
    """

    ids: list[int]
    position: int
    counted: int


@dataclass(frozen=True)
class SubjectFact:
    """A fact to write.

    Attributes:
        plain: The prompt by itself.
        in_contexts: The prompt in each context.
        essence: "{subject} is a", after which little should change.
        target: The target's tokens.
    """

    plain: SubjectText
    in_contexts: list[SubjectText]
    essence: SubjectText
    target: list[int]

    def with_target(self) -> list[SubjectText]:
        """The prompt in each context, followed by all but the last token of the target."""
        return [
            SubjectText([*text.ids, *self.target[:-1]], text.position, text.counted)
            for text in self.in_contexts
        ]


def subject_facts(
    model: Model,
    prompts: Sequence[str],
    targets: Target,
    subjects: Sequence[str],
    contexts: Sequence[str],
    prepend_bos: bool | None,
) -> list[SubjectFact]:
    """The facts that prompts, targets and subjects state, in each of some contexts.

    The target's tokens follow the prompt's as they are. (The published implementations append the
    target as text and tokenise the whole anew, which can join characters across the prompt's end.)

    Args:
        model: A TransformerLens model with a tokenizer.
        prompts: Texts with their subjects, or with ``{}`` in the subjects' places.
        targets: One for all prompts, or one for each: text (mind the leading space) or token ids.
        subjects: One for each prompt.
        contexts: Templates with ``{}`` for the prompt.
        prepend_bos: As in ``model.to_tokens``.

    Raises:
        TypeError: When prompts or subjects are no texts.
        ValueError: When their numbers differ, a target is empty, a subject is not in its prompt, or
            a text is longer than the model's context.

    Warns:
        UserWarning: As :func:`subject_in` and :func:`target_tokens`.
    """
    for argument, texts in (("prompts", prompts), ("subjects", subjects)):
        if isinstance(texts, str) or not isinstance(texts, Sequence) or not texts:
            raise TypeError(f"{argument} must be a list of at least one text, got {texts!r}")
    if len(prompts) != len(subjects):
        raise ValueError(f"there are {len(prompts)} prompts, but {len(subjects)} subjects")
    if model.tokenizer is None:
        raise ValueError("this model has no tokenizer, which finds the subject's tokens")
    filled = [subject_in(*one) for one in zip(prompts, subjects, strict=True)]
    plain = [_subject_text(model, SLOT, *one, prepend_bos) for one in filled]
    after = [torch.tensor(text.ids) for text in plain]
    each_target = target_tokens(model, targets, len(prompts), "targets", after)
    facts = []
    for text, (prompt, span), target in zip(plain, filled, each_target, strict=True):
        in_contexts = [
            _subject_text(model, template, prompt, span, prepend_bos) for template in contexts
        ]
        about = prompt[slice(*span)]
        essence = _subject_text(
            model, SLOT, ESSENCE.replace(SLOT, about), Span(0, len(about)), prepend_bos
        )
        facts.append(SubjectFact(text, in_contexts, essence, target))
        _require_room(model, facts[-1], prompt)
    return facts


def batch_of_subjects(
    model: Model, texts: Sequence[SubjectText]
) -> tuple[Batch, Int[Tensor, "text"]]:
    """Several texts, and the subjects' last tokens in them."""
    batch = batch_of_tokens(model, [torch.tensor(text.ids) for text in texts])
    return batch, torch.tensor([text.position for text in texts])


def read_subjects(
    model: Model,
    points: Sequence[str],
    texts: Sequence[SubjectText],
    edit: WeightEdit | None = None,
) -> list[Float[Tensor, "text _"]]:
    """What passes some HookPoints at the subject's last token of each text.

    Args:
        model: A TransformerLens model.
        points: Names of the HookPoints.
        texts: The texts.
        edit: An edit that takes part by its hooks.
    """
    read = [
        read_at(model, points, *batch_of_subjects(model, batch), edit)
        for batch in in_batches(texts, [len(text.ids) for text in texts])
    ]
    return [torch.cat(of_point) for of_point in zip(*read, strict=True)]


def in_batches(things: Sequence[Thing], sizes: Sequence[int]) -> Iterator[list[Thing]]:
    """Successive things with so many tokens together as go through the model at once."""
    batch: list[Thing] = []
    total = 0
    for thing, size in zip(things, sizes, strict=True):
        if batch and total + size > TOKENS_AT_ONCE:
            yield batch
            batch, total = [], 0
        batch.append(thing)
        total += size
    if batch:
        yield batch


def _subject_text(
    model: Model, template: str, prompt: str, span: Span, prepend_bos: bool | None
) -> SubjectText:
    before = template.index(SLOT)
    text = template.replace(SLOT, prompt)
    ids = prompt_tokens(model, text, prepend_bos, "right")[0].tolist()
    moved = Span(span.start + before, span.end + before)
    token = subject_token(model, text, moved, prepend_bos, ids)
    return SubjectText(ids, token.position, token.counted)


def _require_room(model: Model, fact: SubjectFact, prompt: str) -> None:
    longest = max(len(text.ids) for text in fact.with_target())
    if model.cfg.n_ctx is not None and longest > model.cfg.n_ctx:
        raise ValueError(
            f"prompt {prompt!r} has {longest} tokens with its target in the longest of its "
            f"contexts, more than the model's context of {model.cfg.n_ctx}; pass shorter contexts"
        )
