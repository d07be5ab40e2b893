"""Forward pass shifts of many facts at once, each of which keeps what it needs."""

from __future__ import annotations

import pytest
import torch
from helpers.edits import W_out, embedding, gap, same_bits, seen_at, weights
from helpers.gradients import relative_error
from helpers.state import state
from helpers.versions import MODELS, NEEDS_BRIDGE
from hypothesis import given
from hypothesis import strategies as st

import tl_backward as tlb
from tl_backward.editing import StepNotFoundError, forward_pass_shift
from tl_backward.editing._joint_steps import smallest_steps

PROMPTS = [[3, 17, 3, 29, 8], [1, 2, 3, 4], [9, 8, 7, 6, 5, 4], [11, 12]]
TARGETS = [5, 21, 7, 13]


@pytest.fixture(params=MODELS)
def model(models, request):
    return models(request.param)


def ends(model, layer=1):
    """The inputs of W_out at the last tokens."""
    point = W_out(model, layer).hook_in
    return torch.stack([seen_at(model, point, prompt)[-1] for prompt in PROMPTS])


def changes(model, edit, prompts=PROMPTS):
    """What the edit adds to W_out's output for the inputs of the unedited model."""
    (g,) = edit.factors.values()
    return ends(model) @ g.dense()


def statistics_of(model):
    generator = torch.Generator().manual_seed(0)
    texts = torch.randint(1, 30, (30, 8), generator=generator)
    return tlb.key_statistics(model, list(texts), 1, ridge=0.1)


@pytest.mark.parametrize("key", ["input", "whitened"])
@pytest.mark.parametrize("value", ["target", "centred"])
def test_each_prompts_output_changes_by_its_own_term_alone(model, key, value):
    before, bits = state(model), weights(model)
    statistics = statistics_of(model) if key == "whitened" else None
    options = {"layer": 1, "lr": 0.07, "key": key, "statistics": statistics, "value": value}
    options |= {"skip_if_predicted": False}
    x = ends(model)
    values = torch.stack([embedding(model, target) for target in TARGETS])
    if value == "centred":
        values = values - model.W_U.detach().mean(1)
    expected = 0.07 * x.square().sum(1, keepdim=True) * values
    together = forward_pass_shift(model, PROMPTS, TARGETS, joint=True, **options)
    torch.testing.assert_close(changes(model, together), expected, rtol=1e-8, atol=1e-8)
    summed = forward_pass_shift(model, PROMPTS, TARGETS, **options)
    assert relative_error(changes(model, summed), expected) > 0.1
    assert state(model) == before and same_bits(bits, weights(model))
    alone = forward_pass_shift(model, PROMPTS[0], TARGETS[0], **options)
    joint = forward_pass_shift(model, PROMPTS[0], TARGETS[0], joint=True, **options)
    for name, g in alone.factors.items():
        torch.testing.assert_close(joint.factors[name].dense(), g.dense(), rtol=1e-8, atol=1e-8)


def test_a_ridge_against_the_kernel_written_out(model):
    edit = forward_pass_shift(
        model, PROMPTS, TARGETS, layer=1, lr=1.0, joint=True, ridge=0.3, skip_if_predicted=False
    )
    K = ends(model).mT
    gram = K.mT @ K
    R = gram.diagonal()[:, None] * torch.stack([embedding(model, t) for t in TARGETS])
    damped = gram + 0.3 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    expected = K @ torch.linalg.inv(damped) @ R
    (g,) = edit.factors.values()
    torch.testing.assert_close(g.dense(), expected, rtol=1e-8, atol=1e-8)


def test_a_skipped_prompts_output_does_not_change(model):
    with torch.no_grad():
        predicted = int(model(torch.tensor([PROMPTS[1]]))[0, -1].argmax())
    targets = [TARGETS[0], predicted, *TARGETS[2:]]
    edit = forward_pass_shift(model, PROMPTS, targets, layer=1, lr=0.07, joint=True)
    assert edit.report.skipped[1]
    changed = changes(model, edit).norm(dim=1)
    assert changed[1] <= 1e-10 * changed[0]
    (g,) = edit.factors.values()
    assert len(g.vjps) == 4 - sum(edit.report.skipped)


@NEEDS_BRIDGE
@pytest.mark.parametrize("key", ["input", "whitened"])
def test_the_search_makes_every_target_the_most_probable(boot, key):
    model = boot("gpt2")
    statistics = statistics_of(model) if key == "whitened" else None
    edit = forward_pass_shift(
        model, PROMPTS, TARGETS, layer=1, lr="auto", joint=True, key=key, statistics=statistics
    )
    with edit.applied(), torch.no_grad():
        gaps = [
            gap(model(torch.tensor([prompt]))[0, -1], target)
            for prompt, target in zip(PROMPTS, TARGETS, strict=True)
        ]
    assert min(gaps) >= 0.1 - 1e-6
    assert edit.report.gap == pytest.approx(min(gaps))
    assert len(edit.report.lrs) == 4 and edit.report.lr == max(edit.report.lrs)
    assert len(set(edit.report.lrs)) > 1


@NEEDS_BRIDGE
def test_several_tokens_of_several_targets(boot):
    """Each token is a term of its own, with the text before it in place."""
    model = boot("gpt2")
    targets = [[5, 9], [21], [7, 3, 1], [13]]
    edit = forward_pass_shift(model, PROMPTS, targets, layer=1, lr="auto", joint=True, tokens="all")
    assert len(edit.report.lrs) == 7
    with edit.applied(), torch.no_grad():
        for prompt, target in zip(PROMPTS, targets, strict=True):
            logits = model(torch.tensor([prompt + target]))[0, len(prompt) - 1 : -1]
            assert logits.argmax(-1).tolist() == target


@NEEDS_BRIDGE
def test_a_search_that_fails_has_the_best_it_found(boot):
    model = boot("gpt2")
    with pytest.raises(StepNotFoundError) as error:
        forward_pass_shift(model, PROMPTS, TARGETS, layer=0, lr="auto", joint=True, margin=1e4)
    assert error.value.best.report.gap < 1e4
    assert len(error.value.best.report.lrs) == 4


@NEEDS_BRIDGE
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": "auto"}, 'layer="auto" does not work with joint=True'),
        ({"ridge": -1.0}, "ridge must be"),
        ({"ridge": 1.0, "joint": False}, "ridge is only for joint=True"),
        ({"value": "mean"}, "value must be"),
        ({"prompt": [PROMPTS[0], PROMPTS[0]], "target": [5, 6]}, "do not tell its facts apart"),
    ],
)
def test_bad_input(boot, unchecked, options, message):
    settings = {"prompt": PROMPTS, "target": TARGETS, "layer": 1, "lr": 0.1, "joint": True}
    settings |= {"skip_if_predicted": False} | options
    prompt, target = settings.pop("prompt"), settings.pop("target")
    with pytest.raises(ValueError, match=message):
        forward_pass_shift(boot("gpt2"), prompt, target, **settings)


# the search itself, where it is known what has to come out


@given(
    needed=st.lists(st.floats(0.01, 250), min_size=1, max_size=6),
    guess=st.floats(0.5, 2),
    margin=st.floats(0, 1),
)
def test_the_smallest_steps_of_terms_that_do_not_mix(needed, guess, margin):
    """A term's gap is how much larger than what it needs its step is."""
    wanted = torch.tensor(needed, dtype=torch.float64)
    found = smallest_steps(lambda s: s / wanted - 1 + margin, len(needed), guess, margin)
    assert (found.sizes >= wanted).all()
    assert (found.sizes <= torch.maximum(1.05 * wanted, torch.tensor(0.02 * guess))).all()
    torch.testing.assert_close(found.gaps, found.sizes / wanted - 1 + margin)


def test_steps_are_raised_where_the_others_get_in_the_way():
    """Each term takes a tenth of its neighbour's step away."""
    wanted = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)

    def gaps(sizes):
        return (sizes - 0.1 * sizes.roll(1, -1)) - wanted

    found = smallest_steps(gaps, 3, 1.0, 0.0)
    mixing = torch.eye(3, dtype=torch.float64) - 0.1 * torch.eye(3, dtype=torch.float64).roll(1, 0)
    least = torch.linalg.solve(mixing, wanted)
    assert (gaps(found.sizes) >= 0).all()
    assert (found.sizes >= least * (1 - 1e-9)).all()
    assert (found.sizes <= 1.25 * least).all()


def test_of_terms_that_cannot_succeed_the_nearest_is_kept():
    """The second term's gap is largest at a step of 4, and below the margin there."""

    def gaps(sizes):
        return torch.stack([sizes[:, 0] - 1, -(sizes[:, 1] - 4).square() - 1], dim=1)

    found = smallest_steps(gaps, 2, 1.0, 0.0)
    assert found.gaps[0] >= 0
    assert float(found.sizes[1]) == pytest.approx(4, rel=0.3)
