"""Facts, their prompts and the segments of these."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace

import pytest
from helpers.facts import record
from helpers.texts import TEXTS
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from tl_backward.analysis import SEGMENTS, fact_of, prompt_segments

BOS, FIRST, MIDDLE, SUBJECT, REST, LAST = SEGMENTS


@pytest.fixture(scope="module")
def model():
    """With a tokenizer that makes tokens of single bytes of what it has not seen."""
    bpe = Tokenizer(BPE())
    bpe.pre_tokenizer, bpe.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    trainer = BpeTrainer(
        special_tokens=["<bos>"], initial_alphabet=ByteLevel.alphabet(), show_progress=False
    )
    bpe.train_from_iterator(TEXTS, trainer)
    return SimpleNamespace(
        tokenizer=PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<bos>")
    )


@pytest.mark.parametrize(
    ("prompt", "subject", "tokens", "segments"),
    [
        (  # at the beginning, without a leading space
            "{} plays for the",
            "Lionel Messi",
            ["Lionel", " Messi", " plays", " for", " the"],
            [FIRST, SUBJECT, REST, REST, LAST],
        ),
        (
            "The {} is located in",
            "Eiffel Tower not in",
            ["The", " Eiffel", " Tower", " not", " in", " is", " located", " in"],
            [REST, FIRST, MIDDLE, MIDDLE, SUBJECT, REST, REST, LAST],
        ),
        (  # one token
            "The city of {} is",
            "Berlin",
            ["The", " city", " of", " Berlin", " is"],
            [REST, REST, REST, SUBJECT, LAST],
        ),
        (  # it ends the prompt
            "The city of {}",
            "Messi Tower",
            ["The", " city", " of", " Messi", " Tower"],
            [REST, REST, REST, FIRST, LAST],
        ),
        (  # the same words are in the template
            "The city of Berlin is in {} is in",
            "Berlin",
            ["The", " city", " of", " Berlin", " is", " in", " Berlin", " is", " in"],
            [REST, REST, REST, REST, REST, REST, SUBJECT, REST, LAST],
        ),
    ],
)
def test_segments_are_those_marked_by_hand(model, prompt, subject, tokens, segments):
    fact = fact_of(record(prompt, subject))
    ids = model.tokenizer.encode(fact.prompt)
    assert [model.tokenizer.decode([i]) for i in ids] == tokens
    assert prompt_segments(model, ids, fact) == segments
    bos = model.tokenizer.bos_token_id
    assert prompt_segments(model, [bos, *ids], fact) == [BOS, *segments]


def test_tokens_of_single_bytes_belong_to_their_character(model):
    """The subject is one token per byte; the space before it is a token of the template."""
    for subject in ("Łé", "東京", "🗼"):
        fact = fact_of(record("The city of {} is in", subject))
        ids = model.tokenizer.encode(fact.prompt)
        n_bytes = len(subject.encode())
        assert len(ids) == 3 + 1 + n_bytes + 2
        assert prompt_segments(model, ids, fact) == [
            *(REST, REST, REST, REST),
            *(FIRST, *[MIDDLE] * (n_bytes - 2), SUBJECT),
            *(REST, LAST),
        ]


def test_a_fact_is_read_as_it_is_in_counterfact():
    fact = fact_of(record("The city of {} is", "Berlin", " Paris", "Rome and Berlin"))
    assert fact.prompt == "The city of Berlin is"
    assert fact.prompt[fact.subject.start : fact.subject.stop] == "Berlin"
    assert (fact.target, fact.original) == (" Paris", " Rome and Berlin")


def test_records_of_the_evaluation_are_the_same_facts(tmp_path):
    from tl_backward.evaluation.records import load_records

    raw = record("The {} is in", "Eiffel Tower")
    raw["requested_rewrite"]["relation_id"] = "P17"
    others = ("paraphrase_prompts", "neighborhood_prompts", "generation_prompts")
    raw |= {field: ["It is in"] for field in others}
    file = tmp_path / "records.json"
    file.write_text(json.dumps([raw]))
    (loaded,) = load_records(file)
    assert fact_of(loaded) == fact_of(raw) and fact_of(raw).relation == "P17"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (("prompt",), "no place for a subject"),
        (("prompt",), "{} and {}"),
        (("prompt",), None),
        (("subject",), ""),
        (("target_new",), "Paris"),
        (("target_new", "str"), 5),
        (("target_true", "str"), None),
    ],
)
def test_a_malformed_record_is_named(field, value):
    wrong = copy.deepcopy(record("The city of {} is", "Berlin"))
    inner = wrong["requested_rewrite"]
    for key in field[:-1]:
        inner = inner[key]
    inner[field[-1]] = value
    with pytest.raises(ValueError, match=rf"record 7: requested_rewrite\.{'.'.join(field)}"):
        fact_of(wrong)
    with pytest.raises(ValueError, match="record without case_id: requested_rewrite is missing"):
        fact_of({})


def test_tokens_of_another_text_are_refused(model):
    ids = model.tokenizer.encode("The city of Rome is")
    with pytest.raises(ValueError, match="prompt 'The city of Berlin is' decode to another text"):
        prompt_segments(model, ids, fact_of(record("The city of {} is", "Berlin")))
