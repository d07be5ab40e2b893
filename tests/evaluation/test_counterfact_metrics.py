"""CounterFact records, metrics and tables: closed forms, and what is refused."""

from __future__ import annotations

import copy
import json
import math
import re
from functools import reduce

import datasets
import numpy as np
import pandas as pd
import pytest
import torch

from tl_backward.evaluation import (
    Record,
    TargetScores,
    load_records,
    n_gram_entropy,
    prompt_metrics,
    summarise,
    table,
    wikitext_lines,
)

ENTRY = {
    "case_id": 7,
    "requested_rewrite": {
        "prompt": "{} plays for the city of",
        "relation_id": "P54",
        "subject": "Lionel Messi",
        "target_new": {"str": "Paris", "id": "Q90"},
        "target_true": {"str": "Rome"},
    },
    "paraphrase_prompts": ["Messi plays in", "Lionel plays for"],
    "neighborhood_prompts": ["The Eiffel Tower is located in", "The city of", "not in"],
    "attribute_prompts": ["London is"],
    "generation_prompts": ["Messi is", "Lionel Messi plays"],
}


def changed(path, value=None):
    """The entry with another value somewhere, or without it."""
    entry = copy.deepcopy(ENTRY)
    *outer, last = path.split(".")
    inner = reduce(dict.__getitem__, outer, entry)
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    return entry


def written(path, entries):
    path.write_text(json.dumps(entries), encoding="utf-8")
    return path


# records


def test_a_record_in_the_original_schema(tmp_path):
    (record,) = load_records(written(tmp_path / "facts.json", [ENTRY]))
    assert record == Record(
        case_id=7,
        prompt="Lionel Messi plays for the city of",
        subject="Lionel Messi",
        relation_id="P54",
        target_new="Paris",
        target_true="Rome",
        paraphrase_prompts=("Messi plays in", "Lionel plays for"),
        neighborhood_prompts=("The Eiffel Tower is located in", "The city of", "not in"),
        generation_prompts=("Messi is", "Lionel Messi plays"),
    )


def test_braces_in_a_subject_stay(tmp_path):
    entry = changed("requested_rewrite.subject", "Lionel {} Messi {0}")
    (record,) = load_records(written(tmp_path / "facts.json", [entry]))
    assert record.prompt == "Lionel {} Messi {0} plays for the city of"


@pytest.mark.parametrize(("n", "ids"), [(None, [0, 1, 2]), (2, [0, 1]), (9, [0, 1, 2])])
def test_the_first_records(tmp_path, n, ids):
    file = written(tmp_path / "facts", [ENTRY | {"case_id": i} for i in range(3)])
    assert [record.case_id for record in load_records(file, n)] == ids


def test_records_of_the_hub(monkeypatch, tmp_path):
    calls = []

    def load_dataset(name, split):
        calls.append((name, split))
        return datasets.Dataset.from_list([ENTRY, ENTRY | {"case_id": 8}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    from_hub = load_records("someone/counterfact", split="test")
    assert calls == [("someone/counterfact", "test")]
    file = written(tmp_path / "facts.json", [ENTRY, ENTRY | {"case_id": 8}])
    assert from_hub == load_records(str(file))


MALFORMED = [
    (changed("case_id"), "case_id is missing"),
    (changed("case_id", "7"), "case_id must be an integer, got '7'"),
    (changed("requested_rewrite"), "requested_rewrite is missing"),
    (changed("requested_rewrite", "Paris"), "requested_rewrite must be an object, got 'Paris'"),
    (changed("requested_rewrite.subject"), "requested_rewrite.subject is missing"),
    (changed("requested_rewrite.subject", 3), "requested_rewrite.subject must be text, got 3"),
    (changed("requested_rewrite.prompt", "plays"), "requested_rewrite.prompt must have one {}"),
    (changed("requested_rewrite.prompt", "{} and {}"), "requested_rewrite.prompt must have one"),
    (changed("requested_rewrite.relation_id"), "requested_rewrite.relation_id is missing"),
    (changed("requested_rewrite.target_new.str"), "requested_rewrite.target_new.str is missing"),
    (changed("requested_rewrite.target_new.str", " "), "requested_rewrite.target_new.str must be"),
    (changed("requested_rewrite.target_true", "Rome"), "requested_rewrite.target_true must be an"),
    (changed("paraphrase_prompts"), "paraphrase_prompts is missing"),
    (changed("paraphrase_prompts", []), r"paraphrase_prompts must be a list of at least one text"),
    (changed("neighborhood_prompts", ["a", 3]), "neighborhood_prompts must be a list of at least"),
    (
        changed("generation_prompts", "Messi is"),
        "generation_prompts must be a list of at least",
    ),
    (["Messi"], r"the record must be an object, got \['Messi'\]"),
]


def test_malformed_records_are_named_and_the_others_kept(tmp_path):
    entries = [entry for entry, _ in MALFORMED]
    file = written(tmp_path / "facts.json", [ENTRY, *entries, ENTRY | {"case_id": 8}])
    with pytest.warns(UserWarning, match="skipped .* malformed records") as caught:
        records = load_records(file)
    assert [record.case_id for record in records] == [7, 8]
    (warning,) = caught
    first, *lines = str(warning.message).split("\n")
    assert first.endswith(f"skipped {len(MALFORMED)} malformed records")
    for i, (line, (_, complaint)) in enumerate(zip(lines, MALFORMED, strict=True), start=1):
        assert re.search(f"record {i}: {complaint}".replace("{}", r"\{\}"), line)


def test_no_usable_record_is_an_error_that_names_all(tmp_path):
    file = written(tmp_path / "facts.json", [MALFORMED[0][0], MALFORMED[4][0]])
    with pytest.raises(ValueError, match=r"(?s)source: .* record 0: case_id.* record 1: .*subject"):
        load_records(file)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", "is not a readable JSON file"),
        ('{"a": 1}', "holds a JSON dict, not a list"),
        ("[]", "no usable"),
    ],
)
def test_files_that_hold_no_records(tmp_path, text, match):
    file = tmp_path / "facts.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=match):
        load_records(file)


def test_other_bad_input(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_records(tmp_path / "missing.json")
    with pytest.raises(FileNotFoundError):
        wikitext_lines(tmp_path / "missing.txt")
    with pytest.raises(ValueError, match="n must be at least 1"):
        load_records(written(tmp_path / "facts.json", [ENTRY]), 0)


# lines for the perplexity

LINES = ["", " = Robert Boulter = ", "x" * 29, "y" * 30, " " + "z" * 40 + " ", "w" * 31]


@pytest.mark.parametrize("line_break", ["\n", "\r\n"])
def test_lines_of_a_file(tmp_path, line_break):
    file = tmp_path / "lines.txt"
    file.write_bytes(line_break.join(LINES).encode())
    assert wikitext_lines(file) == LINES[3:]
    assert wikitext_lines(file, n=2) == LINES[3:5]
    assert wikitext_lines(str(file), min_characters=10) == LINES[1:]
    with pytest.raises(ValueError, match="has no line of 50 characters or more"):
        wikitext_lines(file, min_characters=50)


def test_lines_of_the_hub(monkeypatch):
    calls = []

    def load_dataset(name, configuration, split):
        calls.append((name, configuration, split))
        return datasets.Dataset.from_dict({"text": [f"{line}\n" if line else "" for line in LINES]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert wikitext_lines("Salesforce/wikitext") == LINES[3:]
    assert calls == [("Salesforce/wikitext", "wikitext-2-raw-v1", "test")]


# metrics of a record


def scores(probabilities, predicted):
    """Of the new and of the true target, for each prompt."""
    nll = -torch.tensor(probabilities, dtype=torch.float64).log()
    return TargetScores(nll, torch.tensor(predicted))


FOUR_PROMPTS = scores(
    [[0.5, 0.25], [0.25, 0.5], [0.125, 0.125], [0.75, 0.0625]],
    [[True, False], [False, True], [False, False], [True, False]],
)
MEAN_DIFFERENCE = (0.25 - 0.25 + 0 + 0.6875) / 4


@pytest.mark.parametrize(
    ("kind", "success", "magnitude", "accuracy"),
    [
        ("efficacy", 2 / 4, MEAN_DIFFERENCE, 2 / 4),
        ("paraphrase", 2 / 4, MEAN_DIFFERENCE, 2 / 4),
        ("neighborhood", 1 / 4, -MEAN_DIFFERENCE, 1 / 4),
    ],
)
def test_success_magnitude_and_accuracy(kind, success, magnitude, accuracy):
    """The third prompt is a tie, which fails both ways."""
    assert prompt_metrics(kind, FOUR_PROMPTS) == {
        f"{kind}_success": success,
        f"{kind}_magnitude": pytest.approx(magnitude, abs=1e-15),
        f"{kind}_accuracy": accuracy,
    }


def test_nothing_succeeds_where_the_model_gives_nan():
    nan = TargetScores(torch.full((1, 2), torch.nan), torch.tensor([[False, False]]))
    for kind in ("efficacy", "neighborhood"):
        assert prompt_metrics(kind, nan)[f"{kind}_success"] == 0


# n-gram entropy


def entropy(*counts):
    shares = np.array(counts) / sum(counts)
    return -(shares * np.log2(shares)).sum()


@pytest.mark.parametrize(
    ("text", "pairs", "triples"),
    [
        ("a b c d e f g h i", math.log2(8), math.log2(7)),
        ("no no no no no", 0, 0),
        ("a b a b a", entropy(2, 2), entropy(2, 1)),
        ("a b c a b c a b", entropy(3, 2, 2), entropy(2, 2, 2)),
        ("a b, a b, a b", entropy(3, 2, 2), entropy(2, 2, 2)),
        ("a b\n\na  b\ta", entropy(2, 2), entropy(2, 1)),
        ("don't 3.5 don't 3.5 don't", entropy(2, 2), entropy(2, 1)),
        ("one two", 0, 0),
        ("one", 0, 0),
        ("", 0, 0),
    ],
)
def test_n_gram_entropy(text, pairs, triples):
    want = (2 / 3 * pairs + 4 / 3 * triples) / 2
    assert n_gram_entropy(text) == pytest.approx(want, abs=1e-12)


# tables

FRAME = pd.DataFrame(
    {
        "record": [0, 1, 2],
        "error": [None, None, "ValueError: too long"],
        "efficacy_success": [1.0, 1.0, None],
        "efficacy_magnitude": [0.75, 0.25, None],
        "efficacy_accuracy": [1.0, 0.0, None],
        "paraphrase_success": [0.5, 0.5, None],
        "paraphrase_magnitude": [0.5, -0.5, None],
        "paraphrase_accuracy": [0.0, 0.0, None],
        "neighborhood_success": [0.2, 0.3, None],
        "neighborhood_magnitude": [0.0, 0.5, None],
        "neighborhood_accuracy": [0.5, 1.0, None],
        "perplexity": [30.0, None, None],
    }
)


def test_summary():
    row = summarise({"shift": FRAME}).loc["shift"]
    assert row["records"].to_dict() == {"measured": 2, "errors": 1}
    assert row["success"].to_dict() == pytest.approx(
        {
            **{"efficacy": 100, "efficacy_std": 0},
            **{"paraphrase": 50, "paraphrase_std": 0},
            **{"neighborhood": 25, "neighborhood_std": 5},
            "score": 3 / (1 / 100 + 1 / 50 + 1 / 25),
        }
    )
    assert row["magnitude"].to_dict() == pytest.approx(
        {
            **{"efficacy": 50, "efficacy_std": 25},
            **{"paraphrase": 0, "paraphrase_std": 50},
            **{"neighborhood": 25, "neighborhood_std": 25},
        }
    )
    assert row["accuracy", "neighborhood"] == 75 and row["accuracy", "score"] == 0
    assert row["text"].to_dict() == {"perplexity": 30, "perplexity_std": 0}


def test_methods_side_by_side():
    fluent = FRAME.drop(columns="perplexity").assign(ngram_entropy=[6.0, 6.5, None])
    results = {"plain": FRAME, "fluent": fluent}
    shown = table(results)
    assert list(shown.index) == ["plain", "fluent"]
    assert shown.loc["plain", ("success", "neighborhood")] == "25.00 (5.00)"
    assert shown.loc["plain", ("accuracy", "score")] == "0.00"
    assert shown.loc["plain", ("records", "measured")] == "2"
    assert shown["text"].to_dict("index") == {
        "plain": {"perplexity": "30.00 (0.00)", "ngram_entropy": "-"},
        "fluent": {"perplexity": "-", "ngram_entropy": "625.00 (25.00)"},
    }


def test_a_method_that_always_fails():
    frame = pd.DataFrame({"record": [0], "error": ["ValueError: no"], "edit_norm": [None]})
    row = summarise({"bad": frame, "good": FRAME}).loc["bad"]
    assert row["records"].to_dict() == {"measured": 0, "errors": 1}
    assert row["success"].isna().all() and row["text"].isna().all()
    assert (table({"bad": frame})["success"] == "-").all(axis=None)


def test_no_results():
    with pytest.raises(ValueError, match="results is empty"):
        summarise({})
