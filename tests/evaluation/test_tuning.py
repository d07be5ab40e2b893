"""Settings chosen by the score on some records."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest
from helpers.counterfact import RECORDS, with_tokenizer
from helpers.versions import MODELS

import tl_backward as tlb
from tl_backward.evaluation import evaluate, shift, tune

GRID = {"layer": [0, 1], "lr": [0.05, 0.4, 1.5]}
KINDS = ("efficacy", "paraphrase", "neighborhood")


@pytest.fixture
def model(models, tokenizer):
    return with_tokenizer(models, tokenizer, MODELS[-1])


def harmonic(values):
    return 0 if min(values) == 0 else 3 / sum(1 / value for value in values)


def made_up(outcomes):
    """A method whose edits are those of a table by layer: another layer fails for some records."""

    def make(layer):
        def method(model, record):
            if record.case_id in outcomes[layer]:
                raise ValueError("no")
            return shift(layer=1, lr=0.4)(model, record)

        return method

    return make


def test_the_setting_with_the_highest_score_is_chosen(model):
    """Each score is the harmonic mean of the three mean successes that ``evaluate`` gives."""
    chosen = tune(model, RECORDS, shift, GRID, progress=False)
    scores = {}
    for layer in GRID["layer"]:
        for lr in GRID["lr"]:
            frame = evaluate(model, RECORDS, shift(layer=layer, lr=lr), progress=False)
            scores[layer, lr] = harmonic([100 * frame[f"{kind}_success"].mean() for kind in KINDS])
    assert len(set(scores.values())) > 1
    assert chosen.table["score"].tolist() == pytest.approx(list(scores.values()))
    assert list(zip(chosen.table["layer"], chosen.table["lr"], strict=True)) == list(scores)
    best = max(scores, key=scores.get)
    assert (chosen.settings["layer"], chosen.settings["lr"]) == best
    edit = chosen.method(model, RECORDS[0])
    want = tlb.forward_pass_shift(
        model, RECORDS[0].prompt, " Paris", layer=best[0], lr=best[1], prepend_bos=False
    )
    assert float(edit.norm()) == pytest.approx(float(want.norm()))


def test_a_record_without_an_edit_counts_as_a_failure(model):
    """Layer 0 fails for all but the easiest record, which alone would have the better score."""
    every = evaluate(model, RECORDS, shift(layer=1, lr=0.4), progress=False)
    score = [harmonic([row[f"{kind}_success"] for kind in KINDS]) for _, row in every.iterrows()]
    best = int(pd.Series(score).argmax())
    fails = {0: {r.case_id for i, r in enumerate(RECORDS) if i != best}, 1: set()}
    chosen = tune(model, RECORDS, made_up(fails), {"layer": [0, 1]}, progress=False)
    sums = {kind: every[f"{kind}_success"] for kind in KINDS}
    of_one = harmonic([100 * sums[kind][best] / 3 for kind in KINDS])
    of_all = harmonic([100 * sums[kind].mean() for kind in KINDS])
    assert chosen.table["score"].tolist() == pytest.approx([of_one, of_all])
    assert chosen.table["errors"].tolist() == [2, 0]
    assert chosen.table["measured"].tolist() == [1, 3]


def test_what_is_done_is_resumed(model, tmp_path):
    calls = []

    def counted(layer):
        def method(model, record):
            calls.append(layer)

        return method

    options = {"path": tmp_path, "progress": False}
    first = tune(model, RECORDS, shift, GRID, **options)
    again = tune(model, RECORDS, shift, GRID, **options)
    pd.testing.assert_frame_equal(first.table, again.table)
    with pytest.raises(ValueError, match="other fn"):
        tune(model, RECORDS, counted, {"layer": [0]}, **options)
    assert calls == []


def test_groups_can_be_tuned(model):
    chosen = tune(model, RECORDS, shift, GRID, size=3, progress=False)
    frame = evaluate(model, RECORDS, chosen.method, size=3, progress=False)
    want = harmonic([100 * frame[f"{kind}_success"].mean() for kind in KINDS])
    assert chosen.table["score"].max() == pytest.approx(want)


@pytest.mark.parametrize("grid", [{}, {"layer": []}])
def test_an_empty_grid(model, grid):
    with pytest.raises(ValueError, match="name at least one argument, and a value for each"):
        tune(model, RECORDS, shift, grid)


def test_nothing_that_can_be_measured(model):
    long = [replace(record, prompt="in " * 40) for record in RECORDS]
    with pytest.raises(ValueError, match=r"no record could be measured; .*context of 32"):
        tune(model, long, shift, GRID, progress=False)


def test_an_argument_that_the_method_does_not_have(model):
    with pytest.raises(TypeError, match="unexpected keyword argument 'size'"):
        tune(model, RECORDS, lambda layer: shift(layer=layer, lr=1), {"size": [3]})
