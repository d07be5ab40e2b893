"""The subject of a prompt, and its last token."""

from __future__ import annotations

import pytest
import torch
from helpers.texts import TEXTS
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from tl_backward.editing._subjects import Span, subject_in, subject_token

TEXT = st.text(sorted(set("".join(TEXTS))), min_size=1, max_size=6)
"""Of characters that the tests' tokenizer knows."""


@pytest.mark.parametrize(
    ("prompt", "subject", "expected"),
    [
        ("Rome is in", "Rome", ("Rome is in", (0, 4))),
        ("In {} there is", " Rome ", ("In Rome there is", (3, 7))),
        ("Go, made for Google by", "Go", ("Go, made for Google by", (0, 2))),
        ("東京タワーは", "東京", ("東京タワーは", (0, 2))),
        ("Rome {} Rome", "Rome", ("Rome Rome Rome", (5, 9))),
        ("C++ is", "C++", ("C++ is", (0, 3))),
    ],
)
def test_where_the_subject_is(prompt, subject, expected):
    assert subject_in(prompt, subject) == expected


def test_of_two_the_last_is_taken_and_that_is_said():
    with pytest.warns(UserWarning, match=r"2 times; the last one is used.*write \{\}"):
        text, span = subject_in("Rome in Rome is", "Rome")
    assert text[: span.start] == "Rome in "


@pytest.fixture(scope="module")
def tokenised(boot):
    """A model with a tokenizer."""
    return boot("gpt2")


@given(before=TEXT, subject=TEXT.filter(str.strip), after=TEXT, bos=st.booleans())
@settings(max_examples=60, deadline=None)
def test_the_token_holds_the_subjects_last_character(tokenised, before, subject, after, bos):
    """The tokens up to it spell the text to the subject's end at least, and those before do not."""
    text, span = before + subject + after, Span(len(before), len(before) + len(subject.rstrip()))
    ids = tokenised.to_tokens(text, prepend_bos=bos)[0].tolist()
    at = subject_token(tokenised, text, span, bos, ids).position
    pieces = tokenised.tokenizer.convert_ids_to_tokens(ids[bos:])
    n_bytes = len(text[: span.end].encode())
    lengths = torch.tensor([0] * bos + [len(piece) for piece in pieces])  # a character per byte
    spelled = lengths.cumsum(0)
    assert spelled[at] >= n_bytes > (spelled[at - 1] if at else 0)


def test_the_count_of_tokens_differs_where_characters_join(tokenised):
    """ "Eif" ends within the token "Eiffel"; by itself it is other tokens."""
    text = "The Eiffel Tower"
    ids = tokenised.to_tokens(text, prepend_bos=False)[0].tolist()
    token = subject_token(tokenised, text, Span(4, 7), False, ids)
    assert "Eif" in tokenised.tokenizer.decode(ids[token.position])
    of_subject = tokenised.to_tokens(" Eif", prepend_bos=False)[0]
    assert token.counted == len(of_subject) > token.position


def test_a_tokenizer_without_offsets_leaves_the_count(tokenised, monkeypatch):
    text = "The Eiffel Tower is in"
    ids = tokenised.to_tokens(text, prepend_bos=True)[0].tolist()
    span = Span(4, 16)
    expected = subject_token(tokenised, text, span, True, ids).position
    monkeypatch.setattr(PreTrainedTokenizerFast, "is_fast", False)
    assert subject_token(tokenised, text, span, True, ids) == (expected, expected)
