"""The smallest edits, against steps that are made by hand."""

from __future__ import annotations

import pytest
import torch
from helpers.facts import record
from helpers.versions import NEEDS_BRIDGE

import tl_backward as tlb
from tl_backward import analysis
from tl_backward.analysis import fact_of

RECORDS = [
    record("{} plays for the city of", "Lionel Messi", "Paris", "Rome"),
    record("The {} is in", "Eiffel Tower", "Berlin", "London"),
]
TEXTS = ["The city of Rome is not in London", "Messi plays in Paris"]
MARGIN = 0.2

pytestmark = NEEDS_BRIDGE


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def model(request, tokenizer_with_bos):
    model = request.getfixturevalue("boot")(request.param, tokenizer=tokenizer_with_bos)
    model(torch.tensor([[1, 2]]))
    return model


@pytest.fixture(scope="module")
def frame(model):
    """In the layers that are taken by default, which are the first and the last of three."""
    return analysis.smallest_edit(model, RECORDS, margin=MARGIN, texts=TEXTS, progress=False)


def gap(model, record):
    fact = fact_of(record)
    logits = model(fact.prompt)[0, -1].clone()
    target = model.to_tokens(fact.target, prepend_bos=False)[0, 0]
    of_target = logits[target].clone()
    logits[target] = -torch.inf
    return float((of_target - logits.max()).detach())


def step_by_hand(model, record, layer, method, lr):
    """Change the weight itself, by torch's own optimiser or the shift written out."""
    fact = fact_of(record)
    (site,) = tlb.weight_sites(model, "W_out", layer)
    weight = site.parameter
    target = model.to_tokens(fact.target, prepend_bos=False)[0, 0]
    seen = []
    with model.hooks(fwd_hooks=[(site.hook_in, lambda x, hook: seen.append(x.detach()))]):
        loss = -model(fact.prompt)[0, -1].log_softmax(-1)[target]
    if method == "shift":
        update = torch.outer(seen[0][0, -1], model.W_U[:, target].detach())
        weight.data += lr * (update if weight.shape == update.shape else update.T)
        return
    optimiser = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[method]([weight], lr=lr)
    weight.grad = torch.autograd.grad(loss, weight)[0]
    optimiser.step()
    weight.grad = None


def perplexity(model):
    """Mean of those of the texts, with BOS."""
    losses = [model(text, return_type="loss") for text in TEXTS]
    return float(torch.stack(losses).exp().mean().detach())


def test_the_step_is_just_enough_when_it_is_made_by_hand(model, frame):
    assert len(frame) == 2 * 2 * 3 and frame["lr"].gt(0).sum() >= 11
    for row in frame.to_dict("records"):
        one = RECORDS[row["record"]]
        (site,) = tlb.weight_sites(model, "W_out", row["layer"])
        before = site.parameter.detach().clone()
        try:
            if row["lr"] != row["lr"]:
                for lr in torch.logspace(-4, 2, 25).tolist():
                    step_by_hand(model, one, row["layer"], row["method"], lr)
                    assert gap(model, one) < MARGIN
                    site.parameter.data.copy_(before)
                continue
            step_by_hand(model, one, row["layer"], row["method"], row["lr"])
            assert gap(model, one) == pytest.approx(row["gap"], abs=1e-4)
            assert row["gap"] >= MARGIN
            norm = (site.parameter.detach() - before).norm()
            assert row["update_norm"] == pytest.approx(float(norm), rel=1e-5)
            assert row["relative_norm"] == pytest.approx(float(norm / before.norm()), rel=1e-5)
            assert row["perplexity"] == pytest.approx(perplexity(model), rel=1e-5)
            site.parameter.data.copy_(before)
            assert row["perplexity_before"] == pytest.approx(perplexity(model), rel=1e-5)
            step_by_hand(model, one, row["layer"], row["method"], 0.97 * row["lr"])
            assert gap(model, one) < MARGIN
        finally:
            site.parameter.data.copy_(before)


def test_a_target_that_is_predicted_needs_no_step(model):
    """A hook on the model makes it so."""
    ids = [int(model.to_tokens(fact_of(r).target, prepend_bos=False)[0, 0]) for r in RECORDS]

    def lift(logits, hook):
        logits[..., ids[0]] += 100
        return logits

    with model.hooks(fwd_hooks=[("unembed.hook_out", lift)]):
        frame = analysis.smallest_edit(
            model, RECORDS[:1], methods=["shift"], layers=1, progress=False
        )
    assert frame["lr"].tolist() == frame["update_norm"].tolist() == [0.0]
    assert frame["gap"].item() > 50


def test_where_no_step_succeeds_there_is_none(model):
    with model.hooks(fwd_hooks=[("blocks.2.hook_mlp_out", lambda y, hook: 0 * y)]):
        frame = analysis.smallest_edit(model, RECORDS[:1], methods=["shift"], layers=2, texts=TEXTS)
    assert frame[["lr", "update_norm", "relative_norm", "perplexity"]].isna().all(axis=None)
    assert frame["gap"].item() < 0


def test_other_methods_are_refused(model):
    with pytest.raises(
        ValueError, match=r"methods must be from shift, sgd, adam, got \['rmsprop'\]"
    ):
        analysis.smallest_edit(model, RECORDS, methods=["rmsprop"])


def test_the_figure_has_a_line_for_each_method(frame):
    figure = analysis.plot_smallest_edit(frame)
    for line in figure.data:
        rows = frame[(frame["method"] == line.name) & (frame["layer"] == 2)]
        assert line.y[list(line.x).index(2)] == pytest.approx(rows["relative_norm"].median())
    assert {line.name for line in figure.data} == {"shift", "sgd", "adam"}
