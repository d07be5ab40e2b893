"""Edits of several facts, against shifts that are written out on the weight itself."""

from __future__ import annotations

import sys

import pytest
import torch
from helpers.facts import record
from helpers.state import state
from helpers.versions import NEEDS_BRIDGE

import tl_backward as tlb
from tl_backward import analysis
from tl_backward.analysis import fact_of

RECORDS = [
    record(prompt, subject, new, true)
    | {
        "paraphrase_prompts": [f"Paris and {subject} is in", f"{subject} is"],
        "neighborhood_prompts": ["The city of Rome is in", "Messi plays for the", "Berlin is"],
    }
    for prompt, subject, new, true in (
        ("{} plays for the city of", "Lionel Messi", "Paris", "Rome"),
        ("The {} is in", "Eiffel Tower", "Berlin", "London"),
        ("The city of {} is located in", "Paris", "London", "Berlin"),
    )
]
LAYER, LR = 1, 0.3

pytestmark = NEEDS_BRIDGE


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def model(request, tokenizer_with_bos):
    model = request.getfixturevalue("boot")(request.param, tokenizer=tokenizer_with_bos)
    model(torch.tensor([[1, 2]]))
    return model


@pytest.fixture
def weight(model):
    (site,) = tlb.weight_sites(model, "W_out", LAYER)
    before = site.parameter.detach().clone()
    yield site
    site.parameter.data.copy_(before)


def token(model, text):
    return int(model.to_tokens(f" {text}", prepend_bos=False)[0, 0])


def ids(model, one):
    rewrite = one["requested_rewrite"]
    return token(model, rewrite["target_new"]["str"]), token(model, rewrite["target_true"]["str"])


def term(model, site, one):
    """``lr x_n^T D^T[t]`` of the model as it is; None where the target is predicted."""
    seen = []
    with model.hooks(fwd_hooks=[(site.hook_in, lambda x, hook: seen.append(x.detach()))]):
        logits = model(fact_of(one).prompt)[0, -1]
    target, _ = ids(model, one)
    if logits.argmax() == target:
        return None
    return LR * torch.outer(seen[0][0, -1], model.W_U[:, target].detach())


def add(site, update):
    if update is not None:
        site.parameter.data += update if site.parameter.shape == update.shape else update.T


def measured(model, one):
    target, original = ids(model, one)
    result = {}
    for kind, prompts, wanted, other in (
        ("", [fact_of(one).prompt], target, original),
        ("paraphrase_", one["paraphrase_prompts"], target, original),
        ("neighborhood_", one["neighborhood_prompts"], original, target),
    ):
        last = [model(prompt)[0, -1].detach() for prompt in prompts]
        result[f"{kind}accuracy"] = sum(int(x.argmax()) == wanted for x in last) / len(last)
        result[f"{kind}success"] = sum(bool(x[wanted] > x[other]) for x in last) / len(last)
    return result


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("schedule", ["together", "in turn"])
def test_several_facts_are_edited_as_by_hand(model, weight, schedule, n):
    frame = analysis.many_edits(
        model,
        RECORDS,
        layer=LAYER,
        lr=LR,
        sizes=[3],
        schedules=[schedule],
        iterations=[n],
        batch_size=2,
        progress=False,
    )
    if schedule == "together":
        for _ in range(n):
            for update in [term(model, weight, one) for one in RECORDS]:
                add(weight, update)
    else:
        for one in RECORDS:
            for _ in range(n):
                add(weight, term(model, weight, one))
    assert frame["record"].tolist() == [0, 1, 2]
    for one, row in zip(RECORDS, frame.to_dict("records"), strict=True):
        for name, value in measured(model, one).items():
            assert row[name] == pytest.approx(value), name


def test_the_perplexity_is_that_of_the_edited_weights(model, weight):
    texts = ["The city of Rome is not in London", "Messi plays in Paris"]
    frame = analysis.many_edits(
        model,
        RECORDS,
        layer=LAYER,
        lr=LR,
        sizes=[0, 2],
        schedules=["together"],
        iterations=[1],
        texts=texts,
        progress=False,
    )

    def perplexity():
        losses = [model(text, return_type="loss") for text in texts]
        return float(torch.stack(losses).exp().mean().detach())

    assert frame.query("size == 0")["perplexity"].tolist() == pytest.approx([perplexity()] * 3)
    for update in [term(model, weight, one) for one in RECORDS[:2]]:
        add(weight, update)
    assert frame.query("size == 2")["perplexity"].tolist()[:2] == pytest.approx([perplexity()] * 2)


def test_the_usual_step_is_the_median_of_those_that_single_facts_need(model):
    layer = round(0.8 * model.cfg.n_layers)
    needed = [
        tlb.forward_pass_shift(
            model, fact_of(one).prompt, ids(model, one)[0], layer=layer, lr="auto"
        ).report.lr
        for one in RECORDS
    ]
    frame = analysis.many_edits(model, RECORDS, sizes=[1], iterations=[1], progress=False)
    assert frame["lr"].unique().tolist() == [sorted(needed)[1]]


def test_groups_are_edited_apart_and_the_model_is_left_as_it_is(
    model, weight, tmp_path, monkeypatch
):

    before = state(model)
    arguments = {"layer": LAYER, "lr": LR, "progress": False, "path": tmp_path}
    frame = analysis.many_edits(model, RECORDS, sizes=[0, 1, 2], iterations=[1, 2], **arguments)
    assert state(model) == before
    assert len(frame) == 3 * (1 + 2 + 4)
    with monkeypatch.context() as patch:
        module = sys.modules[analysis.many_edits.__module__]
        patch.setattr(module, "forward_pass_shift", None)  # is not called
        again = analysis.many_edits(model, RECORDS, sizes=[0, 1, 2], iterations=[1, 2], **arguments)
    assert again.equals(frame)
    assert frame.query("size == 2")["accuracy"].mean() > frame.query("size == 0")["accuracy"].mean()
    assert frame.query("size == 2")["group"].tolist() == [0, 0, 1] * 4
    for i, one in enumerate(RECORDS):
        (row,) = frame.query(f"size == 0 and record == {i}").to_dict("records")
        assert {k: row[k] for k in measured(model, one)} == pytest.approx(measured(model, one))
    (alone,) = frame.query("size == 1 and record == 2 and iterations == 1").to_dict("records")
    add(weight, term(model, weight, RECORDS[2]))
    want = measured(model, RECORDS[2])
    assert {k: alone[k] for k in want} == pytest.approx(want)
    last_group = frame.query("size == 2 and record == 2 and iterations == 1")
    for row in last_group.to_dict("records"):
        assert {k: row[k] for k in want} == pytest.approx(want)
    with pytest.raises(ValueError, match=r"holds results of other model .*weights\."):
        analysis.many_edits(model, RECORDS, sizes=[0, 1, 2], iterations=[1, 2], **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"schedules": ["at random"]},
            r"schedules must be from together, in turn, got \['at random'\]",
        ),
        ({"sizes": [-1]}, r"sizes must hold numbers of at least 0, got \[-1\]"),
        ({"iterations": [0]}, r"iterations must hold numbers of at least 1, got \[0\]"),
        ({"layer": 7}, r"layers=7: this model has layers 0 to 2"),
    ],
)
def test_bad_arguments_are_named(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        analysis.many_edits(model, RECORDS, **{"layer": LAYER, "lr": LR} | arguments)
    with pytest.raises(ValueError, match="records is empty"):
        analysis.many_edits(model, [], layer=LAYER, lr=LR)


def test_the_figure_shows_the_mean_accuracy(model):
    frame = analysis.many_edits(
        model,
        RECORDS,
        layer=LAYER,
        lr=LR,
        sizes=[1, 3],
        schedules=["together"],
        iterations=[1],
        progress=False,
    )
    line = next(x for x in analysis.plot_many_edits(frame).data if x.name == "accuracy")
    assert list(line.x) == [1, 3]
    assert line.y[1] == pytest.approx(100 * frame.query("size == 3")["accuracy"].mean())
