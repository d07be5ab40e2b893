"""Several facts edited before they are measured, together or in turn, against plain loops."""

from __future__ import annotations

import math
from contextlib import ExitStack

import pandas as pd
import pytest
import torch
from helpers.counterfact import RECORDS, TEXTS, plain_loop, with_tokenizer
from helpers.state import state
from helpers.versions import MODELS

import tl_backward as tlb
from tl_backward import evaluation
from tl_backward.editing import WeightEdit
from tl_backward.evaluation import evaluate, perplexity, shift

PRECISION = 1e-10


@pytest.fixture
def model(models, tokenizer):
    return with_tokenizer(models, tokenizer, MODELS[-1])


def shifted(model, records, lr=0.2):
    prompts = [record.prompt for record in records]
    targets = [f" {record.target_new}" for record in records]
    return tlb.forward_pass_shift(model, prompts, targets, layer=1, lr=lr, prepend_bos=False)


def measured(model, frame, records):
    for record, row in zip(records, frame.to_dict("records"), strict=True):
        want = plain_loop(model, model.tokenizer, record)
        assert {name: row[name] for name in want} == pytest.approx(want, abs=PRECISION)


def test_facts_edited_together_are_measured_under_one_edit(model):
    before = state(model)
    frame = evaluate(
        model, RECORDS, shift(layer=1, lr=0.2), size=2, perplexity_texts=TEXTS, progress=False
    )
    assert state(model) == before
    assert frame["record"].tolist() == [0, 1, 2] and frame["group"].tolist() == [0, 0, 1]
    for records, first in ((RECORDS[:2], 0), (RECORDS[2:], 2)):
        edit = shifted(model, records)
        rows = frame.iloc[first : first + len(records)]
        with edit.applied():
            measured(model, rows, records)
            want = float(perplexity(model, TEXTS, prepend_bos=False))
        assert rows["perplexity"].tolist() == pytest.approx([want] * len(records))
        assert rows["edit_norm"].tolist() == pytest.approx([float(edit.norm())] * len(records))


def test_facts_edited_in_turn_are_measured_after_the_last(model):
    before = state(model)
    frame = evaluate(
        model, RECORDS, shift(layer=1, lr=0.2), size=3, schedule="in turn", progress=False
    )
    assert state(model) == before
    norms = []
    with ExitStack() as stack:
        for record in RECORDS:
            edit = shifted(model, [record])
            norms.append(float(edit.norm()))
            stack.enter_context(edit.applied())
        measured(model, frame, RECORDS)
    assert frame["edit_norm"].tolist() == pytest.approx(norms)
    alone = evaluate(model, RECORDS, shift(layer=1, lr=0.2), progress=False)
    gap = (alone["efficacy_magnitude"] - frame["efficacy_magnitude"]).abs()
    assert gap.max() > 1e-4


def test_a_method_in_turn_gets_the_edits_before_it(model):
    given, edits = [], []

    def method(model, record, earlier):
        given.append(list(earlier))
        edits.append(shifted(model, [record]))
        return edits[-1]

    evaluate(model, RECORDS, method, size=3, schedule="in turn", progress=False)
    assert given == [[], edits[:1], edits[:2]]


def test_alpha_edit_in_turn_keeps_what_was_written_before(model):
    """As by hand, with the earlier edits applied and passed."""
    statistics = tlb.key_statistics(model, TEXTS * 5, [0, 1], ridge=0)
    given = {"layers": [0, 1], "contexts": [["{}"]], "steps": 3, "l2": 0.5, "clamp": 3.0}
    space = {
        site.name: statistics.null_space(site.name, fraction=0.7)
        for site in tlb.weight_sites(model, "W_out", [0, 1])
    }
    method = evaluation.alpha_edit(null_space=space, **given)
    frame = evaluate(model, RECORDS[:2], method, size=2, schedule="in turn", progress=False)
    assert frame["error"].isna().all()
    edits = []
    with ExitStack() as stack:
        for record in RECORDS[:2]:
            facts = [record.prompt], [f" {record.target_new}"]
            options = {**given, "subjects": [record.subject], "earlier": edits}
            edit = tlb.alpha_edit(model, *facts, null_space=space, prepend_bos=False, **options)
            edits.append(edit)
            stack.enter_context(edit.applied())
        measured(model, frame, RECORDS[:2])
    assert frame["edit_norm"].tolist() == pytest.approx([float(edit.norm()) for edit in edits])


@pytest.mark.parametrize("schedule", ["together", "in turn"])
def test_what_fails_in_a_group_is_recorded(model, schedule):
    """Together all of the group fail, in turn only the one; the others are measured."""

    def method(model, record):
        if record is RECORDS[1] or record == RECORDS[:2]:
            raise ValueError("singular")
        return shifted(model, record if isinstance(record, list) else [record])

    before = state(model)
    frame = evaluate(model, RECORDS, method, size=2, schedule=schedule, progress=False)
    assert state(model) == before
    failed = [0, 1] if schedule == "together" else [1]
    assert frame.index[frame["error"] == "ValueError: singular"].tolist() == failed
    assert frame.index[frame["efficacy_success"].isna()].tolist() == failed
    with ExitStack() as stack:
        if schedule == "in turn":
            stack.enter_context(shifted(model, RECORDS[:1]).applied())
            measured(model, frame.iloc[:1], RECORDS[:1])
    with shifted(model, RECORDS[2:]).applied():
        measured(model, frame.iloc[2:], RECORDS[2:])


@pytest.mark.parametrize("size", [1, 2])
def test_an_edit_that_is_not_finite_is_an_error(model, size):
    """A norm of NaN, and one that is infinite, do not reach the tables."""
    (site,) = tlb.weight_sites(model, "W_out", 1)

    def method(model, record):
        value = math.nan if record in (RECORDS[0], RECORDS[:2]) else 1e200
        factors = tlb.GradientFactors(
            torch.full((1, site.d_in), value, dtype=torch.float64),
            torch.full((1, site.d_out), value, dtype=torch.float64),
        )
        return WeightEdit(model, {site.name: factors})

    before = state(model)
    frame = evaluate(model, RECORDS, method, size=size, progress=False)
    assert state(model) == before
    assert frame["error"].str.fullmatch("the norm of the edit is (nan|inf)").all()
    assert "efficacy_success" not in frame
    assert evaluation.table({"x": frame})["records", "errors"].tolist() == ["3"]


def test_groups_are_resumed(model, tmp_path):
    options = {"size": 2, "path": tmp_path / "groups", "progress": False}
    first = evaluate(model, RECORDS, shift(layer=1, lr=0.2), **options)
    again = evaluate(model, RECORDS, shift(layer=1, lr=0.2), **options)
    pd.testing.assert_frame_equal(first, again, check_dtype=False)
    with pytest.raises(ValueError, match="other fn"):
        evaluate(model, RECORDS, shift(layer=1, lr=0.2), **options, schedule="in turn")


def test_malformed_groups(model, unchecked):
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        evaluate(model, RECORDS, shift(layer=1, lr=0.2), size=0)
    with pytest.raises(ValueError, match="schedule must be 'together' or 'in turn', got 'all'"):
        evaluate(model, RECORDS, shift(layer=1, lr=0.2), size=2, schedule="all")


def test_rome_takes_one_fact_at_a_time(model):
    statistics = tlb.key_statistics(model, TEXTS * 5, 1, ridge=0.01)
    method = evaluation.rome(layer=1, statistics=statistics, contexts=["{}"], steps=3)
    frame = evaluate(model, RECORDS, method, size=3, progress=False)
    assert frame["error"].str.startswith("ValueError: rome edits one fact at a time").all()
    frame = evaluate(model, RECORDS, method, size=3, schedule="in turn", progress=False)
    assert frame["error"].isna().all()


def test_the_singular_and_the_nonsensical_do_not_end_a_run(model):
    """Two equal keys without a ridge, and statistics of too little text."""
    twice = [RECORDS[0], RECORDS[0], RECORDS[1]]
    joint = shift(layer=1, lr=0.2, joint=True)
    frame = evaluate(model, twice, joint, size=2, progress=False)
    fails = frame["error"].str.contains("do not tell its facts apart")
    assert fails.eq(True).tolist() == [True, True, False]
    little = tlb.key_statistics(model, TEXTS[:1], 1, ridge=0)
    method = evaluation.rome(layer=1, statistics=little, contexts=["{}"], steps=2)
    frame = evaluate(model, RECORDS, method, progress=False)
    assert frame["error"].str.contains("singular with ridge=0").all()
