"""The subject of a prompt, and its last token."""

from __future__ import annotations

import re
from typing import NamedTuple

from tl_backward._user_warnings import warn_user
from tl_backward.capture.tokens import prompt_tokens
from tl_backward.sites import Model

SLOT = "{}"


class Span(NamedTuple):
    """A range of characters in a text."""

    start: int
    end: int


class SubjectToken(NamedTuple):
    """The position of the subject's last token.

    Attributes:
        position: The token that holds the subject's last character.
        counted: The position computed from the token counts of prefix and subject, tokenised
            separately, as in the published implementations of ROME and MEMIT. It differs from
            ``position`` if the tokenizer merges characters across the subject's ends.
    """

    position: int
    counted: int


def subject_in(prompt: str, subject: str) -> tuple[str, Span]:
    """Fill the prompt's slot, if it has one, with the subject, and locate the subject.

    Args:
        prompt: Text that contains the subject, or ``{}`` in its place.
        subject: The subject of the fact. Surrounding spaces are ignored.

    Raises:
        TypeError: If prompt or subject is not text.
        ValueError: If the subject is empty or not in the prompt, or there are several slots.

    Warns:
        UserWarning: If the prompt contains the subject several times; the last one counts.
    """
    for argument, text in (("prompt", prompt), ("subject", subject)):
        if not isinstance(text, str):
            raise TypeError(
                f"{argument} must be text, so that the subject can be located, got {text!r}"
            )
    subject = subject.strip()
    if not subject:
        raise ValueError("subject is empty; pass the words of the prompt that the fact is about")
    slots = prompt.count(SLOT)
    if slots > 1:
        raise ValueError(f"prompt {prompt!r} has {slots} slots {SLOT}; the subject takes one")
    if slots:
        start = prompt.index(SLOT)
        return prompt.replace(SLOT, subject), Span(start, start + len(subject))
    literal = re.escape(subject)
    found = list(re.finditer(rf"(?<!\w){literal}(?!\w)", prompt))
    found = found or list(re.finditer(literal, prompt))
    if not found:
        raise ValueError(f"subject {subject!r} is not in the prompt {prompt!r}")
    if len(found) > 1:
        warn_user(
            f"subject {subject!r} is in the prompt {prompt!r} {len(found)} times; the last one is "
            f"used. To use another, write {SLOT} in its place"
        )
    return prompt, Span(*found[-1].span())


def subject_token(
    model: Model, text: str, span: Span, prepend_bos: bool | None, ids: list[int]
) -> SubjectToken:
    """The token that holds the last character of a span of a text.

    Without character offsets from the tokenizer, the count is used; see :class:`SubjectToken`.

    Args:
        model: A TransformerLens model.
        text: The whole text.
        span: The subject in it.
        prepend_bos: As in ``model.to_tokens``.
        ids: Tokens of the text.

    Raises:
        ValueError: If no token holds that character.
    """
    counted = _count(model, text, span, prepend_bos)
    offsets = _offsets(model, text, ids)
    if offsets is None:
        return SubjectToken(counted, counted)
    last = span.end - 1
    holding = [i for i, (start, end) in enumerate(offsets) if start <= last < end]
    if not holding:
        raise ValueError(
            f"subject: the tokenizer drops {text[last]!r}, the last character of "
            f"{text[slice(*span)]!r}"
        )
    return SubjectToken(holding[-1], counted)


def _offsets(model: Model, text: str, ids: list[int]) -> list[Span] | None:
    """The character range of each token, empty for tokens prepended to the text."""
    tokenizer = model.tokenizer
    if not tokenizer.is_fast:
        return None
    for special in (False, True):
        encoded = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
        n_before = len(ids) - len(encoded["input_ids"])
        if n_before >= 0 and ids[n_before:] == encoded["input_ids"]:
            before = [Span(0, 0)] * n_before
            return before + [Span(*offsets) for offsets in encoded["offset_mapping"]]
    return None


def _count(model: Model, text: str, span: Span, prepend_bos: bool | None) -> int:
    """Number of tokens of the prefix and of the subject with its leading space, minus one."""
    prefix, subject = text[: span.start], text[span.start : span.end]
    if not prefix.strip():
        return len(prompt_tokens(model, prefix + subject, prepend_bos, "right")[0]) - 1
    if prefix.endswith(" "):
        prefix, subject = prefix[:-1], f" {subject}"
    (before,) = prompt_tokens(model, prefix, prepend_bos, "right")
    (within,) = prompt_tokens(model, subject, False, "right")
    return len(before) + len(within) - 1
