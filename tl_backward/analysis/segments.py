"""Facts as prompts, and which part of its prompt each token belongs to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from tl_backward.evaluation.records import rewrite_of
from tl_backward.sites import Model

SEGMENTS = ("bos", "subject first", "subject middle", "subject last", "relation", "last")
INCOMPLETE = "\ufffd"


class Fact(NamedTuple):
    """What an experiment needs of a record.

    Attributes:
        prompt: The prompt with its subject.
        subject: The characters of the prompt that are the subject.
        target: The edit's target, with its leading space.
        original: What is true, with its leading space.
        relation: The name of the relation, if it is known.
    """

    prompt: str
    subject: range
    target: str
    original: str
    relation: str | None


def fact_of(record: Any) -> Fact:
    """Read a record in the schema of CounterFact, or one that ``evaluation`` has read from it.

    Args:
        record: A mapping with ``requested_rewrite``: ``prompt`` (with ``{}`` for the subject),
            ``subject``, ``target_new.str``, ``target_true.str`` and, if there is one,
            ``relation_id``. Or an object with the attributes ``prompt`` (in which the subject is
            looked for from the left), ``subject, target_new, target_true`` and ``relation_id``.

    Raises:
        ValueError: When one of these is missing or no text, or the prompt has not one ``{}``.

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

    Every token with a character of the subject belongs to it. The first one is ``"subject first"``
    and the last one ``"subject last"``; the only one of a subject of one token is
    ``"subject last"``, too. The last token of the prompt is ``"last"``, whatever else it is.
    Tokens before the prompt's first character are ``"bos"``, and all others ``"relation"``, before
    and behind the subject.

    Args:
        model: A TransformerLens model with a tokenizer.
        tokens: What the model was run on, with or without a BOS token.
        fact: Whose prompt it is.

    Raises:
        ValueError: When the tokens do not decode to the prompt.

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
    """The characters of the prompt that each token is, or is a part of.

    They are counted in what the tokens before it decode to, which any tokenizer can say; tokens
    within one character of several bytes share it.
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
            f"the tokenizer turns the prompt {prompt!r} into tokens of another text, "
            f"{decoded[-1]!r}, in which the subject cannot be found"
        )
    ends = [len(text.rstrip(INCOMPLETE)) for text in decoded]
    return [range(start - begin, max(end, start + 1) - begin) for start, end in pairwise(ends)]
