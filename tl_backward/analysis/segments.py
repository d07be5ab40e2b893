"""Facts as prompts, and the segment of the prompt that each token belongs to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from tl_backward.evaluation.records import rewrite_of
from tl_backward.sites import Model

SEGMENTS = ("bos", "subject first", "subject middle", "subject last", "relation", "last")
INCOMPLETE = "\ufffd"


class Fact(NamedTuple):
    """The parts of a record that experiments need.

    Attributes:
        prompt: The prompt with its subject.
        subject: The character range of the subject in the prompt.
        target: The edit's target, with its leading space.
        original: The true answer, with its leading space.
        relation: The name of the relation, if known.
    """

    prompt: str
    subject: range
    target: str
    original: str
    relation: str | None


def fact_of(record: Any) -> Fact:
    """Read a record in the schema of CounterFact, or one already read by ``evaluation``.

    Args:
        record: A mapping with ``requested_rewrite``: ``prompt`` (with ``{}`` for the subject),
            ``subject``, ``target_new.str``, ``target_true.str`` and optionally ``relation_id``. Or
            an object with the attributes ``prompt`` (whose first occurrence of the subject counts),
            ``subject, target_new, target_true`` and ``relation_id``.

    Raises:
        ValueError: If one of these is missing or not text, or the prompt does not have exactly one
            ``{}``.

    Example:
        >>> fact_of(record).prompt, fact_of(record).target
        ('The mother tongue of Danielle Darrieux is', ' English')
    """
    if not isinstance(record, Mapping):
        begin = record.prompt.index(record.subject)
        span = range(begin, begin + len(record.subject))
        texts = _spaced(record.target_new), _spaced(record.target_true)
        return Fact(record.prompt, span, *texts, record.relation_id)
    try:
        rewrite = rewrite_of(record)
    except ValueError as error:
        raise ValueError(f"record {record.get('case_id', 'without case_id')}: {error}") from error
    before, subject, after, target, original = rewrite
    span = range(len(before), len(before) + len(subject))
    texts = _spaced(target), _spaced(original)
    relation = record["requested_rewrite"].get("relation_id")
    return Fact(before + subject + after, span, *texts, relation)


def prompt_segments(model: Model, tokens: Sequence[int], fact: Fact) -> list[str]:
    """The segment of each token of a fact's prompt, one of ``SEGMENTS``.

    Every token that contains a character of the subject belongs to the subject. Its first token is
    ``"subject first"`` and its last token is ``"subject last"``, also if it is the only one. The
    last token of the prompt is always ``"last"``. Tokens before the prompt's first character are
    ``"bos"``, and all others, before and after the subject, are ``"relation"``.

    Args:
        model: A TransformerLens model with a tokenizer.
        tokens: The tokens that the model ran on, with or without a BOS token.
        fact: The fact of the prompt.

    Raises:
        ValueError: If the tokens do not decode to the prompt.

    Example:
        >>> prompt_segments(model, cache.tokens.tolist(), fact_of(record))
        ['bos', 'relation', 'relation', 'relation', 'relation', 'subject first', ...]
    """
    spans = _character_spans(model, tokens, fact.prompt)
    segments = ["relation" if span.stop > 0 else "bos" for span in spans]
    subject = [
        i
        for i, span in enumerate(spans)
        if span.start < fact.subject.stop and span.stop > fact.subject.start
    ]
    for i in subject:
        segments[i] = "subject middle"
    segments[subject[0]] = "subject first"
    segments[subject[-1]] = "subject last"
    segments[-1] = "last"
    return segments


def _spaced(text: str) -> str:
    return f" {text.lstrip()}"


def _character_spans(model: Model, tokens: Sequence[int], prompt: str) -> list[range]:
    """The character range of each token in the prompt.

    Decoding the preceding tokens gives its start, which works for any tokenizer; tokens that are
    parts of one multi-byte character share it.
    """
    decoded = [
        model.tokenizer.decode(
            tokens[:i], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        for i in range(len(tokens) + 1)
    ]
    begin = decoded[-1].rfind(prompt)
    if begin < 0:
        raise ValueError(
            f"the tokens of the prompt {prompt!r} decode to another text, {decoded[-1]!r}, so the "
            "subject cannot be located"
        )
    ends = [len(text.rstrip(INCOMPLETE)) for text in decoded]
    return [range(start - begin, max(end, start + 1) - begin) for start, end in pairwise(ends)]
