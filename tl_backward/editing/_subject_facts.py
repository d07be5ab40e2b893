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
"""Maximum number of tokens per batch."""

Thing = TypeVar("Thing")


@dataclass(frozen=True)
class SubjectText:
    """A text about a subject.

    Attributes:
        ids: Tokens of the text.
        position: Position of the subject's last token.
        counted: Its position in the published implementations, see :class:`SubjectToken`.
    """

    ids: list[int]
    position: int
    counted: int


@dataclass(frozen=True)
class SubjectFact:
    """A fact to write.

    Attributes:
        plain: The prompt without context.
        in_contexts: The prompt in each context.
        essence: "{subject} is a", whose continuation should hardly change.
        target: Tokens of the target.
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
    """Build the facts of prompts, targets and subjects, in each of several contexts.

    The target's tokens are appended to the prompt's tokens. (The published implementations append
    the target as text and tokenise the whole text, which can merge characters across the prompt's
    end.)

    Args:
        model: A TransformerLens model with a tokenizer.
        prompts: Texts that contain their subjects, or ``{}`` in their places.
        targets: One for all prompts, or one per prompt: text (mind the leading space) or token ids.
        subjects: One per prompt.
        contexts: Templates with ``{}`` for the prompt.
        prepend_bos: As in ``model.to_tokens``.

    Raises:
        TypeError: If prompts or subjects are not lists of text.
        ValueError: If their numbers differ, a target is empty, a subject is not in its prompt, or
            a text exceeds the model's context.

    Warns:
        UserWarning: As :func:`subject_in` and :func:`target_tokens`.
    """
    for argument, texts in (("prompts", prompts), ("subjects", subjects)):
        if isinstance(texts, str) or not isinstance(texts, Sequence) or not texts:
            raise TypeError(f"{argument} must be a list of at least one text, got {texts!r}")
    if len(prompts) != len(subjects):
        raise ValueError(f"there are {len(prompts)} prompts, but {len(subjects)} subjects")
    if model.tokenizer is None:
        raise ValueError("this model has no tokenizer, which is needed to find the subject")
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
    """A batch of texts, and the positions of the subjects' last tokens."""
    batch = batch_of_tokens(model, [torch.tensor(text.ids) for text in texts])
    return batch, torch.tensor([text.position for text in texts])


def read_subjects(
    model: Model,
    points: Sequence[str],
    texts: Sequence[SubjectText],
    edit: WeightEdit | None = None,
) -> list[Float[Tensor, "text _"]]:
    """The tensors at some HookPoints at the subject's last token of each text.

    Args:
        model: A TransformerLens model.
        points: Names of the HookPoints.
        texts: The texts.
        edit: An edit to apply by its hooks.
    """
    read = [
        read_at(model, points, *batch_of_subjects(model, batch), edit)
        for batch in in_batches(texts, [len(text.ids) for text in texts])
    ]
    return [torch.cat(parts) for parts in zip(*read, strict=True)]


def in_batches(things: Sequence[Thing], sizes: Sequence[int]) -> Iterator[list[Thing]]:
    """Group successive things into batches of at most ``TOKENS_AT_ONCE`` tokens."""
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
            f"prompt {prompt!r} has {longest} tokens with its longest context and its target, more "
            f"than the model's context of {model.cfg.n_ctx}; pass shorter contexts"
        )
